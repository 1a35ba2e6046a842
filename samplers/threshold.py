"""Parallel decoding by confidence: `threshold` and `factor` (Fast-dLLM, arXiv 2505.22618)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm.decoding.cache.tail import Kept
from dllm.samplers import (
    OFF,
    BlockMemory,
    Blocks,
    Bundle,
    Context,
    Method,
    Needs,
    Prediction,
    Presets,
    View,
    param,
    rank,
)


@dataclass(frozen=True)
class Threshold(Method):
    """Commit every candidate whose confidence reaches tau, and always the best one.

    With `decay` = alpha the bar falls from tau to tau (1 - alpha) while the block fills (Streaming-dLLM, arXiv
    2601.17917, equation 10): tau (1 - alpha (1 - r)), where r is the share of its masks that is left. As released, the
    masks behind the block that the cache has kept count as masks of the block, which weakens alpha.
    """

    tau: float = param(0.9, "Fast-dLLM's default, LLaDA and Dream", low=0, high=OFF)
    tie: float = param(0.0, "candidates this close to the best one commit with it (dInfer: 1e-5)", low=0, high=1)

    decay: float = param(0.0, "Streaming-dLLM's alpha: 0.3 in most of its settings, 0.1 to 0.7 in all", low=0, high=1)
    tail_counts: bool = param(True, "the released code; False: r is the share of the block alone")
    whole_block: bool = param(
        False, "True: an EOS ends the row when its block is complete, as DPad and Streaming-dLLM do"
    )
    lone_opening: bool = param(False, "True: the forward that opens a block commits its first column only")

    name: ClassVar[str] = "threshold"
    source: ClassVar[str] = "Fast-dLLM, arXiv 2505.22618"
    # `fastdllm_dream`: the released code for shifted models fills the first column of a block in the opening forward,
    # whatever its confidence, because its cached forwards cannot predict that column.
    presets: ClassVar[Presets] = {
        "dinfer": {"tie": 1e-5},
        "fastdllm_dream": {"lone_opening": True},
        "streaming": {"decay": 0.3},
        "streaming_dream": {"decay": 0.3, "lone_opening": True},
    }

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection, and the window where blocks open alone."""
        window = Blocks.of(context, lone_opening=True) if self.lone_opening else None
        return Bundle(window=window, select=self.select, needs=Needs(whole_block=self.whole_block))

    def bar(self, view: View) -> Tensor:
        """(B, 1) float64: tau, decayed by what is left of the block."""
        left, opened = view.live.sum(1), view.memory.get(BlockMemory)
        size = left if opened is None else opened.masks  # the masks that the block held when it was opened
        kept = view.columns.get(Kept)
        if kept is not None and self.tail_counts:
            tail = kept.tail(view.canvas, view.window)
            left, size = left + tail, size + tail
        r = (left.double() / size.clamp(min=1)).clamp(max=1)
        return (self.tau * (1 - self.decay * (1 - r)))[:, None]

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: candidates that reach tau, or come close to the best."""
        conf = soft.confidence
        chosen = conf >= (self.bar(view) if self.decay else self.tau)
        if self.tie:
            top = conf.masked_fill(~view.live, -torch.inf).amax(1, keepdim=True)
            chosen = chosen | (conf >= top - self.tie)
        return chosen


@dataclass(frozen=True)
class Factor(Method):
    """Commit the longest prefix of the confidences c_1 >= c_2 >= ... with (n + 1)(1 - c_n) < f, at least one.

    With a score of another sampler the prefixes are those of its ranking, and c_n is the least of n confidences.
    Preset `compat` reproduces the released code: a first failure at the last rank is committed too.
    """

    f: float = param(1.0, "Fast-dLLM's factor: the joint arg-max equals the product of the marginals below it", low=0)
    compat: bool = param(False, "the paper's rule; True commits a first failure at the last rank as the code does")

    name: ClassVar[str] = "factor"
    source: ClassVar[str] = "Fast-dLLM, arXiv 2505.22618, section 4"
    presets: ClassVar[Presets] = {"compat": {"compat": True}}

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection."""
        return Bundle(select=self.select)

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: the longest prefix that the factor allows."""
        live = view.live
        order = rank(score, live)  # 0-based: n = order + 1
        ranked = soft.confidence.masked_fill(~live, 1).gather(1, order.argsort(dim=1, stable=True))
        at = order.clamp(max=order.shape[1] - 1)
        least = ranked.cummin(1).values.gather(1, at)  # (B, W) of a column and those before it
        passes = (order == 0) | ((order + 2) * (1 - least) < self.f)
        worst = torch.where(live & ~passes, order, order.shape[1]).amin(1, keepdim=True)  # first failing rank
        chosen = order < worst
        if self.compat:
            chosen = chosen | ((order == worst) & (worst == live.sum(1, keepdim=True) - 1))
        return chosen
