"""The remasking rules of SDAR (arXiv 2510.06303) by their released names; LLaDA2.0 (arXiv 2512.15745) decodes alike.

A block takes `steps` forwards at most: each commits at least its share of the block. Only masked columns are
candidates, so a partial first block keeps its prompt tokens. Confidences are those after temperature and filters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm.samplers import OFF, Bundle, Context, Method, Needs, Prediction, Presets, View, param, rank
from dllm.samplers.blocks import BlockMemory, Blocks
from dllm.samplers.eb import EB

RULES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")


@dataclass(frozen=True)
class SDAR(Method):
    """Block decoding: from left to right, by confidence, by confidence above tau, or by bounded entropy."""

    rule: str = param("low_confidence_dynamic", "the released default", choices=RULES)
    tau: float = param(0.85, "the released threshold of the dynamic rule", low=0, high=OFF)
    gamma: float = param(0.35, "nats of entropy that a step may spend on further columns (eb_threshold)", low=0)
    steps: int | None = param(None, "forwards of a block; None: as many as its columns, at least one a step", low=1)
    whole_block: bool = param(False, "True: an EOS ends the row when its block is complete, as the released codes do")

    name: ClassVar[str] = "sdar"
    source: ClassVar[str] = "SDAR, arXiv 2510.06303; LLaDA2.0, arXiv 2512.15745"
    presets: ClassVar[Presets] = {**{rule: {"rule": rule} for rule in RULES}, "llada2": {"tau": 0.95}}

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection; the call's blocks where nobody brings a window."""
        share = Share(self.steps, context.block_length, context.block_size is not None)
        select = {
            "sequential": self.sequential,
            "low_confidence_static": self.static,
            "low_confidence_dynamic": self.dynamic,
            "entropy_bounded": self.bounded,
        }[self.rule]
        return Bundle(
            select=lambda view, soft, score: select(view, soft, share(view)),
            assumes={"window": Blocks.of(context)},
            needs=Needs(filtered=True, revises=self.whole_block),
        )

    def sequential(self, view: View, soft: Prediction, n: Tensor) -> Tensor:
        """(B, W) bool: the leftmost n."""
        return rank(-view.cols.double(), view.live) < n

    def static(self, view: View, soft: Prediction, n: Tensor) -> Tensor:
        """(B, W) bool: the n most confident."""
        return rank(soft.log_confidence, view.live) < n

    def dynamic(self, view: View, soft: Prediction, n: Tensor) -> Tensor:
        """(B, W) bool: all above tau, the n most confident where those are fewer."""
        sure = view.live & (soft.confidence > self.tau)
        enough = sure.sum(1, keepdim=True) >= torch.minimum(n, view.live.sum(1, keepdim=True))
        return torch.where(enough, sure, self.static(view, soft, n))

    def bounded(self, view: View, soft: Prediction, n: Tensor) -> Tensor:
        """Lowest entropies first, while those before a column sum to gamma at most; the share at least."""
        entropy = -soft.negative_entropy
        order = rank(-entropy, view.live)
        return EB(self.gamma).select(view, soft, -entropy) | (order < n)


@dataclass(frozen=True)
class Share:
    """(B, 1) columns that a step commits: block // steps, the first block % steps steps one more.

    No block of a bidirectional model is longer than its row. In a window that is no fixed block, which has no first
    step, every step has the plain share.
    """

    steps: int | None
    block_length: int
    aligned: bool

    def __call__(self, view: View) -> Tensor:
        """(B, 1) at least one."""
        if self.steps is None:
            return torch.ones_like(view.cols[:, :1])
        block = torch.full_like(view.state.step, self.block_length)
        if not self.aligned:
            block = torch.minimum(block, view.state.asked)
        share = block // self.steps
        if opened := view.memory.get(BlockMemory):
            share = share + (view.state.step - opened.step < block % self.steps)
        return share[:, None].clamp(min=1)
