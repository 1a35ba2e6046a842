"""Classifier-free guidance (LLaDA, arXiv 2502.09992, appendix): every row is fed twice, once without its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm.decoding.canvas import Plan, Span, State
from dllm.decoding.slots import Forward, Inputs


@dataclass(frozen=True)
class Guidance(Inputs):
    """logits = u + (scale + 1) (c - u), with u from the canvas whose given positions are masked. scale 0 is off."""

    scale: float
    mask_id: int
    lanes: ClassVar[int] = 2

    def expand(self, plan: Plan, state: State, window: Span) -> Plan:
        """Every row twice, the second time without its prompt."""
        given = state.canvas.frozen.gather(1, plan.pos.clamp(min=0)) & (plan.pos >= 0)
        blank = torch.where(given, self.mask_id, plan.ids)
        lane = None if plan.lane is None else torch.cat([2 * plan.lane, 2 * plan.lane + 1])
        twice, known = plan.times(2), plan.known
        if known is not None and known.lanes is not None and len(plan.pos) == 1:
            known = known._replace(lanes=slice(2 * known.lanes.start, 2 * known.lanes.stop))
        else:
            known = twice.known
        return twice._replace(ids=torch.cat([plan.ids, blank]), pos=twice.pos, lane=lane, known=known)

    def reduce(self, logits: Tensor, cols: Tensor, forward: Forward) -> tuple[Tensor, object]:
        """The guided logits (B, W, V), from the conditional and the unconditional half."""
        conditional, unconditional = logits.chunk(2)
        return unconditional + (self.scale + 1) * (conditional - unconditional), None
