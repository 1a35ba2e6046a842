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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm.decoding.canvas import Plan, State
from dllm.decoding.engine import Answer, Part, Runner, opened, step
from dllm.decoding.prediction import Prediction
from dllm.lookahead.branches import Branch, Query, lay, name, pack, queries
from dllm.lookahead.guard import alike, measured_delta
from dllm.lookahead.guesses import Drafts
from dllm.lookahead.memo import Asked, Entry, Guess, Kept, Line, Source, written
from dllm.lookahead.pace import Pace
from dllm.lookahead.setting import Lookahead, Stats


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
        grids = {"fresh": plan.fresh, "keep": plan.keep, "visible": plan.visible, "lane": plan.lane}
        return self.model.forward_kv(plan.ids, plan.pos, **grids, store=self.store)

    # -- the step -----------------------------------------------------------------------------------------------------

    def finish(self, asked: Asked, hidden: Tensor, *, hit: bool, alone: bool) -> Part:
        """Take the step, check it if the mode asks for that, and remember its prediction to draft from.

        alone: the hidden states are those of the plain call of a single row.
        """
        pred = self.read(self.answer(asked, hidden), asked.window)
        after = self.options.step(self.s, asked.state, asked.window, pred)
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
        again = self.options.step(self.s, state, win, self(state, win, plan, [line.request]))
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
            own, no = after.take(row), torch.zeros_like(row, dtype=torch.bool)
            less = own.canvas.write((new & (ids == canvas.mask_id))[None], ids[None])
            after = after.put(row, own._replace(canvas=less, done=no, closing=no))
        return after
