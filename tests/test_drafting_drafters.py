"""Drafters on loaded models, vocabularies, other people's pipelines."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drafting_kit import VOCAB, Noise, Script, Words, from_columns, golden, plain, tiny_verifier

import dllm
from dllm.drafting.autoregressive import ARDrafter
from dllm.drafting.config import SpecConfig
from dllm.drafting.diffusion import DiffusionDrafter, SamplerDrafter
from dllm.drafting.drafters import Drafter, Need
from dllm.drafting.hooks.candidates import DraftCandidates, assisted_by
from dllm.drafting.hooks.vllm import DLLMProposer
from dllm.drafting.lattice import DraftFailure, build
from dllm.drafting.proposal import EMPTY, Proposal, Rows, chain
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.drafting.retrieval import Fallback, SuffixDrafter
from dllm.drafting.search import EAL, Sample, SampleTree
from dllm.drafting.verifier import Verifier
from dllm.drafting.vocabulary import Vocabulary
from dllm.errors import DllmError

torch.set_num_threads(1)
P = [5, 9, 33, 100, 12, 44, 7, 81, 19]
MODELS = ["tiny-llada-trained", "tiny-dream-random", "tiny-sdar-random", "tiny-fast-dllm-v2-random"]


@pytest.fixture(scope="module")
def models():
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = dllm.load(f"tests/golden/checkpoints/{name}", mask_id=158 if "fast" in name else None)
        return cache[name]

    return get


def drafts(model, rounds=5, k=6, step=3, **kw):
    """The lattices of a few rounds that accept `step` tokens each, and the text after them."""
    d = DiffusionDrafter(model, vocabulary="ids", **kw)
    d.reset(P, Need(model.vocab_size))
    ids, out = list(P), []
    for _ in range(rounds):
        lat = d.draft(ids, k)
        out.append(lat)
        new = lat.argmax[:step].tolist()
        ids += new
        d.observe(ids, new, ())
    return out, ids


@pytest.mark.parametrize("name", MODELS)
def test_columns_come_from_the_aligned_rows(models, name):
    model, k = models(name), 4
    (lat,), _ = drafts(model, rounds=1, k=k, prefix_cache="none")
    n, block = len(P), model.block_size
    width = n + k if block is None else -(-(n + k) // block) * block
    row = torch.tensor([[*P, *[model.mask_id] * (width - n)]])
    hidden = model.forward(row)[0]
    for i in range(k):
        logits = model.logits(hidden[n + i - model.shift]).clone()
        logits[[t for t in (model.mask_id, model.pad_id, model.bos_id) if t is not None]] = -torch.inf
        assert int(lat.argmax[i]) == int(logits.argmax())
        assert lat.logp[i, 0] == pytest.approx(float(torch.log_softmax(logits, -1).max()), abs=1e-5)


@pytest.mark.parametrize("name", ["tiny-sdar-random", "tiny-fast-dllm-v2-random"])
def test_block_cache_is_exact(models, name):
    cached, ids = drafts(models(name), rounds=12, k=5)
    plain_, same = drafts(models(name), rounds=12, k=5, prefix_cache="none")
    assert ids == same
    for a, b in zip(cached, plain_, strict=True):
        assert torch.allclose(a.logp[:, 0], b.logp[:, 0], atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-llada-trained", "tiny-dream-random"])
def test_approximate_prefix_is_fresh_after_a_refresh(models, name):
    exact, ids = drafts(models(name), rounds=3, prefix_cache="none")
    reused, same = drafts(models(name), rounds=3, prefix_cache="approx", refresh=1)
    assert ids == same
    for a, b in zip(exact, reused, strict=True):
        assert torch.allclose(a.logp[:, 0], b.logp[:, 0], atol=1e-5)
    stale, _ = drafts(models(name), rounds=1, prefix_cache="approx", refresh=8)
    assert torch.allclose(stale[0].logp[:, 0], exact[0].logp[:, 0], atol=1e-5)  # the first draft recomputes everything


def test_separator_and_lookahead_change_the_draft_only(models):
    model, verifier = models("tiny-llada-trained"), golden("tiny-llama-ar-random")
    text = plain(verifier, P, 24)
    base = drafts(model, rounds=1)[0][0]
    for kw in (dict(suffix_token_id=3), dict(lookahead_masks=8), dict(temperature=2.0)):
        assert not torch.allclose(drafts(model, rounds=1, **kw)[0][0].logp[:, 0], base.logp[:, 0], atol=1e-3)
        out = dllm.speculate(verifier, DiffusionDrafter(model, **kw), P, max_new_tokens=24, eos=[], length="fixed:k=6")
        assert out.sequences == text


@pytest.mark.parametrize("cache", ["none", "approx"])
@pytest.mark.parametrize("length", ["failfast:chunk=3,tau=0.01", "fixed:k=6", "cost"])
def test_dllm_drafter_is_lossless(models, cache, length):
    verifier = golden("tiny-qwen3-ar-random")
    drafter = DiffusionDrafter(models("tiny-llada-trained"), prefix_cache=cache)
    out = dllm.speculate(verifier, drafter, P, max_new_tokens=24, eos=[], length=length)
    assert out.sequences == plain(verifier, P, 24)
    assert out.draft_forwards >= out.n_draft > 0


def test_other_drafters_are_lossless(models):
    verifier, model = golden("tiny-llama-ar-random"), models("tiny-llada-trained")
    text = plain(verifier, P, 16)
    kw = dict(max_new_tokens=16, eos=[], length="fixed:k=4")
    refined = dllm.speculate(verifier, SamplerDrafter(model), P, **kw)
    assert refined.sequences == text and refined.draft_forwards > refined.n_draft  # several refinement steps a draft
    assert dllm.speculate(verifier, Fallback(DiffusionDrafter(model), min_match=2), P, **kw).sequences == text
    perfect = dllm.speculate(verifier, ARDrafter(verifier), P, **kw)
    assert perfect.sequences == text and perfect.acceptance_rate == 1
    sampled = [
        dllm.speculate(verifier, d, P, **kw, temperature=1.0, seed=3).tokens for d in (model, verifier, "suffix")
    ]
    again = dllm.speculate(verifier, model, P, **kw, temperature=1.0, seed=3).tokens
    assert sampled[0] == again and all(len(t) == 16 for t in sampled)


def test_a_sliding_window_drafter_rolls_back_beyond_its_window():
    verifier, drafter = tiny_verifier("llama"), tiny_verifier("mistral-swa")  # a window of 7
    prompt = [p % VOCAB for p in P]
    out = dllm.speculate(verifier, drafter, prompt, max_new_tokens=24, length="fixed:k=5")
    assert out.sequences == plain(verifier, prompt, 24) and out.acceptance_rate < 1
    ids = list(prompt)
    for r, span in zip(
        out.rounds, out.spans, strict=True
    ):  # each draft is what the drafter would write without a cache
        k = min(5, len(prompt) + 24 - len(ids) - 1)
        own = plain(drafter, ids, max(k, 1))[len(ids) :]
        text = out.sequences[len(ids) : len(ids) + span[1]]
        assert r.nodes == k
        assert r.accepted == next(
            (i for i, (a, b) in enumerate(zip(own[:k], text, strict=False)) if a != b), min(k, len(text))
        )
        ids += text


def test_retrieval_and_model_mix_in_chunks(models):
    verifier, model = golden("tiny-llama-ar-random"), models("tiny-llada-trained")
    drafter = Fallback(DiffusionDrafter(model), min_match=2)
    out = dllm.speculate(
        verifier, drafter, [*P, *P], max_new_tokens=8, eos=[], length="failfast:chunk=2,tau=0.01", temperature=1.0
    )
    assert len(out.tokens) == 8 and "point" in {r.kind for r in out.rounds}


def test_a_fork_retrieves_by_the_same_settings():
    forked = Fallback(Noise(), SuffixDrafter(min_match=3, min_prob=0.4)).fork()
    assert (forked.retrieval.min_match, forked.retrieval.min_prob) == (3, 0.4)


def test_a_prompt_longer_than_the_drafters_context(models):
    verifier, model = golden("tiny-llama-ar-random"), models("tiny-llada-trained")
    prompt = [(7 * i) % 200 + 10 for i in range(300)]  # the drafter has 256 positions
    for kw in ({}, dict(prefix_cache="approx"), dict(suffix_token_id=3)):
        out = dllm.speculate(
            verifier, DiffusionDrafter(model, **kw), prompt, max_new_tokens=12, eos=[], length="fixed:k=4"
        )
        assert out.sequences == plain(verifier, prompt, 12) and out.n_draft > 0 and out.draft_failures == 0


def test_drafter_options_are_checked(models):
    with pytest.raises(DllmError, match="prefix_cache"):
        DiffusionDrafter(models("tiny-llada-trained"), prefix_cache="exact")
    with pytest.raises(DllmError, match="negative"):
        DiffusionDrafter(models("tiny-llada-trained"), lookahead_masks=-1)
    with pytest.raises(DllmError, match="a drafter is"):
        dllm.speculate(tiny_verifier(), 3.5, P)
    with pytest.raises(DllmError, match="share no vocabulary"):
        dllm.speculate(tiny_verifier(), models("tiny-llada-trained"), [3, 4])
    with pytest.raises(DllmError, match="share no vocabulary"):
        dllm.speculate(tiny_verifier(), golden("tiny-llama-ar-random"), [3, 4])


# -- vocabularies


def test_equal_ids_string_map_and_bridge():
    a, b = Words(["a", "b", "ab", "c"]), Words(["c", "b", "a", "d"])
    assert Vocabulary.between(a, a, 4, 4).kind == "ids"
    mapped = Vocabulary.between(a, b, 4, 4)
    assert mapped.kind == "strings" and mapped.to_verifier.tolist() == [2, 1, -1, 0]
    assert mapped.context([2, 1, 0]) == [0, 1, 3] and mapped.context([2, 1]) == [0, 1]
    logits = mapped.logits(torch.tensor([[1.0, 2.0, 9.0, 3.0]]))
    assert logits.tolist() == [[3.0, 2.0, 1.0, -torch.inf]]
    assert mapped.banned([0, 2, None]) == {2}
    text = Vocabulary.between(a, b, 4, 4, "text")
    assert text.bridge([0, 2], [2, 3], 8) == [2, 1, 0]  # "ab" + "c" behind "ca"
    assert text.bridge([0, 2], [2, 3], 2) == [2, 1]
    joined = Words(["a", "b", "ab", "c"])
    assert Vocabulary("text", 4, None, a, joined).bridge([3, 0], [1], 8) == []  # "ca" + "b" re-encodes to c, ab


def test_vocabularies_that_cannot_work():
    with pytest.raises(DllmError, match="share no vocabulary"):
        Vocabulary.between(None, None, 100, 1000)
    with pytest.raises(DllmError, match="share no vocabulary"):
        Vocabulary.between(Words("ab"), Words("cd"), 2, 2, "strings")
    with pytest.raises(DllmError, match="both tokenizers"):
        Vocabulary.between(None, Words("cd"), 2, 2, "text")
    assert Vocabulary.between(Words("ab"), Words("cd"), 2, 2).kind == "text"


def test_padding_rows_of_an_embedding_do_not_matter():
    same = Vocabulary.between(None, None, 255, 256)
    assert same.logits(torch.zeros(2, 255)).shape == (2, 256) and same.logits(torch.zeros(2, 255))[0, 255] == -torch.inf
    assert Vocabulary.between(None, None, 256, 255).logits(torch.zeros(2, 256)).shape == (2, 255)


@pytest.mark.parametrize("name", ["tiny-llada-trained", "tiny-dream-random", "tiny-sdar-random"])
def test_ids_that_the_drafter_lacks_are_not_read(models, name):
    model = models(name)
    size = model.vocab_size
    drafters = [DiffusionDrafter(model, vocabulary="ids") for _ in range(2)]
    drafts = []
    for drafter, ids in zip(drafters, ([*P, size + 3, 9], [*P, 9]), strict=True):
        drafter.reset(ids, Need(size + 5))
        drafts.append(drafter.draft(ids, 4))
    assert torch.equal(drafts[0].tokens, drafts[1].tokens) and drafts[0].start == drafts[1].start + 1
    assert len(drafters[0].draft([size, size + 1], 4)) == 0  # nothing to go by


@pytest.mark.parametrize("kind", ["strings", "text"])
def test_a_drafter_with_another_tokenizer_is_lossless(models, kind):
    model, verifier = models("tiny-llada-trained"), golden("tiny-llama-ar-random")
    pieces = [f"<{i}>" for i in range(255)]
    turned = Words(pieces[::-1])
    old = model.tokenizer
    try:
        model.tokenizer = Words(pieces)
        drafter = DiffusionDrafter(model, vocabulary=kind, verifier_tokenizer=turned)
        out = dllm.speculate(verifier, drafter, P, max_new_tokens=12, eos=[], length="fixed:k=4")
    finally:
        model.tokenizer = old
    assert out.sequences == plain(verifier, P, 12) and out.n_draft > 0 and out.draft_failures == 0


def test_one_drafter_serves_two_verifiers(models):
    """The vocabulary is that of the verifier at hand, also for samplers, and the model is not kept alive."""
    model, verifier = models("tiny-llada-trained"), golden("tiny-llama-ar-random")
    pieces = [f"<{i}>" for i in range(255)]
    kw = dict(max_new_tokens=8, eos=[], length="fixed:k=4")
    text = plain(verifier, P, 8)
    old = model.tokenizer
    try:
        model.tokenizer = Words(pieces)
        for drafter in (DiffusionDrafter(model), SamplerDrafter(model)):
            for tokenizer, kind in ((Words(pieces), "ids"), (Words(pieces[::-1]), "strings")):
                assert dllm.speculate(verifier, drafter, P, tokenizer=tokenizer, **kw).sequences == text
                drafter.reset(P, Need(as_verifier(verifier).vocab, tokenizer=tokenizer))
                assert drafter.vocabulary.kind == kind
    finally:
        model.tokenizer = old
    verifier = weakref.ref(load := dllm.load("tests/golden/checkpoints/tiny-llada-trained"))
    as_drafter(load)
    del load
    gc.collect()
    assert verifier() is None


def test_a_bridged_draft_ends_with_the_drafters_text():
    a, b = Words(["<eos>", "a", "b"]), Words(["b", "a", "<eos>"])
    model = SimpleNamespace(mask_id=9, tokenizer=a, eos_ids=(0,))
    drafter = DiffusionDrafter(model, vocabulary="text")
    drafter.vocabulary = Vocabulary("text", 3, None, a, b)
    table = torch.tensor([[0.9, 1], [0.9, 2], [0.9, 0], [0.9, 1]])  # a b <eos> a
    assert drafter._bridged([1], table).tokens == (1, 0)
    with pytest.raises(DraftFailure):
        drafter._bridged([1], table * float("nan"))


# -- transformers' assisted generation


@pytest.mark.parametrize("agree", ["always", "sometimes", "never"])
def test_candidate_generator_equals_generate(agree):
    model = tiny_verifier()
    text = plain(model, prompt := [p % VOCAB for p in P], 20)
    with assisted_by(model, Script(text, agree)) as made:
        out = plain(model, prompt, 20)
    assert out == text and made.drafter.forwards > 0
    assert plain(model, prompt, 20) == text and model.generation_config.prompt_lookup_num_tokens is None
    assert "_get_candidate_generator" not in vars(model)


def test_candidates_return_no_logits_and_respect_limits():
    model = tiny_verifier()
    made = DraftCandidates(Noise(), Verifier(model), SpecConfig(length="fixed:k=6"), max_length=8)
    ids, logits = made.get_candidates(torch.tensor([[1, 2, 3, 4]]))
    assert logits is None and ids.shape == (1, 7)
    made.update_candidate_strategy(ids, torch.zeros(1, 4, VOCAB), 1)
    assert made.get_candidates(torch.tensor([[1, 2, 3, 4, 9, 9, 9]]))[0].shape == (1, 7)
    with pytest.raises(DllmError, match="batch size 1"):
        made.get_candidates(torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(DllmError, match="chains"):
        DraftCandidates(Noise(), Verifier(model), SpecConfig(tree=4))
    with pytest.raises(DllmError, match="chains"):
        DraftCandidates(Noise(), Verifier(model), SpecConfig(search="tree"))


# -- vLLM


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """As vLLM's: keys that it does not know are refused, to be read as well."""

    method: str
    model: str
    num_speculative_tokens: int


def vllm_config(k=4, **options):
    """What vLLM hands over: `speculative_config` has no room for keys of ours."""
    return SimpleNamespace(
        speculative_config=SpeculativeConfig("custom_class", "dllm.drafting.hooks.vllm.DLLMProposer", k),
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB, max_model_len=20),
        additional_config={"dllm": options} if options else {},
    )


def test_vllm_proposer():
    table = np.zeros((3, 20), dtype=np.int32)
    table[0, :7] = [1, 2, 3, 4, 1, 2, 3]
    table[1, :19] = 5
    proposer = DLLMProposer(vllm_config(drafter="suffix"))
    out = proposer.propose([[3], [5], []], np.array([7, 19, 0]), table)
    assert out == [[4, 1, 2, 3], [], []]  # the second has no room, the third sampled nothing
    lattice = DLLMProposer(vllm_config(), drafter=Noise())
    drafted = lattice.propose([[3]], np.array([7]), table)[0]
    assert 1 <= len(drafted) <= 4 and all(0 <= t < VOCAB for t in drafted)
    with pytest.raises(DllmError, match="num_speculative_tokens"):
        DLLMProposer(vllm_config(0))


def test_what_a_drafter_knows_of_a_request_follows_it_from_slot_to_slot_in_vllm():
    class Counting(Drafter):
        resets, told = 0, []

        def reset(self, ids, need):
            super().reset(ids, need)
            Counting.resets += 1
            self.ids = list(ids)

        def observe(self, ids, emitted, successors):
            Counting.told.append((self.ids, emitted))
            self.ids = list(ids)

        def draft(self, ids, k, *, generator=None):
            assert self.ids == list(ids)
            return chain([len(ids)])

    proposer, table = DLLMProposer(vllm_config(), drafter=Counting()), np.zeros((2, 20), dtype=np.int32)
    table[0, :3], table[1, :3] = [1, 2, 3], [1, 2, 4]
    assert proposer.propose([[3], [4]], np.array([3, 3]), table) == [[3], [3]] and Counting.resets == 2
    table[[0, 1]] = table[[1, 0]]  # they change places
    table[0, 3:5], table[1, 3] = [7, 8], 9
    assert proposer.propose([[7, 8], [9]], np.array([5, 4]), table) == [[5], [4]] and Counting.resets == 2
    assert Counting.told == [([1, 2, 4], [7, 8]), ([1, 2, 3], [9])]
    table[1, :3] = [2, 2, 2]  # another request in the slot
    proposer.propose([[], [9]], np.array([5, 4]), table)
    assert Counting.resets == 3


def test_requests_of_a_step_are_drafted_in_one_forward_in_vllm(monkeypatch):
    model, shapes = dllm.load("tests/golden/checkpoints/tiny-llada-trained", dtype="float64"), []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, ids, *a, **kw: (shapes.append(len(ids)), forward(self, ids, *a, **kw))[1]
    )
    config = vllm_config(3)
    config.model_config.get_vocab_size = lambda: model.vocab_size
    table = np.array([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]], dtype=np.int32)

    def drafts(rows, lengths):
        proposer = DLLMProposer(config, drafter=DiffusionDrafter(model, vocabulary="ids"))
        return proposer.propose([[1]] * len(rows), np.array(lengths), rows)

    both = drafts(table, [5, 3])
    assert shapes == [2] and both == [*drafts(table[:1], [5]), *drafts(table[1:], [3])] and all(map(len, both))


def test_no_keys_of_a_request_stay_in_vllm(models):
    config, drafter = vllm_config(3), DiffusionDrafter(models("tiny-sdar-random"), vocabulary="ids")
    config.model_config.get_vocab_size = lambda: drafter.model.vocab_size
    proposer = DLLMProposer(config, drafter)
    for first in (5, 6, 7):
        assert proposer.propose([[1]], np.array([3]), np.array([[first, 8, 9]], dtype=np.int32))[0]
    assert len(proposer.texts) == 3 and all(text.drafter.held.store is None for text in proposer.texts)


def test_vllm_options_come_from_additional_config_or_the_environment(monkeypatch):
    table = np.array([[1, 2, 3, 4, 1, 2, 3]], dtype=np.int32)
    monkeypatch.setenv("DLLM_DRAFTER", "lookup:max_ngram=2")
    proposer = DLLMProposer(vllm_config())
    proposer.load_model()
    assert proposer.drafter.name == "lookup" and proposer.propose([[3]], np.array([7]), table) == [[4, 1, 2, 3]]
    proposer = DLLMProposer(vllm_config(drafter="suffix:min_match=9"))
    assert proposer.propose([[3]], np.array([7]), table) == [[]] and proposer.drafter.name == "suffix"
    for options, says in (
        (dict(drafer="suffix"), "did you mean 'drafter'"),
        (dict(search="tree"), "chains"),
        (dict(search="viterby"), "did you mean 'viterbi'"),
        (dict(drafter="recycle"), "does not show"),
        (dict(drafter="sufix"), "did you mean 'suffix'"),
    ):
        with pytest.raises(DllmError, match=says):
            DLLMProposer(vllm_config(**options)).load_model()


def test_an_error_of_the_drafter_is_a_missing_draft_in_vllm(caplog):
    class Broken(Drafter):
        def draft(self, ids, k, *, generator=None):
            raise ZeroDivisionError("no luck")

    table, proposer = np.array([[1, 2, 3]], dtype=np.int32), DLLMProposer(vllm_config(), drafter=Broken())
    with caplog.at_level("WARNING"):
        assert [proposer.propose([[3]], np.array([3]), table) for _ in range(3)] == [[[]]] * 3
    assert len(caplog.records) == 1 and "no luck" in caplog.text
    for wrong in (None, [1, 2]):
        given = DLLMProposer(vllm_config(), drafter=Returns(wrong))
        assert given.propose([[3]], np.array([3]), table) == [[]]


# -- what comes back from a drafter is checked


class Returns(Drafter):
    """Drafts whatever it was given, or the result of calling it with k."""

    name = "mine"

    def __init__(self, what):
        self.what = what

    def draft(self, ids, k, *, generator=None):
        return self.what(k) if callable(self.what) else self.what


def raises(error):
    def draft(k):
        raise error

    return draft


def sampled(prob, tokens=(1,)):
    return lambda k: Proposal(tokens, tuple(range(-1, len(tokens) - 1)), "sampled", Rows(torch.tensor(prob)))


FLAT = [1 / VOCAB] * VOCAB
BAD_DRAFTS = {
    "None": (None, "returned NoneType"),
    "a list": ([1, 2], "returned list"),
    "a class": (lambda k: Proposal, "returned type"),
    "raises": (raises(KeyError("x")), "failed with KeyError"),
    "raises without a word": (raises(RuntimeError()), "failed with RuntimeError: RuntimeError"),
    "NaN confidence": (lambda k: chain([1], [float("nan")]), "confidences"),
    "a confidence above one": (lambda k: chain([1, 2], [0.5, 7.0]), "confidences"),
    "no whole token": (lambda k: chain([1.5]), "whole numbers"),
    "tokens of text": (lambda k: chain(["a"]), "whole numbers"),
    "outside the vocabulary": (lambda k: chain([VOCAB]), "outside the verifier's vocabulary"),
    "rows that sum to two": (sampled([[2 * p for p in FLAT]]), "sum to one"),
    "logits for rows": (sampled([[0.0] * VOCAB]), "sum to one"),
    "NaN rows": (sampled([[float("nan")] * VOCAB]), "sum to one"),
    "a row without its token": (sampled([[1.0, *[0.0] * (VOCAB - 1)]]), "no probability"),
    "a NaN lattice": (lambda k: from_columns([[(1, float("nan"))]]), "log-probabilities"),
    "logits for a lattice": (lambda k: from_columns([[(1, 3.0), (2, 2.0)]]), "log-probabilities"),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", BAD_DRAFTS)
def test_a_wrong_draft_is_one_clear_line(name, temperature):
    what, says = BAD_DRAFTS[name]
    with pytest.raises(DllmError, match=says) as caught:
        dllm.speculate(tiny_verifier(), Returns(what), [3, 4, 5], max_new_tokens=4, temperature=temperature, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["fork", "reset", "observe"])
def test_errors_of_the_other_methods_name_the_drafter(method):
    drafter = Returns(EMPTY)
    made = type("Broken", (Returns,), {method: lambda self, *a: {}["x"]})(EMPTY)
    assert len(dllm.speculate(tiny_verifier(), drafter, [3, 4], max_new_tokens=2).tokens) == 2
    with pytest.raises(DllmError, match="'mine' failed with KeyError"):
        dllm.speculate(tiny_verifier(), made, [3, 4], max_new_tokens=2)


def test_tensors_and_numpy_make_proposals_as_lists_do():
    model = tiny_verifier()
    for make in (list, tuple, np.array, torch.tensor):
        drafter = Returns(lambda k, make=make: Proposal(make([1, 2]), make([-1, 0]), conf=make([0.5, 0.25])))
        out = dllm.speculate(model, drafter, [3, 4, 5], max_new_tokens=6, length="fixed:k=2")
        assert out.sequences == plain(model, [3, 4, 5], 6)


def test_unnormalised_rows_of_a_lattice_are_drawn_from_as_they_are_handed_over():
    lat = replace(build(torch.randn(1, VOCAB), 3, with_rows=True), rows=torch.zeros(1, VOCAB))  # ones, not 1 / V
    assert Sample()(lat, []).rows.prob.sum() == pytest.approx(1)


# -- trees and grafts


def test_specials_of_the_drafter_are_banned_from_its_own_drafts_only(models):
    """The separator of the dLLM stands in the prompt: retrieval says it again, and the verifier decides."""
    model, verifier = models("tiny-llada-trained"), golden("tiny-llama-ar-random")
    prompt = [*P, 3, 50, *P, 3, 51, *P]
    kw = dict(max_new_tokens=16, eos=[], length="fixed:k=4", tree=16)
    text = plain(verifier, prompt, 16)
    out = dllm.speculate(verifier, DiffusionDrafter(model, suffix_token_id=3), prompt, graft="suffix", **kw)
    assert out.sequences == text
    drafted = Returns(chain([3, 5]))
    drafted.banned = frozenset([3])
    with pytest.raises(DllmError, match="its special id 3"):
        dllm.speculate(verifier, drafted, prompt, graft="suffix", **kw)
    assert dllm.speculate(verifier, Noise(vocab=255), prompt, graft=Returns(chain([3, 5])), **kw).sequences == text


def test_a_dllm_as_graft_drafts_and_is_counted(models):
    model, verifier = models("tiny-llada-trained"), golden("tiny-llama-ar-random")
    kw = dict(max_new_tokens=16, eos=[], length="fixed:k=4", tree=16)
    text = plain(verifier, P, 16)
    alone = dllm.speculate(verifier, Returns(EMPTY), P, **kw)
    assert alone.draft_forwards == 0 and sum(r.nodes for r in alone.rounds) == 0
    grafted = dllm.speculate(verifier, Returns(EMPTY), P, graft=model, **kw)
    assert grafted.sequences == text and sum(r.nodes for r in grafted.rounds) > 0
    assert grafted.draft_forwards == sum(r.k > 0 or r.nodes > 0 for r in grafted.rounds)
    both = dllm.speculate(verifier, model, P, graft=SamplerDrafter(model), **kw)
    assert both.sequences == text and both.draft_forwards > 2 * both.n_draft  # several steps a graft
    perfect = dllm.speculate(verifier, Returns(EMPTY), P, graft=Script([*text, *[9] * 40]), **kw)
    assert perfect.sequences == text and perfect.n_verify < 16 / 3
    failing = dllm.speculate(verifier, model, P, graft=Returns(raises(DraftFailure("NaN"))), carry="off", **kw)
    assert failing.sequences == text and failing.draft_failures == failing.n_draft


def test_a_tree_is_honoured_or_refused(models):
    model, verifier = models("tiny-llada-trained"), golden("tiny-llama-ar-random")
    kw = dict(max_new_tokens=8, eos=[], length="fixed:k=4")
    text = plain(verifier, P, 8)
    bridged = DiffusionDrafter(model, vocabulary="text", verifier_tokenizer=model.tokenizer)
    for drafter in (verifier, SamplerDrafter(model), bridged, Fallback(SamplerDrafter(model))):
        assert dllm.speculate(verifier, drafter, P, **kw).sequences == text
        assert dllm.speculate(verifier, drafter, P, tree=8, graft="suffix", **kw).sequences == text
        for tree in (dict(tree=8), dict(search="tree")):
            with pytest.raises(DllmError, match="drafts chains here"):
                dllm.speculate(verifier, drafter, P, **tree, **kw)
    with pytest.raises(DllmError, match="merges points"):
        dllm.speculate(verifier, model, P, tree=8, graft="suffix", search="sample_tree", temperature=1.0, **kw)
    assert SpecConfig(tree=7, search="sample_tree:width=2").build_search(True) == SampleTree(2, 3)


@pytest.mark.parametrize("name", ["suffix:min_match=1", "lookup"])
def test_retrieved_trees_hold_what_followed_every_match(name):
    text = [7, 1, 2, 3, 9, 4, 2, 3, 8, 5, 3, 6, 0, 1, 2, 3]
    drafter = as_drafter(name).fork()
    drafter.reset(text, Need(VOCAB, tree=6))
    tree = drafter.draft(text, 2)
    paths = {}
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths[len(paths)] = (*paths.get(parent, ()), token)
    assert set(paths.values()) == {(9,), (9, 4), (8,), (8, 5), (6,), (6, 0)}  # behind 1 2 3, behind 2 3, behind 3
    assert paths[0] == (9,) and list(tree.survival()) == sorted(tree.survival(), reverse=True)
    drafter.reset(text, Need(VOCAB))
    assert drafter.draft(text, 2).tokens == (9, 4)


# -- measurements belong to a drafter, as long as it lives


def test_controllers_are_kept_while_their_drafter_lives():
    model = tiny_verifier()
    kept, controllers = Noise(), as_verifier(model).controllers
    for _ in range(3):
        dllm.speculate(model, Noise(), [3, 4], max_new_tokens=3)
        dllm.speculate(model, kept, [3, 4], max_new_tokens=3)
        dllm.speculate(model, "suffix", [3, 4], max_new_tokens=3)
        dllm.speculate(model, {"name": "suffix"}, [3, 4], max_new_tokens=3)
        dllm.speculate(model, "suffix:min_match=4", [3, 4], max_new_tokens=3)
        dllm.speculate(model, model, [3, 4], max_new_tokens=3)
    gc.collect()
    assert len(controllers) == 4  # kept, two settings of suffix, the causal LM
    del kept
    gc.collect()
    assert len(controllers) == 3


def test_controllers_are_kept_while_all_lives_that_drafts_are_made_of():
    """A number that stood for a graft that is gone never stands for another one."""
    model = tiny_verifier()
    controllers, options = as_verifier(model).controllers, dict(max_new_tokens=3, tree=4)
    for _ in range(3):
        dllm.speculate(model, "suffix", [3, 4], graft=Noise(), **options)
    gc.collect()
    assert not controllers
    kept = Noise()
    for _ in range(2):
        dllm.speculate(model, "suffix", [3, 4], graft=["recycle", kept], **options)
        dllm.speculate(model, "suffix", [3, 4], graft=[{"name": "recycle"}], search=EAL(0.5), max_new_tokens=3, tree=4)
    gc.collect()
    assert len(controllers) == 2  # a search of equal value is the same
    del kept
    gc.collect()
    assert len(controllers) == 1
