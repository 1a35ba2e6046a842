"""AdaSPEC (arXiv 2510.19779): distil only the tokens that the drafter can still learn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from dllm.errors import DllmError
from dllm.models.hub import load
from dllm.models.native import NativeModel
from dllm.spec import param
from dllm.training.alignment.distillation import Distillation
from dllm.training.alignment.objective import Learner, Sum
from dllm.training.alignment.rows import Rows
from dllm.training.laws import DIVERGENCES, kept


@dataclass(frozen=True)
class Selective(Distillation):
    """Distillation of the share of each forward's slots where the drafter is furthest behind a reference: a drafter of
    the same size and start that was distilled before on all of them. What that one could not fit is left out."""

    reference: str = param("", "folder of the drafter that was distilled before")
    share: float = param(0.4, "of the slots that are kept, the paper's", above=0, high=1)

    def __post_init__(self) -> None:
        if not self.reference:
            raise DllmError(
                "the objective 'selective' needs reference=FOLDER, a drafter of this size that `dllm align` made with "
                "the objective 'distillation'"
            )

    def loss(self, rows: Rows, learner: Learner) -> Sum:
        """The divergence of the slots that are kept."""
        p, q = self.laws(rows, learner)
        model, divergence = self._reference.to(learner.model.device), DIVERGENCES[self.divergence]
        with torch.no_grad():
            before = replace(learner, model=model).logits(rows)[:, : p.shape[-1]].float().log_softmax(-1)
        found = divergence(p, q)
        weight = rows.weight * kept(found.detach() - divergence(p, before), self.share)
        return Sum((found * weight).sum(), weight.sum())

    @cached_property
    def _reference(self) -> NativeModel:
        """The reference, which stands still. Errors: a model of another kind."""
        model = load(self.reference, dtype=torch.float32)
        if not isinstance(model, NativeModel) or model.mask_id is None:
            raise DllmError(f"the reference {self.reference} is no drafter that `dllm align` makes")
        return model
