"""What the lookahead knows of a row: answers to queries that may come up, and who wrote which slot of its store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dllm.decoding.canvas import Plan, Span, State
from dllm.lookahead.branches import Authors, Query


class Kept(NamedTuple):
    """Keys and values that a branch would have left in the store, still inside the tensors of its forward."""

    layers: list[tuple[Tensor, Tensor]]  # each (N, Q, kv_heads, head_dim)
    rows: list[int]  # plan row of each copy
    columns: list[Tensor]  # of each copy, those that it keeps

    def write(self, store: Any, query: Query) -> None:
        """Put what the query keeps where the plain call would have put it."""
        for n, columns, f in zip(self.rows, self.columns, query.feeds, strict=True):
            slots = torch.from_numpy(f.pos[f.keep]).to(columns.device)
            for layer, new in enumerate(self.layers):
                for stored, fresh in zip((store.keys[layer], store.values[layer]), new, strict=True):
                    stored[f.lane][:, slots] = fresh[n, columns].transpose(0, 1)

    def alone(self) -> Kept:
        """The same, cut out of the tensors of the forward."""
        cut = [
            torch.cat([x[n, c] for n, c in zip(self.rows, self.columns, strict=True)])
            for pair in self.layers
            for x in pair
        ]
        sizes = np.cumsum([0] + [len(c) for c in self.columns])
        columns = [torch.arange(a, b, device=c.device) for a, b, c in zip(sizes, sizes[1:], self.columns, strict=False)]
        return Kept([(k[None], v[None]) for k, v in zip(cut[::2], cut[1::2], strict=True)], [0] * len(columns), columns)


class Guess(NamedTuple):
    """A query that may come up."""

    query: Query
    parent: int  # the branch whose state it continues; 0 is the true query
    depth: int  # steps ahead
    ids: Tensor  # (L,) the canvas that asks it


@dataclass(eq=False)
class Entry:
    """The answer to one query, evaluated ahead of time."""

    guess: Guess
    hidden: Tensor  # (copies, q, D)
    number: int  # the query's
    kv: Kept | None = None
    old: bool = False  # evaluated before the last forward


class Source(NamedTuple):
    """A prediction to draft from, and the true state that it led to."""

    state: State  # of several rows, after the step
    row: int
    ids: Tensor  # (copies, Q + E) what was fed; the first `planned` queries are the plan's, the others private
    pos: Tensor  # (copies, Q + E)
    hidden: Tensor  # (copies, Q + E, D)
    planned: int
    authors: Authors  # of the stored slots, after the step


class Line:
    """What is known of the row that occupies a lane."""

    def __init__(self, request: int, clock: int, lanes: Iterable[int], slots: int, steady: bool) -> None:
        self.request, self.clock = request, clock
        self.waiting = False  # for a forward
        self.memo: dict[bytes, Entry] = {}
        self.recent: list[Source] = []
        self.numbers: dict[bytes, int] = {}
        # who wrote each slot in the plain call, and in the store as it is
        self.authors: Authors = {i: np.full(slots, -1, np.int64) for i in lanes}
        self.held = self.authors
        self.debts: list[Entry] = []  # hits whose writes the store still lacks
        self.span: list[bytes] | None = None  # the slots that the last step kept
        self.guessed = self.streak = 0  # guesses of the last forward, and how many of them came true so far
        self.steady = steady  # between refreshes, all steps of the row keep the same slots
        self.home = -1  # first column of the window that the last forward without a source was for

    def number(self, query: Query) -> int:
        return self.numbers.setdefault(query.key, len(self.numbers))

    def behind(self, query: Query) -> bool:
        """Whether the query sees slots that the store lacks."""
        return differ(self.authors, self.held, query)

    def settle(self) -> None:
        """Forget the debts once the store is up to date."""
        if all((self.authors[i] == self.held[i]).all() for i in self.authors):
            self.debts = []


def written(authors: Authors, query: Query, number: int) -> Authors:
    """Who wrote each slot after this query."""
    out = dict(authors)
    for f in query.feeds if query.stored else ():
        out[f.lane] = out[f.lane].copy()
        out[f.lane][f.pos[f.keep]] = number
    return out


def differ(a: Authors, b: Authors, query: Query) -> bool:
    """Whether the query would read other keys and values in a store of one history than in that of the other."""
    feeds = zip(query.feeds, query.outside, strict=False)
    return any((a[f.lane][o] != b[f.lane][o]).any() for f, o in feeds)


class Asked(NamedTuple):
    """Rows of a tick whose plans have the same shape class."""

    rows: list[int]  # in the batch of the tick
    lines: list[Line]
    state: State  # opened
    window: Span
    plan: Plan
    fed: Plan
    lane: Tensor
    queries: list[Query]  # none where nobody looks ahead

    @property
    def copies(self) -> int:
        """Times that each row is fed."""
        return len(self.fed.pos) // len(self.rows)

    def take(self, index: list[int]) -> Asked:
        if len(index) == len(self.rows):
            return self
        at = torch.tensor(index, device=self.lane.device)
        wide = torch.cat([at + c * len(self.rows) for c in range(self.copies)])
        rows, lines = [self.rows[i] for i in index], [self.lines[i] for i in index]
        asked = [self.queries[i] for i in index]
        plan, fed = (_rows(p, i) for p, i in ((self.plan, at), (self.fed, wide)))
        return Asked(rows, lines, self.state.take(at), self.window.take(at), plan, fed, self.lane[at], asked)


def _rows(plan: Plan, index: Tensor) -> Plan:
    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[index]

    fresh, keep, visible, lane = (pick(x) for x in (plan.fresh, plan.keep, plan.visible, plan.lane))
    return plan._replace(ids=plan.ids[index], pos=plan.pos[index], fresh=fresh, keep=keep, visible=visible, lane=lane)
