"""Greedy equality: whatever is drafted, the output is the verifier's own."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
import torch
from drafting_kit import KINDS, Noise, Script, golden, plain, tiny_verifier

from dllm import speculate
from dllm.drafting.config import SpecConfig
from dllm.drafting.control import CONTROLLERS

torch.set_num_threads(1)
PROMPT = [3, 17, 5, 9, 22, 4, 31, 8, 2, 11]
N = 24
SEARCHES = ("argmax", "cps", "viterbi", "eal")
CARRY = ("off", "auto", "always")
ALL = list(itertools.product(SEARCHES, CONTROLLERS, (0, 6), CARRY, ("always", "sometimes", "never", "noise")))


@pytest.fixture(scope="module")
def verifiers():
    cache = {}

    def get(kind, attn="sdpa", dtype=torch.float64):
        key = (kind, attn, dtype)
        if key not in cache:
            model = tiny_verifier(kind, attn, dtype)
            cache[key] = model, plain(model, PROMPT, N)
        return cache[key]

    return get


def drafter_of(agree, text):
    return Noise() if agree == "noise" else Script([*text, *([1] * 64)], agree)


def check(model, text, search, length, tree, carry, agree, **kw):
    out = speculate(
        model, drafter_of(agree, text), PROMPT, max_new_tokens=N, search=search, length=length, tree=tree, carry=carry,
        controller=SpecConfig(length=length).build_controller(), **kw,
    )  # fmt: skip
    assert out.sequences == text
    assert sum(r.emitted for r in out.rounds) == N and out.n_verify <= N
    assert all(1 <= r.emitted <= r.nodes + 1 for r in out.rounds)
    return out


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_generate(verifiers, kind, attn):
    model, text = verifiers(kind, attn)
    assert len(set(text[len(PROMPT) :])) > 5  # a varied text: the test means something
    for combo in random.Random(f"{kind}{attn}").sample(ALL, 12):
        check(model, text, *combo)
    for carry in CARRY:  # a tree that needs the gather, every time
        check(model, text, "eal", "fixed", 6, carry, "sometimes")


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("combo", ALL, ids=lambda c: "-".join(map(str, c)))
def test_equal_to_generate_sweep(verifiers, kind, combo):
    check(*verifiers(kind), *combo)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_equal_or_a_tie(verifiers, kind):
    """In float32 a text may leave the reference only where the top-2 margin is within the measured rounding error."""
    model, text = verifiers(kind, dtype=torch.float32)
    exact, divergent = tiny_verifier(kind), 0
    for combo in random.Random(7).sample(ALL, 6):
        search, length, tree, carry, agree = combo
        out = speculate(
            model,
            drafter_of(agree, text),
            PROMPT,
            max_new_tokens=N,
            search=search,
            length=length,
            tree=tree,
            carry=carry,
        )
        if out.sequences != text:
            divergent += 1
            at = next(i for i, (a, b) in enumerate(zip(out.sequences, text, strict=True)) if a != b)
            ids = torch.tensor([text[:at]])
            with torch.no_grad():
                low, high = model(ids).logits[0, -1], exact(ids).logits[0, -1]
            best = high.topk(2).values
            assert best[0] - best[1] < 4 * (low.double() - high).abs().max()
    assert divergent <= 1


@pytest.mark.parametrize("name", ["tiny-llama-ar-random", "tiny-qwen3-ar-random"])
def test_golden_cases(name):
    model = golden(name)
    with open(f"tests/golden/given/{name}/ar_greedy.json") as f:
        cases = json.load(f)["cases"]
    for i, case in enumerate(cases):
        p = case["params"]
        agree = ("sometimes", "noise", "always")[i % 3]
        drafter = Noise(vocab=255) if agree == "noise" else Script(case["output_ids"], agree)
        eos = [] if p["eos_token_id"] is None else p["eos_token_id"]
        out = speculate(
            model, drafter, case["prompt_ids"], max_new_tokens=p["max_new_tokens"], eos=eos, tree=8 * (i % 2)
        )
        assert out.sequences == case["output_ids"], case["id"]


def test_perfect_drafter_needs_n_over_k_plus_one_calls(verifiers):
    model, text = verifiers("llama")
    for k in (1, 3, 7):
        out = speculate(
            model, Script(text), PROMPT, max_new_tokens=N, length=f"fixed:k={k}", search="argmax", carry="off"
        )
        assert out.sequences == text and out.n_verify == math.ceil(N / (k + 1))
        assert out.tau == N / out.n_verify
    bad = speculate(model, Script(text, "never"), PROMPT, max_new_tokens=N, length="fixed:k=4", search="argmax")
    assert bad.sequences == text and bad.n_verify == N and bad.accepted_per_round == 0 and bad.tau == 1


def test_plain_decoding_without_a_drafter(verifiers):
    model, text = verifiers("qwen3")
    out = speculate(model, None, PROMPT, max_new_tokens=N)
    assert out.sequences == text and out.n_verify == N and out.n_draft == 0


@pytest.mark.parametrize("name", ["suffix", "lookup", "recycle"])
@pytest.mark.parametrize("tree", [0, 8])
def test_retrieval_drafters(verifiers, name, tree):
    model, _ = verifiers("llama")
    prompt = [5, 6, 7, 8] * 4
    text = plain(model, prompt, 40)
    out = speculate(model, name, prompt, max_new_tokens=40, length="fixed:k=6", tree=tree)
    assert out.sequences == text
    for source in ("suffix:min_match=1", "recycle"):
        grafted = speculate(model, Noise(), prompt, max_new_tokens=40, length="fixed:k=6", tree=8, graft=source)
        assert grafted.sequences == text


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batch(verifiers, kind):
    model, _ = verifiers(kind)
    prompts = [PROMPT, PROMPT[:3], [7, 7, 1, 30, 12, 6, 19]]
    texts = [plain(model, p, N) for p in prompts]

    class ByRow(Script):
        def reset(self, ids, need):
            super().reset(ids, need)
            self.text = next(t for t in texts if t[: len(ids)] == list(ids))

    for agree in ("always", "sometimes", "never"):
        outs = speculate(model, ByRow([], agree), prompts, max_new_tokens=N, length="fixed:k=5")
        assert [o.sequences for o in outs] == texts


def test_eos_inside_a_draft_ends_the_text(verifiers):
    model, text = verifiers("llama")
    new = text[len(PROMPT) :]
    ends = [new[9], new[14]]  # several end ids; the first to appear wins
    expected = plain(model, PROMPT, N, eos_token_id=ends)
    for search, tree in itertools.product(SEARCHES, (0, 6)):
        out = speculate(
            model, Script(text), PROMPT, max_new_tokens=N, eos=ends, search=search, tree=tree, length="fixed:k=8"
        )
        assert out.sequences == expected and out.finish_reason == "stop"
        assert out.sequences[-1] in ends and not set(out.tokens) & set(ends)
        assert out.tokens == out.sequences[len(PROMPT) : -1]


@pytest.mark.parametrize("search", ["sample", "cps_sample", "sample_tree"])
def test_drawn_drafts_of_a_greedy_text(verifiers, search):
    model, text = verifiers("llama")
    for k, verify in itertools.product((1, 4), ("token", "block")):
        drafter = Script([*text, *([1] * 64)], "sometimes")
        out = speculate(
            model, drafter, PROMPT, max_new_tokens=N, search=search, length=f"fixed:k={k}", verify=verify, seed=3
        )
        assert out.sequences == text and {r.kind for r in out.rounds} >= {"sampled"} and out.n_verify < N


def test_max_length_is_never_passed(verifiers):
    model, text = verifiers("llama")
    for n in (0, 1, 2, 5):
        out = speculate(model, Script(text), PROMPT, max_new_tokens=n, length="fixed:k=8")
        assert out.sequences == text[: len(PROMPT) + n] and out.finish_reason == "length"
