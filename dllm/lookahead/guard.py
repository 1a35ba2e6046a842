"""Whether a decision hangs on rounding: what mode `guarded` asks before it trusts a shared forward."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from dllm.decoding.canvas import Span, State
from dllm.decoding.prediction import Prediction
from dllm.decoding.slots import Sampler
from dllm.decoding.step import step
from dllm.lookahead.setting import Lookahead
from dllm.models.model import Model
from dllm.models.transformer import Weights

_DELTAS: weakref.WeakKeyDictionary[Model, float] = weakref.WeakKeyDictionary()
SAFETY = 16.0  # times the largest difference seen in one probe


def measured_delta(model: Model) -> float:
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


def bound(setting: Lookahead, model: Model) -> float | None:
    """How far logits may move without notice in mode `guarded`: what the caller says, else what is measured; None: in
    another mode."""
    if setting.mode != "guarded":
        return None
    return measured_delta(model) if setting.delta is None else setting.delta


def alike(a: State, b: State) -> Tensor:
    """(B,) whether two states hold the same tokens and the same verdicts."""
    same = (a.canvas.ids == b.canvas.ids).all(1) & (a.canvas.masked == b.canvas.masked).all(1)
    return same & (a.canvas.length == b.canvas.length) & (a.done == b.done) & (a.closing == b.closing)


def doubtful(s: Sampler, state: State, window: Span, pred: Prediction, after: State, delta: float) -> Tensor:
    """(B,) whether a change of the logits by `delta` could turn the decision over, from `state` to `after`.

    That of a row that leaves by an exit always could: a fill takes many tokens. Of the others the worst case of a rule
    that is monotone in each confidence: what was chosen gets less sure, the rest more. Attention weights are tilted
    with them in a few patterns, which finds most of what hangs on them, and bounds nothing.
    """
    at = window.reads.clamp(min=0)
    chosen = state.canvas.masked.gather(1, at) & ~after.canvas.masked.gather(1, at)
    same = ~after.closing
    for sign in (1.0,) if pred.law.greedy else (1.0, -1.0):
        change = torch.where(chosen, -2.0, 2.0)[..., None].to(pred.logits.dtype) * delta * sign
        logits = pred.logits.scatter_add(-1, pred.argmax[..., None], change)
        for weights in [None] if s.needs.attention is None else tilted(pred.weights, delta):
            same &= alike(after, step(s, state, window, pred.over(logits, weights)))
    return ~same


def tilted(weights: Weights, delta: float) -> Iterator[Weights]:
    """Attention weights of which each is a share `delta` larger or smaller: all of them, and by the bits of a hash of
    query and key."""
    cols, table = weights
    mixed = cols[..., None] * 40503 + torch.arange(table.shape[2], device=cols.device) * 30011  # (B, R, L)
    for signs in (torch.zeros_like(mixed), mixed >> 3, mixed >> 5):
        up = 1 + delta * (1 - 2 * (signs & 1))
        yield from (Weights(cols, table * up), Weights(cols, table * (2 - up)))
