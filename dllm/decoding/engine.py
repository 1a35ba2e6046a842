"""The engine: one pure `step`, one `decode` loop. Follow a token from here.

    window.open -> policy.plan -> model.forward -> Prediction -> step -> State -> retire, refill

Rows are independent: a row's window, refresh, noise, counters and exit never depend on its neighbours. A runner decides
which rows step in a tick and where their predictions come from: `Runner` asks the model for every row,
`LookaheadRunner` answers from a memo where it can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.decoding.cache.policy import Policy, full_plan
from dllm.decoding.canvas import Canvas, Decision, Plan, Span, State, splice_columns
from dllm.decoding.columns import indices, scatter
from dllm.decoding.meter import Meter
from dllm.decoding.prediction import Law, Prediction
from dllm.decoding.slots import Sampler, View, best, widen
from dllm.errors import DllmError
from dllm.models.model import Model
from dllm.models.transformer import KVStore


class Tick(NamedTuple):
    """What the loop shows to its observers: the rows that stepped, their new state, what was decided."""

    request: list[int]  # request index of each row
    before: Canvas
    state: State
    window: Span


Step = Callable[[Sampler, State, Span, Prediction], State]  # `step`, or what checks it (`invariants.Checked`)


class Stepped(NamedTuple):
    """Rows that took one step together."""

    rows: Tensor | None  # their indices in the batch; None: all
    state: State  # after the step
    window: Span


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


def opened(s: Sampler, state: State) -> tuple[State, Span]:
    """The state with its window open, and everything that the step will read."""
    state, win = s.window.open(state)
    for extra in s.reads:
        win = widen(win, extra(state, win))
    return state, win


def expanded(s: Sampler, state: State, window: Span, plan: Plan) -> Plan:
    """The plan that is fed: the canvas, or what the inputs slot makes of it."""
    return plan if s.inputs is None else s.inputs.expand(plan, state, window)


def step(s: Sampler, state: State, window: Span, pred: Prediction) -> State:
    """The whole step but the forward. Pure: equal arguments give equal states."""
    view = View(state, window, s.schedule)
    s.window.narrow(view, pred)
    soft = pred
    for adjust in s.adjust:  # for selection only
        soft = adjust(view, soft)
    score = s.score(view, soft)
    chosen = s.select(view, soft, score) & view.live
    if not s.needs.may_idle:  # progress: the best candidate where nothing was chosen
        chosen = chosen | (best(score, view.live) & ~chosen.any(1, keepdim=True))
    d = view.commit(chosen, soft.token)
    for amend in s.amend:  # raw predictions
        d = amend(view, pred, d)
    return advance(s, view, pred, d)


def advance(s: Sampler, view: View, pred: Prediction, d: Decision) -> State:
    """The state after a decision. A fill that the forward did not cover asks for a closing forward."""
    state, canvas = view.state, view.canvas.apply(d)
    closing, done = state.closing, d.done if s.stop is None else d.done | s.stop(view, canvas)
    if d.fill is not None:
        canvas, filled = fill(canvas, pred, d.fill)
        closing, done = d.fill & ~filled, done | filled
    cached, columns = view.window.cached or state.cached, view.columns
    if d.edits:
        edited = torch.zeros_like(state.done)
        edited[[row for row, *_ in d.edits]] = True
        cached = cached.forget(edited)
        columns = splice_columns(columns, d)
    done = done | ~(canvas.masked.any(1) | view.held)
    return State(canvas, state.step + 1, state.seed, state.asked, cached, done, closing, view.memory, columns)


def fill(canvas: Canvas, pred: Prediction, rows: Tensor) -> tuple[Canvas, Tensor]:
    """Write the prediction at every mask of `rows` (B,) bool; also the rows that could be filled."""
    if not bool(rows.any()):
        return canvas, rows
    masked = canvas.masked & rows[:, None]
    cols = indices(masked)
    wide = pred.at(cols)
    if wide is None:
        return canvas, torch.zeros_like(rows)
    return canvas.write(masked, scatter(canvas.ids, cols, wide.token)), rows


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

    def read(self, cols: Tensor) -> Prediction | None:
        """The prediction at `cols` (B, W); None where some column was not covered."""
        return self._predict(cols, self._query(self.model.source(cols)))

    def covered(self, cols: Tensor) -> Tensor:
        """(B,) whether the forward covered all of a row's `cols` (B, W)."""
        row = self._query(self.model.source(cols))
        return ~((row < 0) & (cols >= 0)).any(1)

    def private(self) -> Tensor:
        """Logits (copies B, E, V) of the queries that `inputs` added."""
        return self.model.logits(self.hidden[:, self.queries :])

    def _query(self, source: Tensor) -> Tensor:
        """(B, W) index of the query that holds each source position; padding reads query 0."""
        pos = self.plan.pos[: len(source), : self.queries]
        if self.plan.refresh:
            return source  # a full forward: query index = position
        queries = torch.arange(pos.shape[1], device=pos.device).expand_as(pos)
        return scatter(torch.full_like(self.state.canvas.ids, -1), pos, queries).gather(1, source)

    def _blank(self) -> Tensor:
        """(B,) rows that hold nothing but masks: all their columns tie, and rounding must not order them."""
        canvas = self.state.canvas
        outside = torch.arange(canvas.ids.shape[1], device=canvas.ids.device) >= canvas.length[:, None]
        return ((canvas.ids == canvas.mask_id) | outside).all(1)

    def _predict(self, cols: Tensor, row: Tensor) -> Prediction | None:
        if not self.plan.refresh and bool(((row < 0) & (cols >= 0)).any()):
            return None
        hidden, row = self.hidden, row.clamp(min=0)
        copies = hidden.shape[0] // row.shape[0]
        index = row.repeat(copies, 1) if copies > 1 else row
        picked = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self.model.logits(picked)  # (copies B, W, V)
        if self.options.blank:
            logits = torch.where(self._blank().repeat(copies)[:, None, None], logits[:, :1], logits)
        if self.s.inputs is not None:
            logits, self.extra = self.s.inputs.reduce(logits, cols, self)
            logits[..., self.model.mask_id] = -torch.inf
        state, options = self.state, self.options
        if options.suppress:
            logits[..., list(options.suppress)] = -torch.inf
        if options.min_new_tokens and options.eos_ids:
            early = cols < (state.canvas.start + options.min_new_tokens)[:, None]
            for eos in options.eos_ids:
                logits[..., eos].masked_fill_(early, -torch.inf)
        law = options.law
        return Prediction(logits, cols, law=law, seed=state.seed, step=state.step, more=self.read, extra=self.extra)


@dataclass(eq=False)
class Runner:
    """Runs plans: expands the inputs, calls the model, counts, and gives the prediction a step reads."""

    model: Model
    s: Sampler
    policy: Policy
    options: Options
    meter: Meter
    store: KVStore | None

    def __post_init__(self) -> None:
        self.finite = torch.ones((), dtype=torch.bool, device=self.model.device)  # of all predictions so far

    def tick(self, state: State, lane: Tensor, requests: list[int]) -> list[Stepped]:
        """One step of every row."""
        return self.stepped(*opened(self.s, state), lane, requests)

    def stepped(self, state: State, win: Span, lane: Tensor, requests: list[int]) -> list[Stepped]:
        """One step of rows whose window is open."""
        parts = []
        for rows, plan in self.policy.plan(state, win, lane):
            sub, sub_win, ids = state, win, requests
            if rows is not None:
                sub, sub_win, ids = state.take(rows), win.take(rows), [requests[i] for i in rows.tolist()]
            after = self.options.step(self.s, sub, sub_win, self.predict(self.forward(sub, sub_win, plan, ids)))
            parts.append(Stepped(rows, after, sub_win))
        return parts

    def clock(self, lane: int) -> int:
        """Steps that a lane has taken; lanes of the plain runner never drift apart."""
        return 0

    def predict(self, answer: Answer) -> Prediction:
        """The prediction at the columns that the step reads."""
        pred = answer.read(answer.window.reads)
        if pred is None:
            raise RuntimeError(f"cache plan does not cover the columns that sampler {self.s.name!r} reads")
        self.finite = self.finite & pred.finite
        return pred

    def forward(self, state: State, window: Span, plan: Plan, requests: list[int]) -> Answer:
        """Run a plan of these rows, and count it."""
        fed = expanded(self.s, state, window, plan)
        self.meter.forward(requests, fed)
        return self.answer(state, window, fed, self.hidden(fed), plan.pos.shape[1])

    def answer(self, state: State, window: Span, fed: Plan, hidden: Tensor, queries: int) -> Answer:
        """What hidden states say of these rows, for columns that are asked later."""
        return Answer(self.model, self.s, self.options, state, window, fed, hidden, queries)

    def hidden(self, fed: Plan) -> Tensor:
        """Hidden states (N, Q, D) of a plan."""
        store = self.store if fed.stored else None
        return self.model.forward(
            fed.ids, fed.pos, fresh=fed.fresh, keep=fed.keep, visible=fed.visible, lane=fed.lane, store=store
        )


@torch.inference_mode()  # as a decorator it is left at every yield
def decode(
    model: Model,
    s: Sampler,
    policy: Policy,
    queue: State,
    *,
    batch_size: int,
    options: Options,
    meter: Meter,
    runner: Callable[..., Runner] = Runner,
) -> Iterator[Tick]:
    """Decode every row of `queue`, at most `batch_size` at a time; a finished row makes room for the next one.

    Yields the rows that stepped. Errors: NaN logits in mid-decode.
    """
    total, lanes = queue.rows, s.inputs.lanes if s.inputs is not None else 1
    size = min(batch_size, total)
    store = model.new_store(size * lanes, int(queue.canvas.ids.shape[1])) if policy.stored else None
    run = runner(model, s, policy, options, meter, store)
    caps = [options.max_nfe or 4 * w + 64 for w in (queue.canvas.length - queue.canvas.start).tolist()]
    request, waiting = list(range(size)), size
    state, lane = queue.take(torch.arange(size, device=queue.step.device)), torch.arange(size, device=queue.step.device)
    closing, free = [False] * size, list[int]()
    while request:
        if any(closing):
            ending = [i for i, c in enumerate(closing) if c]
            which = torch.tensor(ending, device=lane.device)
            sub = state.take(which)
            parts = [Stepped(which, close(run, sub, [request[i] for i in ending]), empty(sub))]
        else:
            parts = run.tick(state, lane, request)
        for rows, after, win in parts:
            before = state if rows is None else state.take(rows)
            yield Tick(request if rows is None else [request[i] for i in rows.tolist()], before.canvas, after, win)
            state = after if rows is None else state.put(rows, after)
        # the host sync of the tick
        flags = torch.stack([state.done, state.closing, run.finite.expand_as(state.done)])
        done, closing, finite, steps = torch.cat([flags.long(), state.step[None]]).tolist()
        if not finite[0]:
            raise DllmError(
                "the model returned NaN or infinite logits: load it in float32 or bfloat16, or check the checkpoint"
            )
        meter.finish(r for r, d in zip(request, done, strict=True) if d)
        for i, r in enumerate(request):
            if not done[i] and steps[i] >= caps[r] - 1 and not closing[i]:
                closing[i] = True
                meter.capped.add(r)
        if any(done):
            keep = [i for i, d in enumerate(done) if not d]
            free += [l for l, d in zip(lane.tolist(), done, strict=True) if d]
            index = torch.tensor(keep, dtype=torch.long, device=lane.device)
            state, lane = state.take(index), lane[index]
            request, closing = [request[i] for i in keep], [closing[i] for i in keep]
        # With a lookahead lanes have taken different numbers of steps. A waiting row enters a free lane once no busy
        # lane has taken fewer than that one: at this step the plain call would let it in.
        due = min((run.clock(l) for l in lane.tolist()), default=None) if free and waiting < total else None
        ready = [l for l in free if due is None or run.clock(l) <= due][: total - waiting]
        if ready:
            entering = list(range(waiting, waiting + len(ready)))
            state = state.cat(queue.take(torch.tensor(entering, device=lane.device)))
            lane = torch.cat([lane, torch.tensor(ready, device=lane.device)])
            request, closing = request + entering, closing + [False] * len(entering)
            free, waiting = [l for l in free if l not in ready], waiting + len(entering)


def close(run: Runner, state: State, requests: list[int]) -> State:
    """One full forward that fills whatever is still masked in these rows."""
    plan = full_plan(state)
    answer = run.forward(state, empty(state), plan, requests)
    blank = answer.read(torch.zeros_like(state.step)[:, None])
    assert blank is not None
    yes = torch.ones_like(state.done)
    canvas, _ = fill(state.canvas, blank, yes)
    return state._replace(canvas=canvas, step=state.step + 1, done=yes, closing=~yes)


def empty(state: State) -> Span:
    """The window of a closing forward: nothing is committed through it."""
    zero = torch.zeros_like(state.step)
    return Span(lo=zero, hi=zero, reads=zero[:, None] - 1, epoch=zero)
