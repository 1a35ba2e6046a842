"""How many rows a forward should have: what it costs against what guesses are worth, learned while decoding."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from dllm.decoding.cache.policy import Policy
from dllm.decoding.slots import Sampler
from dllm.lookahead.setting import Lookahead
from dllm.models.model import Model

Key = tuple[str, Policy, Lookahead, str]  # sampler with its parameters, cache, setting, form

ROWS = (1, 2, 4, 8)  # what "auto" chooses from


class Pace:
    """What a forward costs and how often guesses come true, learned over all calls of a model, sampler and cache.

    Cost is a straight line in the rows of a forward, a + b m, fitted with slow forgetting. With hit rate h_k at depth k
    a forward of R rows a sequence takes g(R) = 1 + h_1 + h_1 h_2 + ... steps, all but the first of them from the memo,
    at a cost of s each; R maximises g(R) / (cost(n R) + (g(R) - 1) s).
    """

    known: ClassVar[weakref.WeakKeyDictionary[Model, dict[Key, Pace]]] = weakref.WeakKeyDictionary()
    PRIOR = 0.6  # hit rate before anything was seen; decays into what is seen within some twenty guesses
    PROBE = 0.01  # share of the time that may be spent on finding out
    MARGIN = 1.05  # what rows must promise to gain: less is within the error of the estimates

    def __init__(self, costs: Mapping[int, float] | None = None) -> None:
        self.costs = costs
        self.hits: dict[int, tuple[float, float]] = {}  # depth -> decayed hits, guesses
        self.sums = [0.0] * 5  # of 1, m, m^2, t, m t, each forgotten slowly
        self.total = self.spent = 0.0
        self.step = 0.0  # s: seconds of a step that needs no forward

    @classmethod
    def of(cls, model: Model, sampler: Sampler, policy: Policy, setting: Lookahead, form: str) -> Pace:
        """The account of these, kept for the life of the process; a new one where costs are recorded."""
        if setting.costs is not None:
            return cls(setting.costs)
        return cls.known.setdefault(model, {}).setdefault((sampler.spec, policy, setting, form), cls())

    @property
    def seen(self) -> bool:
        """Whether forwards were measured, or their costs recorded."""
        return self.costs is not None or self.sums[0] > 0

    def learn(self, streak: int, guessed: int) -> None:
        """A round of `guessed` guesses, of which the first `streak` came true."""
        for depth in range(1, min(streak + 1, guessed) + 1):
            hits, seen = self.hits.get(depth, (self.PRIOR * 4, 4.0))
            self.hits[depth] = (0.95 * hits + (depth <= streak), 0.95 * seen + 1)

    def rate(self, depth: int) -> float:
        """Share of guesses at this depth that come true, once the shallower ones did."""
        hits, seen = self.hits.get(min(depth, len(self.hits)), (self.PRIOR, 1.0))  # depths are learned from 1 on
        return hits / seen

    def note(self, m: int, seconds: float, n: int) -> None:
        """A forward of m rows for n sequences took so long; a pause of the machine counts as three times the usual."""
        if self.sums[0] > 5:
            seconds = min(seconds, 3 * self.cost(m))
        self.total += seconds
        if m > n:
            self.spent += max(seconds - self.cost(n), 0.0)
        new = (1.0, m, m * m, seconds, m * seconds)
        self.sums = [0.98 * old + x for old, x in zip(self.sums, new, strict=True)]

    def note_hit(self, seconds: float) -> None:
        """A step without a forward took so long."""
        self.total += seconds
        self.step += (seconds - self.step) * (0.05 if self.step else 1.0)

    def cost(self, m: int) -> float:
        """Seconds of a forward with m rows (in units of the recorded table, where there is one)."""
        one, x, xx, t, xt = self.sums
        if one == 0:
            return float(m)
        spread = one * xx - x * x
        if spread < 1e-6 * one * xx:  # only one size was ever seen: assume that rows cost what they do there
            return t / x * m
        slope = max((one * xt - x * t) / spread, 0.0)
        return max((t - slope * x) / one + slope * m, 1e-9)

    def choose(self, n: int, most: int | None) -> int:
        """Rows a sequence for the next forward of n sequences, at most `most` in all."""
        best = self.best(n, most)
        if best > 1:
            return best
        affordable = self.costs is None and self.spent + self.cost(n) <= self.PROBE * self.total
        return 2 if affordable and (most is None or 2 * n <= most) else 1

    def best(self, n: int, most: int | None) -> int:
        """Rows a sequence with the most steps in a unit of time: one, unless others promise to gain something."""
        sizes = [r for r in ROWS if r == 1 or most is None or n * r <= most]
        speeds = self.speeds(n, sizes)
        best = max(sizes, key=lambda r: (round(speeds[r], 9), -r))
        return best if speeds[best] >= self.MARGIN * speeds[1] else 1

    def speeds(self, n: int, sizes: Sequence[int]) -> dict[int, float]:
        """Steps of each of n sequences in a unit of time, for these numbers of rows."""
        found, steps, alive = {}, 0.0, 1.0
        for rows in range(1, max(sizes) + 1):
            steps += alive
            alive *= self.rate(rows)
            if rows in sizes:
                found[rows] = steps / (self._price(n, rows) + (steps - 1) * self.step)
        return found

    def _price(self, n: int, r: int) -> float:
        if self.costs is None:
            return self.cost(n * r)
        table = sorted((int(k), float(v)) for k, v in self.costs.items())
        return float(np.interp(r, [k for k, _ in table], [v for _, v in table]))
