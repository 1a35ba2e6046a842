"""What the lookahead knows of a row: answers to queries that may come up, and predictions to draft from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dllm.decoding.canvas import Plan, State
from dllm.decoding.graphs import index
from dllm.decoding.meter import Ticket
from dllm.decoding.runner import Part
from dllm.lookahead.branches import Evaluated, Query
from dllm.lookahead.ledger import History, Ledger
from dllm.lookahead.setting import Stats
from dllm.models.transformer import Said


class Source(NamedTuple):
    """A prediction to draft from, and the true state that it led to."""

    state: State  # of several rows, after the step
    row: int
    ids: Tensor  # (copies, Q + E) what was fed; the first `planned` queries are the plan's, the others private
    pos: Tensor  # (copies, Q + E)
    said: Said  # of these (copies, Q + E)
    planned: int
    history: History  # of the store in the plain call, after the step


class RowMemo:
    """What is known of the row that occupies a lane."""

    def __init__(self, request: Ticket, clock: int, ledger: Ledger, stats: Stats) -> None:
        self.request, self.clock, self.ledger, self.stats = request, clock, ledger, stats
        self.waiting = False  # for a forward
        self.answers: dict[bytes, Evaluated] = {}  # by the keys of their queries
        self.recent: list[Source] = []  # since the last forward, that one's first
        self.guessed = self.streak = 0  # guesses of the last forward, and how many of them came true so far
        self.home = -1  # first column of the window that the last forward without a source was for

    def hit(self, answer: Evaluated) -> None:
        """A step finds its answer in the memo."""
        depth = answer.branch.depth
        self.stats.hits += 1
        self.stats.retained += answer.old
        self.stats.depth[depth] = self.stats.depth.get(depth, 0) + 1
        self.streak += not answer.old
        self.ledger.owes(answer)

    def age(self, query: Query | None, *, retain: bool) -> None:
        """Before the forward of this query (None: it has no name): forget what cannot come up again."""
        if query is None or query.opening or not retain:
            self.answers.clear()
        for key, answer in list(self.answers.items()):
            asked = answer.branch.query
            if not answer.old and answer.kv is not None:  # a finished block is worth its memory, a span of masks is not
                answer.kv = None if any(f.keep.all() for f in asked.feeds) else answer.kv.alone()
            answer.old = True
            if answer.kv is None and asked.keeps and not self.ledger.steady:  # a hit could not pay what it would owe
                del self.answers[key]

    def learn(self, fresh: list[Evaluated]) -> None:
        """A forward has run for this row, and evaluated these guesses beside it."""
        self.answers |= {answer.branch.query.key: answer for answer in fresh}
        self.guessed, self.streak, self.waiting = len(fresh), 0, False
        self.stats.forwards += 1
        self.stats.rows += 1 + len(fresh)


class Group(NamedTuple):
    """Rows of a tick whose plans have the same shape class."""

    part: Part
    rows: list[RowMemo]
    planned: int  # queries of the plan; inputs may add others behind them
    fed: Plan  # what the inputs slot made of the plan
    queries: list[Query]  # none where nobody looks ahead

    @property
    def copies(self) -> int:
        """Times that each row is fed."""
        return len(self.fed.pos) // len(self.rows)

    def query(self, i: int) -> Query | None:
        """What row i asks, where anybody looks ahead."""
        return self.queries[i] if self.queries else None

    def take(self, some: list[int]) -> Group:
        """Some of the rows."""
        if len(some) == len(self.rows):
            return self
        at, count = index(some, self.fed.pos.device), len(self.rows)
        fed = self.fed.take(torch.cat([at + copy * count for copy in range(self.copies)]))
        rows, asked = [self.rows[i] for i in some], [self.queries[i] for i in some]
        return Group(self.part.take(some), rows, self.planned, fed, asked)
