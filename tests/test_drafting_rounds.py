"""Rounds of `speculate`: captured ones give what eager ones give, and the host waits for the device once a verify."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from drafting_kit import KINDS, VOCAB, Script, plain, tiny_verifier
from replay import StandIn, standing_in, waits
from transformers import GenerationConfig

import dllm
from dllm.decoding import graphs
from dllm.drafting import verifier as module
from dllm.drafting.accept import Judge, reject, walk_sample
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Ask, Need
from dllm.drafting.front import speculate
from dllm.drafting.loans import Loans
from dllm.drafting.proposal import Proposal, Rows, chain
from dllm.drafting.verifier import Verifier
from dllm.errors import DllmError

torch.set_num_threads(1)
PROMPT = [5, 6, 7, 8]
SHAPES = {
    "chain": dict(),
    "tree": dict(tree=8),
    "drawn chain": dict(temperature=0.8, top_p=0.95, seed=3),
    "drawn tree": dict(temperature=0.8, seed=3, tree=8, search="sample_tree"),
}


@pytest.fixture(autouse=True)
def small_stores(monkeypatch):
    monkeypatch.setattr(module, "SLOTS", 64)
    monkeypatch.setattr(module, "ROOM", 16)


def run(model, text, prompts, **kw):
    kw = {"max_new_tokens": 24, "length": "fixed:k=6", **kw}
    outs = speculate(model, Script(text, "sometimes"), prompts, **kw)
    return [(out.sequences, out.spans, out.draft_forwards) for out in outs]


def counts():
    return next(iter(graphs.IDLE.values())).graphs.counts


@pytest.mark.parametrize(
    ("kind", "shape"), [*(("gemma3-mixed", shape) for shape in SHAPES), *((kind, "tree") for kind in KINDS[:-1])]
)
def test_captured_rounds_are_the_eager_ones(kind, shape):
    model, kw = tiny_verifier(kind), SHAPES[shape]
    text = plain(model, PROMPT, 60)
    prompts = [text[: 4 + i] for i in range(1 if "tree" in shape else 3)]
    expected = run(model, text, prompts, **kw)
    with standing_in(audit=shape == "tree"):
        for _ in range(3):
            assert run(model, text, prompts, graphs=True, **kw) == expected
        assert counts().replays and not counts().captures and not counts().eager  # of the third call


def test_the_store_grows_with_the_text(monkeypatch):
    monkeypatch.setattr(module, "SLOTS", 8)
    model = tiny_verifier()
    text = plain(model, PROMPT, 60)
    for kw in (dict(), dict(tree=8)):
        expected = run(model, text, [text[:4]], graphs=False, **kw)
        with standing_in(audit=True):
            assert [run(model, text, [text[:4]], graphs=True, **kw) for _ in range(3)] == [expected] * 3
            assert {slots for _, _, slots in next(iter(graphs.IDLE.values())).graphs._static} >= {8, 16, 32}
    batch = [text[:4], text[:9]]
    assert [s for s, *_ in run(model, text, batch)] == [plain(model, p, 24) for p in batch]


def test_what_an_earlier_text_left_behind_is_not_seen():
    model = tiny_verifier()
    text = plain(model, PROMPT, 60)
    expected = run(model, text, [text[:4]])
    with standing_in():
        run(model, text, [text[:20]], graphs=True)
        for store, _ in next(iter(graphs.IDLE.values())).graphs._static.values():
            for kept in store._kept():
                with torch.inference_mode():
                    kept.fill_(torch.nan)
        assert run(model, text, [text[:4]], graphs=True) == expected


@pytest.mark.parametrize("drafter", ["suffix", "lookup"])
@pytest.mark.parametrize("kw", [dict(), dict(tree=8), dict(temperature=0.8, top_k=9, seed=1)], ids=str)
def test_a_round_waits_once(drafter, kw):
    model, out = tiny_verifier(), []
    model.generation_config = GenerationConfig()  # nothing of its own in the law: `generate` is not asked
    with standing_in():
        for _ in range(3):
            speculate(model, drafter, PROMPT, max_new_tokens=24, graphs=True, **kw)
        found = waits(lambda: out.append(speculate(model, drafter, PROMPT, max_new_tokens=24, graphs=True, **kw)))
    assert asked(found) == out[0].n_verify


def asked(found: Counter[str]) -> int:
    """Without what the host sends, which is pinned there."""
    return sum(n for what, n in found.items() if not what.startswith("lift_fresh at drafting/proposal.py"))


def test_a_batch_waits_once_for_all_rows():
    model, out = tiny_verifier(), []
    found = waits(lambda: out.extend(speculate(model, "suffix", [PROMPT, [3, 4], [9]], max_new_tokens=20)))
    reads = sum(n for what, n in found.items() if what.startswith("tolist at drafting/loop.py"))
    assert reads == max(o.n_verify for o in out)


@pytest.mark.parametrize("cache", ["none", "approx"])
@pytest.mark.parametrize("draws", [0, 1, 3])
def test_a_draft_of_a_dllm_asks_nothing_before_its_read(cache, draws):
    need = Need(664, frozenset([2]), m_max=4, sampled=draws > 0, draws=draws)
    loans, texts, drafter = Loans(False), [PROMPT, PROMPT[:2]], DiffusionDrafter(dllm.load("tiny"), prefix_cache=cache)
    drafters = [drafter.fork() for _ in texts]
    for drafter, text in zip(drafters, texts, strict=True):
        drafter.reset(text, replace(need, loans=loans))
    for rows in (1, 2, 2):
        pairs = zip(drafters[:rows], texts, strict=False)
        jobs = [d._job(Ask(d, text, 5, torch.Generator().manual_seed(0))) for d, text in pairs]
        found = waits(lambda: drafters[0]._told([job for _, job in jobs], jobs[0][0]))  # noqa: B023
    assert not asked(found)


# -- what cannot be captured


class Asking(torch.nn.Module):
    """A verifier whose forward asks the device."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.base_model, self._supports_attention_backend = inner.base_model, True

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **kw):
        assert bool((input_ids >= 0).all())
        return self.inner(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values, **kw
        )


def test_a_verifier_that_asks_stays_eager(caplog):
    inner = tiny_verifier()
    text, model = plain(inner, PROMPT, 60), Asking(inner)
    with standing_in():
        for _ in range(4):
            assert run(model, text, [text[:4]], graphs=True) == run(inner, text, [text[:4]])
        assert counts().eager and not counts().replays
    (line,) = {r.message for r in caplog.records}
    assert "verifying runs without CUDA graphs: it waits for the device at" in line


def test_memory_that_runs_out_while_capturing(monkeypatch, caplog):
    def record(self, work):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_verifier()
    text = plain(model, PROMPT, 60)
    with standing_in():
        monkeypatch.setattr(StandIn, "record", record)
        for _ in range(3):
            assert run(model, text, [text[:4]], graphs=True) == run(model, text, [text[:4]])
    assert "memory ran out" in caplog.text


def test_asked_for_where_it_cannot_be():
    model = tiny_verifier()
    with pytest.raises(DllmError, match=r"^graphs=True: CUDA graphs need a CUDA device, and this model is on cpu; "):
        speculate(model, None, PROMPT, graphs=True)
    by_slot = Verifier(model)
    by_slot.found["batches"] = False
    with standing_in():
        with pytest.raises(DllmError, match="does not place keys by position_ids alone"):
            speculate(by_slot, None, PROMPT, graphs=True)
        assert speculate(by_slot, None, PROMPT, max_new_tokens=8).sequences == plain(model, PROMPT, 8)
        del by_slot.found["batches"]
        with pytest.raises(DllmError, match=r"call dllm\.speculate"):
            model.generate(torch.tensor([PROMPT]), custom_generate=dllm.spec_generate, spec=dict(graphs=True))


# -- the law: what is asked at once settles what the walk would have settled


def drawn(n, seed):
    """A sampled chain of n tokens, its rows near the verifier's, and the verifier's logits."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n + 1, VOCAB, generator=g)
    rows = torch.softmax(logits[:n] + torch.randn(n, VOCAB, generator=g), -1)
    tokens = torch.multinomial(rows, 1, generator=g)[:, 0].tolist() if n else []
    return chain(tokens, rows=Rows(rows)), logits


def test_the_ratio_test_of_a_chain_is_that_of_the_walk():
    accepted = set()
    for seed in range(60):
        proposal, logits = drawn(seed % 5, seed)
        one, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        law = Judge(sample=True, generator=one)
        kept = law.judge(proposal, logits, law.ask(proposal, logits).tolist(), ())
        assert kept == reject(proposal, lambda node, _, z=logits: torch.softmax(z[node + 1], -1), other)
        assert torch.equal(one.get_state(), other.get_state())
        accepted.add((len(proposal), kept.accepted))
    assert accepted >= {(4, 0), (4, 4), (1, 0), (1, 1), (0, 0)}


def test_a_point_tree_at_once_is_that_of_the_walk():
    tree = Proposal((1, 2, 3, 4, 5), (-1, -1, 0, 0, 2))
    depths = Counter()
    for seed in range(80):
        logits = torch.full((6, VOCAB), -9.0)
        logits[:, 1:6] = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
        one, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        law = Judge(sample=True, warp=lambda z: z / 0.7, generator=one)
        kept = law.judge(tree, logits, law.ask(tree, logits).tolist(), ())
        assert kept == walk_sample(tree, lambda node, _, z=logits: torch.softmax(z[node + 1] / 0.7, -1), other)
        assert torch.equal(one.get_state(), other.get_state())
        depths[kept.accepted] += 1
    assert len(depths) >= 3


def test_a_law_that_reads_the_text_and_siblings_are_walked():
    proposal, logits = drawn(3, 0)
    assert not len(Judge(processors=lambda ids, scores: scores).ask(proposal, logits))
    siblings = Proposal(proposal.tokens, (-1, -1, 0), "sampled", proposal.rows)
    assert not len(Judge(sample=True).ask(siblings, logits))
    assert len(Judge(sample=True).ask(proposal, logits)) == 2


def test_golden_pair_is_the_same_by_graphs():
    """The embedded pair: a drafter of this package beside the verifier."""
    verifier, drafter = dllm.load_verifier("tiny-ar"), dllm.load("tiny")
    verifier.double()
    drafter.to(dtype=torch.float64)
    ask = "Tom has 12 apples. He buys 7 more. How many apples does Tom have?"
    for options in (dict(), dict(tree=16), dict(temperature=0.8, seed=1)):
        kw = dict(max_new_tokens=24, length="fixed:k=6", **options)
        expected = speculate(verifier, drafter, ask, **kw)
        with standing_in():
            for _ in range(3):
                out = speculate(verifier, drafter, ask, graphs=True, **kw)
                assert (out.sequences, out.spans) == (expected.sequences, expected.spans)
