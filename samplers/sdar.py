"""The remasking rules of SDAR (arXiv 2510.06303) by their released names; LLaDA2.0 (arXiv 2512.15745) decodes alike.

A block takes `steps` forwards at most: each commits at least its share of the block. Only masked columns are
candidates, so a partial first block keeps its prompt tokens. Confidences are those after temperature and filters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm.samplers import OFF, Bundle, Context, Method, Needs, Prediction, Presets, View, param, quota, rank
from dllm.samplers.blocks import BlockMemory, Blocks
from dllm.samplers.eb import EB

RULES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")


@dataclass(frozen=True)
class SDAR(Method):
    """Block decoding: from left to right, by confidence, by confidence above tau, or by bounded entropy.

    The share of a step are the best columns by score: confidence, entropy where that is bounded, or what a sampler
    composed with it brings.
    """

    rule: str = param("low_confidence_dynamic", "the released default", choices=RULES)
    tau: float = param(0.85, "the released threshold of the dynamic rule", low=0, high=OFF)
    gamma: float = param(0.35, "nats of entropy that a step may spend on further columns (eb_threshold)", low=0)
    steps: int | None = param(None, "forwards of a block; None: as many as its columns, at least one a step", low=1)
    whole_block: bool = param(False, "True: an EOS ends the row when its block is complete, as the released codes do")

    name: ClassVar[str] = "sdar"
    source: ClassVar[str] = "SDAR, arXiv 2510.06303; LLaDA2.0, arXiv 2512.15745"
    presets: ClassVar[Presets] = {**{rule: {"rule": rule} for rule in RULES}, "llada2": {"tau": 0.95}}

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection, and the score of the rule that goes from left to right; the call's blocks and the rule's
        usual score where nobody brings others."""
        share = Share(self.steps, context.block_length, context.block_size is not None)
        more = {"low_confidence_dynamic": self.sure, "entropy_bounded": EB(self.gamma).select}.get(self.rule, nothing)

        def select(view: View, soft: Prediction, score: Tensor) -> Tensor:
            n = torch.minimum(share(view), view.live.sum(1, keepdim=True))
            further = view.live & more(view, soft, score)
            return torch.where(further.sum(1, keepdim=True) >= n, further, rank(score, view.live) < n)

        usual = quota.entropy if self.rule == "entropy_bounded" else quota.confidence
        return Bundle(
            score=leftmost if self.rule == "sequential" else None,
            select=select,
            assumes={"window": Blocks.of(context), "score": usual},
            needs=Needs(filtered=True, whole_block=self.whole_block),
        )

    def sure(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: all above tau."""
        return soft.confidence > self.tau


def nothing(view: View, soft: Prediction, score: Tensor) -> Tensor:
    """(B, W) bool: no column."""
    return torch.zeros_like(view.live)


def leftmost(view: View, soft: Prediction) -> Tensor:
    """(B, W) score: the first column first."""
    return -view.cols.double()


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
