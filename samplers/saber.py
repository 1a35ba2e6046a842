"""Saber: commit above the mean confidence so far, take back the tokens whose confidence fell (arXiv 2510.18165)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.samplers import Blocks, Bundle, Context, Decision, Method, Needs, Prediction, View, param, rank
from dllm.samplers.revoke import committed_here, decoded, remask

ROUNDING = 32  # units in the last place by which forwards of two shapes may differ on one canvas: no change


class Recorded(NamedTuple):
    """Per-column leaves, (B, L) float64."""

    record: Tensor  # at the last commit, 0 where nothing was ever committed
    last: Tensor  # at the last step


@dataclass(frozen=True)
class Saber(Method):
    """Commit candidates whose confidence exceeds the mean of all confidences recorded at commits (1 before the first),
    at least n; then mask min(max(n // 2, ceil(m / 8)), m - 1) decoded columns again, m being the commits of the step.

    Taken back are those whose confidence changed most for the worse since the last step; tokens of this step are among
    them. As in the released code the confidence is that of the column's *current* arg-max, and the record of a token
    that was taken back still counts in the mean.
    """

    n: int = param(2, "the released default: at least two commits, so that one can be taken back", low=1)
    backtrack: bool = param(True, "False never takes a token back")

    name: ClassVar[str] = "saber"
    source: ClassVar[str] = "Saber, arXiv 2510.18165"
    cost: ClassVar[str] = "one row, every column of the window, committed ones too"

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection and amends; the whole window where nobody brings one."""
        return Bundle(
            select=self.select,
            amend=(self.revoke,),
            assumes={"window": Blocks(context.max_new_tokens, whole=True)},
            needs=Needs(committed=True, revises=self.backtrack),
            columns=lambda canvas: Recorded(*[torch.zeros_like(canvas.ids, dtype=torch.float64)] * 2),
        )

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: candidates above the mean, at least n."""
        record = view.columns[Recorded].record
        count = (record > 0).sum(1)
        bar = torch.where(count > 0, record.sum(1) / count.clamp(min=1), 1.0)
        chosen = view.live & (soft.confidence > bar[:, None])
        few = chosen.sum(1, keepdim=True) < self.n
        return torch.where(few, rank(score, view.live) < self.n, chosen)

    def revoke(self, view: View, pred: Prediction, d: Decision) -> Decision:
        """The decision with the tokens masked again whose confidence fell most; notes the confidences."""
        conf = pred.confidence
        new = committed_here(view, d)
        before = view.columns[Recorded]
        change = conf - view.gather(before.last)
        change = torch.where(change.abs() < ROUNDING * torch.finfo(conf.dtype).eps, 0.0, change)
        last = view.scatter(before.last, conf, view.cols >= 0)
        view.columns[Recorded] = Recorded(view.scatter(before.record, conf, new), last)
        if not self.backtrack:
            return d
        m = new.sum(1)
        limit = torch.minimum(((m + 7) // 8).clamp(min=self.n // 2), m - 1)
        limit = limit * (view.live & ~new).any(1)  # a finished window stays as it is
        return remask(view, d, change, decoded(view) | new, limit)
