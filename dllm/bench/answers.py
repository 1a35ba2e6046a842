"""Answers of the embedded model to its tasks, decoded once and kept: what the benches of samplers and filters read.

They are appended to a JSON-lines file as they come, behind a line that says what they are answers of. A run that is
started again decodes what is still missing. Problems of equal length are decoded together, so that little is padding,
by as many processes as asked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import dllm
from dllm import spec as plain
from dllm.errors import DllmError, first_line
from dllm.models.arguments import Checkpoint
from dllm.samplers.registry import published
from dllm.tasks import registry as tasks

LENGTH = {"word_problems": 48, "sudoku": 24, "functions": 32}  # new tokens: the longest answers fit
CHUNK = 64  # answers decoded together


@dataclass(frozen=True)
class Answer:
    """One decoded problem."""

    task: str
    split: str
    sampler: str
    index: int
    correct: bool
    nfe: int
    tokens: int
    seconds: float  # its share of the batch it was decoded in


class Cell(NamedTuple):
    """The first n problems of a split, answered with one setting of a sampler."""

    task: str
    split: str
    sampler: str
    n: int


class Answers:
    """The answers of one model, and the file that holds them.

    model: loaded, a name, or a `Checkpoint` (a name with arguments of `dllm.load`).
    about: what else the answers depend on, noted in the file. workers: processes; above 1 the model is given by name.
    Errors: a file with answers of another model or setting.
    """

    def __init__(
        self,
        path: str | Path,
        model: Any = "tiny",
        *,
        about: dict[str, Any] | None = None,
        batch_size: int = CHUNK,
        cache: str | None = None,
        workers: int = 1,
    ) -> None:
        model = Checkpoint(model) if isinstance(model, str) else model
        if workers > 1 and not isinstance(model, Checkpoint):
            raise DllmError(f"workers={workers} load the model themselves: give its name or folder")
        self.path, self.batch_size, self.workers = Path(path), batch_size, workers
        self.name, self.model = model, _load(model) if isinstance(model, Checkpoint) else model
        self.arguments = {"batch_size": batch_size, "cache": cache}
        header = {"model": self.model.fingerprint(), "cache": cache or "default", "length": LENGTH, **(about or {})}
        self.done: dict[tuple[str, str, str], dict[int, Answer]] = {}
        self._read(header)

    def _read(self, header: dict[str, Any]) -> None:
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            return
        try:
            text = self.path.read_text(encoding="utf-8")
            first, *rest = plain.lines(text)
            found = json.loads(first)
        except (OSError, ValueError, RecursionError) as error:
            raise DllmError(f"{self.path} is no file of answers ({first_line(error)}): choose another") from None
        if not text.endswith("\n"):  # stopped in the middle of a line
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")
        if found != header:
            raise DllmError(f"{self.path} holds answers of another model or setting: choose another file for this run")
        for line in rest:
            try:
                self._keep(Answer(**json.loads(line)))
            except (ValueError, TypeError):  # a line that was cut off
                continue

    def _keep(self, answer: Answer) -> None:
        self.done.setdefault((answer.task, answer.split, answer.sampler), {})[answer.index] = answer

    def want(self, cells: Iterable[Cell]) -> None:
        """Decode what these cells still miss."""
        jobs = [job for cell in dict.fromkeys(cells) for job in self._missing(cell)]
        if not jobs:
            return
        with (
            tqdm(total=sum(len(indices) for _, indices in jobs), unit="answer", leave=False) as bar,
            self._decoded(jobs) as batches,
        ):
            for answers in batches:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(asdict(a)) + "\n" for a in answers)
                for answer in answers:
                    self._keep(answer)
                bar.set_description(f"{answers[0].task} {answers[0].split} {answers[0].sampler}")
                bar.update(len(answers))

    def _missing(self, cell: Cell) -> Iterator[Job]:
        """Batches of problems without an answer, short prompts first."""
        have = self.done.get(cell[:3], {})
        missing = [i for i in range(cell.n) if i not in have]
        if not missing:
            return
        prompts = problems(cell.task, cell.split, cell.n)
        missing.sort(key=lambda i: len(prompts[i].prompt))
        for first in range(0, len(missing), self.batch_size):
            yield cell, missing[first : first + self.batch_size]

    @contextmanager
    def _decoded(self, jobs: list[Job]) -> Iterator[Iterable[list[Answer]]]:
        """The answers of each job, as they come."""
        if self.workers == 1:
            yield map(partial(decode, self.model, self.arguments), jobs)
            return
        with get_context("spawn").Pool(self.workers, torch.set_num_threads, (1,)) as pool:
            yield pool.imap_unordered(partial(_decode_by_name, self.name, self.arguments), jobs)

    def column(self, cell: Cell, key: str) -> np.ndarray:
        """One figure of the answers of a cell, (n,) floats."""
        answers = self.done[cell[:3]]
        return np.array([float(getattr(answers[i], key)) for i in range(cell.n)])


Job = tuple[Cell, list[int]]  # the problems of a cell that are decoded together


@cache
def problems(task: str, split: str, n: int) -> list[tasks.Example]:
    """The first n problems of a split."""
    return tasks.generate(task, split, n)


_load = cache(dllm.load)


def _decode_by_name(name: Checkpoint, arguments: dict[str, Any], job: Job) -> list[Answer]:
    return decode(_load(name), arguments, job)


def decode(model: Any, arguments: dict[str, Any], job: Job) -> list[Answer]:
    """Decode and grade the problems of one job."""
    (task, split, sampler, n), indices = job
    examples = [problems(task, split, n)[i] for i in indices]
    chats = [[{"role": "user", "content": e.prompt}] for e in examples]
    began = time.perf_counter()
    outputs = dllm.generate(model, chats, sampler=published(sampler), max_new_tokens=LENGTH[task], **arguments)
    each = (time.perf_counter() - began) / len(indices)
    return [
        Answer(task, split, sampler, i, tasks.grade(task, e, o.text), o.nfe, len(o.tokens), each)
        for i, e, o in zip(indices, examples, outputs, strict=True)
    ]
