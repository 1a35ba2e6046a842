"""Guesses of the queries that rows will ask next, drawn from predictions that are one forward old."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.cache.policy import Policy, planned
from dllm.decoding.canvas import Plan, Span, State, mapped
from dllm.decoding.graphs import index
from dllm.decoding.prediction import Prediction
from dllm.decoding.runner import Answer, Runner
from dllm.decoding.slots import Sampler, View, rank
from dllm.decoding.step import expanded, feeding, opened, step
from dllm.lookahead.branches import Branch, Query, fitted, queries, stacked
from dllm.lookahead.ledger import History
from dllm.lookahead.memo import Group, Source
from dllm.lookahead.setting import Lookahead
from dllm.models.transformer import Said


@dataclass
class Chain:
    """A future of one row, as far as it is followed."""

    row: int  # of the group
    history: History  # of the store, as the plain call will find it
    parent: int = 0  # the branch whose state it continues


@dataclass
class Guesses:
    """Guesses of the queries that the rows of a group will ask after the true ones."""

    run: Runner
    policy: Policy  # of forwards with guesses
    setting: Lookahead
    group: Group

    def __post_init__(self) -> None:
        group = self.group
        self.found: list[list[Branch]] = [[] for _ in group.rows]
        self.index: list[dict[bytes, int]] = [{q.key: 0} for q in group.queries]  # key -> branch
        self.held: list[list[History]] = []  # of the store, as each branch of the forward finds it
        self.roots: list[History] = []  # of the store in the plain call, after the true query
        for row, query in zip(group.rows, group.queries, strict=True):
            number = row.ledger.number(query)
            self.held.append([row.ledger.held.after(query, number)])
            self.roots.append(row.ledger.plain.after(query, number))

    def draw(self, limit: int) -> list[list[Branch]]:
        """At most `limit` guesses for each row, from its last prediction, then from older ones; see `shared`."""
        group = self.group
        oldest = max(len(row.recent) for row in group.rows) if self.setting.multi_source else 1
        for age in range(oldest):
            rows = [i for i, row in enumerate(group.rows) if len(row.recent) > age and len(self.found[i]) < limit]
            if not rows:
                continue
            sources = [group.rows[i].recent[-1 - age] for i in rows]
            if age == 0:
                own = group.part.take(rows)
                window = feeding(self.run.s, self.policy, own.state, own.window)
                state, win, histories = own.state, own._replace(window=window).reading, [self.roots[i] for i in rows]
            else:
                state, win = self.opened(_gather(sources))
                histories = [group.rows[i].recent[-age].history for i in rows]
            chains = [Chain(row, history) for row, history in zip(rows, histories, strict=True)]
            draw = self.roll if self.setting.drafter == "roll" else self.ladder
            draw(chains, state, win, StalePredictions(self.run, sources), limit)
        return self.shared()

    def roll(self, chains: list[Chain], state: State, win: Span, stale: StalePredictions, limit: int) -> None:
        """Repeat the sampler's step on the stale predictions, row by row until its horizon."""
        alive = list(range(len(chains)))  # of the chains that are still followed: the rows of `state`
        for depth in range(1, 2 * limit + 1):
            covered = stale.read(alive, state, win)
            if covered is None:
                return
            alive, state, win, pred = covered
            after = self.follow(self.run.s, alive, state, win, pred)
            if after is None:
                return
            alive, state, win = after
            kept = self.place([chains[i] for i in alive], state, win, depth, limit)
            if not kept:
                return
            alive = [alive[i] for i in kept]
            state, win = _take(kept, state, win)

    def ladder(self, chains: list[Chain], state: State, win: Span, stale: StalePredictions, limit: int) -> None:
        """The state with its 1, 2, ... surest stale tokens written."""
        covered = stale.read(list(range(len(chains))), state, win)
        if covered is None:
            return
        alive, state, win, pred = covered
        for count in range(1, limit + 1):

            def surest(view: View, soft: Prediction, score: Tensor, count: int = count) -> Tensor:
                return rank(score, view.live) < count

            after = self.follow(self.run.s._replace(select=surest, amend=()), alive, state, win, pred)
            if after is None:
                return
            some, guess, guess_win = after
            self.place([replace(chains[i]) for i in some], guess, guess_win, count, limit)

    def follow(
        self, s: Sampler, alive: list[int], state: State, win: Span, pred: Prediction
    ) -> tuple[list[int], State, Span] | None:
        """The step on a stale prediction, with the windows of those chains open that go on; None where none does."""
        after = step(s, state, win, pred)
        kept = [i for i, over in enumerate((after.done | after.closing).tolist()) if not over]
        if not kept:
            return None
        going = after if len(kept) == after.rows else after.take(index(kept, after.step.device))
        return [alive[i] for i in kept], *self.opened(going)

    def opened(self, state: State) -> tuple[State, Span]:
        """The states with their windows open, cut to what some row reads."""
        state, win = opened(self.run.s, self.policy, state)
        used = (win.reads >= 0).any(0).nonzero()
        return state, win.cut(int(used[-1]) + 1 if len(used) else 1)

    def place(self, chains: list[Chain], state: State, win: Span, depth: int, limit: int) -> list[int]:
        """Add the query of each state to its row's guesses; which states may be followed further."""
        group, going, beyond = self.group, [], None
        rows = index([c.row for c in chains], win.lo.device)
        if not self.setting.cross_blocks:
            beyond = (win.lo >= group.part.window.hi[rows]).tolist()
        for at, own, own_win, plan in self.plans(state, win, rows):
            for i, query in zip(at, queries(expanded(self.run.s, own, own_win, plan), len(at)), strict=True):
                chain = chains[i]
                full = len(self.found[chain.row]) >= limit
                if query.opening or full or (beyond is not None and beyond[i]):
                    continue
                chain.history.name(query)
                parent = self.add(chain, query, depth, state.canvas.ids[i])
                if parent is not None:
                    number = group.rows[chain.row].ledger.number(query)
                    chain.history, chain.parent = chain.history.after(query, number), parent
                    going.append(i)
        return sorted(going)

    def plans(self, state: State, win: Span, rows: Tensor) -> Iterator[tuple[list[int], State, Span, Plan]]:
        """The forwards of these states, each with the places of those that it serves."""
        lane, stale = None, win.stale
        assert stale is not None
        if self.policy.stored:
            lane = self.group.part.at[rows]
        for flag in (True, False):
            at = [i for i, s in enumerate(stale.tolist()) if s is flag]
            if at:
                own, own_win = _take(at, state, win)
                lanes = None if lane is None else lane[index(at, lane.device)]
                yield at, own, own_win, planned(own, own_win.feeds(flag), lanes)

    def add(self, chain: Chain, query: Query, depth: int, ids: Tensor) -> int | None:
        """The branch of this query, new or known; None where its keys and values cannot be had in this forward."""
        row, known, held = self.group.rows[chain.row], self.index[chain.row], self.held[chain.row]
        if query.key in known:
            return known[query.key]
        if query.key in row.answers:
            return chain.parent
        before = held[chain.parent]
        if before.differs(chain.history, query):
            return None
        self.found[chain.row].append(Branch(query, chain.parent, depth, ids))
        known[query.key] = len(self.found[chain.row])
        held.append(before.after(query, row.ledger.number(query)))
        return known[query.key]

    def shared(self) -> list[list[Branch]]:
        """The guesses of each row, cut to a forward of at most `max_rows` rows with the true ones among them.

        The likeliest stay, which come first by depth: so ancestors stay before their descendants.
        """
        guesses, most = self.found, self.setting.max_rows
        total = sum(map(len, guesses))
        spare = total if most is None else max(most - len(guesses), 0)
        if spare >= total:
            return guesses
        order = sorted((g.depth, i, row) for row, gs in enumerate(guesses) for i, g in enumerate(gs))[:spare]
        out = []
        for row, gs in enumerate(guesses):
            kept = [-1, *sorted(i for _, i, r in order if r == row)]  # -1: the true query
            out.append([gs[i]._replace(parent=kept.index(gs[i].parent - 1)) for i in kept[1:]])
        return out


def _take(rows: list[int], state: State, win: Span) -> tuple[State, Span]:
    at = index(rows, state.step.device)
    return (state, win) if len(rows) == state.rows else (state.take(at), win.take(at))


def _gather(sources: list[Source]) -> State:
    """The states of several sources as one batch."""
    return reduce(State.cat, [s.state.take(index([s.row], s.state.step.device)) for s in sources])


class StalePredictions:
    """The last predictions of several rows, read as if they belonged to later states."""

    def __init__(self, run: Runner, sources: list[Source]) -> None:
        self.run = run
        self.planned = max(s.planned for s in sources)
        extra = max(s.pos.shape[1] - s.planned for s in sources)
        copies = max(len(s.pos) for s in sources)

        def stack(tables: list[Tensor], value: int) -> Tensor:  # (copies, B, Q + E, ...)
            own = zip(tables, sources, strict=True)
            return torch.stack([_widen(t, s.planned, self.planned, extra, copies, value) for t, s in own], 1)

        self.ids = stack([s.ids for s in sources], 0)
        self.pos = stack([s.pos for s in sources], -1)
        self.hidden = stack([s.said.hidden for s in sources], 0)
        weights = [s.said.weights for s in sources if s.said.weights is not None]
        self.weights = stacked(weights, copies) if weights else None  # of (copies B) rows
        self.last: tuple[list[int], Prediction] | None = None

    def read(self, alive: list[int], state: State, win: Span) -> tuple[list[int], State, Span, Prediction] | None:
        """Predictions at what the windows read, for the rows (of `alive`) whose forward covered that; None: no row."""
        last = self.last if self.run.options.law.greedy else None
        if last is not None and last[0] == alive and torch.equal(last[1].cols, win.reads):
            return alive, state, win, last[1]
        answer = self._answer(alive, state, win)
        kept = [i for i, ok in enumerate(answer.covered(win.reads).tolist()) if ok]
        if not kept:
            return None
        if len(kept) < len(alive):
            alive = [alive[i] for i in kept]
            state, win = _take(kept, state, win)
            answer = self._answer(alive, state, win)
        pred = answer.read(win.reads)
        self.last = (alive, pred)
        return alive, state, win, pred

    def _answer(self, alive: list[int], state: State, win: Span) -> Answer:
        at, count = index(alive, self.pos.device), self.pos.shape[1]
        ids, pos, hidden = (x[:, at].flatten(0, 1) for x in (self.ids, self.pos, self.hidden))
        weights = mapped(lambda x: x.view(-1, count, *x.shape[1:])[:, at].flatten(0, 1), self.weights)
        plan = Plan(ids, pos, None, None, None, None, None, False, False)
        said = fitted(Said(hidden, weights), self.planned, win.reads.shape[1])
        return self.run.answer(state, win, plan, said, self.planned)


def _widen(x: Tensor, planned: int, width: int, extra: int, copies: int, value: int) -> Tensor:
    """A table (own copies, Q + E, ...) padded to `copies`, to `width` planned and to `extra` private columns."""
    tail, more = (0, 0) * (x.dim() - 2), (0, copies - len(x))
    front = F.pad(x[:, :planned], (*tail, 0, width - planned, *more), value=value)
    return torch.cat([front, F.pad(x[:, planned:], (*tail, 0, extra + planned - x.shape[1], *more), value=value)], 1)
