"""One round of the chain: drafts, one forward of all of them, and a walk that takes the steps whose drafts came true.

    roll -> ask -> walk: step, open, the same question? -> write -> the next window

A round asks the device nothing: its shapes follow from what the host knows before it, and how many steps each row took
rides on the flags of the tick. So it is a pure function over tensors, but for the store that it writes.

Level r of a row is its state after r steps. The levels of a round are rows in the order r B + b.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.cache.policy import Policy, plan
from dllm.decoding.canvas import Fed, Plan, Span, State, chosen, joined, mapped, sliced
from dllm.decoding.columns import spans
from dllm.decoding.facts import Shape, flags
from dllm.decoding.prediction import Prediction
from dllm.decoding.runner import Answer, Runner
from dllm.decoding.step import expanded, feeding, opened, step
from dllm.lookahead.along import Along
from dllm.lookahead.branches import fitted
from dllm.lookahead.guard import doubtful
from dllm.models.transformer import KeysValues, Said


class Level(NamedTuple):
    """A state that rows are in, or may come to; its window is open and cut to what the round reads."""

    state: State
    window: Span
    valid: Tensor  # (B,) bool: of a draft, whether this forward can answer it; of a walk, whether the row stepped here
    came: State  # as the step left it, before its window opened; of the true state itself the same as `state`


class Asked(NamedTuple):
    """The forward of a round: every level of every row as a row of a plan, and the answers."""

    state: State  # of R B rows
    window: Span
    fed: Fed
    plan: Plan  # (copies R B, Q + E)
    queries: int  # Q; the E behind them are private to the inputs slot
    said: Said  # of that plan
    along: Along | None  # how they lay in the forward; None: there is no store
    layers: list[KeysValues]  # each (copies B, R (Q + E), kv_heads, head_dim); none without a store

    def answer(self, run: Runner, state: State, window: Span, level: int | Tensor) -> Answer:
        """What it says of rows (B) that stand at this level, the same for all or (B,)."""
        rows, device = state.rows, state.step.device
        levels = self.state.rows // rows

        def at(x: Tensor) -> Tensor:
            table = x.view(-1, levels, rows, *x.shape[1:])
            own = table[:, level] if isinstance(level, int) else table[:, level, torch.arange(rows, device=device)]
            return own.flatten(0, 1)

        fed = Plan(
            at(self.plan.ids), at(self.plan.pos), None, None, None, None, None, False, False, dense=self.plan.dense
        )
        return run.answer(state, window, fed, mapped(at, self.said), self.queries)


class Walked(NamedTuple):
    """Where a round led its rows."""

    taken: Tensor  # (B,) steps
    doubt: Tensor  # (B,) bool: the next decision hangs on rounding
    finite: Tensor  # (B,) bool: of the predictions that decided
    state: State  # after these steps, the next window open
    window: Span
    before: list[Level]  # of each step
    after: list[State]  # of each step


class Outcome(NamedTuple):
    """What a round leaves."""

    walked: Walked
    state: State  # with the next window open
    window: Span
    flags: Tensor  # (B, F)
    answer: Answer  # that of the last step, to draft from


@dataclass(frozen=True)
class Round:
    """The rounds of one shape."""

    run: Runner
    far: Policy  # of the forward of a round; `run.policy` is the plain call's
    levels: int  # R
    shape: Shape  # of one level
    lanes: slice | None  # those of the rows, where they are one run
    crosses: bool  # whether drafts go beyond the end of the block
    delta: float | None  # the bound of mode guarded; None: no decision is doubted

    def __call__(self, state: State, window: Span, lane: Tensor | None, stale: Answer | None) -> Outcome:
        """A round of rows whose windows are open. lane (B,): of the store, None: there is none. stale: an answer to
        rows like these, to draft from; None where there is but one level."""
        far = window if self.far is self.run.policy else feeding(self.run.s, self.far, state, window)
        first = Level(state, far.cut(self.shape.reads), torch.ones_like(state.done), state)
        levels = [first] if stale is None else self.roll(first, stale)
        asked = self.ask(levels, lane)
        walked = self.in_turn(levels, asked, lane) if self.remembers(state) else self.at_once(levels, asked)
        if asked.along is not None and self.run.store is not None:
            copies = len(asked.along.lane) // state.rows
            asked.along.write(self.run.store, asked.layers, walked.taken.repeat(copies))
        return self.outcome(state, window, asked, walked)

    # -- drafts -------------------------------------------------------------------------------------------------------

    def roll(self, first: Level, stale: Answer) -> list[Level]:
        """The states themselves, and what the sampler's own step makes of them on the last prediction."""
        levels, s, cols = [first], self.run.s, first.window.reads
        if self.crosses and not (self.far.stored and first.window.feeds(True).refresh):  # the next windows, too
            hi = first.window.hi
            cols = torch.cat([cols, spans(hi, first.state.canvas.length, self.shape.reads)], 1)
        said = fitted(stale.said, stale.queries, self.shape.reads)
        old = replace(stale, state=first.state, window=first.window, extra=None, said=said)
        logits, known = old.logits(cols), old.knows(cols)
        while len(levels) < self.levels:
            state, window, valid, _ = levels[-1]
            found = (window.reads[..., None] == cols[:, None]) & known[:, None]  # (B, W, C)
            at = found.int().argmax(2)[..., None].expand(-1, -1, logits.shape[-1])
            pred = replace(old, state=state, window=window).prediction(logits.gather(1, at), window.reads)
            came = step(s, state, window, pred)
            valid = valid & (found.any(2) | (window.reads < 0)).all(1) & ~came.done & ~came.closing
            state, window = opened(s, self.far, came)
            valid = valid & self.fits(state, window)
            if not self.crosses:
                valid = valid & (window.lo < first.window.hi)
            levels.append(Level(state, window.cut(self.shape.reads), valid, came))
        return levels

    def fits(self, state: State, window: Span) -> Tensor:
        """(B,) whether the forward of a round has room for what these rows feed and read; a full one it has not."""
        shape, fed = self.shape, self.feeds(state, window)
        fits = (fed.cols.sum(1) <= shape.queries) & (window.reads[:, shape.reads :] < 0).all(1)
        if self.far.stored:
            fits = fits & ~fed.sees(state.canvas)[:, shape.slots :].any(1)
        return fits & ~_stale(window) if window.feeds(True).refresh else fits

    def feeds(self, state: State, window: Span) -> Fed:
        """What rows feed, those that refresh among the others where a refresh does not fill the lane."""
        refresh, own, stale = window.feeds(True), window.feeds(False), _stale(window)
        if refresh.refresh:
            return own

        def mixed(a: Tensor | None, b: Tensor | None, usual: Tensor) -> Tensor | None:
            if a is None and b is None:
                return None
            return torch.where(stale[:, None], usual if a is None else a, usual if b is None else b)

        none, cols = torch.zeros_like(own.cols), torch.where(stale[:, None], refresh.cols, own.cols)
        seen = mixed(refresh.seen, own.seen, Fed(cols).sees(state.canvas))
        return Fed(cols, mixed(refresh.keep, own.keep, ~none), seen, mixed(refresh.aside, own.aside, none))

    # -- the forward --------------------------------------------------------------------------------------------------

    def ask(self, levels: list[Level], lane: Tensor | None) -> Asked:
        """One forward of all levels. With a store those of a row lie along the sequence, and keep nothing."""
        run, state, window = self.run, joined([l.state for l in levels]), joined([l.window for l in levels])
        fed = self.feeds(state, window)
        planned = self.plan(state, fed, lane)
        asked = expanded(run.s, state, window, planned)
        if lane is None or run.store is None:
            said, along, layers = run.said(asked), None, list[KeysValues]()
        else:
            along = Along.of(asked, len(levels), len(lane), run.store.slots)
            laid = along.plan(self.lanes if len(asked.pos) == len(planned.pos) else None)
            said, layers = run.model.forward_with(
                laid.ids, laid.pos, rows=laid.rows, kv=True, fresh=laid.fresh, visible=laid.visible, lane=laid.lane,
                store=run.store, known=laid.known,
            )  # fmt: skip
            said = along.by_level(said, len(lane))
        return Asked(state, window, fed, asked, planned.pos.shape[1], said, along, layers)

    def plan(self, state: State, fed: Fed, lane: Tensor | None) -> Plan:
        """The forward of one level of all rows, or of all levels."""
        lanes = None if lane is None else lane.repeat(state.rows // len(lane))
        return plan(state, fed, self.shape, lanes, None)

    # -- the walk -----------------------------------------------------------------------------------------------------

    def remembers(self, state: State) -> bool:
        """Whether the sampler remembers what the model said: numbers, or something of each column."""
        account = type(self.far.columns(state.canvas))
        leaves = [*state.memory.values(), *state.columns.values()]
        floats = any(x.is_floating_point() for leaf in leaves for x in leaf)
        return floats or any(kind is not account for kind in state.columns)

    def at_once(self, levels: list[Level], asked: Asked) -> Walked:
        """All levels step together: a draft was right if the step before it came to just that."""
        s, run, rows, n = self.run.s, self.run, levels[0].state.rows, len(levels)
        pred = run.answer(asked.state, asked.window, asked.plan, asked.said, asked.queries).read(asked.window.reads)
        after = step(s, asked.state, asked.window, pred)
        right = levels[0].valid[None]  # (R, B)
        if n > 1:
            came, before = joined([l.came for l in levels[1:]]), sliced(after, slice(rows * (n - 1)))
            same = _equal(_decides(before), _decides(came), rows * (n - 1))
            same = same & torch.cat([l.valid for l in levels[1:]]) & ~before.done & ~before.closing
            right = torch.cat([right, same.view(n - 1, rows)])
        unsure = ~right & False
        if self.delta is not None:
            unsure = doubtful(s, asked.state, asked.window, pred, after, self.delta).view(n, rows)
        here = (right & F.pad(~unsure[:-1], (0, 0, 1, 0), value=True)).long().cumprod(0).bool()
        taken, finite = (here & ~unsure).sum(0), (pred.finite.view(n, rows) | ~here).all(0)
        at = (taken - 1).clamp(min=0) * rows + torch.arange(rows, device=taken.device)
        state, window = opened(s, run.policy, after)
        afters = [sliced(after, slice(r * rows, (r + 1) * rows)) for r in range(n)]
        return Walked(taken, (here & unsure).any(0), finite, state.take(at), window.take(at), levels, afters)

    def in_turn(self, levels: list[Level], asked: Asked, lane: Tensor | None) -> Walked:
        """Step from each state that was reached with the answer to the draft of it, as long as that asked the same.

        For samplers that remember what the model said: their states differ from all drafts.
        """
        s, read = self.run.s, self.reader(asked)
        state, window, valid, _ = levels[0]
        reached, taken, doubt, finite = state, torch.zeros_like(state.step), ~valid, torch.ones_like(valid)
        before, afters = list[Level](), list[State]()
        for r in range(len(levels)):
            pred = read(r, state, window)
            after = step(s, state, window, pred)
            finite = finite & (pred.finite | ~valid)
            if self.delta is not None:
                unsure = valid & doubtful(s, state, window, pred, after, self.delta)
                doubt, valid = doubt | unsure, valid & ~unsure
            before.append(Level(state, window, valid, state))
            afters.append(after)
            reached, taken = chosen(valid, after, reached), taken + valid
            if r + 1 < len(levels):
                draft = levels[r + 1]
                state, window = opened(s, self.far, after)
                window = window.cut(self.shape.reads)
                valid = valid & draft.valid & ~after.done & ~after.closing
                asks, asked_ = self.question(state, window, lane), self.question(draft.state, draft.window, lane)
                valid = valid & _equal(asks, asked_, state.rows)
        return Walked(taken, doubt, finite, *opened(s, self.run.policy, reached), before, afters)

    def reader(self, asked: Asked) -> Callable[[int, State, Span], Prediction]:
        """The prediction of level r, for states that ask what its drafts did. One head serves all levels, where no
        inputs slot folds their answers."""
        run, logits = self.run, None
        if run.s.inputs is None:
            whole = run.answer(asked.state, asked.window, asked.plan, asked.said, asked.queries)
            logits = whole.logits(asked.window.reads)

        def read(r: int, state: State, window: Span) -> Prediction:
            answer, rows = asked.answer(run, state, window, r), state.rows
            if logits is None:
                return answer.read(window.reads)
            return answer.prediction(logits[r * rows : (r + 1) * rows], window.reads)

        return read

    def question(self, state: State, window: Span, lane: Tensor | None) -> list[Tensor]:
        """All that the answer to these rows depends on beside the store, each (copies B, ...)."""
        fed, canvas = self.feeds(state, window), state.canvas
        tables = [canvas.ids, canvas.length, window.reads, fed.cols, fed.keep, fed.seen, fed.aside]
        if self.run.s.inputs is not None:
            asked = expanded(self.run.s, state, window, self.plan(state, fed, lane))
            tables += [asked.ids, asked.pos, asked.fresh, asked.keep, asked.visible]
        return [t for t in tables if t is not None]

    # -- what it leaves -----------------------------------------------------------------------------------------------

    def outcome(self, state: State, window: Span, asked: Asked, walked: Walked) -> Outcome:
        """The next windows, what the host must know, and the answers of the last steps. A row that took none stays."""
        run, rows, taken, after, ahead = self.run, state.rows, walked.taken, walked.state, walked.window
        level = (taken - 1).clamp(min=0)
        at = level * rows + torch.arange(rows, device=level.device)
        asking = window if run.s.inputs is None else asked.window.take(at)  # nobody else looks at it
        answer = asked.answer(run, asked.state.take(at), asking, level)
        covered = run.covers(asked.fed.cols[at], after)
        fed = (asked.plan.pos >= 0).sum(1).view(-1, rows).sum(0)
        if self.delta is not None:
            after, ahead = chosen(taken > 0, after, state), chosen(taken > 0, ahead, window)
        return Outcome(walked, after, ahead, flags(after, ahead, covered, walked.finite, fed, walked.doubt), answer)


def _decides(state: State) -> list[Tensor]:
    """What may differ between a state and the draft of it, each (N, ...)."""
    canvas, leaves = state.canvas, [*state.memory.values(), *state.columns.values()]
    tokens = [canvas.ids, canvas.masked, canvas.length, *state.cached]
    return tokens + [x for leaf in leaves for x in leaf]


def _stale(window: Span) -> Tensor:
    """(B,) bool: rows that refresh, once the window is open."""
    assert window.stale is not None
    return window.stale


def _equal(a: list[Tensor], b: list[Tensor], rows: int) -> Tensor:
    """(B,) whether rows agree in all of these tables, each (copies B, ...); where shapes differ, they do not."""
    if any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return torch.zeros(rows, dtype=torch.bool, device=a[0].device)
    same = [(x == y).reshape(len(x) // rows, rows, -1).movedim(0, 1).flatten(1) for x, y in zip(a, b, strict=True)]
    return torch.cat(same, 1).all(1)
