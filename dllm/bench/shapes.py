"""Shapes of `dllm bench gpu`, in full and tiny, and the bytes that their forwards read."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypedDict

import torch.nn.functional as F
from torch import Tensor

from dllm.bench.runtime import VOCABULARY, WINDOW
from dllm.eval.records import Decoding
from dllm.models.config import MoEConfig
from dllm.models.moe import MoE, route, wide
from dllm.models.native import NativeModel


class Shape(TypedDict, total=False):
    """Arguments of `random_model`."""

    width: int
    layers: int
    vocabulary: int
    head_dim: int
    block: int
    mlp: int
    moe: MoEConfig


@dataclass(frozen=True)
class Scale:
    """Shapes and calls of a run."""

    dense: Shape
    block: Shape
    mixture: Shape
    prompt: int
    new: int
    length: int  # columns of a block
    steps: int
    rows: int  # of the batch
    answer: int  # new tokens of the embedded model
    vocabulary: int  # of the logits that samplers step on
    ticks: int  # of a sampler's decode, at most
    copied: int  # bytes of the tensor whose copy gives the bandwidth
    environ: dict[str, str] = field(default_factory=dict)  # of child processes
    bars: bool = True

    @property
    def call(self) -> Decoding:
        """The decode that is measured: an equal number of tokens a forward, to the end."""
        return {
            "sampler": "confidence", "cache": "dual", "max_new_tokens": self.new, "block_length": self.length,
            "steps": self.steps, "early_stop": False,
        }  # fmt: skip


FULL = Scale(
    dense={"width": 4096, "layers": 32, "vocabulary": VOCABULARY, "head_dim": 128},
    block={"width": 4096, "layers": 36, "vocabulary": 151_936, "head_dim": 128, "block": WINDOW},  # SDAR-8B
    mixture={  # LLaDA2-mini
        "width": 2048, "layers": 20, "vocabulary": 157_184, "head_dim": 128, "block": WINDOW, "mlp": 5120,
        "moe": MoEConfig(256, 8, 512, "sigmoid", True, 2.5, 8, 4, True, 512, (0,)),
    },
    prompt=256, new=256, length=WINDOW, steps=64, rows=16, answer=64, vocabulary=VOCABULARY, ticks=WINDOW,
    copied=1 << 30,
)  # fmt: skip
SMALL = Scale(
    dense={"width": 64, "layers": 2, "vocabulary": 512, "head_dim": 32},
    block={"width": 64, "layers": 2, "vocabulary": 512, "head_dim": 16, "block": 8},
    mixture={
        "width": 64, "layers": 2, "vocabulary": 512, "head_dim": 16, "block": 8, "mlp": 96,
        "moe": MoEConfig(8, 2, 16, "sigmoid", True, 2.5, 2, 1, True, 16, (0,)),
    },
    prompt=16, new=16, length=8, steps=4, rows=3, answer=8, vocabulary=256, ticks=3, copied=1 << 20,
    environ={"TORCHDYNAMO_DISABLE": "1"}, bars=False,  # compiling would take longer than all the rest
)  # fmt: skip


def weights(model: NativeModel, share: float = 1.0) -> float:
    """Bytes that a forward reads: all but the embedding, which is looked up, and `share` of the experts."""
    experts = {id(p) for m in model.transformer.modules() if isinstance(m, MoE) for p in (m.gate_up_proj, m.down_proj)}
    skipped = set() if model.config.tied else {id(model.transformer.embed_tokens.weight)}
    parameters = (p for p in model.transformer.parameters() if id(p) not in skipped)
    return sum(p.nbytes * (share if id(p) in experts else 1) for p in parameters)


def experts_read(model: NativeModel, decode: Callable[[], object]) -> float:
    """The share of a layer's experts that a forward of this decode chooses, the mean of all."""
    shares = list[float]()

    def note(mlp: MoE, inputs: tuple[Tensor, ...]) -> None:
        flat = inputs[0].flatten(0, -2)
        scores = F.linear(flat.to(wide(flat.dtype)), mlp.gate.weight.to(wide(flat.dtype)))
        experts, _ = route(scores, mlp.gate.expert_bias, mlp.moe)
        shares.append(len(set(experts.flatten().tolist())) / mlp.moe.n_experts)

    mixtures = [m for m in model.transformer.modules() if isinstance(m, MoE)]
    hooks = [m.register_forward_pre_hook(note) for m in mixtures]
    try:
        decode()
    finally:
        for hook in hooks:
            hook.remove()
    return statistics.fmean(shares)
