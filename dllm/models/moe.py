"""The MLP of a layer: one, or a mixture whose experts are stacked: tokens are sorted by expert, one grouped product per
projection. On an accelerator no count of tokens comes to the host."""

from __future__ import annotations

from collections.abc import Callable
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


def by_experts(x: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Every token x (T, H) through each of its `experts` (T, k) -> (T, k, H).

    gate_up (E, H, 2 * width), down (E, width, H). Nothing is added up here, so nothing depends on an order.
    """
    way = grouped if x.device.type == "cpu" or _on_device(x, gate_up) else blocked
    return way(x, experts, gate_up, down)


def _on_device(x: Tensor, weight: Tensor) -> bool:
    """Whether `F.grouped_mm` reads its offsets on this accelerator; elsewhere it waits for them."""
    kernel = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    return kernel and x.dtype == torch.bfloat16 and _aligned(weight)


def _aligned(weight: Tensor) -> bool:
    """Whether rows are a multiple of 16 bytes apart, as `F.grouped_mm` asks."""
    return not any(width * weight.itemsize % 16 for width in weight.shape[1:])


def _sorted(experts: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Experts (R,) of all choices in ascending order, the choices in that order, and where each expert ends (n,)."""
    named, order = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(named, torch.arange(n, device=named.device), right=True, out_int32=True)
    return named, order, ends


def grouped(x: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`by_experts` by products of segments of sorted rows."""
    _, order, ends = _sorted(experts, len(gate_up))
    gate, up = _segments(x[order // experts.shape[1]], gate_up, ends).chunk(2, -1)
    y = _segments(F.silu(gate) * up, down, ends)  # (T*k, H)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return y[back].view(*experts.shape, -1)


def _segments(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows x (R, H), sorted by expert, times their expert's weight (E, H, O) -> (R, O); `ends` (E,) closes segments."""
    taped = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if x.dtype != torch.float64 and _aligned(weight) and not taped:
        return F.grouped_mm(x, weight, offs=ends)
    bounds, weights = [0, *ends.tolist()], weight.unbind()
    return torch.cat([x[a:b] @ w for w, (a, b) in zip(weights, pairwise(bounds), strict=True) if b > a])


def blocked(x: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`by_experts` in shapes that no routing changes: blocks of equal height, each filled with rows of one expert.

    A block is as high as an expert's even share of the rows, so that at most twice the rows are computed.
    """
    n, rows = len(gate_up), experts.numel()
    height = -(-rows // n)
    count = min(rows, (rows + n * (height - 1)) // height)  # blocks that any routing can fill, the last one in part
    named, order, ends = _sorted(experts, n)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    last = ((counts + height - 1) // height).cumsum(0)  # block behind those of each expert
    first = F.pad(last[:-1], (1, 0))
    place = (first * height - (ends - counts))[named] + torch.arange(rows, device=x.device)  # row of each sorted choice
    source = torch.zeros(count * height, dtype=order.dtype, device=x.device)
    source = source.scatter_(0, place, order // experts.shape[1])  # the token of each row; any one where none is
    owner = torch.searchsorted(last, torch.arange(count, device=x.device), right=True).clamp(max=n - 1)
    gate, up = torch.bmm(x[source].view(count, height, -1), gate_up[owner]).chunk(2, -1)
    y = torch.bmm(F.silu(gate) * up, down[owner]).flatten(0, 1)
    back = torch.empty_like(place).scatter_(0, order, place)
    return y[back].view(*experts.shape, -1)


def _shape(x: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return x.new_empty(*experts.shape, x.shape[-1])


# for torch.compile and fake tensors: one operation, whose result has the shape that they ask for
torch.library.define("dllm::by_experts", "(Tensor x, Tensor experts, Tensor gate_up, Tensor down) -> Tensor")
torch.library.impl("dllm::by_experts", "CompositeExplicitAutograd", by_experts)
torch.library.register_fake("dllm::by_experts", _shape)
OPAQUE: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = torch.ops.dllm.by_experts.default


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
        gate, up = self.gate_up_proj.each(x)
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
        real = type(x) is Tensor and not torch.compiler.is_compiling()
        y = (by_experts if real else OPAQUE)(flat, experts, self.gate_up_proj, self.down_proj)  # (T, k, H)
        out = (weights[:, None].to(y.dtype) @ y).view_as(x)
        if self.group is not None:
            dist.all_reduce(out, group=self.group)
        return out if self.shared_experts is None else out + self.shared_experts(x)
