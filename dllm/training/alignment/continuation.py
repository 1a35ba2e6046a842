"""Continuation distillation, DEER's first stage (arXiv 2512.15176): go on behind a random cut of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dllm.spec import param
from dllm.training.alignment.objective import Draw, Learner, Objective, behind
from dllm.training.alignment.rows import Masked
from dllm.training.data import Pair
from dllm.training.diffusion import noise_levels


@dataclass(frozen=True)
class Continuation(Objective):
    """A random cut, a block behind it, masked at rate t with weight 1 / t; past its end an answer goes on with EOS."""

    cuts: int = param(1, "of an answer; where the learner attends in blocks they share what lies before", low=1)

    def texts(self, data: Sequence[Pair], learner: Learner, draw: Draw) -> list[Masked]:
        """As `Objective`."""
        block, end = learner.block, learner.model.eos_ids[0]
        texts, data = [], [c for c in data for _ in range(self.cuts)]
        for c, t in zip(data, noise_levels(len(data), draw.generator), strict=True):
            cut = draw.rng.randrange(len(c.answer))
            masked = torch.rand(block, generator=draw.generator) < t
            if not bool(masked.any()):
                masked[int(torch.randint(block, (1,), generator=draw.generator))] = True
            target = (c.answer[cut:] + [end] * block)[:block]
            weight = torch.full((block,), 1 / float(t))
            texts.append(behind(c.prompt + c.answer[:cut], target, masked, weight))
        return texts
