"""Weight-only quantization of the linear layers through torchao, after loading; embedding and head stay."""

from __future__ import annotations

import logging

import torch
from torch import nn

from dllm.errors import DllmError, first_line, unknown
from dllm.models.moe import MoE
from dllm.models.transformer import Transformer

log = logging.getLogger(__name__)
KINDS = ("int8", "int4")
GROUPS = (128, 64, 32)  # weights that share a scale (int4): the largest that divides every width


def quantize(model: Transformer, kind: str) -> None:
    """Quantize the linear layers in place: "int8" a scale per row, "int4" a scale per group of up to 128 weights.

    int4 on CUDA packs two weights in a byte and needs bfloat16; elsewhere it keeps one per byte (accuracy of int4,
    memory of int8). Expert tensors of a mixture are stacked, no linear layers, and are left as they are.
    """
    if kind not in KINDS:
        raise unknown("quantization", kind, KINDS)
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        raise DllmError("quantization= needs torchao: pip install 'dllm-toolkit[quantization]'") from error
    linears = [m for m in model.layers.modules() if isinstance(m, nn.Linear)]
    config, group = _config(kind, linears)
    if any(isinstance(m, MoE) for m in model.modules()):
        log.warning("quantization leaves the experts of this model as they are")
    try:
        quantize_(model.layers, config, filter_fn=lambda m, _: isinstance(m, nn.Linear) and m.in_features % group == 0)
    except (ImportError, NotImplementedError, AssertionError, ValueError, RuntimeError) as error:
        raise DllmError(f"torchao cannot quantize this model to {kind} here: {first_line(error)}") from error


def _config(kind: str, linears: list[nn.Linear]) -> tuple[object, int]:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if kind == "int8":
        return Int8WeightOnlyConfig(), 1
    group = next((g for g in GROUPS if all(m.in_features % g == 0 for m in linears)), GROUPS[-1])
    weight = linears[0].weight
    if weight.is_cuda:
        if weight.dtype != torch.bfloat16:
            raise DllmError('quantization="int4" on CUDA needs dtype="bfloat16"')
        return Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d"), group
    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, "int4"), granularity=PerGroup(group)), group  # noqa: B009 # foreign
