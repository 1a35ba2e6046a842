"""The expected number of accepted tokens as the objective: the draft tree reward of GTO (arXiv 2509.22134).

GTO contrasts sampled trees, as the tokens of its drafter depend on each other. The slots of a masked-diffusion drafter
do not: the expectation is a sum of products, which has a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dllm.spec import param
from dllm.training.alignment.distillation import compared, numbered
from dllm.training.alignment.objective import Draw, Learner, Objective, Sum
from dllm.training.alignment.refinement import Refinement
from dllm.training.alignment.rows import Masked, Rows
from dllm.training.data import Pair
from dllm.training.laws import expected_length


@dataclass(frozen=True)
class Length(Objective):
    """The last R tokens of a truncated answer are drafted, R uniform; the loss is the share of them that is rejected.

    A slot behind one that is rejected counts nothing, so that the first slots weigh most.
    """

    max_suffix: int = param(96, "most masked tokens, as in refinement", low=1)
    draws: int = param(1, "tokens a slot: 1 is a chain, more a tree over the slots", low=1)
    temperature: float = param(0.0, "of the verifier's law; 0: greedy, which needs no forward of it", low=0)

    def texts(self, data: Sequence[Pair], learner: Learner, draw: Draw) -> list[Masked]:
        """As `Objective`."""
        return numbered(Refinement(1.0, self.max_suffix).texts(data, learner, draw))

    def loss(self, rows: Rows, learner: Learner) -> Sum:
        """What is rejected, of all that is drafted."""
        logits = learner.logits(rows)
        if self.temperature:
            p, q = compared(learner.teacher(rows), logits, self.temperature)
        else:
            q = logits.float().log_softmax(-1)
            p = torch.full_like(q, float("-inf")).scatter(-1, rows.target[:, None], 0.0)
        drafts, draft = torch.unique(rows.extra["draft"], return_inverse=True)
        shape = len(drafts), rows.clean.shape[1]
        lengths = expected_length(p, q, rows.target, draft, rows.place, shape, self.draws)
        slots = torch.ones_like(rows.weight).sum()
        return Sum(slots - lengths.sum(), slots)
