"""KLASS: commit columns that are confident and whose distribution has stopped moving (arXiv 2511.05664)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm.canvas import Canvas, State, Window
from dllm.prediction import Prediction
from dllm.samplers.base import Bundle, Context, Method, Needs, View, param
from dllm.samplers.quota import Quota

ROWS = 8  # distributions compared at once: their temporaries stay in cache


@dataclass(frozen=True)
class KLASS(Method):
    """Commit candidates with confidence above kappa whose KL(p_t || p_{t-1}) stayed below epsilon for the last n steps
    and that have been in the window for n steps; where a row has none, its quota by score.

    `history="generation"` follows the distributions of all generated columns from the first step on, as published: the
    cache must then serve them all. `"window"` starts with the block and costs the window only.
    """

    kappa: float = param(0.9, "the released default; published: 0.6 GSM8K and MATH, 0.7 MBPP, 0.9 HumanEval", low=0)
    epsilon: float = param(0.01, "nats; the released default, of MATH, HumanEval and MBPP (GSM8K: 0.015)", low=0)
    n: int = param(2, "steps a column must be stable, Table 6 of the paper", low=1)
    history: str = param("window", "bounded memory and any cache", choices=("window", "generation"))

    name: ClassVar[str] = "klass"
    source: ClassVar[str] = "KLASS, arXiv 2511.05664"
    cost: ClassVar[str] = "one row, the window's columns (history=generation: all generated ones) and their last logits"
    presets: ClassVar[dict] = {
        "paper": {"history": "generation"},
        "gsm8k": {"kappa": 0.6, "epsilon": 0.015},
        "math": {"kappa": 0.6, "epsilon": 0.01},
        "humaneval": {"kappa": 0.9, "epsilon": 0.01},
        "mbpp": {"kappa": 0.7, "epsilon": 0.01},
    }

    def bundle(self, context: Context) -> Bundle:
        quota = Quota(context.steps, context.block_length)

        def select(view: View, soft: Prediction, score: Tensor) -> Tensor:
            ready = view.live & self.stable(view, soft) & (soft.confidence > self.kappa)
            return torch.where(ready.any(1, keepdim=True), ready, quota(view, soft, score))

        whole = self.history == "generation"
        return Bundle(
            select=select,
            needs=Needs(generation=whole, committed=True),
            memory=_memory,
            columns=_columns,
            reads=beyond if whole else None,
        )

    def stable(self, view: View, pred: Prediction) -> Tensor:
        """(B, W) bool; moves the history on by this step."""
        memory, columns = view.memory, view.columns
        before, known = last_logits(view, pred)
        calm = known & (divergence(pred, before) < self.epsilon) if before is not None else known
        streak = torch.where(calm, view.gather(columns["klass.streak"]) + 1, 0)
        inside = (view.cols >= view.window.lo[:, None]) & (view.cols < view.window.hi[:, None])
        age = view.gather(columns["klass.age"]) + inside
        real = view.cols >= 0
        columns["klass.streak"] = view.scatter(columns["klass.streak"], streak, real)
        columns["klass.age"] = view.scatter(columns["klass.age"], age, real)
        memory["klass.logits"], memory["klass.cols"] = pred.logits, view.cols + 1
        return (streak >= self.n) & (age >= self.n)


def _memory(canvas: Canvas) -> dict[str, Tensor]:
    rows = len(canvas.ids)
    return {
        "klass.logits": canvas.ids.new_zeros((rows, 0, 0), dtype=torch.float32),  # (B, W, V) of the last step
        "klass.cols": canvas.ids.new_zeros((rows, 0)),  # (B, W) column + 1; 0: none
    }


def _columns(canvas: Canvas) -> dict[str, Tensor]:
    zero = torch.zeros_like(canvas.ids)
    return {"klass.streak": zero, "klass.age": zero}


def beyond(state: State, window: Window) -> Tensor:
    """(B, R) every generated column outside the window, -1 padded."""
    canvas = state.canvas
    cols = torch.arange(int(canvas.start.min()), int(canvas.length.max()), device=canvas.ids.device)
    inside = (cols >= window.lo[:, None]) & (cols < window.hi[:, None])
    return torch.where((cols >= canvas.start[:, None]) & (cols < canvas.length[:, None]) & ~inside, cols, -1)


def last_logits(view: View, pred: Prediction) -> tuple[Tensor | None, Tensor]:
    """The logits of the last step at this step's columns (B, W, V), and where they are known (B, W)."""
    old, at = view.memory["klass.logits"], view.memory["klass.cols"]
    cols = view.cols + 1
    if not old.shape[-1]:
        return None, torch.zeros_like(view.masked)
    if at.shape == cols.shape and torch.equal(at, cols):
        return old, cols > 0
    same = (cols[:, :, None] == at[:, None]) & (cols > 0)[:, :, None]  # (B, W, W')
    known, where = same.any(-1), same.int().argmax(-1)
    return old.gather(1, where[..., None].expand(-1, -1, old.shape[-1])), known


def divergence(pred: Prediction, before: Tensor) -> Tensor:
    """(B, W) KL(p || p') in nats of the raw laws; p' from the logits `before` (B, W, V).

    Equal to the sum of p (z - z') less the difference of the log-sum-exps: one pass, no logarithm.
    """
    now, old, probs = (x.flatten(0, 1).split(ROWS) for x in (pred.logits, before, pred.probs))
    lse = torch.cat([z.logsumexp(-1) for z in old])
    moved = [torch.linalg.vecdot(p, (z - w).nan_to_num_(nan=0.0)) for z, w, p in zip(now, old, probs, strict=True)]
    return torch.cat(moved).view(pred.cols.shape) - pred.lse + lse.view(pred.cols.shape)
