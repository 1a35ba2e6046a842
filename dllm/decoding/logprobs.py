"""Log-probabilities of what is written: the raw law at the forward whose step wrote a token.

They are leaves of the state, so they cost no forward, follow length edits, and are those of the plain call under a
lookahead. docs/logprobs.md says what the numbers are, and what they are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.decoding.canvas import Canvas, Decision
from dllm.decoding.columns import scatter
from dllm.decoding.prediction import Prediction
from dllm.decoding.slots import View


@dataclass(frozen=True)
class TokenLogprob:
    """What the model said of a token where it was written: natural logarithms of the raw law."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # the most probable token ids and theirs, the best first
    constrained: float | None = None  # under the constraint of the answer, given that a member comes out


class Logprobs(NamedTuple):
    """Per-column leaves: the log-softmax of the raw logits for the token that stands there, in nats, and the k best.

    Nothing is known of what was given, of masks, and of tokens that a length edit brought in.
    """

    known: Tensor  # (B, L) bool
    value: Tensor  # (B, L)
    bound: Tensor  # (B, L) that of the posterior under a constraint; inf: there was none
    ids: Tensor  # (B, L, k) the most probable tokens, the best first
    top: Tensor  # (B, L, k) theirs

    def said(self, columns: list[int]) -> list[TokenLogprob | None]:
        """What the one row of these leaves knows of some columns; of alternatives those that could stand there."""
        return [
            TokenLogprob(
                value,
                tuple((t, p) for t, p in zip(ids, top, strict=True) if p > -math.inf),
                bound if bound < math.inf else None,
            )
            if known
            else None
            for known, value, bound, ids, top in zip(*(leaf[0, columns].tolist() for leaf in self), strict=True)
        ]

    def noted(self, pred: Prediction, cols: Tensor, token: Tensor) -> Logprobs:
        """The same with what a prediction says of `token` (B, W) at `cols` (B, W), -1 for columns that are left."""
        law = pred.free
        ids = law.highest(self.ids.shape[-1])
        value, top = law.log_probs(torch.cat([token[..., None], ids], -1)).tensor_split([1], -1)
        bound = pred.posterior(token)
        return Logprobs(
            scatter(self.known, cols, True),
            scatter(self.value, cols, value[..., 0].to(self.value.dtype)),
            scatter(self.bound, cols, torch.inf if bound is None else bound.to(self.bound.dtype)),
            scatter(self.ids, cols, ids),
            scatter(self.top, cols, top.to(self.top.dtype)),
        )


@dataclass(frozen=True)
class Noting:
    """Notes the log-probabilities of a call. It is the last in the chain of amendments and changes nothing."""

    k: int
    dtype: torch.dtype

    def columns(self, canvas: Canvas) -> Logprobs:
        """Nothing is known at first."""
        blank = torch.zeros(canvas.ids.shape, dtype=self.dtype, device=canvas.ids.device)
        many = blank[..., None].repeat(1, 1, self.k)
        return Logprobs(blank.bool(), blank, torch.full_like(blank, torch.inf), many.long(), many)

    def __call__(self, view: View, pred: Prediction, d: Decision) -> Decision:
        """The same decision; notes what it writes. What a column held before counts no more."""
        was = view.columns[Logprobs]
        was = was._replace(known=was.known & ~(view.canvas.masked | d.write))
        token = view.gather(d.token)
        cols = torch.where(view.gather(d.write) & (token != view.canvas.mask_id), view.cols, -1)
        view.columns[Logprobs] = was.noted(pred, cols, token)
        return d
