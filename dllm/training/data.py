"""What a training step reads: problems of the built-in tasks or one's own JSONL, cut into batches of equal length.

A batch is a pure function of (settings, seed, step): resuming needs no stored position, and a batch can be looked at
again. Every row is prompt + answer window; the window is filled up with EOS, so rows of a batch have one length and
no padding (LLaDA, arXiv 2502.09992 §2.3). A window is a little longer than its answer, sometimes much longer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dllm import spec as plain
from dllm.errors import DllmError
from dllm.tasks.base import Example
from dllm.tasks.registry import task
from dllm.training.config import DataSpec

CHUNK = 16  # batches drawn together, then sorted by length
STRIDE = 8  # row lengths are multiples of this: few shapes, little waste


class Batch(NamedTuple):
    """Rows of one length."""

    ids: Tensor  # (B, T) prompt, answer, EOS up to T
    prompt: Tensor  # (B,) tokens of the prompt
    answer: Tensor  # (B,) tokens of the answer with its first EOS


class Pair(NamedTuple):
    """One encoded example, without an end token; or an answer of a teacher, with one unless it was cut."""

    prompt: list[int]
    answer: list[int]


class Source(Protocol):
    """Endless examples, addressed by position so that a run can resume anywhere."""

    def take(self, start: int, n: int, seed: int) -> list[Example]:
        """`n` examples from position `start` of the stream of `seed`."""
        ...


@dataclass(frozen=True)
class TaskMix:
    """Training problems of the built-in tasks, fresh ones at every step, drawn by weight."""

    weights: Mapping[str, float]

    def take(self, start: int, n: int, seed: int) -> list[Example]:
        """As `Source`."""
        rng = random.Random(f"mix/{seed}/{start}")
        names = rng.choices(list(self.weights), list(self.weights.values()), k=n)
        streams = {name: task(name).stream("train", rng.getrandbits(48)) for name in self.weights}
        return [next(streams[name]) for name in names]


class JsonLines:
    """One's own data: a file of {"prompt": ..., "answer": ...} lines, in a new order every epoch."""

    def __init__(self, path: str | Path) -> None:
        self.examples = read_jsonl(path)

    def take(self, start: int, n: int, seed: int) -> list[Example]:
        """As `Source`."""
        return list(islice(self._from(start, seed), n))

    def _from(self, start: int, seed: int) -> Iterator[Example]:
        size = len(self.examples)
        epoch, offset = divmod(start, size)
        while True:
            order = random.Random(f"epoch/{seed}/{epoch}").sample(range(size), size)
            yield from (self.examples[i] for i in order[offset:])
            epoch, offset = epoch + 1, 0


def read_jsonl(path: str | Path) -> list[Example]:
    """The examples of a JSONL file; a DllmError names and counts lines that are not {"prompt": str, "answer": str}."""
    path = Path(path)
    if not path.is_file():
        raise DllmError(f"no data file {path}")
    good, broken = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            example = _parse(line)
            if example is None:
                broken.append(number)
            else:
                good.append(example)
    if broken:
        shown = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
        raise DllmError(f'{path}: {len(broken)} broken lines (expected {{"prompt": text, "answer": text}}): {shown}')
    if not good:
        raise DllmError(f"{path}: no examples")
    return good


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty. Errors: no file, not UTF-8, no line."""
    path = Path(path)
    try:
        lines = [line for line in plain.lines(path.read_text(encoding="utf-8-sig")) if line.strip()]
    except FileNotFoundError:
        raise DllmError(f"no file of prompts: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DllmError(f"cannot read {path}: {error}") from None
    if not lines:
        raise DllmError(f"{path}: no prompts")
    return lines


def _parse(line: bytes) -> Example | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    prompt, answer = row.get("prompt"), row.get("answer")
    return Example(prompt, answer) if isinstance(prompt, str) and isinstance(answer, str) else None


@dataclass(frozen=True)
class Batches:
    """Step number -> Batch; `data` says how long rows are."""

    source: Source
    encode: Callable[[Example], Pair]
    eos: int
    batch_size: int
    data: DataSpec
    seed: int

    def chunk(self, index: int) -> list[Batch]:
        """Batches `index * CHUNK` to the next chunk: sorted by length, cut, shuffled."""
        n = CHUNK * self.batch_size
        rng = random.Random(f"chunk/{self.seed}/{index}")
        pairs = [self.encode(e) for e in self.source.take(index * n, n, self.seed)]
        rows = sorted(((self._length(p, rng), i) for i, p in enumerate(pairs)))
        cuts = [rows[i : i + self.batch_size] for i in range(0, n, self.batch_size)]
        rng.shuffle(cuts)
        return [self._batch([pairs[i] for _, i in cut], max(t for t, _ in cut)) for cut in cuts]

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches of `step`, `step + 1`, ..."""
        index, offset = divmod(step, CHUNK)
        while True:
            yield from self.chunk(index)[offset:]
            index, offset = index + 1, 0

    def _length(self, pair: Pair, rng: random.Random) -> int:
        """The row length T of one example: what `max_new_tokens` up to `max_window` asks for has been seen."""
        data, need = self.data, len(pair.prompt) + len(pair.answer) + 1
        if need > data.max_length:
            raise DllmError(
                f"an example of {need} tokens exceeds max_length {data.max_length}; raise it or shorten the data"
            )
        draw = rng.random()
        cap = data.max_window if draw < data.rare else data.window if draw < data.rare + data.long else 0
        length = rng.randint(need, max(need, len(pair.prompt) + cap)) if cap else need
        return min(-(-length // STRIDE) * STRIDE, data.max_length)

    def _batch(self, pairs: Sequence[Pair], length: int) -> Batch:
        ids = [p.prompt + p.answer + [self.eos] * (length - len(p.prompt) - len(p.answer)) for p in pairs]
        return Batch(
            torch.tensor(ids),
            torch.tensor([len(p.prompt) for p in pairs]),
            torch.tensor([len(p.answer) + 1 for p in pairs]),
        )
