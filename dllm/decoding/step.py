"""The two halves of a step around its forward, pure functions of the state: `opened` before it, `step` after it.

    opened -> plan -> model.forward -> Prediction -> step -> opened -> ...

Nothing here asks the device for a value, so both can be captured as parts of a CUDA graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dllm.decoding.cache.policy import Policy
from dllm.decoding.canvas import Decision, Fed, Plan, Span, State, splice_columns
from dllm.decoding.columns import marked, scatter
from dllm.decoding.prediction import Prediction
from dllm.decoding.slots import Sampler, View, best, widen
from dllm.models.transformer import Rows


def opened(s: Sampler, policy: Policy, state: State) -> tuple[State, Span]:
    """The state with its window open: what the step will commit, read and feed, and what it leaves in the store.

    A row that is done opens one, too, which nobody looks at: it is shown as if its last column were open.
    """
    canvas, width = state.canvas, state.canvas.ids.shape[1]
    last = torch.arange(width, device=canvas.ids.device) == canvas.length[:, None] - 1
    shown = last & state.done[:, None] & ~canvas.masked
    state, win = s.window.open(state._replace(canvas=canvas.showing(canvas.masked | shown)))
    state = state._replace(canvas=state.canvas.showing(state.canvas.masked & ~shown))
    if policy.sparse and not s.needs.committed:  # committed columns are computed only for those who read them
        read = (win.reads >= 0) & state.canvas.masked.gather(1, win.reads.clamp(min=0))
        win = win._replace(reads=torch.where(read, win.reads, -1))
    state = policy.note(state, win)
    win = win._replace(cached=policy.holds(state, win))
    for extra in s.reads:
        win = widen(win, extra(state, win), width)
    if win.reads.shape[1] < width:
        win = win._replace(reads=F.pad(win.reads, (0, width - win.reads.shape[1]), value=-1))
    return state, feeding(s, policy, state, win)


def feeding(s: Sampler, policy: Policy, state: State, window: Span) -> Span:
    """The window with the forwards of this policy."""
    window = policy.feed(state, window)
    if s.inputs is None and (s.needs.attention is None or not policy.shift):
        return window

    def fed(refresh: bool) -> Fed:
        own = window.feeds(refresh)
        if s.needs.attention is not None and policy.shift:  # the attention of a column is that of its own query
            read = torch.where(window.inside(window.reads), window.reads, -1)
            own = own._replace(cols=own.cols | marked(read, own.cols.shape[1]))
        return own if s.inputs is None else s.inputs.cover(own, state, window)

    return window._replace(refresh=fed(True), step=fed(False))


def expanded(s: Sampler, state: State, window: Span, plan: Plan) -> Plan:
    """The plan that is fed: the canvas, or what the inputs slot makes of it; and whose attention is wanted."""
    fed = plan if s.inputs is None else s.inputs.expand(plan, state, window)
    attention, width = s.needs.attention, state.canvas.ids.shape[1]
    if attention is None:
        return fed
    pos = fed.pos[:, : plan.pos.shape[1]]  # what inputs add behind is read by nobody else
    queries = torch.arange(pos.shape[1], device=pos.device).expand_as(pos)
    at = torch.where(pos < 0, -1, queries)
    if attention.rows == "window":
        table = scatter(torch.full((len(pos), width), -1, device=pos.device), pos, queries)
        reads = window.reads.repeat(len(pos) // len(window.reads), 1)
        at = torch.where(reads < 0, -1, table.gather(1, reads.clamp(min=0)))
    assert isinstance(attention.layers, frozenset), "prepare names the layers"
    return fed._replace(rows=Rows(attention.layers, at, width))


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
    return advance(s, view, pred.lawful(view.canvas, d))


def advance(s: Sampler, view: View, d: Decision) -> State:
    """The state after a decision. A fill is left to the engine, which knows what the forward covered."""
    state, canvas = view.state, view.canvas.apply(d)
    open_ = canvas.masked.any(1)
    done = d.done if s.stop is None else d.done | s.stop(view, canvas)
    held, closing = view.held, state.closing
    if d.fill is not None:
        held, closing = held & ~d.fill, d.fill & open_
    cached, columns = view.window.cached or state.cached, view.columns
    if d.edits:
        edited = torch.zeros_like(state.done)
        edited[[row for row, *_ in d.edits]] = True
        cached = cached.forget(edited)
        columns = splice_columns(columns, d)
    done = done | ~(open_ | held)
    return State(canvas, state.step + 1, state.seed, state.asked, cached, done, closing, view.memory, columns)
