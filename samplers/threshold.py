"""Parallel decoding by confidence: `threshold` and `factor` (Fast-dLLM, arXiv 2505.22618)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm.samplers import OFF, Blocks, Bundle, Context, Method, Prediction, Presets, View, param, rank


@dataclass(frozen=True)
class Threshold(Method):
    """Commit every candidate whose confidence reaches tau, and always the best one."""

    tau: float = param(0.9, "Fast-dLLM's default, LLaDA and Dream", low=0, high=OFF)
    tie: float = param(0.0, "candidates this close to the best one commit with it (dInfer: 1e-5)", low=0, high=1)

    lone_opening: bool = param(False, "True: the forward that opens a block commits its first column only")

    name: ClassVar[str] = "threshold"
    source: ClassVar[str] = "Fast-dLLM, arXiv 2505.22618"
    # `fastdllm_dream`: the released code for shifted models fills the first column of a block in the opening forward,
    # whatever its confidence, because its cached forwards cannot predict that column.
    presets: ClassVar[Presets] = {"dinfer": {"tie": 1e-5}, "fastdllm_dream": {"lone_opening": True}}

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection, and the window where blocks open alone."""
        window = Blocks.of(context, lone_opening=True) if self.lone_opening else None
        return Bundle(window=window, select=self.select)

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: candidates that reach tau, or come close to the best."""
        conf = soft.confidence
        chosen = conf >= self.tau
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
