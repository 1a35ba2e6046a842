"""Guesses of the queries that rows will ask next, drawn from predictions that are one forward old."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.canvas import Plan, Span, State
from dllm.decoding.engine import Answer, opened, step
from dllm.decoding.prediction import Prediction
from dllm.decoding.slots import Sampler, View, rank
from dllm.lookahead.branches import Authors, Query, name, queries
from dllm.lookahead.memo import Asked, Guess, Source, differ, written

if TYPE_CHECKING:
    from dllm.lookahead.walk import Walk


@dataclass
class Chain:
    """A future of one row, as far as it is followed."""

    row: int  # of the forward
    authors: Authors  # who will have written each slot, as the plain call finds the store
    parent: int = 0  # the branch whose state it continues


class Drafts:
    """Guesses of the queries that the rows of a forward will ask next."""

    def __init__(self, walk: Walk, asked: Asked) -> None:
        self.walk, self.asked = walk, asked
        self.guesses: list[list[Guess]] = [[] for _ in asked.rows]
        self.index: list[dict[bytes, int]] = [{q.key: 0} for q in asked.queries]  # key -> branch
        # who will have written each slot, as each branch finds the store
        self.views: list[list[Authors]] = []
        self.roots: list[Authors] = []  # and as the plain call will find it after the true query
        for line, query in zip(asked.lines, asked.queries, strict=True):
            number = line.number(query)
            self.views.append([written(line.held, query, number)])
            self.roots.append(written(line.authors, query, number))

    def draw(self, limit: int) -> list[list[Guess]]:
        """At most `limit` guesses for each row, from its last prediction, then from older ones."""
        asked, setting = self.asked, self.walk.setting
        oldest = max(len(line.recent) for line in asked.lines) if setting.multi_source else 1
        for age in range(oldest):
            rows = [i for i, line in enumerate(asked.lines) if len(line.recent) > age and len(self.guesses[i]) < limit]
            if not rows:
                continue
            sources = [asked.lines[i].recent[-1 - age] for i in rows]
            if age == 0:
                at = torch.tensor(rows, device=asked.lane.device)
                state, win, authors = asked.state.take(at), asked.window.take(at), [self.roots[i] for i in rows]
            else:
                state, win = opened(self.walk.s, _gather(sources))
                authors = [asked.lines[i].recent[-age].authors for i in rows]
            chains = [Chain(row, a) for row, a in zip(rows, authors, strict=True)]
            draw = self.roll if setting.drafter == "roll" else self.ladder
            draw(chains, state, win, Stale(self.walk, sources), limit)
        return self.guesses

    def roll(self, chains: list[Chain], state: State, win: Span, stale: Stale, limit: int) -> None:
        """Repeat the sampler's step on the stale predictions, row by row until its horizon."""
        index = list(range(len(chains)))  # of the chains that are still followed: the rows of `state`
        for depth in range(1, 2 * limit + 1):
            covered = stale.read(index, state, win)
            if covered is None:
                return
            index, state, win, pred = covered
            after = self.follow(self.walk.s, index, state, win, pred)
            if after is None:
                return
            index, state, win = after
            kept = self.place([chains[i] for i in index], state, win, depth, limit)
            if not kept:
                return
            index = [index[i] for i in kept]
            state, win = _take(kept, state, win)

    def ladder(self, chains: list[Chain], state: State, win: Span, stale: Stale, limit: int) -> None:
        """The state with its 1, 2, ... surest stale tokens written."""
        covered = stale.read(list(range(len(chains))), state, win)
        if covered is None:
            return
        index, state, win, pred = covered
        for count in range(1, limit + 1):

            def surest(view: View, soft: Prediction, score: Tensor, count: int = count) -> Tensor:
                return rank(score, view.live) < count

            after = self.follow(self.walk.s._replace(select=surest, amend=()), index, state, win, pred)
            if after is None:
                return
            some, guess, guess_win = after
            self.place([replace(chains[i]) for i in some], guess, guess_win, count, limit)

    def follow(
        self, s: Sampler, index: list[int], state: State, win: Span, pred: Prediction
    ) -> tuple[list[int], State, Span] | None:
        """The step on a stale prediction, with the windows of those chains open that go on; None where none does."""
        after = step(s, state, win, pred)
        kept = [i for i, over in enumerate((after.done | after.closing).tolist()) if not over]
        if not kept:
            return None
        return [index[i] for i in kept], *opened(s, _take(kept, after)[0])

    def place(self, chains: list[Chain], state: State, win: Span, depth: int, limit: int) -> list[int]:
        """Add the query of each state to its row's guesses; which states may be followed further."""
        asked, going, beyond = self.asked, [], None
        rows = torch.tensor([c.row for c in chains], device=win.lo.device)
        if not self.walk.setting.cross_blocks:
            beyond = (win.lo >= asked.window.hi[rows]).tolist()
        for part, plan in self.walk.policy.plan(state, win, asked.lane[rows]):
            at = list(range(len(chains))) if part is None else part.tolist()
            own, own_win = (state, win) if part is None else (state.take(part), win.take(part))
            for i, query in zip(at, queries(self.walk.expand(own, own_win, plan), len(at)), strict=True):
                chain = chains[i]
                full = len(self.guesses[chain.row]) >= limit
                if query.opening or full or (beyond is not None and beyond[i]):
                    continue
                name(query, chain.authors)
                parent = self.add(chain, query, depth, state.canvas.ids[i])
                if parent is not None:
                    number = asked.lines[chain.row].number(query)
                    chain.authors, chain.parent = written(chain.authors, query, number), parent
                    going.append(i)
        return sorted(going)

    def add(self, chain: Chain, query: Query, depth: int, ids: Tensor) -> int | None:
        """The branch of this query, new or known; None where its keys and values cannot be had in this forward."""
        row = chain.row
        line, known, views = self.asked.lines[row], self.index[row], self.views[row]
        if query.key in known:
            return known[query.key]
        if query.key in line.memo:
            return chain.parent
        view = views[chain.parent]
        if differ(view, chain.authors, query):
            return None
        self.guesses[row].append(Guess(query, chain.parent, depth, ids))
        known[query.key] = len(self.guesses[row])
        views.append(written(view, query, line.number(query)))
        return known[query.key]


def _take(rows: list[int], state: State, win: Span | None = None) -> tuple[State, Any]:
    if len(rows) == state.rows:
        return state, win
    at = torch.tensor(rows, device=state.step.device)
    return state.take(at), None if win is None else win.take(at)


def _gather(sources: list[Source]) -> State:
    """The states of several sources as one batch."""
    parts = [s.state.take(torch.tensor([s.row], device=s.state.step.device)) for s in sources]
    state = parts[0]
    for part in parts[1:]:
        state = state.cat(part)
    return state


class Stale:
    """The last predictions of several rows, read as if they belonged to later states."""

    def __init__(self, walk: Walk, sources: list[Source]) -> None:
        self.walk = walk
        self.planned = max(s.planned for s in sources)
        extra = max(s.pos.shape[1] - s.planned for s in sources)
        copies = max(len(s.pos) for s in sources)

        def stack(tables: list[Tensor], value: int) -> Tensor:  # (copies, B, Q + E, ...)
            wide = [_widen(t, s.planned, self.planned, extra, value) for t, s in zip(tables, sources, strict=True)]
            return torch.stack([_more(t, copies, value) for t in wide], 1)

        self.ids = stack([s.ids for s in sources], 0)
        self.pos = stack([s.pos for s in sources], -1)
        self.hidden = stack([s.hidden for s in sources], 0)
        self.last: tuple[list[int], Prediction] | None = None

    def read(self, index: list[int], state: State, win: Span) -> tuple[list[int], State, Span, Prediction] | None:
        """Predictions at what the windows read, for the rows (of `index`) whose forward covered that; None: no row."""
        last = self.last if self.walk.options.law.greedy else None
        if last is not None and last[0] == index and torch.equal(last[1].cols, win.reads):
            return index, state, win, last[1]
        answer = self._answer(index, state, win)
        kept = [i for i, ok in enumerate(answer.covered(win.reads).tolist()) if ok]
        if not kept:
            return None
        if len(kept) < len(index):
            index = [index[i] for i in kept]
            state, win = _take(kept, state, win)
            answer = self._answer(index, state, win)
        pred = answer.read(win.reads)
        assert pred is not None
        self.last = (index, pred)
        return index, state, win, pred

    def _answer(self, index: list[int], state: State, win: Span) -> Answer:
        at, walk = torch.tensor(index, device=self.pos.device), self.walk
        ids, pos, hidden = (x[:, at].flatten(0, 1) for x in (self.ids, self.pos, self.hidden))
        plan = Plan(ids, pos, None, None, None, None, False, False)
        return Answer(walk.model, walk.s, walk.options, state, win, plan, hidden, self.planned)


def _more(x: Tensor, copies: int, value: int) -> Tensor:
    """A table (own copies, ...) padded to `copies`."""
    return torch.cat([x, x.new_full((copies - len(x), *x.shape[1:]), value)])


def _widen(x: Tensor, planned: int, width: int, extra: int, value: int) -> Tensor:
    """A table (copies, Q + E, ...) with its planned and its private columns padded to `width` and `extra`."""
    tail = (0, 0) * (x.dim() - 2)
    front, back = x[:, :planned], x[:, planned:]
    front = F.pad(front, (*tail, 0, width - planned), value=value)
    return torch.cat([front, F.pad(back, (*tail, 0, extra - back.shape[1]), value=value)], 1)
