"""KLASS: commit columns that are confident and whose distribution has stopped moving (arXiv 2511.05664)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.samplers import (
    OFF,
    Bundle,
    Canvas,
    Context,
    Method,
    Needs,
    Prediction,
    Presets,
    Sized,
    Span,
    State,
    View,
    param,
)  # fmt: skip
from dllm.samplers.quota import Quota


class Before(NamedTuple):
    """Per-row leaves: what the last step leaves of the K columns that are followed at most."""

    logits: Tensor  # (B, K, V)
    lse: Tensor  # (B, K)
    cols: Tensor  # (B, K) column + 1; 0: none
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

        def first(canvas: Canvas, columns: int, steps: int | None) -> Before:
            """Nothing was seen."""
            most = min(context.max_new_tokens, canvas.ids.shape[1]) if whole else columns
            cols = canvas.ids.new_zeros((len(canvas.ids), most))
            none = cols.to(context.logits)
            return Before(none[..., None].expand(-1, -1, context.vocab_size), none, cols, canvas.length)

        return Bundle(
            select=select,
            memory=Sized(first),
            columns=lambda canvas: Calm(*[torch.zeros_like(canvas.ids)] * 2),
            reads=beyond if whole else None,
            needs=Needs(generation=whole),
        )

    def stable(self, view: View, pred: Prediction) -> Tensor:
        """(B, W) bool; moves the history on by this step."""
        history, real = view.columns[Calm], view.cols >= 0
        cols = torch.where(real if self.history == "generation" else view.inside, view.cols + 1, 0)  # what is followed
        before = view.memory[Before]
        at, known = matched(view, cols, before)
        calm = known & (divergence(pred, before.logits, before.lse, at) < self.epsilon)
        streak = torch.where(calm, view.gather(history.streak) + 1, 0)
        age = view.gather(history.age) + view.inside
        view.columns[Calm] = Calm(view.scatter(history.streak, streak, real), view.scatter(history.age, age, real))
        view.memory[Before] = followed(pred, cols, before.cols.shape[1], view.canvas.length)
        return (streak >= self.n) & (age >= self.n)


def beyond(state: State, window: Span) -> Tensor:
    """(B, R) every generated column outside the window, -1 padded."""
    canvas = state.canvas
    cols = torch.arange(canvas.ids.shape[1], device=canvas.ids.device)
    generated = (cols >= canvas.start[:, None]) & (cols < canvas.length[:, None])
    return torch.where(generated & ~window.inside(cols), cols, -1)


def matched(view: View, cols: Tensor, before: Before) -> tuple[Tensor, Tensor]:
    """(B, W) where the last step left what it saw of these columns, and whether it did."""
    cols = torch.where((view.canvas.length == before.length)[:, None], cols, 0)
    same = (cols[:, :, None] == before.cols[:, None]) & (cols > 0)[:, :, None]  # (B, W, K)
    return same.int().argmax(-1), same.any(-1)


def followed(pred: Prediction, cols: Tensor, most: int, length: Tensor) -> Before:
    """What this step leaves: the K = `most` first columns of those that are followed, `cols` (B, W) plus one, else 0.

    Without a copy where the step reads K columns.
    """
    logits, lse, more = pred.logits, pred.lse, most - cols.shape[1]
    if more < 0:
        at = (cols == 0).int().argsort(dim=1, stable=True)[:, :most]
        cols, lse = cols.gather(1, at), lse.gather(1, at)
        logits = logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))
    elif more:
        cols, lse, logits = F.pad(cols, (0, more)), F.pad(lse, (0, more)), F.pad(logits, (0, 0, 0, more))
    return Before(logits, lse, cols, length)


def divergence(pred: Prediction, logits: Tensor, lse: Tensor, at: Tensor) -> Tensor:
    """(B, W) KL(p || p') in nats of the raw laws; p' from the logits (B, K, V) and their log-sum-exps (B, K), of which
    `at` (B, W) names one a column.

    Equal to the sum of p (z - z') less the difference of the log-sum-exps: no logarithm of a probability.
    """
    rows = torch.arange(len(at), device=at.device)[:, None] * logits.shape[1] + at
    table = logits.flatten(0, 1)
    moved = [
        torch.linalg.vecdot(z.softmax(-1), table[row].sub_(z).nan_to_num_(nan=0.0)) for z, row in pred.chunks(rows)
    ]
    return lse.gather(1, at) - pred.lse - torch.cat(moved).view(at.shape)
