"""Hierarchy-dLLM: one confident column splits each run of masks (dInfer's HierarchyDecoder)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dllm.samplers import OFF, Bundle, Context, Decision, Method, Needs, Prediction, Presets, View, best_each, param
from dllm.samplers.revoke import committed_here, decoded, remask, stored_probability


@dataclass(frozen=True)
class Hierarchy(Method):
    """Commit every candidate above tau_high, and the best of each run of masks where it exceeds tau_low.

    A run ("area") is a maximal stretch of neighbouring masks in the window; its best column splits it, so that the next
    step decides two halves that depend less on each other. The best candidate of all always commits. With tau_remask,
    decoded tokens of the window whose probability fell below it are masked again, fewer than the step commits.
    """

    tau_high: float = param(
        0.85, "inside the paper's range 0.78-0.88, where its GSM8K score equals threshold's", low=0, high=OFF
    )
    tau_low: float = param(0.4, "the released default (paper: 0.3-0.5)", low=0, high=OFF)
    tau_remask: float | None = param(None, "off, as released; the paper tries 0.01, 0.3 and 0.35", low=0, high=1)

    name: ClassVar[str] = "hierarchy"
    source: ClassVar[str] = "Hierarchy-dLLM, ICLR 2026; dInfer, arXiv 2510.08666"
    presets: ClassVar[Presets] = {"dinfer": {"tau_high": 0.9, "tau_low": 0.4}}

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection; amends where tau_remask is given."""
        if self.tau_remask is None:
            return Bundle(select=self.select)
        return Bundle(select=self.select, amend=(self.revoke,), needs=Needs(committed=True, revises=True))

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: sure candidates, and the best of each area."""
        conf = soft.confidence
        return (conf > self.tau_high) | (best_of_areas(view, score) & (conf > self.tau_low))

    def revoke(self, view: View, pred: Prediction, d: Decision) -> Decision:
        """The decision with doubtful tokens masked again, fewer than it commits."""
        assert self.tau_remask is not None
        now = stored_probability(view, pred)
        among = decoded(view) & (now < self.tau_remask)
        return remask(view, d, now, among, committed_here(view, d).sum(1) - 1)


def best_of_areas(view: View, score: Tensor) -> Tensor:
    """(B, W) bool: in each maximal run of candidates the one of highest score, lowest position on ties."""
    live = view.live
    follows = live[:, :-1] & (view.cols[:, 1:] == view.cols[:, :-1] + 1)  # the left neighbour is in the same area
    starts = live.clone()
    starts[:, 1:] &= ~follows
    return best_each(score, live, starts.cumsum(1), live.shape[1] + 1)
