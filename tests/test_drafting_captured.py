"""Captured drafts of `speculate` are the eager ones, and the host waits once for each of them."""

from __future__ import annotations

import pytest
import torch
from drafting_kit import plain, tiny_verifier
from replay import StandIn, standing_in, waits
from sweeps import dealt, some
from transformers import GenerationConfig

import dllm
from dllm.decoding import graphs
from dllm.drafting import autoregressive, diffusion
from dllm.drafting.autoregressive import ARDrafter
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Need
from dllm.drafting.front import Warp, sampling, speculate
from dllm.drafting.lattice import DraftFailure
from dllm.drafting.loans import Loans
from dllm.drafting.places import bucket
from dllm.drafting.retrieval import Fallback
from dllm.errors import DllmError

torch.set_num_threads(1)
PROMPT = [5, 9, 33, 10, 12, 34, 7, 31, 19]
BATCH = [PROMPT, PROMPT[:5], PROMPT[:7]]
DRAWN = dict(temperature=0.8, top_p=0.95, seed=3)
SHAPES = {
    "chain": (BATCH, {}),
    "drawn chain": (BATCH, DRAWN),
    "tree": ([PROMPT], dict(tree=8)),
    "drawn tree": ([PROMPT], dict(temperature=0.8, seed=3, tree=8, search="sample_tree")),
}
DLLMS = {
    "llada": "tiny-llada-trained",
    "dream": "tiny-dream-random",  # shifted
    "sdar": "tiny-sdar-random",  # block-causal
    "fast-dllm-v2": "tiny-fast-dllm-v2-random",  # both
}
CASES = [
    *dealt(["llada"], ["none", "approx"], SHAPES),
    ("dream", "none", "chain"),
    ("dream", "approx", "chain"),
    ("sdar", "auto", "chain"),
    ("sdar", "none", "tree"),
    ("fast-dllm-v2", "auto", "drawn chain"),
]


@pytest.fixture(scope="module")
def dllms():
    cache = {}

    def get(name):
        if name not in cache:
            mask = 158 if "fast" in name else None
            cache[name] = dllm.load(f"tests/golden/checkpoints/{DLLMS[name]}", mask_id=mask, dtype="float64")
        return cache[name]

    return get


def run(verifier, drafter, prompts, **kw):
    kw = {"max_new_tokens": 14, "eos": [], "length": "fixed:k=5", **kw}
    outs = speculate(verifier, drafter, prompts, **kw)
    return [(out.sequences, out.spans, out.draft_forwards) for out in outs]


def counts(model):
    return graphs.IDLE[model].graphs.counts


def settled(drafter, prompts, model, verifier=None, **kw):
    """Captured runs are the eager one; what the last of them did with the drafter's graphs."""
    verifier = verifier or tiny_verifier()
    expected = run(verifier, drafter, prompts, **kw)
    for _ in range(3):
        assert run(verifier, drafter, prompts, graphs=True, **kw) == expected
    return counts(model)


@pytest.mark.parametrize(("name", "cache", "shape"), CASES)
def test_captured_drafts_of_a_dllm_are_the_eager_ones(dllms, name, cache, shape):
    model, (prompts, kw) = dllms(name), SHAPES[shape]
    drafter = DiffusionDrafter(model, vocabulary="ids", prefix_cache=cache, refresh=4)
    with standing_in(audit=shape == "tree"):
        last = settled(drafter, prompts, model, **kw)
        assert last.replays and not last.captures and not last.eager
        assert len(graphs.IDLE[model].graphs._entries) < 8


@pytest.mark.parametrize(("kind", "shape"), [("llama", "chain"), ("llama", "drawn chain"), ("gemma3-mixed", "chain")])
def test_captured_chains_of_a_causal_lm_are_the_eager_ones(kind, shape):
    model, (prompts, kw) = tiny_verifier(kind, seed=5), SHAPES[shape]
    with standing_in():
        last = settled(ARDrafter(model), prompts, model, **kw)
        assert last.replays and not last.captures and not last.eager
        keys = [key for _, key in graphs.IDLE[model].graphs._entries]
        sizes = [key[1] for key in keys if key[0] == "next"]  # one and the same piece while as many rows are left
        assert sorted(sizes) == sorted(set(sizes)) and max(sizes) == len(prompts) and len(keys) < 8


def test_every_replay_of_a_chain_is_what_its_work_would_do_now():
    model = tiny_verifier(seed=5)
    with standing_in(audit=True):
        settled(ARDrafter(model), [PROMPT], model, max_new_tokens=8, **DRAWN)


@pytest.mark.parametrize("kw", [{}, DRAWN], ids=str)
def test_a_model_may_draft_for_itself(kw):
    """Its graphs are lent once, and both of its roles find what stands still."""
    model = tiny_verifier()
    expected = run(model, ARDrafter(model), BATCH, **kw)
    with standing_in():
        for _ in range(3):
            assert run(model, ARDrafter(model), BATCH, graphs=True, **kw) == expected
        assert not counts(model).captures and not counts(model).eager
    text = plain(model, PROMPT, 14)
    assert expected[0][0] == text or kw


def test_a_drafter_beside_another_of_the_same_model(dllms):
    """The texts of both have lanes of their own."""
    model = dllms("sdar")
    drafter = Fallback(DiffusionDrafter(model, vocabulary="ids", prefix_cache="approx"), min_match=2)
    graft = DiffusionDrafter(model, vocabulary="ids", prefix_cache="approx", temperature=2.0)
    with standing_in():
        assert settled(drafter, [PROMPT], model, tree=8, graft=graft).replays


def test_drafts_through_strings_and_text(dllms):
    model, old = dllms("llada"), dllms("llada").tokenizer
    pieces = [f"<{i}>" for i in range(40)]

    class Words:
        def __init__(self, pieces):
            self.pieces = pieces

        def get_vocab(self):
            return {p: i for i, p in enumerate(self.pieces)}

        def decode(self, ids, skip_special_tokens=False):
            return "".join(self.pieces[i] if i < 40 else "" for i in ids)

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [self.pieces.index(p + ">") for p in text.split(">")[:-1]]}

    try:
        model.tokenizer = Words(pieces)
        for kind in ("strings", "text"):
            drafter = DiffusionDrafter(model, vocabulary=kind, verifier_tokenizer=Words(pieces[::-1]))
            with standing_in():
                assert settled(drafter, [PROMPT], model).replays
    finally:
        model.tokenizer = old


# -- waits


@pytest.mark.parametrize(("cache", "kw"), dealt(["none", "approx"], [{}, DRAWN, dict(tree=8)]))
def test_the_host_waits_once_for_a_draft_of_a_dllm(dllms, cache, kw):
    drafter = DiffusionDrafter(dllms("llada"), vocabulary="ids", prefix_cache=cache)
    out, found = spied(drafter, **kw)
    drafts = sum(r.k > 0 and not r.carried for r in out.rounds)
    redrawn = sum(r.carried for r in out.rounds) if "seed" in kw else 0  # what was carried over is drawn anew
    assert drafts > 2 and sum(found.values()) == out.n_verify + drafts + redrawn


@pytest.mark.parametrize("kw", [{}, DRAWN], ids=str)
def test_the_host_waits_once_for_a_chain_of_a_causal_lm(kw):
    out, found = spied(ARDrafter(tiny_verifier(seed=5)), **kw)
    drafts = sum(r.nodes > 0 for r in out.rounds)
    assert out.draft_forwards > 3 * drafts > 6 and sum(found.values()) == out.n_verify + drafts


def spied(drafter, **kw):
    verifier, out = tiny_verifier(), []
    verifier.generation_config = GenerationConfig()  # nothing of its own in the law: `generate` is not asked
    kw = dict(max_new_tokens=20, eos=[], length="fixed:k=5", graphs=True, **kw)
    with standing_in():
        for _ in range(3):
            speculate(verifier, drafter, PROMPT, **kw)
        found = waits(lambda: out.append(speculate(verifier, drafter, PROMPT, **kw)))
    host = ("lattice.py", "search.py")  # behind the read of a draft
    mine = {w: n for w, n in found.items() if w.startswith("cpu") or not any(h in w for h in host)}
    return out[0], {w: n for w, n in mine.items() if not w.startswith("lift_fresh at drafting/proposal.py")}


# -- shapes


def test_widths_are_few():
    assert [bucket(n) for n in (1, 2, 3, 16, 17, 33, 128, 129, 300, 1025)] == [1, 2, 4, 16, 32, 48, 128, 160, 320, 1280]
    assert bucket(3, 16) == 16 and bucket(20, 16) == 32
    assert all(n <= bucket(n) <= max(n + 15, 1.25 * n) for n in range(1, 5000))
    assert len({bucket(n) for n in range(1, 32769)}) <= 44


@pytest.mark.parametrize("cache", some(["none", "auto"], "auto".__eq__))
def test_a_long_text_has_few_captures(dllms, cache):
    """A text of 200 tokens, with drafts of every length."""
    model = dllms("sdar" if cache == "auto" else "llada")
    drafter = DiffusionDrafter(model, vocabulary="ids", prefix_cache=cache)
    kw = dict(max_new_tokens=120, length="heuristic", carry="off")
    verifier = tiny_verifier()
    expected = run(verifier, drafter, [PROMPT], **kw)
    with standing_in():
        assert run(verifier, drafter, [PROMPT], graphs=True, **kw) == expected
        assert counts(model).captures <= len({bucket(n, 16) for n in range(9, 160)}) and counts(model).replays > 30


@pytest.mark.parametrize("drafter", ["approx", "auto", "causal"])
def test_the_store_grows_with_the_text(dllms, drafter, monkeypatch):
    for module in (diffusion, autoregressive):
        monkeypatch.setattr(module, "SLOTS", 8)
    model = {"approx": dllms("llada"), "auto": dllms("sdar"), "causal": tiny_verifier(seed=5)}[drafter]
    made = ARDrafter(model) if drafter == "causal" else DiffusionDrafter(model, vocabulary="ids", prefix_cache=drafter)
    # a store begins anew with the text, and so does what is approximate
    kw = {"carry": "off"} if drafter == "approx" else {}
    verifier = tiny_verifier()
    with standing_in():
        found = [run(verifier, made, BATCH, graphs=True, max_new_tokens=30, **kw) for _ in range(3)]
        slots = {layout[-1] for layout in graphs.IDLE[model].graphs._static}
        assert len(slots) >= 2 and not counts(model).captures
    expected = run(verifier, made, BATCH, max_new_tokens=30, **kw)
    assert found[0] == found[1] == found[2]
    assert found[0] == expected or drafter == "approx"
    assert [ids for ids, *_ in found[0]] == [ids for ids, *_ in expected]


@pytest.mark.parametrize("drafter", ["dllm", "causal"])
def test_what_an_earlier_text_left_behind_is_not_seen(dllms, drafter):
    model = dllms("sdar") if drafter == "dllm" else tiny_verifier(seed=5)
    made = DiffusionDrafter(model, vocabulary="ids") if drafter == "dllm" else ARDrafter(model)
    verifier = tiny_verifier()
    expected = run(verifier, made, [PROMPT])
    with standing_in():
        run(verifier, made, [[*PROMPT, *PROMPT]], graphs=True)
        for held, _ in graphs.IDLE[model].graphs._static.values():
            stores = held.places._kept() if drafter == "causal" else [*held.store.keys, *held.store.values]
            with torch.inference_mode():
                for kept in stores:
                    kept.fill_(torch.nan)
        assert run(verifier, made, [PROMPT], graphs=True) == expected


def test_two_laws_of_equal_value_share_captures(dllms):
    one, other = (sampling(0.8, 5, 0.9, []).warp for _ in range(2))
    assert isinstance(one, Warp) and one == other and hash(one) == hash(other)
    assert one != sampling(0.7, 5, 0.9, []).warp
    assert Need(9, warp=one).law == Need(9, warp=sampling(0.7, 5, 0.9, []).warp).law  # greedy drafts are not warped
    assert Need(9, sampled=True, warp=one).law == Need(9, sampled=True, warp=other).law


# -- what cannot be captured


def test_a_law_that_asks_stays_eager(dllms, caplog):
    model, verifier = dllms("llada"), tiny_verifier()
    drafter = DiffusionDrafter(model, vocabulary="ids")

    class TemperatureLogitsWarper:
        def __call__(self, ids, scores):
            return scores / 0.8 if bool(scores.isfinite().any()) else scores

    kw = dict(temperature=1.0, seed=0, logits_processor=[TemperatureLogitsWarper()])
    expected = run(verifier, drafter, [PROMPT], **kw)
    with standing_in():
        for _ in range(3):
            assert run(verifier, drafter, [PROMPT], graphs=True, **kw) == expected
        assert counts(model).eager and not counts(model).replays
    assert {r.message.split(";")[0].split(" at ")[0] for r in caplog.records} == {
        "drafting runs without CUDA graphs: it waits for the device"
    }


@pytest.mark.parametrize("drafter", ["dllm", "causal"])
def test_memory_that_runs_out_while_capturing(dllms, drafter, monkeypatch, caplog):
    model = dllms("sdar") if drafter == "dllm" else tiny_verifier(seed=5)
    made = DiffusionDrafter(model, vocabulary="ids") if drafter == "dllm" else ARDrafter(model)
    verifier = tiny_verifier()
    expected = run(verifier, made, BATCH)

    def record(self, work):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with standing_in():
        monkeypatch.setattr(StandIn, "record", record)
        for _ in range(3):
            assert run(verifier, made, BATCH, graphs=True) == expected
    assert "drafting runs without CUDA graphs: memory ran out" in caplog.text


def test_a_drafter_that_cannot_be_captured_is_named_once(caplog):
    loans = Loans(True)
    model = tiny_verifier()
    with loans:
        for _ in range(2):
            assert loans.drafting(model, lambda: "no CUDA device") is None
    assert [r.message for r in caplog.records] == ["drafting runs without CUDA graphs: no CUDA device"]
    for asked in (None, False):
        assert Loans(asked).drafting(model, lambda: "no CUDA device") is None
    assert len(caplog.records) == 1


def test_graphs_are_off_where_they_are_not_asked_for(dllms):
    model, verifier = dllms("sdar"), tiny_verifier()
    with standing_in():
        run(verifier, DiffusionDrafter(model, vocabulary="ids"), BATCH, graphs=False)
        assert model not in graphs.IDLE and verifier not in graphs.IDLE
        with pytest.raises(DllmError, match="call dllm"):
            verifier.generate(torch.tensor([PROMPT]), custom_generate=dllm.spec_generate, spec=dict(graphs=True))


@pytest.mark.parametrize("captured", [False, True])
def test_logits_that_are_no_numbers_cut_a_chain(captured):
    """The tokens before them are drafted, and the next draft knows nothing of them."""
    model = tiny_verifier(seed=5)
    embedding = model.get_input_embeddings().weight.data
    with standing_in():
        drafter, loans = ARDrafter(model), Loans(captured)
        drafter.reset(PROMPT, Need(40, loans=loans))
        whole = drafter.draft(PROMPT, 5).tokens
        kept = embedding[whole[2]].clone()
        embedding[whole[2]] = torch.nan
        first = whole.index(whole[2]) + 1
        assert drafter.draft(PROMPT, 5).tokens == whole[:first]
        with pytest.raises(DraftFailure):
            drafter.draft([*PROMPT, whole[2]], 5)
        embedding[whole[2]] = kept
        assert drafter.draft(PROMPT, 5).tokens == whole
