"""Models larger than one device: layers spread over devices (accelerate's plan), or split over processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist

from dllm.errors import DllmError
from dllm.models.checkpoint import Place, assign, build
from dllm.models.config import ModelConfig
from dllm.models.fused import Fused
from dllm.models.moe import MoE
from dllm.models.transformer import Attention, Transformer


def device_plan(config: ModelConfig, device_map: str | Mapping[str, object], dtype: torch.dtype | None) -> Place:
    """Where every parameter goes: "auto" or "balanced" (planned by accelerate), or a dict module name -> device.

    A layer is never split; everything is computed where its weights are. There is no offloading to disk.
    """
    if isinstance(device_map, str):
        device_map = _planned(config, device_map, dtype)
    places = {name: f"cuda:{d}" if isinstance(d, int) else str(d) for name, d in device_map.items()}
    if "disk" in places.values():
        raise DllmError("the model does not fit in the memory there is, and offloading to disk is not supported")

    def place(parameter: str) -> torch.device:
        owners = [n for n in places if n in ("", parameter) or parameter.startswith(f"{n}.")]
        if not owners:
            raise DllmError(f"device_map has no place for {parameter}")
        return torch.device(places[max(owners, key=len)])

    for name, _ in build(config).named_parameters():
        place(name)
    return place


def _planned(config: ModelConfig, kind: str, dtype: torch.dtype | None) -> Mapping[str, object]:
    try:
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ImportError as error:
        raise DllmError("device_map= needs accelerate: pip install 'dllm-toolkit[accelerate]'") from error
    if kind not in ("auto", "balanced"):
        raise DllmError(f'unknown device_map {kind!r}; known: "auto", "balanced", "tensor", or module name -> device')
    skeleton, dtype = build(config), dtype or torch.bfloat16
    memory = get_balanced_memory(skeleton, no_split_module_classes=["Layer"], dtype=dtype)
    plan: Mapping[str, object] = infer_auto_device_map(skeleton, memory, ["Layer"], dtype=dtype)
    return plan


def process_device(device: torch.device) -> torch.device:
    """Join the process group of torchrun and pick this process's device."""
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise DllmError('device_map="tensor" runs under torchrun: torchrun --nproc-per-node 2 script.py')
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", dist.get_rank()))) if device.type == "cuda" else device


def split_over_processes(model: Transformer) -> None:
    """Tensor parallelism in place: heads, MLP and expert widths and head rows are divided among the processes.

    Every process calls `forward` with the same arguments, gets the same logits, and stores the keys of its own heads.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    config, ways, rank = model.config, dist.get_world_size(), dist.get_rank()
    widths = {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "intermediate_size": config.intermediate_size}
    if config.moe is not None:
        widths |= {"expert width": config.moe.intermediate_size, "shared expert width": config.moe.shared_size}
    if bad := [f"{name}={width}" for name, width in widths.items() if width % ways]:
        raise DllmError(f"{ways} processes cannot share {', '.join(bad)} evenly")
    mesh = init_device_mesh(next(model.parameters()).device.type, (ways,))
    mlp = {"gate_up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    attention = {"self_attn.qkv_proj": ColwiseParallel(), "self_attn.o_proj": RowwiseParallel()}
    heads = [config.n_heads // ways, config.n_kv_heads // ways]
    for module in model.modules():
        if isinstance(module, Attention):
            module.heads = heads
        elif isinstance(module, Fused):
            _by_process(module, ways)
    for layer in model.layers:
        prefix = "mlp.shared_experts" if isinstance(layer.mlp, MoE) else "mlp"
        dense = not isinstance(layer.mlp, MoE) or layer.mlp.shared_experts is not None
        parallelize_module(layer, mesh, attention | ({f"{prefix}.{n}": s for n, s in mlp.items()} if dense else {}))
        if isinstance(layer.mlp, MoE):
            _split_experts(layer.mlp, ways, rank)
    if model.lm_head is not None:
        parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    model.config = replace(config, n_heads=heads[0], n_kv_heads=heads[1])


def _by_process(fused: Fused, ways: int) -> None:
    """Order the rows so that those of every process are consecutive and hold its share of each part."""
    for name, value in list(fused.named_parameters()):
        shares = [part.chunk(ways) for part in fused.apart(value.detach()).values()]
        assign(
            fused, name, torch.cat([share for shares_of_one in zip(*shares, strict=True) for share in shares_of_one])
        )
    fused.parts = {part: width // ways for part, width in fused.parts.items()}


def _split_experts(mlp: MoE, ways: int, rank: int) -> None:
    """Keep this process's share of every expert's width; the partial sums are added up in `MoE.forward`."""
    gate, up = mlp.gate_up_proj.detach().chunk(2, 2)
    own = torch.cat([part.chunk(ways, 2)[rank] for part in (gate, up)], 2)
    assign(mlp, "gate_up_proj", own.clone())
    assign(mlp, "down_proj", mlp.down_proj.detach().chunk(ways, 1)[rank].clone())
    mlp.group = dist.group.WORLD
