"""The sweeps, whole or as a rotating sample.

    pytest -m sweep -n auto                              all of them: hours
    pytest -m sweep --sweep-minutes 2                    a sample that changes with the date, its seed in the header
    pytest -m sweep --sweep-minutes 2 --sweep-seed 7     the same sample again, as far as the minutes reach

In a sample each test function gets an equal share of the minutes for its cases, but one case at least, in an order that
the seed shuffles; tests that are one long run shorten it (`size`). The minutes are those of one process.

Products of parameters are cut in two: the suite has some of the cases, the sweep the others.

    @pytest.mark.parametrize(("sampler", "cache"), dealt(SAMPLERS, CACHES))    each value of each axis
    @pytest.mark.parametrize(("a", "b", "c"), dealt(A, B, C, ways=2))          each two values of two axes together
    @pytest.mark.parametrize("case", some(CASES, lambda case: ...))            those that the rule names
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any

import pytest

sample: Sample | None = None  # of this session


def size(whole: int, sampled: int) -> int:
    """How many draws or examples a sweep takes."""
    return whole if sample is None else sampled


def some(cases: Iterable[Any], kept: Callable[[Any], bool]) -> list[Any]:
    """The cases, those that are not kept marked as a sweep. A case is a tuple of values where there are many."""

    def values(case: Any) -> tuple[Any, ...]:
        return case if isinstance(case, tuple) else (case,)

    return [pytest.param(*values(c), marks=() if kept(c) else pytest.mark.sweep) for c in cases]


def dealt(*axes: Iterable[Any], ways: int = 1) -> list[Any]:
    """The product of the axes. The suite has few of it that hold every choice of values from `ways` axes; all others
    are a sweep."""
    lists = [list(axis) for axis in axes]
    whole = list(product(*(range(len(axis)) for axis in lists)))
    choices = {case: set(combinations(enumerate(case), ways)) for case in whole}
    left, kept, used = set().union(*choices.values()), set[tuple[int, ...]](), Counter[tuple[int, int]]()
    while left:  # the one that takes the most, and of these the one whose values had the fewest turns
        best = max(whole, key=lambda case: (len(choices[case] & left), -sum(used[at] for at in enumerate(case))))
        kept.add(best)
        left -= choices[best]
        used.update(enumerate(best))
    picked = [tuple(axis[i] for axis, i in zip(lists, case, strict=True)) for case in whole]
    return [
        pytest.param(*values, marks=() if case in kept else pytest.mark.sweep)
        for case, values in zip(whole, picked, strict=True)
    ]


class Sample:
    """A pytest plugin: shuffles the cases of each test function and leaves out those that come after its share."""

    def __init__(self, minutes: float, seed: int | None) -> None:
        self.minutes = minutes
        self.seed = int(time.strftime("%Y%m%d")) if seed is None else seed
        self.began: dict[str, float] = {}
        self.share = 0.0  # seconds of a test function

    def pytest_report_header(self) -> str:
        return f"sweeps: a sample of {self.minutes:g} minutes, --sweep-seed {self.seed}"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        functions: dict[str, list[Any]] = {}
        for item in items:
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
        draws = random.Random(self.seed)
        items[:] = [item for cases in functions.values() for item in draws.sample(cases, len(cases))]
        self.share = 60 * self.minutes / max(len(functions), 1)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> bool | None:
        now = time.monotonic()
        if now - self.began.setdefault(item.nodeid.partition("[")[0], now) > self.share:
            item.session._setupstate.teardown_exact(nextitem)  # the fixtures of what was run before it
            return True  # handled: nothing is run, nothing reported
        return None

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"sweeps: --sweep-seed {self.seed}")
