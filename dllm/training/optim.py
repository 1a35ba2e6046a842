"""Optimizers of a recipe: Muon for the matrices inside the layers, AdamW for embedding, head, norms and biases."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from dllm.models.fused import Fused
from dllm.training.config import OptimizerSpec, ScheduleSpec


@dataclass
class Optimizers:
    """One or two optimizers that step together, each at its own learning rate times the schedule's."""

    parts: list[torch.optim.Optimizer]
    parameters: list[nn.Parameter]
    clip: float
    schedule: ScheduleSpec

    def step(self, step: int) -> bool:
        """Update at step `step` (from 0) and clear the gradients; False, without an update, where one is not finite."""
        finite = bool(nn.utils.clip_grad_norm_(self.parameters, self.clip).isfinite())
        for part in self.parts:
            if finite:
                for group in part.param_groups:
                    group["lr"] = part.defaults["lr"] * self.schedule.rate(step)
                part.step()
            part.zero_grad(set_to_none=True)
        return finite

    def state_dict(self) -> list[dict[str, object]]:
        """The state of each part, for a checkpoint."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        """Go on from a checkpoint's states."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def build_optimizers(module: nn.Module, spec: OptimizerSpec, schedule: ScheduleSpec) -> Optimizers:
    """Optimizers over the parameters of `module` that require gradients."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n]
    inside = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in inside]
    parts: list[torch.optim.Optimizer] = []
    if matrices and spec.name == "muon":
        fused = {m.weight: m for m in module.modules() if isinstance(m, Fused)}
        parts.append(Muon(matrices, spec.lr, spec.momentum, spec.weight_decay, fused))
    elif matrices:
        parts.append(_adamw(matrices, spec.lr, spec, spec.weight_decay))
    if rest:
        parts.append(_adamw(rest, spec.rest_lr, spec, 0.0))
    return Optimizers(parts, [p for _, p in named], spec.clip, schedule)


def _adamw(parameters: list[nn.Parameter], lr: float, spec: OptimizerSpec, decay: float) -> torch.optim.AdamW:
    first, second = spec.betas
    return torch.optim.AdamW(parameters, lr=lr, betas=(first, second), weight_decay=decay, fused=True)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is made orthogonal (Jordan 2024; arXiv 2502.16982), for matrices only.

    The update has the root mean square of AdamW's, so that one learning rate serves every shape. The rule is that of
    `torch.optim.Muon`, which iterates in bfloat16 one matrix after another: on a CPU that took longer than forward and
    backward together. Here matrices of one shape are a batch, in their own precision. `fused`: weights that hold
    several matrices, each of which is one for itself.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        fused: Mapping[Tensor, Fused] = MappingProxyType({}),
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.fused = fused

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is taken
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # matrices and their updates
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - momentum)
                    for pair in self._apart(p, p.grad.lerp(buffer, momentum)):
                        shapes[pair[0].shape].append(pair)
            for shape, pairs in shapes.items():
                size = lr * 0.2 * math.sqrt(max(shape))
                updates = orthogonal(torch.stack([update for _, update in pairs]))
                for (matrix, _), update in zip(pairs, updates, strict=True):
                    matrix.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-size)

    def _apart(self, p: Tensor, update: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        if p not in self.fused:
            return [(p, update)]
        return zip(*(self.fused[p].apart(x).values() for x in (p, update)), strict=True)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to `x` (N, rows, columns), roughly: singular values between 0.7 and 1.2.

    Five Newton-Schulz iterations with Jordan's coefficients.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
