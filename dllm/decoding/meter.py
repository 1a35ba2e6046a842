"""Meter: what a call cost. Samplers never count; the engine reports every forward here.

`nfe` is a row's own number of forwards, `calls` the batched forwards of the whole call, `positions` the recomputed
positions of a row (all its copies, so guidance counts twice): nfe_equiv = positions / canvas length.
"""

from __future__ import annotations

import time
from collections.abc import Iterable


class Meter:
    """Counters of one call over `requests` rows."""

    def __init__(self, requests: int) -> None:
        self.nfe = [0] * requests
        self.calls = 0
        self.capped: set[int] = set()
        self.halted: set[int] = set()  # ended from outside
        self.seconds = [0.0] * requests  # from the start of the call to the row's last forward
        self.first: list[float] = [0.0] * requests  # to the row's first forward: prefill
        self.positions = [0] * requests  # recomputed by the forwards of each row
        self._began = time.perf_counter()

    def forward(self, requests: Iterable[int]) -> None:
        """Count one batched forward that served these rows."""
        self.calls += 1
        for r in requests:
            self.nfe[r] += 1

    def computed(self, requests: Iterable[int], positions: Iterable[int]) -> None:
        """Count the positions that a forward computed for each row."""
        for r, n in zip(requests, positions, strict=True):
            self.positions[r] += n

    def halt(self, request: int) -> None:
        """End a row from outside: it steps no more, and its time stands."""
        self.halted.add(request)
        self.finish([request])

    def tick(self, requests: list[int]) -> None:
        """Note the time at which a row had its first answer."""
        for r in requests:
            if not self.first[r]:
                self.first[r] = time.perf_counter() - self._began

    def finish(self, requests: Iterable[int]) -> None:
        """Note the time at which these rows ended."""
        for r in requests:
            self.seconds[r] = time.perf_counter() - self._began
