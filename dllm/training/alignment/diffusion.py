"""Masked diffusion over whole answers, block by block where a learner attends in blocks (arXiv 2503.09573)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dllm.spec import param
from dllm.training.alignment.objective import Draw, Learner, Objective
from dllm.training.alignment.rows import Masked
from dllm.training.data import Pair
from dllm.training.diffusion import noise_levels


@dataclass(frozen=True)
class Diffusion(Objective):
    """Every token of an answer is masked at rate t, one t a block, and all of them weigh the same.

    The answer is filled up with its end token to the end of a block, as a decoder meets it. A learner that attends in
    blocks reads the blocks before each clean; for one that attends to everything the answer is one block.
    """

    complementary: bool = param(
        False, "each block a second time, with what was kept masked: every token is learned (arXiv 2509.26328)"
    )

    def texts(self, data: Sequence[Pair], learner: Learner, draw: Draw) -> list[Masked]:
        """As `Objective`."""
        size, end = learner.model.block_size or learner.block, learner.model.eos_ids[0]
        texts = []
        for c in data:
            first, stop = len(c.prompt), len(c.prompt) + len(c.answer)
            ids = [*c.prompt, *c.answer, *[end] * (-stop % size)]
            starts = range(first // size * size, len(ids), size) if learner.model.block_size else [0]
            for start, t in zip(starts, noise_levels(len(starts), draw.generator), strict=True):
                stop = start + size if learner.model.block_size else len(ids)
                u = torch.rand(stop, generator=draw.generator)
                u[: max(first, start)] = 2.0
                masked = (u < t) | (u == u.min())  # at least one
                texts.append(Masked(ids[:stop], masked, torch.ones(stop)))
                kept = ~masked & (u < 2.0)
                if self.complementary and bool(kept.any()):
                    texts.append(Masked(ids[:stop], kept, torch.ones(stop)))
        return texts
