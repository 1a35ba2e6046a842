"""The expected number of accepted tokens as the objective: the draft tree reward of GTO (arXiv 2509.22134).

GTO contrasts sampled trees, as the tokens of its drafter depend on each other. The slots of a masked-diffusion drafter
do not: the expectation is a sum of products, which has a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dllm.spec import param
from dllm.training.alignment.objective import Draw, Learner, Masked, Objective, Rows, Sum
from dllm.training.alignment.refinement import Refinement
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
        return Refinement(1.0, self.max_suffix).texts(data, learner, draw)

    def loss(self, rows: Rows, learner: Learner) -> Sum:
        """What is rejected, of all that is drafted."""
        q = learner.logits(rows).float().log_softmax(-1)
        if self.temperature:
            p = (learner.teacher(rows).float() / self.temperature).log_softmax(-1)
        else:
            p = torch.full_like(q, float("-inf")).scatter(-1, rows.target[:, None], 0.0)
        shape = rows.ids.shape[0], rows.ids.shape[1]
        lengths = expected_length(p, q, rows.target, rows.row, rows.column, shape, self.draws)
        slots = torch.ones_like(rows.weight).sum()
        return Sum(slots - lengths.sum(), slots)
