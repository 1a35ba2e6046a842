"""Optimizers of a recipe: Muon for the matrices inside the layers, AdamW for embedding, head, norms and biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import DllmError
from .config import OptimizerSpec, ScheduleSpec


@dataclass
class Optimizers:
    """One or two optimizers that step together; `base` are their learning rates before the schedule."""

    parts: list[torch.optim.Optimizer]
    base: list[float]
    parameters: list[nn.Parameter]
    clip: float
    schedule: ScheduleSpec

    def step(self, step: int) -> bool:
        """Update at step `step` (from 0) and clear the gradients; False, without an update, where one is not finite."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if not bool(norm.isfinite()):
            self.zero_grad()
            return False
        rate = self.schedule.rate(step)
        for part, base in zip(self.parts, self.base, strict=True):
            for group in part.param_groups:
                group["lr"] = base * rate
            part.step()
        self.zero_grad()
        return True

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def build_optimizers(module: nn.Module, spec: OptimizerSpec, schedule: ScheduleSpec) -> Optimizers:
    """Optimizers over the parameters of `module` that require gradients."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n]
    inside = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in inside]
    parts: list[torch.optim.Optimizer] = []
    base = []
    if matrices and spec.name == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise DllmError("optimizer.name=muon needs torch 2.9 or newer; use adamw")
        # The update is scaled to the size of AdamW's, so that one learning rate serves every shape (arXiv 2502.16982).
        parts.append(torch.optim.Muon(matrices, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay,
                                      adjust_lr_fn="match_rms_adamw"))  # fmt: skip
        base.append(spec.lr)
    elif matrices:
        parts.append(_adamw(matrices, spec.lr, spec, spec.weight_decay))
        base.append(spec.lr)
    if rest:
        parts.append(_adamw(rest, spec.rest_lr, spec, 0.0))
        base.append(spec.rest_lr)
    return Optimizers(parts, base, [p for _, p in named], spec.clip, schedule)


def _adamw(parameters: list[nn.Parameter], lr: float, spec: OptimizerSpec, decay: float) -> torch.optim.AdamW:
    first, second = spec.betas
    return torch.optim.AdamW(parameters, lr=lr, betas=(first, second), weight_decay=decay, fused=True)
