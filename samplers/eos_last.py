"""Columns that predict an end token commit last (LLaDA, arXiv 2502.09992)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.decoding.prediction import Rescored
from dllm.samplers import Prediction, View


@dataclass(frozen=True)
class EosLast:
    """Columns whose token is EOS or end-of-turn are committed last (LLaDA's `confidence_eos_eot_inf`)."""

    eos_ids: tuple[int, ...]

    def __call__(self, view: View, pred: Prediction) -> Prediction:
        """The prediction that is least sure of what it is where the token is an end, whatever ranks."""
        ends = torch.zeros_like(pred.token, dtype=torch.bool)
        for eos in self.eos_ids:
            ends |= pred.token == eos
        return Unsure(pred, ends)


class Unsure(Rescored):
    """A prediction that counts as the uniform one in some columns (B, W) bool."""

    def __init__(self, raw: Prediction, where: Tensor) -> None:
        super().__init__(raw, torch.where(where, 0.0, raw.confidence))
        self._where = where

    @property
    def margin(self) -> Tensor:
        """(B, W) 0 there."""
        return torch.where(self._where, 0.0, self.raw.margin)

    @property
    def negative_entropy(self) -> Tensor:
        """(B, W) -ln V there."""
        return torch.where(self._where, -math.log(self.logits.shape[-1]), self.raw.negative_entropy)
