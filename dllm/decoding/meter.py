"""Meter: what a call cost. Samplers never count; the engine reports every forward here.

`nfe` is a row's own number of forwards, `calls` the batched forwards of the whole call, `positions` the recomputed
positions of a row (all its copies, so guidance counts twice): nfe_equiv = positions / canvas length.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from dllm.decoding.canvas import Plan


class Meter:
    """Counters of one call over `requests` rows."""

    def __init__(self, requests: int, device: torch.device | str = "cpu") -> None:
        self.nfe = [0] * requests
        self.calls = 0
        self.capped: set[int] = set()
        self.seconds = [0.0] * requests  # from the start of the call to the row's last forward
        self.first: list[float] = [0.0] * requests  # to the row's first forward: prefill
        self._positions = torch.zeros(requests, dtype=torch.long, device=device)
        self._began = time.perf_counter()

    def forward(self, requests: list[int], plan: Plan, positions: list[int] | None = None) -> None:
        """Count one batched forward that served these rows; `positions`: of each row, where the plan is not by rows."""
        self.calls += 1
        for r in requests:
            self.nfe[r] += 1
        if positions is None:
            queries = (plan.pos >= 0).sum(1).view(-1, len(requests)).sum(0)
        else:
            queries = torch.tensor(positions, device=plan.pos.device)
        self._positions.index_add_(0, torch.tensor(requests, device=queries.device), queries)

    def tick(self, requests: list[int]) -> None:
        """Note the time at which a row had its first answer."""
        for r in requests:
            if not self.first[r]:
                self.first[r] = time.perf_counter() - self._began

    def finish(self, requests: Iterable[int]) -> None:
        """Note the time at which these rows ended."""
        for r in requests:
            self.seconds[r] = time.perf_counter() - self._began

    @property
    def positions(self) -> list[int]:
        """Recomputed positions of each row."""
        return self._positions.tolist()
