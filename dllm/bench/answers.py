"""Answers of the embedded model to its tasks, decoded once and kept: what the benches of samplers and filters read.

They are appended to a JSON-lines file as they come, behind a line that says what they are answers of. A run that is
started again decodes what is still missing. Problems of equal length are decoded together, so that little is padding,
by as many processes as asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from tqdm import tqdm

import dllm
from dllm.bench.planted import Planted
from dllm.errors import DllmError, first_line
from dllm.eval.metrics import interval, ratio, verdicts
from dllm.eval.records import Sample
from dllm.models.arguments import Checkpoint
from dllm.models.lines import append, mend, read_lines
from dllm.models.native import NativeModel
from dllm.samplers.registry import check, published
from dllm.tasks import registry as tasks

CHUNK = 64  # answers decoded together
LOSS = 0.01  # accuracy that a setting may lose on the validation split


class Frame(NamedTuple):
    """What a sampler decodes in; None: the window of the task, what the call has by default."""

    cache: str | None = None
    new: int | None = None  # columns of the window
    block: int | None = None  # columns of a block
    steps: int | None = None  # of a quota; None: one a column


Key = tuple[str, str, str, Frame, int]  # of an answer: task, split, sampler, frame, index of the problem


@dataclass(frozen=True)
class Solved:
    """One decoded problem."""

    task: str
    split: str
    sampler: str
    frame: Frame
    index: int
    correct: bool
    nfe: int
    positions: int
    tokens: int
    seconds: float  # its share of the batch it was decoded in
    arness: float | None = None  # of its commits, where they were traced

    @property
    def key(self) -> Key:
        """Which problem this is, of which series."""
        return self.task, self.split, self.sampler, self.frame, self.index


class Series(NamedTuple):
    """The first n problems of a split, answered with one setting of a sampler."""

    task: str
    split: str
    sampler: str
    n: int
    frame: Frame = Frame()

    @property
    def settled(self) -> Frame:
        """The frame with its window."""
        return self.frame._replace(new=self.frame.new or tasks.task(self.task).window)

    def key(self, index: int) -> Key:
        """Of the answer to one of its problems."""
        return self.task, self.split, self.sampler, self.settled, index


@dataclass(frozen=True)
class Score:
    """The figures of a series."""

    task: str
    setting: str
    accuracy: float
    interval: tuple[float, float]  # 95 %, bootstrap
    nfe: float
    positions: float  # an answer
    tokens_per_forward: float
    seconds: float  # an answer

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


Part = tuple[Series, list[int]]  # the problems of a series that are decoded together


class Answers:
    """The answers of one model, and the file that holds them.

    model: loaded, a name, or a `Checkpoint` (a name with arguments of `dllm.load`).
    about: what else the answers depend on, noted in the file. trace: how near to left-to-right each was decoded, too.
    workers: processes; above 1 the model is given by name.
    Errors: a file with answers of another model or setting.
    """

    def __init__(
        self,
        path: str | Path,
        model: NativeModel | Planted | str | Checkpoint = "tiny",
        *,
        about: Mapping[str, object] | None = None,
        batch_size: int = CHUNK,
        workers: int = 1,
        trace: bool = False,
    ) -> None:
        model = Checkpoint(model) if isinstance(model, str) else model
        if workers > 1 and not isinstance(model, Checkpoint):
            raise DllmError(f"workers={workers} load the model themselves: give its name or folder")
        self.path, self.batch_size, self.workers, self.trace = Path(path), batch_size, workers, trace
        self.source, self.model = model, _load(model) if isinstance(model, Checkpoint) else model
        header = {"model": self.model.fingerprint(), **(about or {})}
        self.done = {answer.key: answer for answer in self._read(header)}

    def _read(self, header: dict[str, object]) -> list[Solved]:
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append(self.path, [header])
        try:
            found, *rest = read_lines(self.path)
            answers = [Solved(**{**row, "frame": Frame(*row["frame"])}) for row in rest]
        except (ValueError, TypeError, KeyError, DllmError) as error:
            raise DllmError(f"{self.path} is no file of answers ({first_line(error)}): choose another") from None
        if found != header:
            raise DllmError(f"{self.path} holds answers of another model or setting: choose another file for this run")
        mend(self.path)
        return answers

    def want(self, series: Iterable[Series]) -> None:
        """Decode what these series still miss. Errors: a sampler that there is not, before anything is decoded."""
        wanted = dict.fromkeys(series)
        for sampler in dict.fromkeys(one.sampler for one in wanted):
            check(sampler)
        parts = [part for one in wanted for part in self._missing(one)]
        if not parts:
            return
        with (
            tqdm(total=sum(len(indices) for _, indices in parts), unit="answer", leave=False) as bar,
            self._decoded(parts) as batches,
        ):
            for answers in batches:
                append(self.path, map(asdict, answers))
                self.done |= {answer.key: answer for answer in answers}
                one = answers[0]
                bar.set_description(" ".join(map(str, filter(None, [one.task, one.split, one.sampler, *one.frame]))))
                bar.update(len(answers))

    def _missing(self, series: Series) -> Iterator[Part]:
        """Batches of problems without an answer, short prompts first."""
        missing = [i for i in range(series.n) if series.key(i) not in self.done]
        if not missing:
            return
        prompts = problems(series.task, series.split, series.n)
        missing.sort(key=lambda i: len(prompts[i].prompt))
        for first in range(0, len(missing), self.batch_size):
            yield series, missing[first : first + self.batch_size]

    @contextmanager
    def _decoded(self, parts: list[Part]) -> Iterator[Iterable[list[Solved]]]:
        """The answers of each part, as they come."""
        if self.workers == 1:
            yield map(self.solve, parts)
            return
        with get_context("spawn").Pool(self.workers, torch.set_num_threads, (1,)) as pool:
            yield pool.imap_unordered(partial(solve, self.source, self.batch_size, self.trace), parts)

    def solve(self, part: Part) -> list[Solved]:
        """Decode and grade the problems of one part."""
        return solve(self.model, self.batch_size, self.trace, part)

    def of(self, series: Series) -> list[Solved]:
        """The answers of a series."""
        return [self.done[series.key(i)] for i in range(series.n)]

    def samples(self, series: Series) -> list[Sample]:
        """The answers of a series as evaluation counts them."""
        return [
            {"correct": float(a.correct), "nfe": a.nfe, "tokens": a.tokens, "clock": {"seconds": a.seconds}}
            for a in self.of(series)
        ]

    def score(self, series: Series) -> Score:
        """The figures of a series."""
        rows, answers = self.samples(series), self.of(series)
        right = verdicts(rows)
        nfe, positions = fmean(a.nfe for a in answers), fmean(a.positions for a in answers)
        work = (nfe, positions, ratio(rows, "tokens", "nfe"), fmean(a.seconds for a in answers))
        return Score(series.task, series.sampler, fmean(right), interval(right), *work)

    def fastest(self, candidates: Sequence[Series], bar: float) -> Series:
        """The fewest forwards among those at most `LOSS` below the bar; where none is, the most accurate."""
        scores = [(self.score(series), series) for series in candidates]
        good = [pair for pair in scores if pair[0].accuracy >= bar - LOSS - 1e-9]
        return (min(good, key=lambda s: s[0].nfe) if good else max(scores, key=lambda s: s[0].accuracy))[1]


_load = cache(dllm.load)
problems = cache(tasks.generate)  # (task, split, n): the first n problems of a split


def solve(model: NativeModel | Planted | Checkpoint, batch_size: int, trace: bool, part: Part) -> list[Solved]:
    """Decode and grade the problems of one part; a process loads a checkpoint once."""
    model = _load(model) if isinstance(model, Checkpoint) else model
    series, indices = part
    (task, split, sampler, n, _), frame = series, series.settled
    examples = [problems(task, split, n)[i] for i in indices]
    chats = [[{"role": "user", "content": e.prompt}] for e in examples]
    began = time.perf_counter()
    outputs = dllm.generate(
        model, chats, sampler=published(sampler), max_new_tokens=frame.new, block_length=frame.block, cache=frame.cache,
        steps=frame.steps, batch_size=batch_size, trace=trace,
    )  # fmt: skip
    each = (time.perf_counter() - began) / len(indices)
    found = []
    for i, e, o in zip(indices, examples, outputs, strict=True):
        right, order = tasks.grade(task, e, o.text), None if o.trace is None else o.trace.arness(tokens=len(o.tokens))
        found.append(Solved(task, split, sampler, frame, i, right, o.nfe, o.positions, len(o.tokens), each, order))
    return found
