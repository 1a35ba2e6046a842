"""Exact draft-and-verify over any sampler: the decoder runs unchanged behind a memo of forwards.

A sampler is a pure function of its state and of what the model answers to the state's query. So the answers may be
computed ahead of time: when the next query is not in the memo, one forward evaluates it *and* the queries of guessed
futures, found by rolling the very same `step` on predictions that are one forward old. A guess that comes true later
costs no forward; one that does not is never looked at. Tokens therefore equal those of the plain call, whatever the
guesses, and no step needs more than one forward. With the static schedule, drafts from the last accepted state only and
a memo that is emptied at each forward, this is FreeDave (arXiv 2510.00294).

What "equal" rests on: a forward must give a row the same logits whatever runs beside it. See `Lookahead.mode`.
"""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.branches import Authors, Branch, Query, lay, name, pack, queries
from dllm.canvas import Plan, State, Window
from dllm.engine import Answer, Part, Runner, advance, opened, step
from dllm.errors import DllmError, unknown
from dllm.prediction import Prediction
from dllm.samplers.base import View, rank

ROWS = (1, 2, 4, 8)  # what "auto" chooses from
MODES = ("exact", "guarded", "fast")
DRAFTERS = ("roll", "ladder")


@dataclass(frozen=True)
class Lookahead:
    """How far to look ahead, and what is promised.

    rows          query rows of a sequence in one forward, the true one included; "auto" takes what the measured cost of
                  a forward and the hits so far make fastest (1: no lookahead).
    mode          exact    identical to the plain call, never more forwards. For float64 weights, and for models that
                           declare `batch_invariant = True`: logits do not depend on what runs in the same forward.
                  guarded  identical to the plain call as long as logits differ between forward shapes by less than
                           `delta`, for rules that are monotone in each confidence. A decision that a change of `delta`
                           could turn over is taken again on a forward of the plain shape. Forwards: those of the plain
                           call at most, plus these re-runs (in `stats`).
                  fast     no promise. Every `audit`-th hit is checked on a forward of its own and the rate of
                           divergent decisions reported. Never more forwards than the plain call.
                  None     exact where it can be had, else guarded.
    drafter       roll     repeat the sampler's own step on the last prediction.
                  ladder   the current state with the 1, 2, ... surest tokens written.
    retain        keep evaluated guesses until the cache is refreshed, not only until the next forward.
    multi_source  draft from all states passed since the last forward, not only from the last one.
    cross_blocks  guess beyond the end of the block, where the forward covers that (no cache, block-causal models).
    ahead         block-causal models: blocks of masks that each row reads behind its own, so that guesses reach beyond
                  the next edge too. The sampler never looks there.
    restart       a row that has moved on to another block begins there with a forward of its own and without guesses,
                  as FreeDave's released eager mode does.
    max_rows      query rows of a whole forward; None: `rows` for each sequence. The likeliest guesses get them.
    """

    rows: int | str = 4
    mode: str | None = None
    drafter: str = "roll"
    retain: bool = True
    multi_source: bool = True
    cross_blocks: bool = True
    ahead: int = 0
    restart: bool = False
    max_rows: int | None = None
    delta: float | None = None  # bound on logit differences; None: measured
    audit: int = 16
    costs: Mapping[int, float] | None = None  # recorded cost of a forward for 1, 2, ... rows; None: measured

    def __post_init__(self) -> None:
        if self.rows != "auto" and (not isinstance(self.rows, int) or isinstance(self.rows, bool) or self.rows < 1):
            raise DllmError(f"lookahead rows={self.rows!r} must be 'auto' or an integer of at least 1")
        if self.mode is not None and self.mode not in MODES:
            raise unknown("lookahead mode", str(self.mode), MODES)
        if self.drafter not in DRAFTERS:
            raise unknown("lookahead drafter", str(self.drafter), DRAFTERS)
        if self.max_rows is not None and self.max_rows < 1:
            raise DllmError(f"lookahead max_rows={self.max_rows!r} must be at least 1")
        if self.ahead < 0:
            raise DllmError(f"lookahead ahead={self.ahead!r} must not be negative")
        if self.audit < 1 or (self.delta is not None and self.delta < 0):
            raise DllmError(f"lookahead audit={self.audit} must be at least 1 and delta={self.delta} not negative")

    @classmethod
    def parse(cls, spec: Any) -> Lookahead:
        """From 4, "auto", {"rows": 8, "mode": "fast", ...} or a Lookahead. Errors: unknown keys, bad values."""
        if isinstance(spec, Lookahead):
            return spec
        if not isinstance(spec, Mapping):
            return cls(rows=spec)
        known = {f.name for f in dataclasses.fields(cls)}
        for key in spec:
            if key not in known:
                raise unknown("lookahead setting", str(key), known)
        return cls(**spec)

    def settle(self, model: Any, sampler: Any) -> Lookahead:
        """The setting with its mode decided. Errors: a promise that this model or sampler cannot keep, and why."""
        if getattr(sampler.needs, "impure", False):
            raise DllmError(
                f"sampler {sampler.name!r} depends on more than its state (global randomness, a clock or the number of "
                "forwards), so its steps cannot be verified ahead of time: use it without lookahead"
            )
        invariant = model.dtype == torch.float64 or getattr(model, "batch_invariant", False)
        if self.mode == "exact" and not invariant:
            raise DllmError(
                f"lookahead mode 'exact' cannot be promised in {str(model.dtype).removeprefix('torch.')}: the last "
                "bits of logits depend on the shape of a forward. Load the model with dtype='float64', or use "
                "mode 'guarded'"
            )
        return dataclasses.replace(self, mode=self.mode or ("exact" if invariant else "guarded"))


@dataclass
class Stats:
    """What the lookahead of one request did."""

    steps: int = 0  # of the sampler
    forwards: int = 0  # that this request waited for
    rows: int = 0  # query rows evaluated for it
    hits: int = 0  # steps that found their answer in the memo
    retained: int = 0  # of these, answers older than the last forward
    reruns: int = 0  # forwards that confirmed a close decision, or restored a cache
    audits: int = 0  # hits that were checked (mode fast)
    divergences: int = 0  # confirmed or checked decisions that came out different
    depth: dict[int, int] = field(default_factory=dict)  # hits by how many steps ahead they were guessed
    delta: float = 0.0  # the bound that mode guarded relied on

    def report(self, setting: Lookahead) -> dict[str, Any]:
        """As an output shows it."""
        return {**dataclasses.asdict(self), "mode": setting.mode, "drafter": setting.drafter}


class Entry:
    """The answer to one query."""

    def __init__(self, query: Query, hidden: Tensor, number: int, depth: int, kv: Kept | None = None) -> None:
        self.query, self.hidden, self.number, self.depth, self.kv = query, hidden, number, depth, kv
        self.old = False  # evaluated before the last forward


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

    def __init__(self, request: int, clock: int, lanes: Iterable[int], slots: int) -> None:
        self.request, self.clock = request, clock
        self.waiting = False  # for a forward
        self.memo: dict[bytes, Entry] = {}
        self.recent: list[Source] = []
        self.numbers: dict[bytes, int] = {}
        self.authors: Authors = {
            i: np.full(slots, -1, np.int64) for i in lanes
        }  # who wrote each slot in the plain call
        self.held = self.authors  # and in the store as it is
        self.debts: list[Entry] = []  # hits whose writes the store still lacks
        self.span: list[bytes] | None = None  # the slots that the last step kept
        self.guessed = self.streak = 0
        self.home = -1  # first column of the window that the last forward without a source was for

    def number(self, query: Query) -> int:
        return self.numbers.setdefault(query.key, len(self.numbers))

    def behind(self, query: Query) -> bool:
        """Whether the query sees slots that the store lacks."""
        feeds = zip(query.feeds, query.outside, strict=False)
        return any((self.authors[f.lane][o] != self.held[f.lane][o]).any() for f, o in feeds)


def written(authors: Authors, query: Query, number: int) -> Authors:
    """Who wrote each slot after this query."""
    out = dict(authors)
    for f in query.feeds if query.stored else ():
        out[f.lane] = out[f.lane].copy()
        out[f.lane][f.pos[f.keep]] = number
    return out


class Asked(NamedTuple):
    """Rows of a tick whose plans have the same shape class."""

    rows: list[int]  # in the batch of the tick
    lines: list[Line]
    state: State  # opened
    window: Window
    plan: Plan
    fed: Plan
    lane: Tensor
    queries: list[Query]

    def take(self, index: list[int], copies: int) -> Asked:
        at = torch.tensor(index, device=self.lane.device)
        wide = torch.cat([at + c * len(self.rows) for c in range(copies)])
        rows, lines = [self.rows[i] for i in index], [self.lines[i] for i in index]
        asked = [self.queries[i] for i in index]
        plan, fed = (_rows(p, i) for p, i in ((self.plan, at), (self.fed, wide)))
        return Asked(rows, lines, self.state.take(at), self.window.take(at), plan, fed, self.lane[at], asked)


def _rows(plan: Plan, index: Tensor) -> Plan:
    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[index]

    fresh, keep, visible, lane = (pick(x) for x in (plan.fresh, plan.keep, plan.visible, plan.lane))
    return plan._replace(ids=plan.ids[index], pos=plan.pos[index], fresh=fresh, keep=keep, visible=visible, lane=lane)


class Guess(NamedTuple):
    """A query that may come up."""

    query: Query
    parent: int  # the branch whose state it continues; 0 is the true query
    depth: int  # steps ahead


class Walk(Runner):
    """The runner that looks ahead. `report` collects the statistics of each request."""

    def __init__(self, *args: Any, setting: Lookahead, report: dict[int, Stats]) -> None:
        super().__init__(*args)
        self.plain = self.policy
        if setting.ahead and self.policy.exact:
            self.policy = dataclasses.replace(self.policy, ahead=setting.ahead)
        self.setting, self.report = setting, report
        self.lines: dict[int, Line] = {}
        self.pace = Pace.of(self.model, self.s, self.policy, setting)
        self.delta = 0.0
        if setting.mode == "guarded":
            self.delta = setting.delta if setting.delta is not None else measured_delta(self.model)
        self.limit = 1  # query rows of a sequence in the next forward
        self.steady = not self.policy.sparse  # between refreshes, all steps of a row keep the same slots

    # -- the tick -----------------------------------------------------------------------------------------------------

    def clock(self, lane: int) -> int:
        return self.lines[lane].clock if lane in self.lines else 0

    def tick(self, state: State, lane: Tensor, requests: list[int]) -> list[Part]:
        """Step every row whose answer is known; when none is, one forward for the rows that are furthest behind.

        All rows of their shape class ride along. So each forward serves a tick of the plain call, and there are never
        more of them than there.
        """
        lines = [self.line(l, r) for l, r in zip(lane.tolist(), requests, strict=True)]
        ready = [i for i, line in enumerate(lines) if not line.waiting]
        if any(lines[i].memo for i in ready):
            asked = self.ask(state, lane, lines, ready, named=True)
            if parts := [p for group in asked for p in self.hits(group)]:
                return parts
        most = self.setting.max_rows
        rows = self.setting.rows
        self.limit = self.pace.choose(len(lines), most) if rows == "auto" else int(rows)
        groups = self.ask(state, lane, lines, list(range(len(lines))), named=self.limit > 1)
        last = min(line.clock for line in lines)
        return [self.miss(g) for g in groups if any(line.clock == last for line in g.lines)]

    def line(self, lane: int, request: int) -> Line:
        line = self.lines.get(lane)
        if line is None or line.request != request:
            slots = self.store.keys[0].shape[2] if self.store is not None else 0
            lanes = self.s.inputs.lanes if self.s.inputs is not None else 1
            own = range(lanes * lane, lanes * (lane + 1))
            line = self.lines[lane] = Line(request, line.clock if line else 0, own, slots)
            self.report[request] = Stats(delta=self.delta)
        return line

    def ask(self, state: State, lane: Tensor, lines: list[Line], rows: list[int], *, named: bool) -> list[Asked]:
        """Open the windows of these rows and plan their forwards."""
        if len(rows) < len(lines):
            index = torch.tensor(rows, device=lane.device)
            state, lane = state.take(index), lane[index]
        state, win = opened(self.s, state)
        out = []
        for part, plan in self.policy.plan(state, win, lane):
            own, own_win, at, own_lane = state, win, list(range(len(rows))), lane
            if part is not None:
                own, own_win, at, own_lane = state.take(part), win.take(part), part.tolist(), lane[part]
            mine = [rows[i] for i in at]
            fed = self.expand(own, own_win, plan)
            asked = queries(fed, len(at)) if named else []
            group = [lines[i] for i in mine]
            for query, line in zip(asked, group, strict=False):
                name(query, line.authors)
            out.append(Asked(mine, group, own, own_win, plan, fed, own_lane, asked))
        return out

    # -- answers ------------------------------------------------------------------------------------------------------

    def hits(self, asked: Asked) -> list[Part]:
        """Step the rows whose query is in the memo; the others wait."""
        found = [line.memo.get(q.key) for line, q in zip(asked.lines, asked.queries, strict=True)]
        index = [i for i, e in enumerate(found) if e is not None and not asked.lines[i].waiting]
        for i, entry in enumerate(found):
            asked.lines[i].waiting = entry is None
        if not index:
            return []
        entries = [e for e in found if e is not None]
        group = asked.take(index, len(entries[0].query.feeds))
        laid = torch.stack(
            [lay(e.hidden, q) for e, q in zip(entries, group.queries, strict=True)], 1
        )  # (copies, B, Q, D)
        for line, entry in zip(group.lines, entries, strict=True):
            self.count_hit(line, entry)
        return [self.finish(group, laid.flatten(0, 1), hit=True, plain=False)]

    def count_hit(self, line: Line, entry: Entry) -> None:
        stats = self.report[line.request]
        stats.hits += 1
        stats.retained += entry.old
        stats.depth[entry.depth] = stats.depth.get(entry.depth, 0) + 1
        line.streak += not entry.old
        if entry.query.keeps:
            line.authors = written(line.authors, entry.query, entry.number)
            line.debts.append(entry)

    def miss(self, asked: Asked) -> Part:
        """One forward for these rows, with guesses beside them."""
        began = time.perf_counter()
        guesses: list[list[Guess]] = [[] for _ in asked.rows]
        for i, line in enumerate(asked.lines):
            self.close_round(line, asked.queries[i] if asked.queries else None)
        opening = any(q.opening for q in asked.queries)
        if self.limit > 1 and not opening:
            guesses = self.share(asked.lines, Drafts(self, asked).draw(self.limit - 1))
        hidden, evaluated = self.evaluate(asked, guesses)
        for line, fresh in zip(asked.lines, evaluated, strict=True):
            for entry in fresh[1:]:
                line.memo[entry.query.key] = entry
            line.guessed, line.streak, line.waiting = max(len(fresh) - 1, 0), 0, False
            stats = self.report[line.request]
            stats.forwards += 1
            stats.rows += max(len(fresh), 1)
        part = self.finish(asked, hidden, hit=False, plain=not any(guesses))
        if self.setting.rows == "auto" and not opening:
            self.pace.note(len(asked.rows) + sum(map(len, guesses)), time.perf_counter() - began, len(asked.rows))
        return part

    def share(self, lines: list[Line], guesses: list[list[Guess]]) -> list[list[Guess]]:
        """Cut the guesses to the rows that a forward may have: the likeliest stay, ancestors before descendants."""
        most = self.setting.max_rows
        spare = sum(map(len, guesses)) if most is None else max(most - len(lines), 0)
        if spare >= sum(map(len, guesses)):
            return guesses
        order = sorted((g.depth, i, row) for row, gs in enumerate(guesses) for i, g in enumerate(gs))[:spare]
        out: list[list[Guess]] = []
        for row, gs in enumerate(guesses):
            kept = [i for _, i, r in sorted(order) if r == row]
            place = {0: 0} | {i + 1: k + 1 for k, i in enumerate(kept)}
            out.append([gs[i]._replace(parent=place[gs[i].parent]) for i in kept])
        return out

    def close_round(self, line: Line, query: Query | None) -> None:
        """Before a forward: learn from the last round, bring the store up to date, forget what cannot come up again."""
        if line.guessed:
            self.pace.learn(line.streak, line.guessed)
        if query is not None and query.stored:
            self.note_span(line, query)
        if line.debts and (query is None or not self.steady or line.behind(query)):
            self.repay(line)
        if query is None or query.opening or not self.setting.retain:
            line.memo.clear()
        for key, entry in list(line.memo.items()):
            if not entry.old and entry.kv is not None:  # a finished block is worth its memory; a span of masks is not
                entry.kv = None if any(f.keep.all() for f in entry.query.feeds) else entry.kv.alone()
            entry.old = True
            if entry.kv is None and entry.query.keeps and not self.steady:
                del line.memo[key]

    def note_span(self, line: Line, query: Query) -> None:
        """Where steps rewrite ever other slots, a guess is of use only with the keys and values that it wrote."""
        span = None if query.opening else [f.pos[f.keep].tobytes() for f in query.feeds]
        self.steady = self.steady and (span is None or line.span is None or span == line.span)
        line.span = span

    def repay(self, line: Line) -> None:
        """Write what the hits since the last forward would have written: from their own keys and values, else again."""
        for entry in line.debts:
            if entry.kv is not None:
                entry.kv.write(self.store, entry.query)
            else:
                packed = pack([[Branch(entry.query, -1)]], self.model.device)
                self.meter.forward([line.request], packed.plan)
                self.hidden(packed.plan)
                self.report[line.request].reruns += 1
        line.debts, line.held = [], line.authors

    def evaluate(self, asked: Asked, guesses: list[list[Guess]]) -> tuple[Tensor, list[list[Entry]]]:
        """Run the true queries and the guesses: hidden states of the former in their plan's layout, entries of all."""
        requests = [line.request for line in asked.lines]
        if not any(guesses):
            self.meter.forward(requests, asked.fed)
            hidden = self.hidden(asked.fed)
            for i, line in enumerate(asked.lines):
                self.wrote(line, asked.queries[i] if asked.queries else None)
            return hidden, [[] for _ in requests]
        branches = [
            [Branch(q, -1), *(Branch(g.query, g.parent) for g in gs)]
            for q, gs in zip(asked.queries, guesses, strict=True)
        ]
        packed = pack(branches, self.model.device)
        self.meter.forward(requests, packed.plan, [sum(b.query.size for b in bs) for bs in branches])
        hidden, layers = self.tapped(packed.plan)
        split = packed.split(hidden, branches)
        entries: list[list[Entry]] = []
        for row, line in enumerate(asked.lines):
            number = self.wrote(line, asked.queries[row])
            fresh = [Entry(asked.queries[row], split[row][0], number, 0)]
            for g, states, (lanes, at) in zip(guesses[row], split[row][1:], packed.places[row][1:], strict=True):
                kept = [torch.from_numpy(np.flatnonzero(f.keep) + at).to(hidden.device) for f in g.query.feeds]
                kv = Kept(layers, lanes, kept) if layers and any(map(len, kept)) else None
                fresh.append(Entry(g.query, states, line.number(g.query), g.depth, kv))
            entries.append(fresh)
        laid = torch.stack([lay(e[0].hidden, q) for e, q in zip(entries, asked.queries, strict=True)], 1)
        return laid.flatten(0, 1), entries

    def wrote(self, line: Line, query: Query | None) -> int:
        """Note what a true forward left in the store."""
        if query is None:  # without a memo nobody asks who wrote what: everything may be new
            number = line.numbers.setdefault(b"plain %d" % len(line.numbers), len(line.numbers))
            line.authors = line.held = {lane: np.full_like(a, number) for lane, a in line.authors.items()}
            return number
        number = line.number(query)
        line.authors, line.held = written(line.authors, query, number), written(line.held, query, number)
        self.settle(line)
        return number

    def tapped(self, plan: Plan) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """A forward, and the keys and values that it computed."""
        if self.store is None or not plan.stored:
            return self.hidden(plan), []
        store, layers = self.store, list[tuple[Tensor, Tensor]]()
        self.store = store._replace(tap=layers)
        try:
            return self.hidden(plan), layers
        finally:
            self.store = store

    # -- the step -----------------------------------------------------------------------------------------------------

    def finish(self, asked: Asked, hidden: Tensor, *, hit: bool, plain: bool) -> Part:
        """Take the step, check it if the mode asks for that, and remember its prediction to draft from."""
        pred = self.read(self.answer(asked, hidden), asked.window)
        after = step(self.s, asked.state, asked.window, pred)
        doubtful: list[int] = []
        if self.setting.mode == "guarded" and not plain:
            doubtful = self.doubtful(asked, pred, after)
        elif self.setting.mode == "fast" and hit:
            hits = [self.report[line.request].hits for line in asked.lines]
            doubtful = [i for i, count in enumerate(hits) if count % self.setting.audit == 0]
        if doubtful:
            after, hidden = self.confirm(asked, doubtful, after, hidden, hit)
        self.remember(asked, hidden, after, hit=hit)
        rows = torch.tensor(asked.rows, device=asked.lane.device)
        return Part(rows, after, asked.window)

    def answer(self, asked: Asked, hidden: Tensor) -> Answer:
        planned = asked.plan.pos.shape[1]
        return Answer(self.model, self.s, self.options, asked.state, asked.window, asked.fed, hidden, planned)

    def remember(self, asked: Asked, hidden: Tensor, after: State, *, hit: bool) -> None:
        n, planned = len(asked.rows), asked.plan.pos.shape[1]
        fed, pos, states = (x.unflatten(0, (-1, n)) for x in (asked.fed.ids, asked.fed.pos, hidden))  # (copies, B, ...)
        blocks = asked.window.lo.tolist() if self.setting.restart else [-1] * n
        for i, (line, block) in enumerate(zip(asked.lines, blocks, strict=True)):
            line.clock += 1
            self.report[line.request].steps += 1
            if not hit and not line.recent:
                line.home = block
            source = Source(after, i, fed[:, i], pos[:, i], states[:, i], planned, line.authors)
            line.recent = [*line.recent, source] if hit else [source]
            if block != line.home:
                line.recent = []

    def doubtful(self, asked: Asked, pred: Prediction, after: State) -> list[int]:
        """Rows whose decision a change of the logits by `delta` could turn over.

        The worst case of a rule that is monotone in each confidence: what was chosen gets less sure, the rest more.
        """
        at = asked.window.reads.clamp(min=0)
        chosen = asked.state.canvas.masked.gather(1, at) & ~after.canvas.masked.gather(1, at)
        signs = (1.0,) if self.options.law.greedy else (1.0, -1.0)
        same = torch.ones_like(after.done)
        for sign in signs:
            change = torch.where(chosen, -2.0, 2.0)[..., None].to(pred.logits.dtype) * self.delta * sign
            logits = pred.logits.scatter_add(-1, pred.argmax[..., None], change)
            other = Prediction(
                logits, pred.cols, law=pred.law, seed=pred.seed, step=pred.step, more=pred.more, answer=pred.answer
            )
            same &= alike(after, step(self.s, asked.state, asked.window, other))
        return [i for i, ok in enumerate(same.tolist()) if not ok]

    def confirm(self, asked: Asked, rows: list[int], after: State, hidden: Tensor, hit: bool) -> tuple[State, Tensor]:
        """Take the steps of these rows again on a forward of the plain shape; in mode fast only compare."""
        copies = hidden.shape[0] // len(asked.rows)
        sub = asked.take(rows, copies)
        for line, query in zip(sub.lines, sub.queries, strict=True):
            if query.stored and line.behind(query):
                own = line.debts.pop() if hit else None
                self.repay(line)
                line.debts += [own] if own is not None else []
        self.meter.forward([line.request for line in sub.lines], sub.fed)
        single = self.hidden(sub.fed)
        again = step(self.s, sub.state, sub.window, self.read(self.answer(sub, single), sub.window))
        index = torch.tensor(rows, device=asked.lane.device)
        for line, query, same in zip(sub.lines, sub.queries, alike(after.take(index), again).tolist(), strict=True):
            stats = self.report[line.request]
            stats.audits += self.setting.mode == "fast"
            stats.reruns += self.setting.mode != "fast"
            stats.divergences += not same
            line.held = written(line.held, query, line.number(query))
            self.settle(line)
        if self.setting.mode == "fast":
            return after, hidden
        wide = torch.cat([index + c * len(asked.rows) for c in range(copies)])
        hidden = hidden.clone()
        hidden[wide] = single
        return after.put(index, again), hidden

    def settle(self, line: Line) -> None:
        """Forget the debts of a line whose store is up to date."""
        if all((line.authors[i] == line.held[i]).all() for i in line.authors):
            line.debts = []


def alike(a: State, b: State) -> Tensor:
    """(B,) whether two states hold the same tokens and the same verdicts."""
    same = (a.canvas.ids == b.canvas.ids).all(1) & (a.canvas.masked == b.canvas.masked).all(1)
    return same & (a.canvas.length == b.canvas.length) & (a.done == b.done) & (a.closing == b.closing)


# -- drafting ---------------------------------------------------------------------------------------------------------


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
            rows = [i for i, s in zip(rows, sources, strict=True) if len(s.ids) == len(sources[0].ids)]
            sources = [asked.lines[i].recent[-1 - age] for i in rows]
            if age == 0:
                at = torch.tensor(rows, device=asked.lane.device)
                state, win, authors = asked.state.take(at), asked.window.take(at), [self.roots[i] for i in rows]
            else:
                state, win = opened(self.walk.s, _gather(sources))
                authors = [asked.lines[i].recent[-age].authors for i in rows]
            stale = Stale(self.walk, sources)
            draw = self.roll if setting.drafter == "roll" else self.ladder
            draw(rows, state, win, stale, authors, limit)
        return self.guesses

    def roll(
        self, rows: list[int], state: State, win: Window, stale: Stale, authors: list[Authors], limit: int
    ) -> None:
        """Repeat the sampler's step on the stale predictions, row by row until its horizon."""
        parents, index = [0] * len(rows), list(range(len(rows)))
        for depth in range(1, 2 * limit + 1):
            read = stale.read(index, state, win)
            if read is None:
                return
            kept, pred = read
            state, win = _take(kept, state, win)
            after = step(self.walk.s, state, win, pred)
            index = [index[i] for i in kept]
            kept = [i for i, over in enumerate((after.done | after.closing).tolist()) if not over]
            if not kept:
                return
            index = [index[i] for i in kept]
            state, win = opened(self.walk.s, _take(kept, after)[0])
            kept = self.place([rows[i] for i in index], state, win, index, authors, parents, depth, limit)
            if not kept:
                return
            index = [index[i] for i in kept]
            state, win = _take(kept, state, win)

    def ladder(
        self, rows: list[int], state: State, win: Window, stale: Stale, authors: list[Authors], limit: int
    ) -> None:
        """The state with its 1, 2, ... surest stale tokens written."""
        s = self.walk.s
        read = stale.read(list(range(len(rows))), state, win)
        if read is None:
            return
        index, pred = read
        state, win = _take(index, state, win)
        for count in range(1, limit + 1):
            view, soft = View(state, win), pred
            if hasattr(s.window, "narrow"):
                s.window.narrow(view, pred)
            for adjust in s.adjust:
                soft = adjust(view, soft)
            chosen = rank(s.score(view, soft), view.live) < count
            after = advance(view, pred, view.commit(chosen, soft.token))
            kept = [i for i, over in enumerate((after.done | after.closing).tolist()) if not over]
            if not kept:
                return
            mine = [index[i] for i in kept]
            guess, guess_win = opened(s, _take(kept, after)[0])
            chains = dict(enumerate(authors))
            self.place([rows[i] for i in mine], guess, guess_win, mine, chains, dict.fromkeys(mine, 0), count, limit)

    def place(
        self,
        rows: list[int],
        state: State,
        win: Window,
        index: list[int],
        authors: Any,
        parents: Any,
        depth: int,
        limit: int,
    ) -> list[int]:
        """Add the query of each state to its row's guesses; which states may be followed further."""
        going, edges = [], None
        if not self.walk.setting.cross_blocks:
            edges = (win.lo >= self.asked.window.hi[torch.tensor(rows, device=win.lo.device)]).tolist()
        lane = self.asked.lane[torch.tensor(rows, device=self.asked.lane.device)]
        for part, plan in self.walk.policy.plan(state, win, lane):
            at = list(range(len(rows))) if part is None else part.tolist()
            own, own_win = (state, win) if part is None else (state.take(part), win.take(part))
            for i, query in zip(at, queries(self.walk.expand(own, own_win, plan), len(at)), strict=True):
                row, me = rows[i], index[i]
                if query.opening or len(self.guesses[row]) >= limit or (edges is not None and edges[i]):
                    continue
                name(query, authors[me])
                parent = self.add(row, query, authors[me], parents[me], depth)
                if parent is not None:
                    number = self.asked.lines[row].number(query)
                    authors[me], parents[me] = written(authors[me], query, number), parent
                    going.append(i)
        return sorted(going)

    def add(self, row: int, query: Query, authors: Authors, parent: int, depth: int) -> int | None:
        """The branch of this query, new or known; None where its keys and values cannot be had in this forward."""
        line, known, views = self.asked.lines[row], self.index[row], self.views[row]
        if query.key in known:
            return known[query.key]
        if query.key in line.memo:
            return parent
        if len(query.feeds) != len(self.asked.queries[row].feeds):
            return None
        view = views[parent]
        if any((view[f.lane][o] != authors[f.lane][o]).any() for f, o in zip(query.feeds, query.outside, strict=False)):
            return None
        self.guesses[row].append(Guess(query, parent, depth))
        known[query.key] = len(self.guesses[row])
        views.append(written(view, query, line.number(query)))
        return known[query.key]


def _take(rows: list[int], state: State, win: Window | None = None) -> tuple[State, Any]:
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

        def stack(tables: list[Tensor], value: int) -> Tensor:  # (copies, B, Q + E, ...)
            return torch.stack(
                [_widen(t, s.planned, self.planned, extra, value) for t, s in zip(tables, sources, strict=True)], 1
            )

        self.ids = stack([s.ids for s in sources], 0)
        self.pos = stack([s.pos for s in sources], -1)
        self.hidden = stack([s.hidden for s in sources], 0)
        self.last: tuple[list[int], Prediction] | None = None

    def read(self, index: list[int], state: State, win: Window) -> tuple[list[int], Prediction] | None:
        """Predictions at what the windows read, and the rows (of `index`) whose forward covered that."""
        walk, reads = self.walk, win.reads
        if walk.options.law.greedy and self.last and self.last[0] == index and torch.equal(self.last[1].cols, reads):
            return list(range(len(index))), self.last[1]
        answer = self._answer(index, state, win)
        kept = [i for i, ok in enumerate(answer.covered(reads).tolist()) if ok]
        if not kept:
            return None
        if len(kept) < len(index):
            index = [index[i] for i in kept]
            state, win = _take(kept, state, win)
            answer = self._answer(index, state, win)
        pred = answer.read(win.reads)
        assert pred is not None
        self.last = (index, pred)
        return kept, pred

    def _answer(self, index: list[int], state: State, win: Window) -> Answer:
        at, walk = torch.tensor(index, device=self.pos.device), self.walk
        ids, pos, hidden = (x[:, at].flatten(0, 1) for x in (self.ids, self.pos, self.hidden))
        plan = Plan(ids, pos, None, None, None, None, False, False)
        return Answer(walk.model, walk.s, walk.options, state, win, plan, hidden, self.planned)


def _widen(x: Tensor, planned: int, width: int, extra: int, value: int) -> Tensor:
    """A table (copies, Q + E, ...) with its planned and its private columns padded to `width` and `extra`."""
    tail = (0, 0) * (x.dim() - 2)
    front, back = x[:, :planned], x[:, planned:]
    front = F.pad(front, (*tail, 0, width - planned), value=value)
    return torch.cat([front, F.pad(back, (*tail, 0, extra - back.shape[1]), value=value)], 1)


# -- how many rows ----------------------------------------------------------------------------------------------------


class Pace:
    """What a forward costs and how often guesses come true, learned over all calls of a model, sampler and cache.

    Cost is a straight line in the rows of a forward, a + b m, fitted with slow forgetting. With hit rate h_k at depth k
    a forward of R rows a sequence takes g(R) = 1 + h_1 + h_1 h_2 + ... steps; R maximises g(R) / cost(n R).
    """

    known: ClassVar[weakref.WeakKeyDictionary[Any, dict[Any, Any]]] = weakref.WeakKeyDictionary()  # by model
    PRIOR = 0.6  # hit rate before anything was seen; decays into what is seen within some twenty guesses
    PROBE = 0.03  # share of the time that may be spent on finding out

    def __init__(self, costs: Mapping[int, float] | None = None) -> None:
        self.costs = costs
        self.hits: dict[int, tuple[float, float]] = {}  # depth -> decayed hits, guesses
        self.sums = np.zeros(5)  # of 1, m, m^2, t, m t
        self.total = self.spent = 0.0
        self.rows = 1

    @classmethod
    def of(cls, model: Any, sampler: Any, policy: Any, setting: Lookahead) -> Pace:
        if setting.costs is not None:
            return cls(dict(setting.costs))
        mine = cls.known.setdefault(model, {})
        return mine.setdefault((sampler.name, policy.name, setting.drafter), cls())

    def learn(self, streak: int, guessed: int) -> None:
        """A round of `guessed` guesses, of which the first `streak` came true."""
        for depth in range(1, min(streak + 1, guessed) + 1):
            hits, seen = self.hits.get(depth, (self.PRIOR * 4, 4.0))
            self.hits[depth] = (0.95 * hits + (depth <= streak), 0.95 * seen + 1)

    def rate(self, depth: int) -> float:
        """Share of guesses at this depth that come true, once the shallower ones did."""
        known = [d for d in self.hits if d <= depth]
        hits, seen = self.hits[max(known)] if known else (self.PRIOR, 1.0)
        return hits / seen

    def survival(self, depth: int) -> float:
        return float(np.prod([self.rate(k) for k in range(1, depth + 1)]))

    def note(self, m: int, seconds: float, n: int) -> None:
        """A forward of m rows for n sequences took so long."""
        self.total += seconds
        if m > n:
            self.spent += max(seconds - self.cost(n), 0.0)
        self.sums = 0.98 * self.sums + np.array([1, m, m * m, seconds, m * seconds])

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
        """Rows a sequence for the next forward of n sequences."""
        sizes = [r for r in ROWS if r == 1 or most is None or n * r <= most]
        self.rows = max(sizes, key=lambda r: (round(self.gain(r) / self._price(n, r), 9), -r))
        if self.rows == 1 and self.costs is None and len(sizes) > 1:
            affordable = self.spent + self.cost(n) <= self.PROBE * self.total
            self.rows = 2 if affordable else 1
        return self.rows

    def gain(self, rows: int) -> float:
        return sum(self.survival(k) for k in range(rows))

    def _price(self, n: int, r: int) -> float:
        if self.costs is None:
            return self.cost(n * r)
        table = sorted((int(k), float(v)) for k, v in self.costs.items())
        return float(np.interp(r, [k for k, _ in table], [v for _, v in table]))


_DELTAS: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
SAFETY = 16.0  # times the largest difference seen in one probe


def measured_delta(model: Any) -> float:
    """Bound on how far the logits of a row move with the shape of the forward: one row against eight, once a model."""
    if model not in _DELTAS:
        width = min(64, model.max_positions)
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.vocab_size, (8, width), generator=draws).to(model.device)
        together = model.logits(model.forward(ids, None))
        apart = torch.cat([model.logits(model.forward(row[None], None)) for row in ids])
        finite = torch.isfinite(apart)
        gap = (together - apart)[finite].abs().max()
        floor = apart[finite].abs().max() * torch.finfo(apart.dtype).eps
        _DELTAS[model] = SAFETY * float(torch.maximum(gap, floor))
    return _DELTAS[model]
