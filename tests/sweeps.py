"""The sweeps, whole or as a rotating sample.

    pytest -m sweep -n auto                              all of them: hours
    pytest -m sweep --sweep-minutes 2                    a sample that changes with the date, its seed in the header
    pytest -m sweep --sweep-minutes 2 --sweep-seed 7     the same sample again, as far as the minutes reach

In a sample each test function gets an equal share of the minutes for its cases, in an order that the seed shuffles, and
tests that are one long run shorten it (`size`).
"""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

sample: Sample | None = None  # of this session


def size(whole: int, sampled: int) -> int:
    """How many draws or examples a sweep takes."""
    return whole if sample is None else sampled


class Sample:
    """A pytest plugin: shuffles the cases of each test function and leaves out those that come after its share."""

    def __init__(self, minutes: float, seed: int | None) -> None:
        self.minutes = minutes
        self.seed = int(time.strftime("%Y%m%d")) if seed is None else seed
        self.began: dict[str, float] = {}
        self.share = 0.0  # seconds of a test function
        self.cases = self.run = 0

    def pytest_report_header(self) -> str:
        return f"sweeps: a sample of {self.minutes:g} minutes, --sweep-seed {self.seed}"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        functions: dict[str, list[Any]] = {}
        for item in items:
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
        draws = random.Random(self.seed)
        items[:] = [item for cases in functions.values() for item in draws.sample(cases, len(cases))]
        self.cases, self.share = len(items), 60 * self.minutes / max(len(functions), 1)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> bool | None:
        now = time.monotonic()
        if now - self.began.setdefault(item.nodeid.partition("[")[0], now) > self.share:
            item.session._setupstate.teardown_exact(nextitem)  # the fixtures of what was run before it
            return True  # handled: nothing is run, nothing reported
        self.run += 1
        return None

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"sweeps: {self.run} of {self.cases} cases, --sweep-seed {self.seed}")
