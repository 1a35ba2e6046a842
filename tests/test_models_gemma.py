"""DiffusionGemma is handed to transformers' own decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dllm
from dllm.cli import app
from dllm.errors import DllmError
from dllm.models.diffusion_gemma import DiffusionGemma

gemma = pytest.importorskip("transformers.models.diffusion_gemma")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    torch.manual_seed(0)
    text = {
        "vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 1,
        "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 128,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16,
    }  # fmt: skip
    network = DiffusionGemmaForBlockDiffusion(
        DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=4)
    )
    path = tmp_path_factory.mktemp("gemma")
    network.save_pretrained(path)
    return path


def test_native_decoding(folder):
    model = dllm.load(folder, device="cpu")
    assert isinstance(model, DiffusionGemma) and model.mask_id is None and model.eos_ids == (1,)
    options = {"name": "native", "max_denoising_steps": 2}
    first, second = dllm.generate(model, [[5, 6, 7], [9, 10]], sampler=options, max_new_tokens=6)
    assert len(first.tokens) <= 6 and all(0 <= t < 80 for t in first.tokens) and 1 <= first.nfe <= 4
    assert first.sequences[:3] == [5, 6, 7] and first.sampler == "native"
    assert first.calls == second.calls == first.nfe + second.nfe  # of the whole call
    events = list(dllm.stream(model, [[5, 6, 7], [9, 10]], sampler=options, max_new_tokens=6))
    assert [(e.request, e.output.tokens) for e in events] == [(0, first.tokens), (1, second.tokens)]
    assert model.own_decoder.options("native:max_denoising_steps=2") == model.own_decoder.options(options)
    alone = dllm.generate(model, [9, 10], sampler=options, max_new_tokens=6, seed=1)
    assert alone.tokens == second.tokens  # request i uses seed + i
    assert alone.tokens != dllm.generate(model, [9, 10], sampler=options, max_new_tokens=6, seed=2).tokens


def test_chat(folder):
    shown = CliRunner().invoke(app, ["chat", "-m", str(folder), "--device", "cpu"], input="/quit\n")
    assert shown.exit_code == 0, shown.exception


def test_other_samplers_and_caches_are_refused(folder):
    model = dllm.load(folder, device="cpu")
    for arguments, message in (
        ({"sampler": "threshold"}, 'sampler="native" only'),
        ({"sampler": {"name": "native", "max_denoising_step": 3}}, "did you mean 'max_denoising_steps'"),
        ({"cache": "dual"}, "cache"),
        ({"temperature": 0.5}, "temperature"),
        ({"lookahead": 4}, "lookahead"),
    ):
        with pytest.raises(DllmError, match=message):
            dllm.generate(model, [5, 6], **arguments)
    with pytest.raises(DllmError, match='sampler="native"'):
        model.forward(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(DllmError, match="mask_id is not for DiffusionGemma"):
        dllm.load(folder, device="cpu", mask_id=3)
