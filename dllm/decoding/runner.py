"""The forward of a tick: `Runner` plans it for the rows of a batch, asks the model, takes the step, and opens the next.

A runner decides which rows step in a tick and where their predictions come from: this one asks the model for every row,
`LookaheadRunner` answers from a memo where it can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.decoding.cache.policy import Policy, everything, plan
from dllm.decoding.canvas import Canvas, Fed, Plan, Span, State, mapped
from dllm.decoding.columns import indices, scatter
from dllm.decoding.constants import constant
from dllm.decoding.constraints.bound import Bound, Reach, Rule
from dllm.decoding.facts import Facts, Shape, flags, kinds, matched
from dllm.decoding.graphs import index
from dllm.decoding.logprobs import Logprobs
from dllm.decoding.meter import Kind, Ticket, served
from dllm.decoding.prediction import Law, Prediction
from dllm.decoding.slots import Sampler
from dllm.decoding.step import expanded, opened, step
from dllm.models.model import ForwardOptions, Model
from dllm.models.transformer import KVStore, Said, Weights

Fill = Callable[[State, Tensor, int], tuple[State, Prediction]]
Process = Callable[[Canvas, Tensor, Tensor], Tensor]  # changes the logits (B, W, V) at columns (B, W), on the host
Step = Callable[[Sampler, State, Span, Prediction], State]  # `step`, or what checks it (`invariants.Checked`)


@dataclass(frozen=True)
class Options:
    """What the loop needs to know beside model, sampler and cache."""

    law: Law = field(default_factory=Law)
    suppress: tuple[int, ...] = ()  # ids that are never predicted
    min_new_tokens: int = 0
    eos_ids: tuple[int, ...] = ()
    process: Process | None = None  # has the last word on logits
    max_nfe: int | None = None  # steps (a forward each) a row may take; None: 4 per column of its window, and 64
    blank: bool = False  # some row begins with nothing but masks, and the model tells columns by differences alone
    rule: Rule | None = None  # what answers are bound to
    traced: bool = False  # observers are shown every step, those between the ticks of a lookahead, too
    step: Step = field(default_factory=lambda: step)  # takes the true steps; a guess of the lookahead is none

    def cap(self, facts: Facts) -> int:
        """The steps that a row may take, the closing forward among them."""
        return self.max_nfe or 4 * (facts.length - facts.start) + 64


class Part(NamedTuple):
    """Some rows of a batch, with open windows. Row i of a batch has lane i of the store."""

    rows: list[int]  # in the batch
    at: Tensor  # (N,) the same on the device
    lanes: slice | None  # and as one run, where they are one
    state: State
    window: Span
    facts: list[Facts]
    request: list[Ticket]

    def take(self, some: Sequence[int]) -> Part:
        """Some of the rows, by their places among these."""
        if len(some) == len(self.rows):
            return self
        rows, facts = [self.rows[i] for i in some], [self.facts[i] for i in some]
        at, own = index(some, self.at.device), index(rows, self.at.device)
        request = [self.request[i] for i in some]
        return Part(rows, own, run_of(rows), self.state.take(at), self.window.take(at), facts, request)

    @property
    def stale(self) -> bool:
        """Whether these rows, which are alike in that, refresh."""
        return bool(self.facts[0].stale)

    @property
    def kind(self) -> Kind:
        """Of their forward."""
        return "refresh" if self.stale else "step"

    @property
    def fed(self) -> Fed:
        """What their forward feeds."""
        return self.window.feeds(self.stale)

    @property
    def reading(self) -> Span:
        """The window, its reads cut to what some row reads."""
        return self.window.cut(max(1, *(f.reads for f in self.facts)))


def run_of(rows: Sequence[int]) -> slice | None:
    """Ascending rows as a slice, where they are consecutive."""
    first, last = rows[0], rows[-1]
    return slice(first, last + 1) if list(rows) == list(range(first, last + 1)) else None


@dataclass
class Batch:
    """The rows that are being decoded, windows open. They never move: a row that is done waits for the next request."""

    state: State
    window: Span
    flags: Tensor  # (B, F)
    facts: list[Facts]
    request: list[Ticket | None]  # of each row; None: nobody's

    @property
    def busy(self) -> list[int]:
        """The rows that decode a request."""
        return [i for i, r in enumerate(self.request) if r is not None]

    @property
    def tickets(self) -> list[Ticket]:
        """Those of the busy rows."""
        return [ticket for ticket in self.request if ticket is not None]

    def part(self, rows: list[int]) -> Part:
        """Some of the rows."""
        request = [r for r in (self.request[i] for i in rows) if r is not None]
        facts, at = [self.facts[i] for i in rows], index(rows, self.flags.device)
        whole = len(rows) == len(self.request)
        state, window = (self.state, self.window) if whole else (self.state.take(at), self.window.take(at))
        return Part(rows, at, run_of(rows), state, window, facts, request)

    def put(self, rows: list[int], state: State, window: Span, flags: Tensor) -> None:
        """Replace some rows, on the device."""
        if rows == list(range(len(self.request))):
            self.state, self.window, self.flags = state, window, flags
        else:
            at = index(rows, self.flags.device)
            self.state, self.window = self.state.put(at, state), self.window.put(at, window)
            self.flags = self.flags.index_copy(0, at, flags)

    def took(self, turn: Turn) -> Stepped:
        """Carry out the step that some rows took."""
        self.put(turn.part.rows, turn.state, turn.window, turn.flags)
        return Stepped(turn.part, turn.answer.filled)


class Ask(NamedTuple):
    """A step that waits for its forward."""

    part: Part
    shape: Shape
    window: Span  # its reads cut to the shape
    plan: Plan  # what is fed
    queries: int  # the planned ones; inputs may feed more behind them


class Turn(NamedTuple):
    """What one step makes of some rows."""

    part: Part  # as they were
    after: State  # after the step
    state: State  # with the next window open
    window: Span  # the next one
    flags: Tensor  # (N, F)
    answer: Answer


@dataclass(eq=False)
class Tick:
    """What the loop shows to its observers: the rows that stepped and their new state. Copy what you keep of that."""

    rows: list[int]  # of the state
    request: list[Ticket]  # of each
    before: list[Facts]  # what the host knew of each: the window of the step
    facts: list[Facts]  # what it knows now
    state: State

    @cached_property
    def canvas(self) -> Canvas:
        """The canvases of these rows on the host: one copy, for all who ask."""
        canvas, whole = self.state.canvas, self.rows == list(range(self.state.rows))
        return (canvas if whole else canvas.take(index(self.rows, canvas.ids.device))).cpu()

    @cached_property
    def ends(self) -> list[int]:
        """The first mask of each row, the width of the canvas where none is left."""
        return self.canvas.first_masked().tolist()


class Stepped(NamedTuple):
    """Rows of a batch that have taken a step together."""

    part: Part  # as they were
    fill: Fill  # `Answer.filled` of their forward


@dataclass(eq=False)
class Answer:
    """What one forward says, read at any column that it covered.

    `plan` is what was fed. Beside the planned forward it may hold more rows (copies of all rows, one after the other)
    and, behind the `queries` planned columns, more queries: those are private to `inputs`.
    """

    model: Model
    s: Sampler
    options: Options
    state: State
    window: Span
    plan: Plan
    said: Said  # of (copies B) rows of Q + private queries
    queries: int
    extra: object = None  # what `inputs.reduce` told of it

    def read(self, cols: Tensor, reach: Reach | None = None) -> Prediction:
        """The prediction at `cols` (B, W); of a column that was not covered it is meaningless. reach: what the host
        knows of the columns that a constraint looks at."""
        return self.prediction(self.logits(cols), cols, reach=reach)

    def logits(self, cols: Tensor) -> Tensor:
        """What it says of `cols` (B, W), folded and cut to what may be predicted: (B, W, V)."""
        row = self._query(self.model.source(cols)).clamp(min=0)
        hidden = self.said.hidden
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
        return logits if options.process is None else options.process(state.canvas, cols, logits)

    def prediction(
        self, logits: Tensor, cols: Tensor, canvas: Canvas | None = None, reach: Reach | None = None
    ) -> Prediction:
        """The prediction that these logits (B, W, V) at `cols` (B, W) are; under a constraint for rows with this
        canvas, None: with that of the forward."""
        state, law, rule = self.state, self.options.law, self.options.rule
        weights = None if self.said.weights is None else self._weights
        pred = Prediction(
            logits, cols, law=law, seed=state.seed, step=state.step, more=self._more, extra=self.extra, weights=weights
        )
        if rule is None:
            return pred
        if canvas is None and self.s.inputs is not None:
            canvas, reach = self.s.inputs.canvas(self), None
        return rule.bind(pred, state.canvas if canvas is None else canvas, state.memory[Bound], reach)

    def knows(self, cols: Tensor) -> Tensor:
        """(B, W) bool: of the columns (B, W), those that the forward covered."""
        return (self._query(self.model.source(cols)) >= 0) & (cols >= 0)

    def covered(self, cols: Tensor) -> Tensor:
        """(B,) whether the forward covered all of a row's `cols` (B, W)."""
        return (self.knows(cols) | (cols < 0)).all(1)

    def private(self) -> Tensor:
        """Logits (copies B, E, V) of the queries that `inputs` added."""
        return self.model.logits(self.said.hidden[:, self.queries :])

    @property
    def fed(self) -> Tensor:
        """(B,) positions that were computed, all copies of a row together."""
        return (self.plan.pos >= 0).sum(1).view(-1, self.state.rows).sum(0)

    def filled(self, state: State, rows: Tensor, width: int) -> tuple[State, Prediction]:
        """`state` with this prediction at every mask of `rows` (B,) bool; `width` bounds the masks of a row."""
        masked = state.canvas.masked & rows[:, None]
        cols = indices(masked, width)
        pred = self.prediction(self.logits(cols), cols, state.canvas)
        canvas = state.canvas.write(masked, scatter(state.canvas.ids, cols, pred.token))
        columns, noted = state.columns, state.columns.get(Logprobs)
        if noted is not None:
            columns = columns.plus(noted.noted(pred, cols, pred.token))
        done, closing = state.done | rows, state.closing & ~rows
        return state._replace(canvas=canvas, columns=columns, done=done, closing=closing), pred

    def _weights(self) -> Weights:
        """Attention weights of the B rows, from the copy that answers."""
        weights = self.said.weights
        assert weights is not None
        rows, inputs = self.state.rows, self.s.inputs
        if len(weights.cols) == rows or inputs is None:
            return weights
        at = inputs.answering(self) * rows + torch.arange(rows, device=weights.cols.device)
        return mapped(lambda x: x[at], weights)

    def _more(self, cols: Tensor) -> Prediction | None:
        return self.read(cols) if bool(self.covered(cols).all()) else None

    def _query(self, source: Tensor) -> Tensor:
        """(B, W) index of the query that holds each source position, -1 where none does."""
        if self.plan.dense:
            return source
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

    shares: ClassVar[bool] = True  # whether forwards of others may answer what it `asks`; else it makes its own
    model: Model
    s: Sampler
    policy: Policy
    options: Options
    store: KVStore | None = field(default=None, init=False)

    def begin(self, batch: Batch) -> None:
        """Make room for the keys and values of this batch."""
        if self.policy.stored:
            self.store = self.model.new_store(len(batch.request) * self.copies, batch.state.canvas.ids.shape[1])

    @property
    def copies(self) -> int:
        """Lanes of the store that a row has, one after the other."""
        return 1 if self.s.inputs is None else self.s.inputs.lanes

    def forget(self, rows: list[int]) -> None:
        """Empty the lanes of these rows: NaN would reach those who come next, whatever weight it has."""
        lanes = [self.copies * row + copy for row in rows for copy in range(self.copies)]
        for table in () if self.store is None else (*self.store.keys, *self.store.values):
            table.index_fill_(0, index(lanes, table.device), 0.0)

    def tick(self, batch: Batch) -> list[Stepped]:
        """One step of every row. Refreshing and stepping rows differ in shape: at most two forwards."""
        return [self.play(batch, rows) for rows in kinds(batch.busy, batch.facts)]

    def play(self, batch: Batch, rows: list[int]) -> Stepped:
        """The step of rows of one kind, carried out."""
        return batch.took(self.turn(batch.part(rows)))

    def clock(self, lane: int) -> int:
        """Steps that a lane has taken; lanes of the plain runner never drift apart."""
        return 0

    def rest(self, lanes: list[int], clock: int) -> None:
        """Let lanes that nobody waits for keep up with the others, which have taken so many steps."""

    def ticks(self, part: Part, facts: list[Facts], state: State) -> list[Tick]:
        """What observers are shown of rows of a batch that have stepped: `part` before, `facts` and the batch's state
        now."""
        return [Tick(part.rows, part.request, part.facts, facts, state)]

    def turn(self, part: Part) -> Turn:
        """One step of rows that all refresh, or all do not."""
        served(part.request, part.kind)
        return self.work(part, Shape.of(part.facts, part.fed))

    def asks(self, batch: Batch) -> list[Ask]:
        """The forwards that the next step of every row waits for (`shares`)."""
        some = [part for rows in kinds(batch.busy, batch.facts) for part in matched(rows, batch.facts)]
        return [self.pose(part, Shape.of(part.facts, part.fed)) for part in map(batch.part, some)]

    def work(self, part: Part, shape: Shape) -> Turn:
        """The same in these sizes: plan, forward, step, next window. It asks the device nothing: it can be captured."""
        ask = self.pose(part, shape)
        return self.told(ask, self.said(ask.plan))

    def alone(self, ask: Ask) -> Said:
        """What a forward of its own says to an ask."""
        served(ask.part.request, ask.part.kind)
        return self.said(ask.plan)

    def pose(self, part: Part, shape: Shape) -> Ask:
        """The half of the work in front of the forward."""
        window, plan = part.window.cut(shape.reads), self.planned(part, shape)
        return Ask(part, shape, window, expanded(self.s, part.state, window, plan), plan.pos.shape[1])

    def told(self, ask: Ask, said: Said) -> Turn:
        """The half behind it."""
        part, window = ask.part, ask.window
        answer = self.answer(part.state, window, ask.plan, said, ask.queries)
        pred = answer.read(window.reads, ask.shape.reach)
        return self.stepped(part, answer, pred, self.options.step(self.s, part.state, window, pred))

    def planned(self, part: Part, shape: Shape) -> Plan:
        """The forward of such rows, in their lanes of the store where there is one."""
        return plan(part.state, part.fed, shape, self.lane(part), part.lanes)

    def lane(self, part: Part) -> Tensor | None:
        """(N,) the lanes of a part; None where there is no store."""
        return part.at if self.policy.stored else None

    def forward(self, state: State, window: Span, plan: Plan) -> Answer:
        """Run a plan of these rows."""
        fed = expanded(self.s, state, window, plan)
        return self.answer(state, window, fed, self.said(fed), plan.pos.shape[1])

    def answer(self, state: State, window: Span, fed: Plan, said: Said, queries: int) -> Answer:
        """What a forward said of these rows, for columns that are asked later."""
        return Answer(self.model, self.s, self.options, state, window, fed, said, queries)

    def said(self, fed: Plan) -> Said:
        """Run a plan of N rows as it is."""
        options = ForwardOptions(
            fresh=fed.fresh, keep=fed.keep, visible=fed.visible, lane=fed.lane, known=fed.known,
            store=self.store if fed.stored else None,
        )  # fmt: skip
        if fed.rows is None:
            return Said(self.model.forward(fed.ids, fed.pos, **options))
        return self.model.forward_with(fed.ids, fed.pos, rows=fed.rows, **options).said

    def stepped(self, part: Part, answer: Answer, pred: Prediction, after: State, fed: int | None = None) -> Turn:
        """Rows that took a step, with their next window; fed: positions computed for each, None: by the answer."""
        covered = self.covers(part.fed.cols, after)
        count = answer.fed if fed is None else torch.full_like(after.step, fed)
        return Turn(part, after, *self.open(after, pred, covered, count), answer)

    def open(self, after: State, pred: Prediction, covered: Tensor, fed: Tensor) -> tuple[State, Span, Tensor]:
        """The state with its next window open, that, and what the host must know of both."""
        state, window = opened(self.s, self.policy, after)
        return state, window, flags(state, window, covered, pred.finite, fed)

    def covers(self, cols: Tensor, after: State) -> Tensor:
        """(B,) whether a forward of these columns (B, L) predicts every mask that is left."""
        source = self.model.source(torch.arange(cols.shape[1], device=cols.device)).expand_as(cols)
        return ~(after.canvas.masked & ~cols.gather(1, source)).any(1)

    def close(self, part: Part) -> Turn:
        """One full forward that fills whatever is still masked in these rows."""
        served(part.request, "closing")
        state, longest = part.state, max(f.length for f in part.facts)
        shape = Shape(longest, 0, longest, padded=any(f.length < longest for f in part.facts))
        answer = self.forward(state, empty(state), plan(state, everything(state), shape, None, None))
        filled, pred = answer.filled(state, torch.ones_like(state.done), max(f.masks for f in part.facts))
        after = filled._replace(step=state.step + 1)
        part = part._replace(facts=[f._replace(lo=0, hi=0) for f in part.facts])
        return Turn(part, after, *self.open(after, pred, torch.zeros_like(after.done), answer.fed), answer)


def empty(state: State) -> Span:
    """The window of a closing forward: nothing is committed through it."""
    zero = torch.zeros_like(state.step)
    return Span(lo=zero, hi=zero, end=zero, reads=zero[:, None] - 1, epoch=zero)
