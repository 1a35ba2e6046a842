"""The backbone against official logits, against native transformers classes, and against itself through the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dllm.models.config import ModelConfig
from dllm.models.hub import load
from dllm.models.model import Model
from dllm.models.transformer import KVStore, Transformer

GOLDEN = Path(__file__).parent / "golden"
MASKS = {"tiny-fast-dllm-v2-random": 158}  # not in its config: a call parameter of the reference
CHECKPOINTS = sorted(p.parent.name for p in GOLDEN.glob("given/*/logits.json"))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def golden(name: str) -> list[tuple[dict, Tensor]]:
    described = json.loads((GOLDEN / "given" / name / "logits.json").read_text())
    tensors = load_file(GOLDEN / "given" / name / "logits.safetensors")
    return [(e, tensors[e["raw_key"]]) for e in described["entries"]]


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_official_logits(name, dtype):
    for entry, expected in golden(name):
        rule = entry["attention"]
        block = rule["block_causal"] if isinstance(rule, dict) else None
        model = load(GOLDEN / "checkpoints" / name, dtype=dtype, device="cpu", mask_id=MASKS.get(name), block_size=block)
        ids = torch.tensor(entry["input_ids"])
        real = torch.ones_like(ids) if entry["attention_mask"] is None else torch.tensor(entry["attention_mask"])
        pos = torch.where(real > 0, real.cumsum(1) - 1, -1)
        logits = model.transformer.head(model.forward(ids, pos))
        stored = torch.tensor(entry["positions"])
        seen = real[:, stored].bool()
        error = (logits[:, stored] - expected[..., : model.vocab_size]).abs()[seen].max()
        assert error < 1e-4, (name, entry["name"], error)
