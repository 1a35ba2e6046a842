"""A task: a stream of problems with a grader.

Every problem carries a key, the part of it that makes it *that* problem (the operations and numbers, the solution
grid); the split of a problem is a hash of its key, so that no test problem is a renamed training problem.
A stream is a pure function of (task, split, seed).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dllm.errors import DllmError, unknown

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One problem: what the model reads, the reference answer, and what the grader needs."""

    prompt: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A named stream of problems and the rule that says whether an answer is right. `window`: tokens of the embedded
    tokenizer in which every answer fits with its end.
    """

    name: str
    draw: Callable[[random.Random], Example]
    grade: Callable[[Example, str], bool]
    split_of: Callable[[str], str]
    window: int

    def stream(self, split: str, seed: int = 0) -> Iterator[Example]:
        """Endless examples of `split` (train, validation, test); the same for the same seed."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        rng = random.Random(f"{self.name}/{split}/{seed}")
        while True:
            example = self.draw(rng)
            if self.split_of(example.meta["key"]) == split:
                yield example

    def generate(self, split: str, n: int, seed: int = 0) -> list[Example]:
        """The first `n` examples of the stream with distinct prompts."""
        if n < 0:
            raise DllmError(f"n must not be negative, got {n}")
        found: dict[str, Example] = {}  # by prompt, in order
        for example in self.stream(split, seed):
            if len(found) == n:
                break
            found.setdefault(example.prompt, example)
        return list(found.values())


def hash_split(key: str) -> str:
    """90 % train, 5 % validation, 5 % test, by a hash of the key."""
    bucket = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"
