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

import time
from dataclasses import dataclass
from typing import ClassVar

from dllm.decoding.cache.policy import planned
from dllm.decoding.canvas import Plan, State, mapped
from dllm.decoding.facts import Shape, kinds, reach
from dllm.decoding.graphs import index
from dllm.decoding.meter import Ticket, computed, served
from dllm.decoding.prediction import Prediction
from dllm.decoding.runner import Batch, Part, Runner, Stepped, Turn
from dllm.decoding.step import expanded, feeding
from dllm.lookahead.branches import Branch, Evaluated, laid, pack, queries
from dllm.lookahead.guard import alike, bound, doubtful
from dllm.lookahead.guesses import Guesses
from dllm.lookahead.ledger import Ledger
from dllm.lookahead.memo import Group, RowMemo, Source
from dllm.lookahead.pace import Pace
from dllm.lookahead.released import restart, subset
from dllm.lookahead.setting import Lookahead, Stats
from dllm.models.transformer import Outputs, Said


@dataclass(eq=False)
class LookaheadRunner(Runner):
    """The runner that looks ahead; a ticket gets the statistics of its row."""

    shares: ClassVar[bool] = False
    setting: Lookahead

    def __post_init__(self) -> None:
        setting = self.setting
        self.far = setting.far(self.policy)  # of forwards with guesses; `policy` is the plain call's
        self.rows: dict[int, RowMemo] = {}  # by lane
        self.rested: dict[int, int] = {}  # steps of lanes that stood empty meanwhile
        self.pace = Pace.of(self.model, self.s, self.policy, setting, "memo")
        self.delta = bound(setting, self.model) or 0.0

    # -- the tick -----------------------------------------------------------------------------------------------------

    def clock(self, lane: int) -> int:
        """Steps that a lane has taken."""
        own = self.rows[lane].clock if lane in self.rows else 0
        return max(own, self.rested.get(lane, 0))

    def rest(self, lanes: list[int], clock: int) -> None:
        """See `Runner`."""
        self.rested.update(dict.fromkeys(lanes, clock))

    def tick(self, batch: Batch) -> list[Stepped]:
        """Step every row whose answer is known; when none is, one forward for the rows that are furthest behind.

        All rows of their shape class ride along. So each forward serves a tick of the plain call, and there are never
        more of them than there.
        """
        began = time.perf_counter()
        part = batch.part(batch.busy)
        rows = [self.row(l, r) for l, r in zip(part.rows, part.request, strict=True)]
        ready = [i for i, row in enumerate(rows) if not row.waiting]
        groups = None
        if any(rows[i].answers for i in ready):
            groups = self.ask(part, rows, ready, ahead=True)
            if steps := [step for group in groups for step in self.hits(group)]:
                self.pace.note_hit(time.perf_counter() - began)
                return [batch.took(step) for step in steps]
        auto, most = self.setting.rows == "auto", self.setting.max_rows
        limit = self.pace.choose(len(rows), most) if auto else int(self.setting.rows)
        if groups is None or len(ready) < len(rows) or limit == 1:
            groups = self.ask(part, rows, list(range(len(rows))), ahead=limit > 1)
        last = min(row.clock for row in rows)
        due = [group for group in groups if any(row.clock == last for row in group.rows)]
        steps = [self.miss(group, limit) for group in due]
        if auto and len(due) == 1 and not any(q.opening for q in due[0].queries):
            evaluated = sum(1 + row.guessed for row in due[0].rows)
            self.pace.note(evaluated, time.perf_counter() - began, len(due[0].rows))
        return [batch.took(step) for step in steps]

    def row(self, lane: int, request: Ticket) -> RowMemo:
        """What is known of the row in this lane; a new request begins with nothing but the lane's clock."""
        row = self.rows.get(lane)
        if row is None or row.request is not request:
            slots = self.store.slots if self.store is not None else 0
            lanes = range(self.copies * lane, self.copies * (lane + 1))
            request.ahead = stats = Stats(delta=self.delta)
            ledger = Ledger(lanes, slots, steady=not self.policy.sparse)
            row = self.rows[lane] = RowMemo(request, self.clock(lane), ledger, stats)
        return row

    def ask(self, part: Part, rows: list[RowMemo], which: list[int], *, ahead: bool) -> list[Group]:
        """Plan the forwards of these rows, with the names of their queries to look `ahead`."""
        out = []
        for some in kinds(which, part.facts):
            own = part.take(some)
            plan = self.ahead(own) if ahead and self.far is not self.policy else self.plain(own)
            fed, group = expanded(self.s, own.state, own.reading, plan), [rows[i] for i in some]
            asked = queries(fed, len(some)) if ahead else []
            for query, row in zip(asked, group, strict=False):
                row.ledger.plain.name(query)
            out.append(Group(own, group, plan.pos.shape[1], fed, asked))
        return out

    def plain(self, part: Part) -> Plan:
        """The forward of rows that all refresh, or all do not."""
        return self.planned(part, Shape.of(part.facts, part.fed))

    def ahead(self, part: Part) -> Plan:
        """The same, with what guesses may need behind them."""
        window = feeding(self.s, self.far, part.state, part.window)
        return planned(part.state, window.feeds(part.stale), self.lane(part))

    # -- answers ------------------------------------------------------------------------------------------------------

    def hits(self, group: Group) -> list[Turn]:
        """Step the rows whose query is in the memo; the others wait."""
        found = [row.answers.get(q.key) for row, q in zip(group.rows, group.queries, strict=True)]
        answers = {i: answer for i, answer in enumerate(found) if answer is not None}
        for i, row in enumerate(group.rows):
            row.waiting = i not in answers
        if not answers:
            return []
        for i, answer in answers.items():
            group.rows[i].hit(answer)
        some = group.take(list(answers))
        said = laid(some.queries, list(answers.values()), some.copies)
        return [self.finish(some, said, 0, hit=True, alone=False)]

    def miss(self, group: Group, limit: int) -> Turn:
        """One forward for these rows, with guesses beside them: at most `limit` rows of each sequence."""
        for i, row in enumerate(group.rows):
            self.close_round(row, group, i)
        guesses: list[list[Branch]] = [[] for _ in group.rows]
        if limit > 1 and not any(q.opening for q in group.queries):
            guesses = Guesses(self, self.far, self.setting, group).draw(limit - 1)
        said, evaluated, fed = self.evaluate(group, guesses)
        for row, fresh in zip(group.rows, evaluated, strict=True):
            row.learn(fresh)
        plain = self.policy is self.far or not group.queries
        alone = len(group.rows) == 1 and plain and not any(guesses)
        return self.finish(group, said, fed, hit=False, alone=alone)

    def close_round(self, row: RowMemo, group: Group, i: int) -> None:
        """Before a forward: learn from the last round, bring the store up to date, forget what cannot come up again."""
        query = group.query(i)
        self.pace.learn(row.streak, row.guessed)
        self.pay(row, row.ledger.due(query))
        row.age(query, retain=self.setting.retain)

    def pay(self, row: RowMemo, debts: list[Evaluated]) -> None:
        """Write what hits owe the store: from their own keys and values, else by their forwards."""
        for answer in debts:
            if answer.kv is not None and self.store is not None:
                answer.kv.write(self.store, answer.branch.query)
            else:
                packed = pack([[answer.branch._replace(parent=-1)]], self.model.device)
                served([row.request], "step")
                computed([row.request], [answer.branch.query.size])
                self.said(packed.plan)
                row.stats.reruns += 1

    def evaluate(self, group: Group, guesses: list[list[Branch]]) -> tuple[Said, list[list[Evaluated]], int | None]:
        """Run the true queries and the guesses: what is said of the former as planned, answers to the latter, and the
        positions that the plan does not count itself (None: it counts them)."""
        served(group.part.request, group.part.kind)
        answers, fed = list[list[Evaluated]](), None
        if not any(guesses):
            said = self.said(group.fed)
        else:
            ids = group.part.state.canvas.ids
            true = [Branch(q, -1, 0, own) for q, own in zip(group.queries, ids, strict=True)]
            branches = [[branch, *others] for branch, others in zip(true, guesses, strict=True)]
            packed, fed = pack(branches, self.model.device, group.fed.rows), 0
            computed(group.part.request, [sum(b.query.size for b in bs) for bs in branches])
            answers = packed.split(branches, self.run(packed.plan))
            said = laid(group.queries, [first for first, *_ in answers], group.copies)
        for i, row in enumerate(group.rows):
            row.ledger.wrote(group.query(i))
        return said, [others for _, *others in answers] or [[] for _ in group.rows], fed

    def run(self, plan: Plan) -> Outputs:
        """Run a plan, and have the keys and values that it computed (none: no store)."""
        if self.store is None or not plan.stored:
            return Outputs(self.said(plan), [])
        return self.model.forward_with(
            plan.ids, plan.pos, rows=plan.rows, kv=True, fresh=plan.fresh, keep=plan.keep, visible=plan.visible,
            lane=plan.lane, store=self.store,
        )  # fmt: skip

    # -- the step -----------------------------------------------------------------------------------------------------

    def finish(self, group: Group, said: Said, fed: int | None, *, hit: bool, alone: bool) -> Turn:
        """Take the step, check it if the mode asks for that, and remember its prediction to draft from.

        fed: positions computed for each row, None: those of the plan. alone: the forward was that of the plain call of
        a single row.
        """
        part, window = group.part, group.part.reading
        answer = self.answer(part.state, window, group.fed, said, group.planned)
        pred = answer.read(window.reads, reach(part.facts))
        after = self.options.step(self.s, part.state, window, pred)
        for i in self.doubts(group, pred, after, hit=hit, alone=alone):
            after = self.confirm(group, i, after)
        if self.setting.relax is not None:
            after = subset(group, after)
        self.remember(group, said, after, hit=hit)
        return self.stepped(part, answer, pred, after, fed)

    def doubts(self, group: Group, pred: Prediction, after: State, *, hit: bool, alone: bool) -> list[int]:
        """The rows whose step is taken again: what the mode holds for unsure, or wants to audit."""
        if self.setting.mode == "guarded" and not alone:
            unsure = doubtful(self.s, group.part.state, group.part.reading, pred, after, self.delta)
            return [i for i, yes in enumerate(unsure.tolist()) if yes]
        if self.setting.mode == "fast" and hit:
            return [i for i, row in enumerate(group.rows) if row.stats.hits % self.setting.audit == 0]
        return []

    def confirm(self, group: Group, i: int, after: State) -> State:
        """Take the step of row i again, by itself as in its plain call; in mode fast only compare."""
        row, query = group.rows[i], group.query(i)
        if query is not None:
            self.pay(row, row.ledger.due_again(query))
        again = self.turn(group.part.take([i]))
        computed([row.request], again.answer.fed.tolist())
        if query is not None:
            row.ledger.wrote(query)
        at, fast = index([i], self.model.device), self.setting.mode == "fast"
        row.stats.audits += fast
        row.stats.reruns += not fast
        row.stats.divergences += not bool(alike(after.take(at), again.after))
        return after if fast else after.put(at, again.after)

    def remember(self, group: Group, said: Said, after: State, *, hit: bool) -> None:
        """Keep the prediction of each row, to draft from it."""
        count, planned = len(group.rows), min(group.planned, group.fed.pos.shape[1])  # inputs may cut the canvas
        ids, pos = (x.view(-1, count, x.shape[1]) for x in (group.fed.ids, group.fed.pos))
        by_row = mapped(lambda x: x.view(-1, count, *x.shape[1:]), said)
        for i, row in enumerate(group.rows):
            row.clock += 1
            row.stats.steps += 1
            own = mapped(lambda x, i=i: x[:, i], by_row)
            source = Source(after, i, ids[:, i], pos[:, i], own, planned, row.ledger.plain)
            fresh = not hit and not row.recent
            row.recent = [*row.recent, source] if hit else [source]
            if self.setting.restart:
                restart(row, group.part.facts[i].lo, fresh)
