"""Lookahead without a memo: each forward answers a row's state and a chain of drafts of those behind it (`round`).

Nothing is remembered but the last answer of each row, and the host asks for nothing but the flags of the tick: a round
costs it what a tick does. The memo of `walk` finds more hits (it retains what was rejected, and drafts from several
states) and pays for them in questions: it is for machines where a question costs little and a forward much.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.canvas import Plan, Span, State, chosen, mapped
from dllm.decoding.facts import Facts, Shape, fetch, flags, kinds
from dllm.decoding.graphs import index
from dllm.decoding.meter import Ticket, computed, served
from dllm.decoding.prediction import Prediction
from dllm.decoding.runner import Answer, Batch, Part, Runner, Stepped, Tick, Turn
from dllm.decoding.step import feeding, opened
from dllm.lookahead.branches import stacked as rows_of
from dllm.lookahead.guard import alike, bound, doubtful
from dllm.lookahead.pace import Pace
from dllm.lookahead.round import Level, Round
from dllm.lookahead.setting import Lookahead, Stats
from dllm.models.transformer import Said

T = TypeVar("T")


class Last(NamedTuple):
    """The last answer to a row, and the row's place in it."""

    request: Ticket
    answer: Answer
    place: int


class Played(NamedTuple):
    """A forward of this tick, until the host knows how many steps its rows took."""

    size: int  # levels
    alone: bool  # it takes a doubtful decision again
    before: list[Level]  # of each step of a round
    after: list[State]

    def window(self, facts: Facts, row: int, step: int) -> Facts:
        """The facts of a row before the round, with the window of one of its steps."""
        if not self.before:
            return facts
        window = self.before[step].window
        return facts._replace(lo=int(window.lo[row]), hi=int(window.hi[row]))


@dataclass(eq=False)
class ChainRunner(Runner):
    """The runner whose forwards answer chains of drafts; a ticket gets the statistics of its row."""

    shares: ClassVar[bool] = False
    setting: Lookahead
    clocks: dict[int, int] = field(default_factory=dict)  # steps that each lane has taken
    last: dict[int, Last] = field(default_factory=dict)  # by lane
    played: dict[int, Played] = field(default_factory=dict)  # of this tick, by the first lane of each part
    began: float = 0.0  # the tick

    def __post_init__(self) -> None:
        setting = self.setting
        self.far = setting.far(self.policy)  # of the forwards of rounds; `policy` is the plain call's
        self.pace = Pace.of(self.model, self.s, self.policy, setting, "chain")
        self.delta = bound(setting, self.model)

    # -- the tick -----------------------------------------------------------------------------------------------------

    def clock(self, lane: int) -> int:
        """Steps that a lane has taken."""
        return self.clocks.get(lane, 0)

    def rest(self, lanes: list[int], clock: int) -> None:
        """See `Runner`."""
        self.clocks.update((lane, max(self.clock(lane), clock)) for lane in lanes)

    def tick(self, batch: Batch) -> list[Stepped]:
        """One forward for the rows that are furthest behind, and for all of their kind: those that refresh, or do not.

        So each forward serves a tick of the plain call, and there are never more of them than there; but a row in doubt
        has one of its own.
        """
        self.began, self.played = time.perf_counter(), {}
        doubt = [i for i in batch.busy if batch.facts[i].doubt]
        steady = [i for i in batch.busy if i not in doubt]
        behind = min(map(self.clock, steady), default=0)
        stepped = [self.play(batch, [i], alone=True) for i in doubt]
        due = [rows for rows in kinds(steady, batch.facts) if any(self.clock(i) == behind for i in rows)]
        return stepped + [self.play(batch, rows) for rows in due]

    def play(self, batch: Batch, rows: list[int], alone: bool = False) -> Stepped:
        """A round of these rows, or a plain step: `alone`, or where it would have but one level."""
        part = batch.part(rows)
        levels = 1 if alone else self.levels(part.facts, part.window)
        stale = self.recent(part) if levels > 1 else None
        if stale is None:
            return batch.took(self.note(self.turn(part), Played(1, alone, [], [])))
        served(part.request, part.kind)
        out = self.round(levels, self.shape(part.facts, part.window, levels), part.lanes)(
            part.state, part.window, self.lane(part), stale
        )
        turn = Turn(part, out.state, out.state, out.window, out.flags, out.answer)
        return batch.took(self.note(turn, Played(levels, False, out.walked.before, out.walked.after)))

    def round(self, levels: int, shape: Shape, lanes: slice | None) -> Round:
        """The rounds of this call."""
        return Round(self, self.far, levels, shape, lanes, self.setting.cross_blocks, self.delta)

    def note(self, turn: Turn, played: Played) -> Turn:
        """Remember what these rows are to be drafted from, and how they came there."""
        part = turn.part
        self.played[part.rows[0]] = played
        for place, (lane, request) in enumerate(zip(part.rows, part.request, strict=True)):
            self.last[lane] = Last(request, turn.answer, place)
        return turn

    def levels(self, facts: list[Facts], window: Span) -> int:
        """R of the next forward of these rows. A full one has no room for drafts, and nobody steps beyond his cap."""
        if facts[0].stale and window.feeds(True).refresh:
            return 1
        setting, n = self.setting, len(facts)
        room = min(self.options.cap(f) - 1 - f.step for f in facts)
        wide = room if setting.max_rows is None else min(room, max(setting.max_rows // n, 1))
        rows = self.pace.choose(n, setting.max_rows) if setting.rows == "auto" else int(setting.rows)
        return min(rows, wide)

    def shape(self, facts: list[Facts], window: Span, levels: int) -> Shape:
        """What one level has room for: that of the row itself, and of a block that it may have finished."""
        own = window.feeds(False)
        block, width, queries = self.policy.block_size or 0, own.cols.shape[1], max(1, *(f.size for f in facts))
        crossed, ahead = block * self.setting.cross_blocks, block * self.far.ahead
        room = min(queries + crossed + ahead, width)
        slots = min(max(f.limit for f in facts) + (levels - 1) * crossed + ahead, width)
        reads = min(max(1, crossed, *(f.reads for f in facts)), width)
        padded = not own.dense or any(f.size != room for f in facts)
        return Shape(room, slots, reads, padded=padded, ragged=True)

    def recent(self, part: Part) -> Answer | None:
        """The last answers to these rows, to draft from; None where no row has one."""
        found = [self.last.get(lane) for lane in part.rows]
        found = [l if l and l.request is r else None for l, r in zip(found, part.request, strict=True)]
        first = next((l for l in found if l), None)
        if first is None:
            return None
        answer = first.answer
        together = all(l and l.answer is answer and l.place == i for i, l in enumerate(found))
        return answer if together and answer.state.rows == len(found) else stacked(found)

    # -- mode guarded, plain steps of several rows --------------------------------------------------------------------

    def stepped(self, part: Part, answer: Answer, pred: Prediction, after: State, fed: int | None = None) -> Turn:
        """As the plain runner; in mode guarded a row stays where a forward of itself alone might lead elsewhere."""
        if self.delta is None or after.rows == 1:
            return super().stepped(part, answer, pred, after, fed)
        unsure = doubtful(self.s, part.state, part.window.cut(pred.cols.shape[1]), pred, after, self.delta)
        covered = self.covers(part.fed.cols, after)
        state, window = opened(self.s, self.policy, after)
        state, window = chosen(unsure, part.state, state), chosen(unsure, part.window, window)
        table = flags(state, window, covered, pred.finite, answer.fed, unsure)
        return Turn(part, after, state, window, table, answer)

    # -- after the wait -----------------------------------------------------------------------------------------------

    def ticks(self, part: Part, facts: list[Facts], state: State) -> list[Tick]:
        """Count the steps that the rows took. A trace is shown each of them, others where a row has come to."""
        played = self.played.pop(part.rows[0], None)
        if played is None:  # a closing forward
            return super().ticks(part, facts, state)
        taken = [f.step - was.step for f, was in zip(facts, part.facts, strict=True)]
        if self.setting.rows == "auto" and not self.played and not part.stale:
            self.pace.note(played.size * len(taken), time.perf_counter() - self.began, len(taken))
        for j, (lane, n) in enumerate(zip(part.rows, taken, strict=True)):
            self.clocks[lane] = self.clock(lane) + n
            self.count(part.request[j], played, n)
            self.audit(part, played, j, n)
        shown = self.between(part, played, facts, taken) if self.options.traced else []
        some = [j for j, n in enumerate(taken) if n]
        rows, request = [part.rows[j] for j in some], [part.request[j] for j in some]
        before = [played.window(part.facts[j], j, taken[j] - 1) if shown else part.facts[j] for j in some]
        return [*shown, Tick(rows, request, before, [facts[j] for j in some], state)] if some else []

    def count(self, request: Ticket, played: Played, steps: int) -> None:
        """Statistics of a row that took some steps with one forward."""
        stats = self.stats(request)
        stats.steps += steps
        stats.reruns += played.alone
        stats.forwards += not played.alone
        stats.rows += played.size
        for depth in range(1, steps):
            stats.hits += 1
            stats.depth[depth] = stats.depth.get(depth, 0) + 1
        if played.size > 1:
            self.pace.learn(max(steps - 1, 0), played.size - 1)

    def stats(self, request: Ticket) -> Stats:
        """Those of a row."""
        if not isinstance(request.ahead, Stats):
            request.ahead = Stats(delta=self.delta or 0.0, form="chain")
        assert isinstance(request.ahead, Stats)
        return request.ahead

    def audit(self, part: Part, played: Played, j: int, steps: int) -> None:
        """mode fast: after every so many hits the last step of a round is taken again by itself, and compared."""
        stats, every = self.stats(part.request[j]), self.setting.audit
        if self.setting.mode != "fast" or steps < 2 or stats.hits // every == (stats.hits - steps + 1) // every:
            return
        at, level = index([j], self.model.device), played.before[steps - 1]
        state, window = level.state.take(at), level.window.take(at)
        window = feeding(self.s, self.policy, state, window)
        no, zero = torch.zeros_like(state.done), torch.zeros_like(state.step)
        facts, lane = fetch(flags(state, window, no, ~no, zero)), part.rows[j]
        own = Part([lane], index([lane], at.device), slice(lane, lane + 1), state, window, facts, [part.request[j]])
        again = self.turn(own)
        computed(own.request, again.answer.fed.tolist())
        stats.audits += 1
        stats.divergences += not bool(alike(played.after[steps - 1].take(at), again.after))

    def between(self, part: Part, played: Played, facts: list[Facts], taken: list[int]) -> list[Tick]:
        """Every step of a round but the last of each row."""
        out = list[Tick]()
        for r, after in enumerate(played.after):
            if some := [j for j, n in enumerate(taken) if n > r + 1]:
                before = [played.window(part.facts[j], j, r) for j in some]
                now = [facts[j]._replace(done=0, step=part.facts[j].step + r + 1) for j in some]
                out.append(Tick(some, [part.request[j] for j in some], before, now, after))
        return out


def stacked(found: Sequence[Last | None]) -> Answer:
    """Answers to several rows as one; what a row lacks it does not cover."""
    known = [l for l in found if l is not None]
    queries = max(_planned(l.answer) for l in known)
    extra = max(l.answer.said.hidden.shape[1] - _planned(l.answer) for l in known)
    copies = max(len(l.answer.said.hidden) // l.answer.state.rows for l in known)

    def own(l: Last, table: T) -> T:  # (copies, ...)
        return mapped(lambda x: x.view(-1, l.answer.state.rows, *x.shape[1:])[:, l.place], table)

    def wide(l: Last | None, of: str) -> Tensor:  # (copies, Q + E, ...)
        lacks, l, pos = l is None, l or known[0], of == "pos"
        table = own(l, l.answer.plan.pos if pos else l.answer.said.hidden)
        table = _widened(table, _planned(l.answer), queries, extra, copies, -1 if pos else 0)
        return torch.full_like(table, -1) if lacks and pos else table

    pos, hidden = (torch.stack([wide(l, of) for l in found], 1).flatten(0, 1) for of in ("pos", "hidden"))
    read = [own(l, l.answer.said.weights) for l in (l or known[0] for l in found)]
    weights = [w for w in read if w is not None]
    said = Said(hidden, rows_of(weights, copies) if weights else None)
    fed = Plan(pos, pos, None, None, None, None, None, False, False)
    return replace(known[0].answer, plan=fed, said=said, queries=queries)


def _planned(answer: Answer) -> int:
    return min(answer.queries, answer.plan.pos.shape[1])  # inputs may cut the canvas


def _widened(x: Tensor, planned: int, width: int, extra: int, copies: int, value: int) -> Tensor:
    """A table (own copies, Q + E, ...) padded to `copies`, to `width` planned and to `extra` private columns."""
    tail, more = (0, 0) * (x.dim() - 2), (0, copies - len(x))
    front = F.pad(x[:, :planned], (*tail, 0, width - planned, *more), value=value)
    return torch.cat([front, F.pad(x[:, planned:], (*tail, 0, extra + planned - x.shape[1], *more), value=value)], 1)
