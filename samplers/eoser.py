"""EOSER: columns that predict the end of the text wait, so that the whole window can be decoded at once
(arXiv 2509.23924)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm.samplers import Blocks, Bundle, Context, Method, Prediction, View, param
from dllm.samplers.quota import Quota

SMALLEST = 1e-30  # a factor of 0 still leaves a rank


@dataclass(frozen=True)
class Demote:
    """The score slot: confidence, times lambda where the token is the end of sequence; lambda rises with the steps."""

    eos: int | None
    gamma_min: float | None
    gamma_max: float
    context: Context

    def __call__(self, view: View, soft: Prediction) -> Tensor:
        """(B, W) log confidence, lowered where the token is the end of sequence."""
        if self.eos is None:
            return soft.log_confidence
        factor = self.factor(view).clamp(min=SMALLEST).to(soft.confidence.dtype)
        return soft.log_confidence + torch.where(soft.token == self.eos, factor.log()[:, None], 0.0)

    def factor(self, view: View) -> Tensor:
        """(B,) lambda of this step."""
        t, usual = view.schedule.fraction(view) if view.schedule else None, 0.01
        if t is None:
            last, usual = self.context.budget(view.state) - 1, 0.4
            t = torch.where(last > 0, view.state.step.double() / last.clamp(min=1), 1.0).clamp(max=1)
        low = usual if self.gamma_min is None else self.gamma_min
        return low + (self.gamma_max - low) * t


@dataclass(frozen=True)
class EOSER(Method):
    """Rank by confidence, times a factor below 1 where the token is EOS; the factor rises to 1 over the steps.

    Probabilities and the tokens written stay as they are. Only the first EOS id counts, not an end of turn. The window
    is the whole generation, which is what the method makes usable.
    """

    gamma_min: float | None = param(
        None, "None: 0.4, the released default; 0.01 with `ass`, as released", low=0, high=1
    )
    gamma_max: float = param(1.0, "no demotion at the last step", low=0, high=1)
    whole: bool = param(True, "False keeps the call's blocks")

    name: ClassVar[str] = "eoser"
    source: ClassVar[str] = "EOSER and ASS, arXiv 2509.23924"

    def bundle(self, context: Context) -> Bundle:
        """Owns the score; the whole window and the quota where nobody brings others."""
        eos = context.eos_ids[0] if context.eos_ids else None
        score = Demote(eos, self.gamma_min, self.gamma_max, context)
        if not self.whole:
            return Bundle(score=score)
        length = context.max_new_tokens
        return Bundle(
            score=score, assumes={"window": Blocks(length, whole=True), "select": Quota(context.steps, length)}
        )
