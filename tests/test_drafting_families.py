"""Families of transformers as verifiers: their own greedy text by chains, batches and trees, or one clear refusal."""

from __future__ import annotations

import pytest
import torch
from drafting_kit import Noise, Script
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
from verifier_zoo import OWN, PROMPTS, VOCAB, varied

import dllm
from dllm.errors import DllmError

N = 12
ALL = "chain batch tree"
CHAINS = "chain batch"
TABLE = {
    **dict.fromkeys(("llama", "mistral", "gemma2", "gpt2", "gptj", "falcon", "olmo3"), ALL),
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "deepseek_v3"), ALL),
    # keys by slot (MPT, BART), ALiBi from a two-dimensional mask (Bloom, Falcon), a window over slots (GPT-Neo)
    **dict.fromkeys(("mpt", "bart", "bloom", "falcon-alibi", "gpt_neo", "roformer"), CHAINS),
    # chunks, convolutions, sparse attention: what transformers' own assisted decoding rolls back
    **dict.fromkeys(("llama4_text", "lfm2", "deepseek_v32"), CHAINS),
    "phi3-longrope": ALL,  # computes its cache anew where the factors change
    "llama-dynamic": "chain tree",  # the longest row would decide for all
    "trocr": CHAINS,  # returns the logits of the whole text, whatever `logits_to_keep` says
    # a running state, no cache, one token at a time, a window in the cache that the mask does not know
    **dict.fromkeys(("mamba", "rwkv", "minimax", "openai-gpt", "xlnet", "prophetnet", "moshi"), ""),
}


class Scripts(Script):
    """Drafts several known texts, every third token wrong."""

    def __init__(self, texts):
        super().__init__([], "sometimes")
        self.texts = texts

    def reset(self, ids, need):
        self.need = need
        self.text = next(t for t in self.texts if t[: len(ids)] == list(ids))


def served(model, texts):
    """Which ways the verifier takes; each that it takes must give its own texts, and a refusal is one line."""
    kw = dict(max_new_tokens=len(texts[0]) - len(PROMPTS[0]), length="fixed:k=5")
    ways = {
        "chain": lambda: [dllm.speculate(model, Scripts(texts), p, **kw) for p in PROMPTS],
        "batch": lambda: dllm.speculate(model, Scripts(texts), list(PROMPTS), **kw),
        "tree": lambda: [dllm.speculate(model, Scripts(texts), p, tree=7, **kw) for p in PROMPTS],
    }
    taken = []
    for name, way in ways.items():
        try:
            outs = way()
        except DllmError as error:
            assert type(model).__name__ in str(error) and "\n" not in str(error)
            continue
        assert [o.sequences for o in outs] == texts, name
        assert sum(o.n_verify for o in outs) < sum(len(o.tokens) for o in outs)
        taken.append(name)
    return " ".join(taken)


@pytest.mark.parametrize("family", TABLE)
def test_a_family_gives_its_own_text_or_is_refused(family):
    assert served(*varied(family, N)) == TABLE[family]


@pytest.mark.sweep
@pytest.mark.parametrize("attn", [None, "eager"])
@pytest.mark.parametrize("family", sorted({*NAMES, *OWN}))
def test_every_family_gives_its_own_text_or_is_refused(family, attn):
    try:
        model, texts = varied(family, 30, attn)
    except Exception as error:  # a family that cannot be shrunk, or does not generate
        pytest.skip(f"{type(error).__name__}: {str(error)[:80]}")
    served(model, texts)


@pytest.mark.parametrize("family", ["bart", "gpt_neo", "lfm2", "gemma4_text"])
def test_a_padded_batch_through_the_hook(family):
    """Rows that are verified one after the other keep their padding, as `generate` does."""
    model, _ = varied(family, 8)
    ids = torch.tensor([PROMPTS[0], [0, 0, 0, *PROMPTS[2]], [0] * 7 + PROMPTS[1]])
    kw = dict(attention_mask=(ids != 0).long(), max_new_tokens=N, do_sample=False)
    ours = model.generate(ids, custom_generate=dllm.speculator(Noise(vocab=VOCAB), length="fixed:k=4"), **kw)
    assert ours.tolist() == model.generate(ids, **kw).tolist()
