"""Answers that nobody decodes, for the benches that count them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from dllm.bench.answers import Answers, Part, Series, Solved

Rule = Callable[[Series, int], tuple[bool, int]]  # a problem of a series -> whether it is solved, in how many forwards
FAKE = SimpleNamespace(fingerprint=lambda: "fake")  # a model that nobody asks


class Played(Answers):
    """Answers by a rule, and who was asked for how many."""

    def __init__(self, path: Path, rule: Rule, tokens: int = 20) -> None:
        self.rule, self.tokens = rule, tokens
        self.asked: list[tuple[str, int]] = []
        super().__init__(path, FAKE, batch_size=3)  # type: ignore[arg-type]

    def solve(self, part: Part) -> list[Solved]:
        series, indices = part
        task, split, sampler, *_ = series
        self.asked.append((sampler, len(indices)))
        found = [(i, *self.rule(series, i)) for i in indices]
        frame = series.settled
        return [
            Solved(task, split, sampler, frame, i, right, nfe, 10 * nfe, self.tokens, 0.5) for i, right, nfe in found
        ]
