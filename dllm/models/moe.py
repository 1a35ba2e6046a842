"""The MLP of a layer: one, or a mixture whose experts are stacked: tokens are sorted by expert, one grouped product per
projection."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dllm.models.config import MoEConfig
from dllm.models.fused import Fused


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, router and rotation: float32, or float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def route(scores: Tensor, bias: Tensor | None, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """Choose experts: router logits (T, E) in at least float32 -> expert ids (T, k) and their weights (T, k).

    Softmax scores (LLaDA-MoE keeps them as they are, SDAR-MoE renormalises) or sigmoid scores with a choice limited
    to the best groups (LLaDA2). The bias changes the choice only.
    """
    weights = scores.softmax(-1) if moe.score == "softmax" else scores.sigmoid()  # (T, E)
    choice = weights if bias is None else weights + bias
    if moe.n_groups > 1:
        grouped = choice.view(*choice.shape[:-1], moe.n_groups, -1)  # (T, G, E/G)
        best = grouped.topk(2, -1).values.sum(-1).topk(moe.topk_groups, -1).indices  # (T, topk_groups)
        open_groups = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        choice = grouped.masked_fill(~open_groups[..., None], -torch.inf).flatten(-2)
    experts = choice.topk(moe.top_k, -1).indices
    chosen = weights.gather(-1, experts)
    if moe.renormalize:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return experts, chosen * moe.scale


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows x (R, H), sorted by expert, times their expert's weight (E, H, O) -> (R, O); `ends` (E,) closes segments."""
    taped = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    aligned = not any(width * x.itemsize % 16 for width in weight.shape[1:])  # rows of the kernel are 16 bytes apart
    compiled = torch.compiler.is_compiling() and x.dtype != torch.bfloat16  # inductor has no other
    if x.dtype != torch.float64 and aligned and not taped and not compiled:
        return F.grouped_mm(x, weight, offs=ends.int())
    bounds = [0, *ends.tolist()]
    used = [(e, a, b) for e, (a, b) in enumerate(pairwise(bounds)) if b > a]
    return torch.cat([x[a:b] @ weight[e] for e, a, b in used])


class Router(nn.Module):
    """The expert scores: a linear map computed in at least float32."""

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(moe.n_experts, hidden_size))
        self.expert_bias = nn.Parameter(torch.zeros(moe.n_experts), requires_grad=False) if moe.expert_bias else None


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = Fused(hidden_size, {"gate_proj": width, "up_proj": width})
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        x = self.down_proj(F.silu(gate) * up)
        return x


class MoE(nn.Module):
    """`sum_k w_k * expert_k(x) + shared(x)`; the experts are stacked, gate and up side by side.

    Weights are input by output: with the few rows an expert gets, that product is up to a quarter faster on a CPU.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.gate = Router(hidden_size, moe)
        self.gate_up_proj = nn.Parameter(torch.empty(moe.n_experts, hidden_size, 2 * moe.intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(moe.n_experts, moe.intermediate_size, hidden_size))
        self.shared_experts = MLP(hidden_size, moe.shared_size) if moe.shared_size else None
        self.group: dist.ProcessGroup | None = None  # set when the width of the experts is split over processes

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        flat = x.flatten(0, -2)  # (T, H)
        scores = F.linear(flat.to(wide(x.dtype)), self.gate.weight.to(wide(x.dtype)))
        experts, weights = route(scores, self.gate.expert_bias, self.moe)  # (T, k)
        order = experts.flatten().argsort(stable=True)  # (T*k,) rows of the flattened choice, sorted by expert
        ends = experts.flatten().bincount(minlength=self.moe.n_experts).cumsum(0)  # (E,)
        gate, up = grouped_linear(flat[order // self.moe.top_k], self.gate_up_proj, ends).chunk(2, -1)
        y = grouped_linear(F.silu(gate) * up, self.down_proj, ends)  # (T*k, H)
        y = y[order.argsort()].view(-1, self.moe.top_k, y.shape[-1])  # back to (T, k, H): no atomics, so reproducible
        out = (weights[:, None].to(y.dtype) @ y).view_as(x)
        if self.group is not None:
            dist.all_reduce(out, group=self.group)
        return out if self.shared_experts is None else out + self.shared_experts(x)
