"""Benches of the model layer: memory of a load, speed of a mixture layer, numerics. `python -m dllm.bench.models`."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.bench.runtime import side_by_side
from dllm.models.config import ModelConfig, MoEConfig
from dllm.models.hub import load
from dllm.models.moe import MLP, MoE, route
from dllm.models.native import NativeModel

log = logging.getLogger(__name__)
CHILD = """
import re, sys
from pathlib import Path
from dllm.models.hub import load
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
load(sys.argv[1], device="cpu", dtype=sys.argv[3])  # a small one, so that late imports do not count
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = peak()
model = load(sys.argv[2], device="cpu", dtype=sys.argv[3])
print(before, peak())
"""


def load_memory(gigabytes: float = 2.0, shards: int = 8, dtype: str = "bfloat16") -> dict[str, float]:
    """Peak memory (bytes) of loading a random float32 checkpoint of about `gigabytes` in `shards` files as `dtype`.

    Measured in a fresh process, less what it used before loading (Linux only: the kernel's high-water mark). Bound:
    largest shard + model in `dtype`.
    """
    layers = max(1, round(gigabytes * 1e9 / 4 / 16.8e6))  # 16.8 M parameters a layer of this shape
    config = ModelConfig(
        "llada", "LLaDAModelLM", 4096, 4096, 1024, layers, 16, 16, 64, 4096, mask_id=4095, eos_ids=(4094,), pad_id=4094
    )
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        _random(replace(config, n_layers=1, vocab_size=64, mask_id=63, eos_ids=(62,), pad_id=62), small, 1)
        size = sum(p.nbytes for p in _random(config, large, shards))
        files = [p.stat().st_size for p in large.glob("*.safetensors")]
        command = [sys.executable, "-c", CHILD, str(small), str(large), dtype]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, peak = (int(x) * 1024 for x in out.split())
    target = size // 4 * (4 if dtype == "float32" else 2)
    bound = max(files) + target
    return {
        "checkpoint": sum(files), "largest_shard": max(files), "model": target, "bound": bound,
        "peak": peak - before, "ratio": (peak - before) / bound,
    }  # fmt: skip


def _random(config: ModelConfig, folder: Path, shards: int) -> Sequence[Tensor]:
    model = NativeModel(config)
    parameters = list(model.transformer.parameters())
    model.save(folder, shard_bytes=sum(p.nbytes for p in parameters) // shards)
    return parameters


def moe_speed(
    tokens: int = 32, expert_width: int = 128, width: int = 256, experts: int = 64, top_k: int = 8, repeats: int = 40
) -> dict[str, float]:
    """Median milliseconds of one mixture layer against a loop over the experts, side by side in one run.

    Expert widths of a half (LLaDA-MoE) and a quarter (LLaDA2) of the model's are the published ones.
    """
    torch.manual_seed(0)
    mlp = MoE(width, MoEConfig(experts, top_k, expert_width))
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    modules = [_expert(mlp, e) for e in range(experts)]
    x = torch.randn(1, tokens, width)
    with torch.no_grad():
        error = float((mlp(x) - expert_loop(mlp, modules, x)).abs().max())
        ours, loop = side_by_side(lambda: mlp(x), lambda: expert_loop(mlp, modules, x), repeats, 3, time.thread_time)
    return {
        "tokens": tokens, "width": width, "expert_width": expert_width, "experts": experts, "top_k": top_k,
        "ms": ours * 1e3, "loop_ms": loop * 1e3, "speedup": loop / ours, "max_error": error,
    }  # fmt: skip


def _expert(mlp: MoE, index: int) -> MLP:
    """One expert as the module that the reference codes have."""
    expert = MLP(mlp.gate_up_proj.shape[1], mlp.moe.intermediate_size)
    weights = {"gate_up_proj": mlp.gate_up_proj, "down_proj": mlp.down_proj}
    expert.load_state_dict({f"{name}.weight": stacked[index].detach().T for name, stacked in weights.items()})
    return expert


def expert_loop(mlp: MoE, modules: list[MLP], x: Tensor) -> Tensor:
    """The usual reference: for every expert, the tokens that chose it."""
    flat = x.flatten(0, -2)
    experts, weights = route(F.linear(flat, mlp.gate.weight), None, mlp.moe)
    out = torch.zeros_like(flat)
    chosen = F.one_hot(experts, mlp.moe.n_experts).permute(2, 1, 0)  # (E, k, T)
    for e, expert in enumerate(modules):
        slot, token = torch.where(chosen[e])
        out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
    return out.view_as(x)


def numerics(folder: str | Path, length: int = 128) -> list[dict[str, str | float]]:
    """Error of each dtype against float64 on one row of random tokens: logits, probabilities and argmax."""
    exact = load(folder, device="cpu", dtype="float64")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, exact.vocab_size, (4, min(length, exact.max_positions)), generator=generator)
    ids[:, ids.shape[1] // 2 :: 2] = exact.mask_id or 0
    truth = exact.logits(exact.forward(ids))
    rows = []
    for dtype in ("float32", "float16", "bfloat16"):
        model = load(folder, device="cpu", dtype=dtype)
        logits = model.logits(model.forward(ids)).double()
        finite = truth.isfinite()
        rows.append({
            "dtype": dtype,
            "max_logit_error": float((logits - truth)[finite].abs().max()),
            "mean_logit_error": float((logits - truth)[finite].abs().mean()),
            "max_probability_error": float((logits.softmax(-1) - truth.softmax(-1)).abs().max()),
            "same_argmax": float((logits.argmax(-1) == truth.argmax(-1)).double().mean()),
        })  # fmt: skip
    return rows


def main() -> None:
    """The command line of these benches."""
    parser = argparse.ArgumentParser(description="Experts in one product against a loop; memory of a streamed load.")
    parser.add_argument("folders", nargs="*", help="checkpoints whose half-precision errors are measured besides")
    folders = parser.parse_args().folders
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    for expert_width in (64, 128, 256):
        for tokens in (1, 8, 32, 128, 512):
            log.info(json.dumps({"moe": moe_speed(tokens, expert_width)}))
    log.info(json.dumps({"load": load_memory()}))
    for folder in folders:
        log.info(json.dumps({"numerics": folder, "rows": numerics(folder)}, indent=1))


if __name__ == "__main__":
    main()
