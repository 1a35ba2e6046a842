"""DAPD: commit masks that hardly attend to each other, whatever their confidences (arXiv 2603.12996)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm.samplers import (
    OFF,
    Attention,
    Bundle,
    Canvas,
    Context,
    Method,
    Needs,
    Prediction,
    Presets,
    View,
    param,
    rank,
)  # fmt: skip
from dllm.samplers.independent import independent

EPS = 1e-8  # the least that a row of the graph is divided by

TAUS = {  # tau_min and tau_max by task, as a third party copied them for LLaDA-8B-Instruct
    "staged": {"gsm8k": (0.01, 0.05), "math": (0.01, 0.05), "humaneval": (0.01, 0.15), "mbpp": (0.01, 0.15)},
    "direct": {"gsm8k": (0.005, 0.05), "math": (0.005, 0.05), "humaneval": (0.01, 0.05), "mbpp": (0.01, 0.02)},
}


@dataclass(frozen=True)
class DAPD(Method):
    """Commit an independent set of the masks' attention graph, by degree times confidence.

    S_ij is the mean of the attention between two masks of the window in both directions. Highest first, a mask commits
    unless S to one that was taken, over its own largest S, is above tau. tau grows from tau_min to tau_max with the
    share of the generation that is written.

    direct: what is `sure` commits outside of the graph. staged: from the middle of the generation on, whatever has
    confidence `high` commits too. There is no other bar: tokens of low confidence commit by design. Published with one
    block for the whole generation.
    """

    variant: str = param("direct", "the README's fewest forwards at equal accuracy", choices=("direct", "staged"))
    tau_min: float = param(0.01, "the released functions' default", low=0)
    tau_max: float = param(0.15, "the released functions' default; the presets have the tasks'", low=0)
    sure: float = param(0.998, "released as 1.0: in bfloat16 that is every probability from here on", low=0, high=OFF)
    high: float = param(0.9, "released, fixed", low=0, high=OFF)
    share: float = param(0.3, "released: the last three tenths of the layers, 10 of 32", above=0, high=1)

    name: ClassVar[str] = "dapd"
    source: ClassVar[str] = "DAPD, arXiv 2603.12996"
    cost: ClassVar[str] = "one row, the window's columns, and their attention weights in a third of the layers"
    presets: ClassVar[Presets] = {
        **{
            f"{variant}_{task}": {"variant": variant, "tau_min": low, "tau_max": high}
            for variant, tasks in TAUS.items()
            for task, (low, high) in tasks.items()
        },
        "compat": {"sure": 1.0},
    }

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection, which has an order of its own."""
        return Bundle(select=self.select, needs=Needs(attention=Attention(("share", self.share))))

    def tau(self, canvas: Canvas) -> Tensor:
        """(B,) the bar of this step."""
        return self.tau_min + (self.tau_max - self.tau_min) * progress(canvas)

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: what is sure, and an independent set of the rest."""
        conf, live, canvas = soft.confidence, view.live, view.canvas
        weights = view.pairs(soft.attention)
        apart = ~torch.eye(live.shape[1], dtype=torch.bool, device=live.device)
        graph = ((weights + weights.mT) / 2).masked_fill(~(live[..., None] & live[:, None] & apart), 0.0)  # (B, W, W) S
        near = graph / graph.amax(2, keepdim=True).clamp(min=EPS) > self.tau(canvas)[:, None, None]
        outside = live & (conf >= self.sure) if self.variant == "direct" else torch.zeros_like(live)
        among = live & ~outside
        chosen = outside | independent(rank(graph.sum(2) * conf, among), among, near)
        return chosen | (conf >= self.high) & (progress(canvas) >= 0.5)[:, None] if self.variant == "staged" else chosen


def progress(canvas: Canvas) -> Tensor:
    """(B,) rho: the share of the generation that is written."""
    return 1 - canvas.masked.sum(1).double() / (~canvas.frozen).sum(1).clamp(min=1)
