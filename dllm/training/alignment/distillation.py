"""DistillSpec (arXiv 2310.08461): bring the drafter's law of each slot to the verifier's, by a divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.drafting.proposal import drawn
from dllm.spec import param
from dllm.training.alignment.objective import Draw, Learner, Sum
from dllm.training.alignment.refinement import Refinement
from dllm.training.alignment.rows import Masked, Rows
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
        return numbered(uniform(super().texts(data, learner, draw), 1, draw))

    def loss(self, rows: Rows, learner: Learner) -> Sum:
        """The divergence of the masked slots."""
        p, q = self.laws(rows, learner)
        return Sum((DIVERGENCES[self.divergence](p, q) * rows.weight).sum(), rows.weight.sum())

    def laws(self, rows: Rows, learner: Learner) -> tuple[Tensor, Tensor]:
        """The verifier's and the drafter's law of the masked slots, (M, V) each."""
        logits = learner.logits(rows)
        if self.on_policy:
            tokens = drawn(logits.detach().float().softmax(-1), rows.extra["u"])[:, 0]
            drafts, draft = torch.unique(rows.extra["draft"], return_inverse=True)
            own = rows.clean[torch.zeros_like(drafts).index_put((draft,), rows.text)]  # (D, L), as texts may share one
            rows = rows._replace(clean=own.index_put((draft, rows.place), tokens), text=draft)
        return compared(learner.teacher(rows), logits, self.temperature)


def compared(teacher: Tensor, learner: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The laws p and q of logits (M, V) over the ids that both have."""
    size = min(teacher.shape[-1], learner.shape[-1])
    p, q = (teacher[:, :size].float() / temperature).log_softmax(-1), learner[:, :size].float().log_softmax(-1)
    return p, q


def uniform(texts: Sequence[Masked], draws: int, draw: Draw) -> list[Masked]:
    """The texts with uniforms `u` (T, draws), for tokens that the learner draws in its loss."""
    return [_with(text, u=torch.rand(len(text.ids), draws, generator=draw.generator)) for text in texts]


def numbered(texts: Sequence[Masked]) -> list[Masked]:
    """The texts with their number as `draft` (T,): slots of one number are one draft."""
    return [_with(text, draft=torch.full((len(text.ids),), i)) for i, text in enumerate(texts)]


def _with(text: Masked, **extra: Tensor) -> Masked:
    return text._replace(extra={**text.extra, **extra})
