"""KLASS: commit columns that are confident and whose distribution has stopped moving (arXiv 2511.05664)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.samplers import OFF, Bundle, Canvas, Context, Method, Prediction, Presets, Span, State, View, param
from dllm.samplers.quota import Quota

ROWS = 1  # distributions compared at once: their temporaries stay in a CPU's cache


class Before(NamedTuple):
    """Per-row leaves: what the last step leaves; empty before the first."""

    logits: Tensor  # (B, W, V)
    lse: Tensor  # (B, W)
    cols: Tensor  # (B, W) column + 1; 0: not followed
    length: Tensor  # (B,) where it changed, columns moved


class Calm(NamedTuple):
    """Per-column leaves, (B, L)."""

    streak: Tensor  # steps in a row that moved the distribution by less than epsilon
    age: Tensor  # steps in the window


@dataclass(frozen=True)
class KLASS(Method):
    """Commit candidates with confidence above kappa whose KL(p_t || p_{t-1}) stayed below epsilon for the last n steps
    and that have been in the window for n steps; where a row has none, its quota by score.

    `history="generation"` follows the distributions of all generated columns from the first step on, as published: the
    cache must then serve them all. `"window"` starts with the block and costs the window only.
    """

    kappa: float = param(
        0.9, "the released default; published: 0.6 GSM8K and MATH, 0.7 MBPP, 0.9 HumanEval", low=0, high=OFF
    )
    epsilon: float = param(0.01, "nats; the released default, of MATH, HumanEval and MBPP (GSM8K: 0.015)", low=0)
    n: int = param(2, "steps a column must be stable, Table 6 of the paper", low=1)
    history: str = param("window", "bounded memory and any cache", choices=("window", "generation"))

    name: ClassVar[str] = "klass"
    source: ClassVar[str] = "KLASS, arXiv 2511.05664"
    cost: ClassVar[str] = "one row, the window's columns (history=generation: all generated ones) and their last logits"
    presets: ClassVar[Presets] = {
        "paper": {"history": "generation"},
        "gsm8k": {"kappa": 0.6, "epsilon": 0.015},
        "math": {"kappa": 0.6, "epsilon": 0.01},
        "humaneval": {"kappa": 0.9, "epsilon": 0.01},
        "mbpp": {"kappa": 0.7, "epsilon": 0.01},
        "dream_gsm8k": {"kappa": 0.9, "epsilon": 0.001},
        "dream_math": {"kappa": 0.9, "epsilon": 0.005},
        "dream_humaneval": {"kappa": 0.8, "epsilon": 0.001},
        "dream_mbpp": {"kappa": 0.9, "epsilon": 0.001},
    }  # for LLaDA, and with the prefix for Dream

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection and remembers the last step's distributions."""
        quota = Quota.of(context)

        def select(view: View, soft: Prediction, score: Tensor) -> Tensor:
            ready = view.live & self.stable(view, soft) & (soft.confidence > self.kappa)
            return torch.where(ready.any(1, keepdim=True), ready, quota(view, soft, score))

        whole = self.history == "generation"
        return Bundle(
            select=select,
            memory=_memory,
            columns=lambda canvas: Calm(*[torch.zeros_like(canvas.ids)] * 2),
            reads=beyond if whole else None,
        )

    def stable(self, view: View, pred: Prediction) -> Tensor:
        """(B, W) bool; moves the history on by this step."""
        history, real = view.columns[Calm], view.cols >= 0
        cols = torch.where(real if self.history == "generation" else view.inside, view.cols + 1, 0)  # what is followed
        before, known = last(view, cols)
        calm = known & (divergence(pred, *before) < self.epsilon) if before else known
        streak = torch.where(calm, view.gather(history.streak) + 1, 0)
        age = view.gather(history.age) + view.inside
        view.columns[Calm] = Calm(view.scatter(history.streak, streak, real), view.scatter(history.age, age, real))
        view.memory[Before] = Before(pred.logits, pred.lse, cols, view.canvas.length)
        return (streak >= self.n) & (age >= self.n)


def _memory(canvas: Canvas) -> Before:
    none = canvas.ids.new_zeros((len(canvas.ids), 0))
    return Before(none.float()[..., None].expand(-1, -1, 0), none.float(), none, canvas.length)


def beyond(state: State, window: Span) -> Tensor:
    """(B, R) every generated column outside the window, -1 padded."""
    canvas = state.canvas
    cols = torch.arange(int(canvas.start.min()), int(canvas.length.max()), device=canvas.ids.device)
    generated = (cols >= canvas.start[:, None]) & (cols < canvas.length[:, None])
    return torch.where(generated & ~window.inside(cols), cols, -1)


def last(view: View, cols: Tensor) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
    """Logits (B, W, V) and their log-sum-exps (B, W) of the last step at these columns, and where they are known."""
    logits, lse, at, length = view.memory[Before]
    if not logits.shape[-1]:
        return None, torch.zeros_like(view.masked)
    cols = torch.where((view.canvas.length == length)[:, None], cols, 0)
    if at.shape == cols.shape and torch.equal(at, cols):
        return (logits, lse), cols > 0
    same = (cols[:, :, None] == at[:, None]) & (cols > 0)[:, :, None]  # (B, W, W')
    known, where = same.any(-1), same.int().argmax(-1)
    return (logits.gather(1, where[..., None].expand(-1, -1, logits.shape[-1])), lse.gather(1, where)), known


def divergence(pred: Prediction, logits: Tensor, lse: Tensor) -> Tensor:
    """(B, W) KL(p || p') in nats of the raw laws; p' from the logits (B, W, V) and their log-sum-exps (B, W).

    Equal to the sum of p (z - z') less the difference of the log-sum-exps: no logarithm of a probability.
    """
    rows = zip(*(torch.split(x.flatten(0, 1), ROWS) for x in (pred.logits, logits)), strict=True)
    moved = [torch.linalg.vecdot(z.softmax(-1), (z - w).nan_to_num_(nan=0.0)) for z, w in rows]
    return torch.cat(moved).view(pred.cols.shape) - pred.lse + lse
