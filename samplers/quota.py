"""The fixed quota of LLaDA (arXiv 2502.09992) under four scores: confidence, margin, entropy, random.

A block with m masks and T steps commits m // T columns a step, the first m % T steps one more. Steps that would commit
nothing are skipped: they cannot change the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from dllm.decoding import noise
from dllm.samplers import Bundle, Context, Method, Needs, Prediction, Schedule, Score, View, rank
from dllm.samplers.blocks import BlockMemory, first_block


@dataclass(frozen=True)
class Quota(Schedule):
    """Commit the best `n` candidates; `steps` (None: one token a step) are spread over the row's blocks."""

    steps: int | None
    block_length: int
    aligned: bool = False

    @classmethod
    def of(cls, context: Context) -> Self:
        """The schedule of a call, on its blocks."""
        return cls(context.steps, context.block_length, aligned=context.block_size is not None)

    def __call__(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: the best columns, as many as this step commits."""
        return rank(score, view.live) < self.count(view)[:, None]

    def count(self, view: View) -> Tensor:
        """(B,) how many columns this step commits."""
        if self.steps is None:
            return torch.ones_like(view.state.step)
        opened, canvas = view.memory.get(BlockMemory), view.canvas
        if opened is None:  # a window that is no fixed block: the steps are spread over the generation
            return ((canvas.length - canvas.start) // self.steps).clamp(min=1)
        blocks, index = self._block(view, opened)
        masks = opened.masks.clamp(min=1)
        steps = self.steps // blocks + (index < self.steps % blocks)
        steps = torch.minimum(steps.clamp(min=1), masks)
        done = view.state.step - opened.step
        return masks // steps + (done < masks % steps)

    def elapsed(self, view: View) -> Tensor:
        """(B,) steps of the schedule before this one; those that were skipped count, a block has its full share."""
        opened = view.memory.get(BlockMemory)
        if opened is None:
            return view.state.step
        blocks, index = self._block(view, opened)
        if self.steps is None:
            before = index * self.block_length
        else:
            before = index * (self.steps // blocks) + torch.minimum(index, self.steps % blocks)
        return before + view.state.step - opened.step

    def _block(self, view: View, opened: BlockMemory) -> tuple[Tensor, Tensor]:
        """(B,) blocks of each row, and which of them is open."""
        canvas = view.canvas
        origin = first_block(canvas, self.block_length, self.aligned)
        blocks = (canvas.length - origin + self.block_length - 1) // self.block_length
        return blocks, (opened.lo - origin) // self.block_length


def confidence(view: View, soft: Prediction) -> Tensor:
    """Probability of the proposed token (in log, which still resolves values that round to one)."""
    return soft.log_confidence


def margin(view: View, soft: Prediction) -> Tensor:
    """Best probability minus second best."""
    return soft.margin


def entropy(view: View, soft: Prediction) -> Tensor:
    """Negative entropy in nats."""
    return soft.negative_entropy


def random(view: View, soft: Prediction) -> Tensor:
    """A keyed uniform for each column and step."""
    return view.uniform(noise.ORDER)


@dataclass(frozen=True)
class Ranked(Method):
    """Base of the samplers that are a score and nothing else."""

    score: ClassVar[Score]
    needs: ClassVar[Needs] = Needs()

    def bundle(self, context: Context) -> Bundle:
        """Owns the score."""
        return Bundle(score=type(self).score, needs=self.needs)


@dataclass(frozen=True)
class Confidence(Ranked):
    """Commit the quota's most confident columns (LLaDA's low-confidence remasking)."""

    name: ClassVar[str] = "confidence"
    source: ClassVar[str] = "LLaDA, arXiv 2502.09992"
    score: ClassVar[Score] = confidence


@dataclass(frozen=True)
class Margin(Ranked):
    """Commit the quota's columns with the largest probability margin."""

    name: ClassVar[str] = "margin"
    source: ClassVar[str] = "Dream, arXiv 2508.15487 (topk_margin)"
    score: ClassVar[Score] = margin


@dataclass(frozen=True)
class Entropy(Ranked):
    """Commit the quota's columns of lowest entropy."""

    name: ClassVar[str] = "entropy"
    source: ClassVar[str] = "Dream, arXiv 2508.15487 (entropy)"
    score: ClassVar[Score] = entropy


@dataclass(frozen=True)
class Random(Ranked):
    """Commit random columns of the block; the tokens are still the model's."""

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "LLaDA, arXiv 2502.09992 (random remasking)"
    score: ClassVar[Score] = random
    needs: ClassVar[Needs] = Needs(stochastic=True)
