"""The forward of a tick: `Runner` plans it for the rows of a batch, asks the model, takes the step, and opens the next.

A runner decides which rows step in a tick and where their predictions come from: this one asks the model for every row,
`LookaheadRunner` answers from a memo where it can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.decoding.cache.policy import Policy, everything, plan
from dllm.decoding.canvas import Plan, Span, State
from dllm.decoding.columns import constant, indices, scatter
from dllm.decoding.facts import Facts, Shape, flags
from dllm.decoding.graphs import index
from dllm.decoding.meter import Meter
from dllm.decoding.prediction import Law, Prediction
from dllm.decoding.slots import Confidence, Sampler
from dllm.decoding.step import expanded, opened, step
from dllm.models.model import Model
from dllm.models.transformer import KVStore

Step = Callable[[Sampler, State, Span, Prediction], State]  # `step`, or what checks it (`invariants.Checked`)


@dataclass(frozen=True)
class Options:
    """What the loop needs to know beside model, sampler and cache."""

    law: Law = field(default_factory=Law)
    suppress: tuple[int, ...] = ()  # ids that are never predicted
    min_new_tokens: int = 0
    eos_ids: tuple[int, ...] = ()
    max_nfe: int | None = None  # steps (a forward each) a row may take; None: 4 per column of its window, and 64
    blank: bool = False  # some row begins with nothing but masks, and the model tells columns by differences alone
    step: Step = field(default_factory=lambda: step)  # takes the true steps; a guess of the lookahead is none


class Part(NamedTuple):
    """Some rows of a batch, with open windows. Row i of a batch has lane i of the store."""

    rows: list[int]  # in the batch
    whole: bool  # these are all of them
    state: State
    window: Span
    facts: list[Facts]
    request: list[int]

    def take(self, some: Sequence[int]) -> Part:
        """Some of the rows, by their places among these."""
        if len(some) == len(self.rows):
            return self
        at = index(some, self.state.step.device)
        rows, request = [self.rows[i] for i in some], [self.request[i] for i in some]
        facts = [self.facts[i] for i in some]
        return Part(rows, False, self.state.take(at), self.window.take(at), facts, request)

    @property
    def reading(self) -> Span:
        """The window, its reads cut to what some row reads."""
        return self.window.cut(max(1, *(f.reads for f in self.facts)))

    @property
    def lane(self) -> Tensor:
        """(N,) lanes of the rows."""
        return index(self.rows, self.state.step.device)

    @property
    def lanes(self) -> slice | None:
        """The lanes as one run, where they are one."""
        first = self.rows[0]
        return slice(first, first + len(self.rows)) if self.rows[-1] - first == len(self.rows) - 1 else None


@dataclass
class Batch:
    """The rows that are being decoded, windows open. They never move: a row that is done waits for the next request."""

    state: State
    window: Span
    flags: Tensor  # (B, F)
    facts: list[Facts]
    request: list[int | None]  # of each row; None: nobody's

    def part(self, rows: list[int]) -> Part:
        """Some of the rows."""
        request = [r for r in (self.request[i] for i in rows) if r is not None]
        facts = [self.facts[i] for i in rows]
        if len(rows) == len(self.request):
            return Part(rows, True, self.state, self.window, facts, request)
        at = index(rows, self.flags.device)
        return Part(rows, False, self.state.take(at), self.window.take(at), facts, request)

    def put(self, rows: list[int], state: State, window: Span, flags: Tensor) -> None:
        """Replace some rows, on the device."""
        if rows == list(range(len(self.request))):
            self.state, self.window, self.flags = state, window, flags
        else:
            at = index(rows, self.flags.device)
            self.state, self.window = self.state.put(at, state), self.window.put(at, window)
            self.flags = self.flags.index_copy(0, at, flags)


class Stepped(NamedTuple):
    """Rows that took one step together."""

    part: Part  # as they were
    after: State  # after the step
    state: State  # with the next window open
    window: Span  # the next one
    flags: Tensor  # (N, F)
    answer: Answer


@dataclass(eq=False)
class Answer:
    """Hidden states of one forward, read at any column that it covered.

    `plan` is what was fed. Beside the planned forward it may hold more rows (copies of all rows, one after the other)
    and, behind the `queries` planned columns, more queries: those are private to `inputs`.
    """

    model: Model
    s: Sampler
    options: Options
    state: State
    window: Span
    plan: Plan
    hidden: Tensor  # (copies B, Q + private, D)
    queries: int
    extra: object = None  # what `inputs.reduce` told of it

    def read(self, cols: Tensor) -> Prediction:
        """The prediction at `cols` (B, W); of a column that was not covered it is meaningless."""
        row = self._query(self.model.source(cols)).clamp(min=0)
        hidden = self.hidden
        copies = hidden.shape[0] // row.shape[0]
        at = row.repeat(copies, 1) if copies > 1 else row
        picked = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self.model.logits(picked)  # (copies B, W, V)
        if self.options.blank:
            logits = torch.where(self._blank().repeat(copies)[:, None, None], logits[:, :1], logits)
        if self.s.inputs is not None:
            logits, self.extra = self.s.inputs.reduce(logits, cols, self)
            logits[..., self.model.mask_id] = -torch.inf
        state, options = self.state, self.options
        if options.suppress:
            logits.index_fill_(-1, constant(options.suppress, logits.device), -torch.inf)
        if options.min_new_tokens and options.eos_ids:
            early = cols < (state.canvas.start + options.min_new_tokens)[:, None]
            for eos in options.eos_ids:
                logits[..., eos].masked_fill_(early, -torch.inf)
        law = options.law
        return Prediction(logits, cols, law=law, seed=state.seed, step=state.step, more=self._more, extra=self.extra)

    def covered(self, cols: Tensor) -> Tensor:
        """(B,) whether the forward covered all of a row's `cols` (B, W)."""
        row = self._query(self.model.source(cols))
        return ~((row < 0) & (cols >= 0)).any(1)

    def private(self) -> Tensor:
        """Logits (copies B, E, V) of the queries that `inputs` added."""
        return self.model.logits(self.hidden[:, self.queries :])

    @property
    def fed(self) -> Tensor:
        """(B,) positions that were computed, all copies of a row together."""
        return (self.plan.pos >= 0).sum(1).view(-1, self.state.rows).sum(0)

    def filled(self, state: State, rows: Tensor, width: int) -> tuple[State, Prediction]:
        """`state` with this prediction at every mask of `rows` (B,) bool; `width` bounds the masks of a row."""
        masked = state.canvas.masked & rows[:, None]
        cols = indices(masked, width)
        pred = self.read(cols)
        canvas = state.canvas.write(masked, scatter(state.canvas.ids, cols, pred.token))
        columns, noted = state.columns, state.columns.get(Confidence)
        if noted is not None:
            columns = columns.plus(Confidence(scatter(noted.table, cols, pred.confidence.to(noted.table.dtype))))
        done, closing = state.done | rows, state.closing & ~rows
        return state._replace(canvas=canvas, columns=columns, done=done, closing=closing), pred

    def _more(self, cols: Tensor) -> Prediction | None:
        return self.read(cols) if bool(self.covered(cols).all()) else None

    def _query(self, source: Tensor) -> Tensor:
        """(B, W) index of the query that holds each source position, -1 where none does."""
        if self.plan.refresh:
            return source  # a full forward: query index = position
        pos = self.plan.pos[: len(source), : self.queries]
        queries = torch.arange(pos.shape[1], device=pos.device).expand_as(pos)
        return scatter(torch.full_like(self.state.canvas.ids, -1), pos, queries).gather(1, source)

    def _blank(self) -> Tensor:
        """(B,) rows that hold nothing but masks: all their columns tie, and rounding must not order them."""
        canvas = self.state.canvas
        outside = torch.arange(canvas.ids.shape[1], device=canvas.ids.device) >= canvas.length[:, None]
        return ((canvas.ids == canvas.mask_id) | outside).all(1)


@dataclass(eq=False)
class Runner:
    """Runs plans: expands the inputs, calls the model, counts, and takes the step that the prediction allows."""

    model: Model
    s: Sampler
    policy: Policy
    options: Options
    meter: Meter
    store: KVStore | None

    def tick(self, batch: Batch) -> list[Stepped]:
        """One step of every row. Refreshing and stepping rows differ in shape: at most two forwards."""
        busy = [i for i, r in enumerate(batch.request) if r is not None]
        parts = ([i for i in busy if batch.facts[i].stale == stale] for stale in (1, 0))
        return [self.turn(batch.part(rows)) for rows in parts if rows]

    def clock(self, lane: int) -> int:
        """Steps that a lane has taken; lanes of the plain runner never drift apart."""
        return 0

    def turn(self, part: Part) -> Stepped:
        """One step of rows that all refresh, or all do not."""
        answer, window = self.forward(part, self.planned(part)), part.reading
        pred = answer.read(window.reads)
        return self.stepped(part, answer, pred, self.options.step(self.s, part.state, window, pred))

    def planned(self, part: Part) -> Plan:
        """The forward of such rows, in their lanes of the store where there is one."""
        fed = part.window.feeds(bool(part.facts[0].stale))
        return plan(part.state, fed, Shape.of(part.facts, fed), self.lane(part), part.lanes)

    def lane(self, part: Part) -> Tensor | None:
        """(N,) the lanes of a part; None where there is no store."""
        return part.lane if self.policy.stored else None

    def forward(self, part: Part, plan: Plan) -> Answer:
        """Run a plan of these rows, and count it."""
        window = part.reading
        fed = expanded(self.s, part.state, window, plan)
        self.meter.forward(part.request)
        return self.answer(part.state, window, fed, self.hidden(fed), plan.pos.shape[1])

    def answer(self, state: State, window: Span, fed: Plan, hidden: Tensor, queries: int) -> Answer:
        """What hidden states say of these rows, for columns that are asked later."""
        return Answer(self.model, self.s, self.options, state, window, fed, hidden, queries)

    def hidden(self, fed: Plan) -> Tensor:
        """Hidden states (N, Q, D) of a plan."""
        store = self.store if fed.stored else None
        return self.model.forward(
            fed.ids, fed.pos, fresh=fed.fresh, keep=fed.keep, visible=fed.visible, lane=fed.lane, store=store,
            known=fed.known,
        )  # fmt: skip

    def stepped(self, part: Part, answer: Answer, pred: Prediction, after: State, fed: int | None = None) -> Stepped:
        """Rows that took a step, with their next window; fed: positions computed for each, None: by the answer."""
        cols = part.window.feeds(bool(part.facts[0].stale)).cols
        covered = ~(after.canvas.masked & ~cols.gather(1, self._source(cols))).any(1)
        count = answer.fed if fed is None else torch.full_like(after.step, fed)
        return Stepped(part, after, *self.open(after, pred, covered, count), answer)

    def open(self, after: State, pred: Prediction, covered: Tensor, fed: Tensor) -> tuple[State, Span, Tensor]:
        """The state with its next window open, that, and what the host must know of both."""
        state, window = opened(self.s, self.policy, after)
        return state, window, flags(state, window, covered, pred.finite, fed)

    def _source(self, cols: Tensor) -> Tensor:
        """(B, L) the position that predicts each column."""
        return self.model.source(torch.arange(cols.shape[1], device=cols.device)).expand_as(cols)

    def close(self, part: Part) -> Stepped:
        """One full forward that fills whatever is still masked in these rows."""
        state, longest = part.state, max(f.length for f in part.facts)
        shape = Shape(longest, 0, longest, padded=any(f.length < longest for f in part.facts))
        part = part._replace(window=empty(state))  # `reading` leaves its one column
        answer = self.forward(part, plan(state, everything(state), shape, None, None))
        filled, pred = answer.filled(state, torch.ones_like(state.done), max(f.masks for f in part.facts))
        after = filled._replace(step=state.step + 1, columns=state.columns)  # no step: it notes nothing
        return Stepped(part, after, *self.open(after, pred, torch.zeros_like(after.done), answer.fed), answer)


def empty(state: State) -> Span:
    """The window of a closing forward: nothing is committed through it."""
    zero = torch.zeros_like(state.step)
    return Span(lo=zero, hi=zero, reads=zero[:, None] - 1, epoch=zero)
