"""DistillSpec (arXiv 2310.08461): bring the drafter's law of each slot to the verifier's, by a divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.drafting.proposal import drawn
from dllm.spec import param
from dllm.training.alignment.objective import Draw, Learner, Masked, Rows, Sum
from dllm.training.alignment.refinement import Refinement
from dllm.training.data import Pair
from dllm.training.laws import DIVERGENCES


@dataclass(frozen=True)
class Distillation(Refinement):
    """Slots are masked and weigh as in refinement. The verifier's law of a slot is that behind the teacher's tokens
    before it, or, `on_policy`, behind tokens that the drafter draws itself: what it faces when it drafts."""

    divergence: str = param("forward-kl", "cross-entropy with more to learn from a slot", choices=tuple(DIVERGENCES))
    on_policy: bool = param(False, "a draft that leaves the teacher's text is rejected there, whatever follows")
    temperature: float = param(1.0, "of the verifier's law", above=0)

    def texts(self, data: Sequence[Pair], learner: Learner, draw: Draw) -> list[Masked]:
        """As `Objective`, with what draws take."""
        return uniform(super().texts(data, learner, draw), 1, draw)

    def loss(self, rows: Rows, learner: Learner) -> Sum:
        """The divergence of the masked slots."""
        p, q = self.laws(rows, learner)
        return Sum((DIVERGENCES[self.divergence](p, q) * rows.weight).sum(), rows.weight.sum())

    def laws(self, rows: Rows, learner: Learner) -> tuple[Tensor, Tensor]:
        """The verifier's and the drafter's law of the masked slots, (M, V) each."""
        q = learner.logits(rows).float().log_softmax(-1)
        if self.on_policy:
            tokens = drawn(q.detach().exp(), rows.extra["u"])[:, 0]
            rows = rows._replace(clean=rows.clean.index_put((rows.row, rows.column), tokens))
        return (learner.teacher(rows).float() / self.temperature).log_softmax(-1), q


def uniform(texts: Sequence[Masked], draws: int, draw: Draw) -> list[Masked]:
    """The texts with uniforms `u` (T, draws), for tokens that the learner draws in its loss."""
    return [text._replace(extra={"u": torch.rand(len(text.ids), draws, generator=draw.generator)}) for text in texts]
