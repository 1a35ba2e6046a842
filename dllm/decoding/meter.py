"""What decoding costs. Samplers never count; the engine reports every forward here.

A `Meter` is one call: its batched forwards, and a `Ticket` for each of its rows. Rows of several calls may share a
forward, so a ticket goes with its row and counts by itself: `nfe` is a row's own number of forwards, `positions` what
they recomputed (all copies, so guidance counts twice): nfe_equiv = positions / canvas length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["refresh", "step", "closing"]  # of a forward: an epoch begins, goes on, the rest is filled
Watch: TypeAlias = Callable[[Kind, int], None]  # is told of a batched forward: its kind, the rows that it served


@dataclass(eq=False)
class Ticket:
    """A row of a call: what it has cost, and how it ends."""

    call: Meter
    index: int  # in the call
    nfe: int = 0
    positions: int = 0  # recomputed by its forwards
    cached: int = 0  # tokens of the prompt whose keys and values were there before
    entered: float = 0.0  # seconds from the start of the call to the row's lane: what it waited
    first: float = 0.0  # seconds from the start of the call to the row's first forward: prefill
    seconds: float = 0.0  # to its last forward
    capped: bool = False  # it has taken the steps that it may
    halted: bool = False  # ended from outside
    broken: bool = False  # its logits had no softmax
    ahead: object = None  # statistics of the lookahead

    def enter(self) -> None:
        """Note the time at which it got a lane."""
        self.entered = self.call.elapsed

    def answered(self) -> None:
        """Note the time of the first answer."""
        self.first = self.first or self.call.elapsed

    def finish(self) -> None:
        """Note the time of the end."""
        self.seconds = self.call.elapsed

    def again(self) -> None:
        """Begin anew: what it has cost so far counts no more."""
        self.nfe = self.positions = 0
        self.first, self.capped, self.ahead = 0.0, False, None

    def halt(self) -> None:
        """End the row from outside, whether it waits or decodes: it steps no more, and its time stands."""
        self.halted = True
        self.finish()


class Meter:
    """One call over `requests` rows. watch: is told of every forward that serves some of them, once for all calls that
    share both."""

    def __init__(self, requests: int, watch: Watch | None = None) -> None:
        self.calls = 0  # batched forwards that served some of its rows
        self.watch = watch
        self.rows = [Ticket(self, index) for index in range(requests)]
        self._began = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the call began."""
        return time.perf_counter() - self._began


def served(rows: Sequence[Ticket], kind: Kind) -> None:
    """Count one batched forward that served these rows."""
    calls = {row.call for row in rows}
    for call in calls:
        call.calls += 1
    for row in rows:
        row.nfe += 1
    for watch in {call.watch for call in calls if call.watch is not None}:
        watch(kind, len(rows))


def computed(rows: Iterable[Ticket], positions: Iterable[int]) -> None:
    """Count the positions that a forward computed for each row."""
    for row, n in zip(rows, positions, strict=True):
        row.positions += n
