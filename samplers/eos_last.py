"""Columns that predict an end token commit last (LLaDA, arXiv 2502.09992)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm.samplers import Prediction, View


@dataclass(frozen=True)
class EosLast:
    """Columns whose token is EOS or end-of-turn are committed last (LLaDA's `confidence_eos_eot_inf`)."""

    eos_ids: tuple[int, ...]

    def __call__(self, view: View, pred: Prediction) -> Prediction:
        """The prediction with confidence 0 where the token is an end."""
        ends = torch.zeros_like(pred.token, dtype=torch.bool)
        for eos in self.eos_ids:
            ends |= pred.token == eos
        return pred.rescored(torch.where(ends, 0.0, pred.confidence))
