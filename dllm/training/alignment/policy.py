"""TVD++ (arXiv 2403.00858): total variation by the gradient of a policy whose rewards are standardised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dllm.drafting.proposal import drawn
from dllm.spec import param
from dllm.training.alignment.distillation import compared, uniform
from dllm.training.alignment.objective import Draw, Learner, Sum
from dllm.training.alignment.refinement import Refinement
from dllm.training.alignment.rows import Masked, Rows
from dllm.training.data import Pair
from dllm.training.laws import tvd_plus


@dataclass(frozen=True)
class Policy(Refinement):
    """Slots are masked and weigh as in refinement; the verifier's law is that behind the teacher's tokens."""

    draws: int = param(8, "tokens a slot; one is noisy, all would be the total variation itself", low=1)
    temperature: float = param(1.0, "of the verifier's law", above=0)

    def texts(self, data: Sequence[Pair], learner: Learner, draw: Draw) -> list[Masked]:
        """As `Objective`, with what draws take."""
        return uniform(super().texts(data, learner, draw), self.draws, draw)

    def loss(self, rows: Rows, learner: Learner) -> Sum:
        """The total variation of the masked slots."""
        p, q = compared(learner.teacher(rows), learner.logits(rows), self.temperature)
        tokens = drawn(q.detach().exp(), rows.extra["u"])
        return Sum((tvd_plus(p, q, tokens) * rows.weight).sum(), rows.weight.sum())
