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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm import spec as plain
from dllm.decoding import engine
from dllm.decoding.canvas import Plan, State
from dllm.decoding.engine import Answer, Part, Runner, opened, step
from dllm.decoding.prediction import Prediction
from dllm.errors import DllmError, unknown
from dllm.lookahead.branches import Branch, Query, lay, name, pack, queries
from dllm.lookahead.guesses import Drafts
from dllm.lookahead.memo import Asked, Entry, Guess, Kept, Line, Source, written
from dllm.lookahead.pace import Pace
from dllm.samplers.base import KINDS, misfit

MODES = ("exact", "guarded", "fast")
DRAFTERS = ("roll", "ladder")
RELAXATIONS = ("subset",)


def _costs(table: Any) -> bool:
    """Whether this says what forwards of some numbers of rows cost."""
    (rows, _), (cost, _) = KINDS["int"], KINDS["float"]
    return isinstance(table, Mapping) and bool(table) and all(rows(k) and cost(v) and v > 0 for k, v in table.items())


@dataclass(frozen=True)
class Lookahead:
    """How far to look ahead, and what is promised.

    rows          query rows of a sequence in one forward, the true one included; "auto" takes what the measured cost of
                  a forward and the hits so far make fastest (1: no lookahead).
    mode          exact    identical to the plain call, never more forwards. For float64 weights, and for models that
                           declare `batch_invariant = True`: logits do not depend on what runs in the same forward.
                  guarded  identical to the plain call of each prompt by itself as long as logits differ between
                           forward shapes by less than `delta`, for rules that are monotone in each confidence. A
                           decision that a change of `delta` could turn over is taken again on the forward of that plain
                           call. Forwards: those of the plain call at most, plus these re-runs (in `stats`).
                  fast     no promise. Every `audit`-th hit is checked on a forward of its own and the rate of
                           divergent decisions reported. Never more forwards than the plain call.
                  None     exact where it can be had, else guarded.
    drafter       roll     repeat the sampler's own step on the last prediction.
                  ladder   the current state with the 1, 2, ... surest tokens written.
    retain        keep evaluated guesses until the cache is refreshed, not only until the next forward.
    multi_source  draft from all states passed since the last forward, not only from the last one.
    cross_blocks  guess beyond the end of the block, where the forward covers that (no cache, block-causal models).
    ahead         block-causal models: blocks of masks that each row reads behind its own, so that guesses reach beyond
                  the edge. Each costs its columns; without any, thresholds in small blocks save next to nothing.
    restart       a row that has moved on to another block begins there with a forward of its own and without guesses,
                  as FreeDave's released eager mode does.
    max_rows      query rows of a whole forward; None: `rows` for each sequence. The likeliest guesses get them.
    relax         a rule that changes the output; `out.lossless` is False then, and the plain call's forwards no bound.
                  subset   a step whose outcome was not guessed is cut down to the largest guess inside it, whose answer
                           is there already: the threshold variant of FreeDave's released code.
    """

    rows: int | str = 4
    mode: str | None = None
    drafter: str = "roll"
    retain: bool = True
    multi_source: bool = True
    cross_blocks: bool = True
    ahead: int = 1
    restart: bool = False
    max_rows: int | None = None
    delta: float | None = None  # bound on logit differences; None: measured
    audit: int = 16
    costs: Mapping[int, float] | None = None  # recorded cost of a forward for 1, 2, ... rows; None: measured
    relax: str | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if what := misfit(f.type, value := getattr(self, f.name)):
                raise DllmError(f"lookahead {f.name}={value!r} must be {what}")
        if self.costs is not None and not _costs(self.costs):
            raise DllmError(f"lookahead costs={self.costs!r} must be a table such as {{1: 1.0, 8: 1.3}}")
        if self.rows != "auto" and (not isinstance(self.rows, int) or isinstance(self.rows, bool) or self.rows < 1):
            raise DllmError(f"lookahead rows={self.rows!r} must be 'auto' or an integer of at least 1")
        if self.mode is not None and self.mode not in MODES:
            raise unknown("lookahead mode", str(self.mode), MODES)
        if self.drafter not in DRAFTERS:
            raise unknown("lookahead drafter", str(self.drafter), DRAFTERS)
        if self.relax is not None and self.relax not in RELAXATIONS:
            raise unknown("lookahead relaxation", str(self.relax), RELAXATIONS)
        if self.max_rows is not None and self.max_rows < 1:
            raise DllmError(f"lookahead max_rows={self.max_rows!r} must be at least 1")
        if self.ahead < 0:
            raise DllmError(f"lookahead ahead={self.ahead!r} must not be negative")
        if self.audit < 1 or (self.delta is not None and self.delta < 0):
            raise DllmError(f"lookahead audit={self.audit} must be at least 1 and delta={self.delta} not negative")

    @classmethod
    def parse(cls, spec: Any) -> Lookahead:
        """From 4, "auto", "8:mode=fast", {"rows": 8, "mode": "fast"}, a Lookahead. Errors: unknown keys, bad values."""
        if isinstance(spec, Lookahead):
            return spec
        if isinstance(spec, str):
            rows, _, rest = spec.partition(":")
            items = [i.split("=", 1) for i in (f"rows={rows}", *filter(None, rest.split(",")))]
            try:
                spec = {key.strip(): plain.value(value) for key, value in items}
            except ValueError as error:
                raise DllmError(f"lookahead {spec!r} is not of the form rows:setting=value,...") from error
        if not isinstance(spec, Mapping):
            return cls(rows=spec)
        known = {f.name for f in dataclasses.fields(cls)}
        for key in spec:
            if key not in known:
                raise unknown("lookahead setting", str(key), known)
        return cls(**spec)

    @property
    def lossless(self) -> bool:
        """Whether the output is that of the plain call, under the conditions of the mode."""
        return self.mode != "fast" and self.relax is None

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
    cuts: int = 0  # steps that a relaxation cut down
    depth: dict[int, int] = field(default_factory=dict)  # hits by how many steps ahead they were guessed
    delta: float = 0.0  # the bound that mode guarded relied on

    def report(self, setting: Lookahead) -> dict[str, Any]:
        """As an output shows it."""
        return {**dataclasses.asdict(self), **{k: getattr(setting, k) for k in ("mode", "drafter", "relax")}}


class Walk(Runner):
    """The runner that looks ahead. `report` collects the statistics of each request."""

    def __init__(self, *args: Any, setting: Lookahead, report: dict[int, Stats]) -> None:
        super().__init__(*args)
        self.plain = self.policy
        if setting.ahead and setting.cross_blocks and self.policy.exact and self.policy.block_size:
            self.policy = dataclasses.replace(self.policy, ahead=setting.ahead)
        self.setting, self.report = setting, report
        self.lines: dict[int, Line] = {}
        self.pace = Pace.of(self.model, self.s, self.policy, setting)
        self.delta = 0.0
        if setting.mode == "guarded":
            self.delta = setting.delta if setting.delta is not None else measured_delta(self.model)
        self.batch = 0  # rows of the tick
        self.limit = 1  # query rows of a sequence in the next forward

    # -- the tick -----------------------------------------------------------------------------------------------------

    def clock(self, lane: int) -> int:
        return self.lines[lane].clock if lane in self.lines else 0

    def tick(self, state: State, lane: Tensor, requests: list[int]) -> list[Part]:
        """Step every row whose answer is known; when none is, one forward for the rows that are furthest behind.

        All rows of their shape class ride along. So each forward serves a tick of the plain call, and there are never
        more of them than there.
        """
        began, self.batch = time.perf_counter(), len(requests)
        lines = [self.line(l, r) for l, r in zip(lane.tolist(), requests, strict=True)]
        ready = [i for i, line in enumerate(lines) if not line.waiting]
        groups = None
        if any(lines[i].memo for i in ready):
            groups = self.ask(state, lane, lines, ready, ahead=True)
            if parts := [p for group in groups for p in self.hits(group)]:
                self.pace.note_hit(time.perf_counter() - began)
                return parts
        rows, most = self.setting.rows, self.setting.max_rows
        self.limit = self.pace.choose(len(lines), most) if rows == "auto" else int(rows)
        if groups is None or len(ready) < len(lines) or self.limit == 1:
            groups = self.ask(state, lane, lines, list(range(len(lines))), ahead=self.limit > 1)
        last = min(line.clock for line in lines)
        due = [g for g in groups if any(line.clock == last for line in g.lines)]
        parts = [self.miss(g) for g in due]
        if rows == "auto" and len(due) == 1 and not any(q.opening for q in due[0].queries):
            evaluated = sum(1 + line.guessed for line in due[0].lines)
            self.pace.note(evaluated, time.perf_counter() - began, len(due[0].lines))
        return parts

    def line(self, lane: int, request: int) -> Line:
        line = self.lines.get(lane)
        if line is None or line.request != request:
            slots = self.store.keys[0].shape[2] if self.store is not None else 0
            lanes = self.s.inputs.lanes if self.s.inputs is not None else 1
            own = range(lanes * lane, lanes * (lane + 1))
            line = self.lines[lane] = Line(request, line.clock if line else 0, own, slots, not self.policy.sparse)
            self.report[request] = Stats(delta=self.delta)
        return line

    def ask(self, state: State, lane: Tensor, lines: list[Line], rows: list[int], *, ahead: bool) -> list[Asked]:
        """Open the windows of these rows and plan their forwards, with the names of their queries to look `ahead`."""
        if len(rows) < len(lines):
            index = torch.tensor(rows, device=lane.device)
            state, lane = state.take(index), lane[index]
        state, win = opened(self.s, state)
        out = []
        for part, plan in (self.policy if ahead else self.plain).plan(state, win, lane):
            own, own_win, at, own_lane = state, win, list(range(len(rows))), lane
            if part is not None:
                own, own_win, at, own_lane = state.take(part), win.take(part), part.tolist(), lane[part]
            mine = [rows[i] for i in at]
            fed = self.expand(own, own_win, plan)
            asked = queries(fed, len(at)) if ahead else []
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
        group = asked.take(index)
        laid = torch.stack(
            [lay(e.hidden, q, group.copies) for e, q in zip(entries, group.queries, strict=True)], 1
        )  # (copies, B, Q, D)
        for line, entry in zip(group.lines, entries, strict=True):
            self.count_hit(line, entry)
        return [self.finish(group, laid.flatten(0, 1), hit=True, alone=False)]

    def count_hit(self, line: Line, entry: Entry) -> None:
        stats, (query, _, depth, _) = self.report[line.request], entry.guess
        stats.hits += 1
        stats.retained += entry.old
        stats.depth[depth] = stats.depth.get(depth, 0) + 1
        line.streak += not entry.old
        if query.keeps:
            line.authors = written(line.authors, query, entry.number)
            line.debts.append(entry)

    def miss(self, asked: Asked) -> Part:
        """One forward for these rows, with guesses beside them."""
        guesses: list[list[Guess]] = [[] for _ in asked.rows]
        for i, line in enumerate(asked.lines):
            self.close_round(line, asked.queries[i] if asked.queries else None)
        if self.limit > 1 and not any(q.opening for q in asked.queries):
            guesses = self.share(asked.lines, Drafts(self, asked).draw(self.limit - 1))
        hidden, evaluated = self.evaluate(asked, guesses)
        for line, fresh in zip(asked.lines, evaluated, strict=True):
            line.memo |= {entry.guess.query.key: entry for entry in fresh}
            line.guessed, line.streak, line.waiting = len(fresh), 0, False
            stats = self.report[line.request]
            stats.forwards += 1
            stats.rows += 1 + len(fresh)
        plain = self.policy is self.plain or not asked.queries
        alone = len(asked.rows) == 1 and plain and not any(guesses)
        return self.finish(asked, hidden, hit=False, alone=alone)

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
        if line.debts and (query is None or not line.steady or line.behind(query)):
            self.repay(line)
        if query is None or query.opening or not self.setting.retain:
            line.memo.clear()
        for key, entry in list(line.memo.items()):
            if not entry.old and entry.kv is not None:  # a finished block is worth its memory; a span of masks is not
                entry.kv = None if any(f.keep.all() for f in entry.guess.query.feeds) else entry.kv.alone()
            entry.old = True
            if entry.kv is None and entry.guess.query.keeps and not line.steady:
                del line.memo[key]

    def note_span(self, line: Line, query: Query) -> None:
        """Where steps rewrite ever other slots, a guess is of use only with the keys and values that it wrote."""
        span = None if query.opening else [f.pos[f.keep].tobytes() for f in query.feeds]
        line.steady = line.steady and (span is None or line.span is None or span == line.span)
        line.span = span

    def repay(self, line: Line) -> None:
        """Write what the hits since the last forward would have written: from their own keys and values, else again."""
        for entry in line.debts:
            query = entry.guess.query
            if entry.kv is not None:
                entry.kv.write(self.store, query)
            else:
                packed = pack([[Branch(query, -1)]], self.model.device)
                self.meter.forward([line.request], packed.plan)
                self.hidden(packed.plan)
                self.report[line.request].reruns += 1
        line.debts, line.held = [], line.authors

    def evaluate(self, asked: Asked, guesses: list[list[Guess]]) -> tuple[Tensor, list[list[Entry]]]:
        """Run the true queries and the guesses: hidden states of the former as planned, and answers to the latter."""
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
            self.wrote(line, asked.queries[row])
            fresh = []
            for g, states, (lanes, at) in zip(guesses[row], split[row][1:], packed.places[row][1:], strict=True):
                kept = [torch.from_numpy(np.flatnonzero(f.keep) + at).to(hidden.device) for f in g.query.feeds]
                kv = Kept(layers, lanes, kept) if layers and any(map(len, kept)) else None
                fresh.append(Entry(g, states, line.number(g.query), kv))
            entries.append(fresh)
        laid = torch.stack([lay(states[0], q, asked.copies) for states, q in zip(split, asked.queries, strict=True)], 1)
        return laid.flatten(0, 1), entries

    def wrote(self, line: Line, query: Query | None) -> None:
        """Note what a true forward left in the store."""
        if self.store is None:
            return
        if query is None:  # without a memo nobody asks who wrote what: everything may be new
            number = line.numbers.setdefault(b"plain %d" % len(line.numbers), len(line.numbers))
            line.authors = line.held = {lane: np.full_like(a, number) for lane, a in line.authors.items()}
            return
        number = line.number(query)
        line.authors, line.held = written(line.authors, query, number), written(line.held, query, number)
        line.settle()

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

    def finish(self, asked: Asked, hidden: Tensor, *, hit: bool, alone: bool) -> Part:
        """Take the step, check it if the mode asks for that, and remember its prediction to draft from.

        alone: the hidden states are those of the plain call of a single row.
        """
        pred = self.read(self.answer(asked, hidden), asked.window)
        after = engine.step(self.s, asked.state, asked.window, pred)
        doubtful: list[int] = []
        if self.setting.mode == "guarded" and not alone:
            doubtful = self.doubtful(asked, pred, after)
        elif self.setting.mode == "fast" and hit:
            hits = [self.report[line.request].hits for line in asked.lines]
            doubtful = [i for i, count in enumerate(hits) if count % self.setting.audit == 0]
        for i in doubtful:
            after = self.confirm(asked, i, after, hit)
        if self.setting.relax is not None:
            after = self.cut(asked, after)
        self.remember(asked, hidden, after, hit=hit)
        all_rows = len(asked.rows) == self.batch
        return Part(None if all_rows else torch.tensor(asked.rows, device=asked.lane.device), after, asked.window)

    def answer(self, asked: Asked, hidden: Tensor) -> Answer:
        planned = asked.plan.pos.shape[1]
        return Answer(self.model, self.s, self.options, asked.state, asked.window, asked.fed, hidden, planned)

    def remember(self, asked: Asked, hidden: Tensor, after: State, *, hit: bool) -> None:
        n, planned = len(asked.rows), min(asked.plan.pos.shape[1], asked.fed.pos.shape[1])  # inputs may cut the canvas
        fed, pos, states = (x.unflatten(0, (-1, n)) for x in (asked.fed.ids, asked.fed.pos, hidden))  # (copies, B, ...)
        blocks = asked.window.lo.tolist() if self.setting.restart else [-1] * n
        for i, (line, block) in enumerate(zip(asked.lines, blocks, strict=True)):
            line.clock += 1
            self.report[line.request].steps += 1
            if not hit and not line.recent:  # nothing to draft from: it ran without guesses
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

    def confirm(self, asked: Asked, i: int, after: State, hit: bool) -> State:
        """Take the step of row i again, by itself as in its plain call; in mode fast only compare."""
        line, query = asked.lines[i], asked.queries[i] if asked.queries else None
        if query is not None and query.stored and line.behind(query):
            if hit and query.keeps:
                line.debts.pop()  # its own, which this forward writes
            self.repay(line)
        row = torch.tensor([i], device=asked.lane.device)
        state, win = asked.state.take(row), asked.window.take(row)
        ((_, plan),) = self.plain.plan(state, win, asked.lane[row])
        again = engine.step(self.s, state, win, self(state, win, plan, [line.request]))
        stats, fast = self.report[line.request], self.setting.mode == "fast"
        stats.audits += fast
        stats.reruns += not fast
        stats.divergences += not bool(alike(after.take(row), again))
        if query is not None:
            line.held = written(line.held, query, line.number(query))
            line.settle()
        return after if fast else after.put(row, again)

    def cut(self, asked: Asked, after: State) -> State:
        """The subset rule: each step cut down to the largest guess inside it, where there is one."""
        before, canvas = asked.state.canvas, after.canvas
        for i, line in enumerate(asked.lines):
            new = before.masked[i] & ~canvas.masked[i]
            inside = [
                (int((e.guess.ids != before.ids[i]).sum()), e.guess.ids)
                for e in line.memo.values()
                if not e.old and bool(((e.guess.ids == canvas.ids[i]) | (new & (e.guess.ids == canvas.mask_id))).all())
            ]
            size, ids = max(inside, key=lambda x: x[0], default=(0, canvas.ids[i]))
            if not size or torch.equal(ids, canvas.ids[i]):
                continue
            self.report[line.request].cuts += 1
            row = torch.tensor([i], device=asked.lane.device)
            masked = (canvas.masked[i] | (new & (ids == canvas.mask_id)))[None]
            no = torch.zeros_like(row, dtype=torch.bool)
            own = after.take(row)
            own = own._replace(canvas=own.canvas._replace(ids=ids[None], masked=masked), done=no, closing=no)
            after = after.put(row, own)
        return after


def alike(a: State, b: State) -> Tensor:
    """(B,) whether two states hold the same tokens and the same verdicts."""
    same = (a.canvas.ids == b.canvas.ids).all(1) & (a.canvas.masked == b.canvas.masked).all(1)
    return same & (a.canvas.length == b.canvas.length) & (a.done == b.done) & (a.closing == b.closing)


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
