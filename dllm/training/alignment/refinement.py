"""Refinement, DEER's second stage (arXiv 2512.15176): all of the last R tokens, most weight right behind the prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dllm.spec import param
from dllm.training.alignment.objective import Draw, Learner, Objective, behind
from dllm.training.alignment.rows import Masked
from dllm.training.data import Pair


@dataclass(frozen=True)
class Refinement(Objective):
    """The last R tokens of a truncated answer, R uniform, all masked; token i of R weighs alpha^(R - i)."""

    alpha: float = param(1.01, "section 4 of the paper: stable; 1.02 is noisy, 1.05 diverges", low=1)
    max_suffix: int = param(96, "most masked tokens (the paper's number)", low=1)
    cuts: int = param(1, "of an answer; where the learner attends in blocks they share what lies before", low=1)

    def texts(self, data: Sequence[Pair], learner: Learner, draw: Draw) -> list[Masked]:
        """As `Objective`."""
        texts = []
        for c in (c for c in data for _ in range(self.cuts)):
            end = draw.rng.randint(1, len(c.answer))
            r = draw.rng.randint(1, min(self.max_suffix, end))
            weight = self.alpha ** torch.arange(r - 1, -1, -1, dtype=torch.float32)
            masked = torch.ones(r, dtype=torch.bool)
            texts.append(behind(c.prompt + c.answer[: end - r], c.answer[end - r : end], masked, weight))
        return texts
