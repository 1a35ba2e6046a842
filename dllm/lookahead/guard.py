"""Whether a decision hangs on rounding: what mode `guarded` asks before it trusts a shared forward."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from dllm.decoding.canvas import State


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
