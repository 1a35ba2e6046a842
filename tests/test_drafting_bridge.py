"""Drafters whose tokens are parts of the verifier's: the cache of n-grams, and what it makes of a draft."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from drafting_kit import Words, golden, plain
from golden_cases import GOLDEN

import dllm
from dllm.bench import vocabularies
from dllm.drafting.bridge import Bridge
from dllm.drafting.diffusion import DiffusionDrafter, SamplerDrafter
from dllm.drafting.drafters import Need
from dllm.drafting.vocabulary import Vocabulary
from dllm.errors import DllmError

torch.set_num_threads(1)
P = [5, 9, 33, 100, 12, 44, 7, 81, 19]


def bridge(*texts):
    a, b = Words(["a", "b", "c", "x"]), Words(["c", "ab", "a", "ba", "cab", "abc"])
    found = Bridge(a, b, {0: 2, 2: 0})  # a and c are single on both sides
    for text in texts:
        ids = b(text)["input_ids"]
        found.learn(ids, len(ids))
    return found


def test_the_cache_holds_what_a_text_was_made_of():
    found = bridge("abcabaab")  # abc, ab, a, ab
    assert found.grams == {0: {(0, 1): 1, (0, 1, 2): 5}}
    assert bridge("cab").grams == {2: {(2, 0, 1): 4}}
    assert bridge("ac").grams == {}  # single tokens need no n-gram
    found.learn([3], 1)
    assert found.grams[1] == {(1, 0): 3}


SLOTS = [{0: 0.5, 2: 0.3, 1: 0.2}, {1: 0.6, 0: 0.3, 3: 0.1}, {1: 0.7, 0: 0.2, 2: 0.1}]


def test_the_chances_are_those_of_independent_draws_read_by_the_cache():
    """Enumerated: all draws of three slots, each read as the longest n-gram that it begins with, or its first id."""
    found = bridge("ab", "cab", "ba", "abc")
    chances = dict.fromkeys([*range(6), None], 0.0)
    for draw in product(*SLOTS):
        p = SLOTS[0][draw[0]] * SLOTS[1][draw[1]] * SLOTS[2][draw[2]]
        held = {len(g): t for g, t in found.grams.get(draw[0], {}).items() if draw[: len(g)] == g}
        chances[held[max(held)] if held else found.direct.get(draw[0])] += p
    told = {token: p for token, p, _ in found.following(SLOTS, 0)}
    assert told == pytest.approx({t: p for t, p in chances.items() if t is not None and t in told})
    assert set(told) == {t for t, p in chances.items() if t is not None and p}


def test_a_tree_has_the_likeliest_paths_and_a_chain_the_likeliest_steps():
    found, paths = bridge("ab", "cab", "ba"), {}

    def walk(path, chance, at):
        for token, p, end in found.following(SLOTS, at):
            if p > 0 and token != 3:
                paths[(*path, token)] = chance * p
                walk((*path, token), chance * p, end)

    walk((), 1.0, 0)
    tree = found.proposal(SLOTS, 4, frozenset({3}))
    assert sorted(map(paths.get, paths), reverse=True)[:4] == pytest.approx([paths[p] for p in tree.paths[1:]])
    one = found.proposal(SLOTS, 0, frozenset({3}))
    assert one.tokens == (1, 2) and one.conf == pytest.approx((0.3, 0.2))  # ab, then a: b has no token of its own
    assert found.merged([0, 1, 2, 0, 1, 1, 0]) == [1, 4, 3]  # ab, cab, ba


def turned(n=255):
    """The drafter's tokenizer, and a verifier's: the same strings backwards, but that some are two of the drafter's."""
    pieces = [f"<{i}>" for i in range(n)]
    theirs = pieces[::-1]
    return Words(pieces), theirs


@pytest.mark.parametrize("options", [{}, {"tree": 8}, {"temperature": 1.0, "seed": 3}], ids=str)
@pytest.mark.parametrize("make", [DiffusionDrafter, SamplerDrafter])
def test_texts_stay_the_verifiers_own_and_n_grams_are_drafted(make, options, monkeypatch):
    options = {**options, "tree": 0} if make is SamplerDrafter else options  # it drafts chains
    m, verifier = dllm.load(str(GOLDEN / "checkpoints" / "tiny-llada-trained")), golden("tiny-llama-ar-random")
    ours, theirs = turned()
    text = plain(verifier, P, 16)
    for i, token in enumerate(sorted({*text[len(P) :]})[:6]):  # tokens of its answer that the drafter has in two pieces
        theirs[token] = f"<{10 + i}><{40 + i}>"
    drafted, follow = set(), Bridge.following

    def spied(self, slots, at):
        found = follow(self, slots, at)
        drafted.update(end - at for _, _, end in found)
        return found

    monkeypatch.setattr(Bridge, "following", spied)
    m.tokenizer = ours
    monkeypatch.setattr(type(m), "logits", lambda self, hidden: _pieces(hidden, ours))
    drafter = make(m, vocabulary="ngrams", verifier_tokenizer=Words(theirs))
    kw = {"max_new_tokens": 16, "eos": [], **options}
    if make is SamplerDrafter:
        drafter.arguments = {"steps": 2}
    out = dllm.speculate(verifier, drafter, [*P, *text[len(P) :]], length="fixed:k=4", **kw)
    assert out.sequences == dllm.speculate(verifier, None, [*P, *text[len(P) :]], **kw).sequences
    assert out.n_draft > 0 and out.draft_failures == 0 and (2 in drafted or make is SamplerDrafter)


def _pieces(hidden, ours):
    """Logits that like the first pieces at even places and the second ones at odd."""
    logits = torch.zeros(*hidden.shape[:-1], len(ours.pieces))
    logits[..., 0::2, 10:16] = 5.0
    logits[..., 10:16], logits[..., 40:46] = 5.0, 5.0
    return logits


def test_what_cannot_be_is_refused():
    m = dllm.load(str(GOLDEN / "checkpoints" / "tiny-llada-trained"))
    with pytest.raises(DllmError, match="did you mean 'ngrams'"):
        Vocabulary.between(m.tokenizer, m.tokenizer, 255, 255, "ngram")
    with pytest.raises(DllmError, match="both tokenizers"):
        Vocabulary.between(None, None, 255, 255, "ngrams")
    with pytest.raises(DllmError, match="meet in n-grams"):
        Vocabulary.between(*[Words("ab")] * 2, 2, 2, "ngrams").trimmed([1], 2)
    drafter = DiffusionDrafter(m, vocabulary="ngrams")
    drafter.reset(P, Need(255, tokenizer=m.tokenizer))
    assert not drafter.lattices and not drafter.chains_only


def test_the_bench_tells_the_same_texts_in_another_vocabulary(monkeypatch):
    monkeypatch.setattr(vocabularies, "LEARNED", 3)
    monkeypatch.setattr(vocabularies, "NEW", 24)
    base = dllm.load("tiny").tokenizer
    made = vocabularies.Merged(base, 664, [[5, 6, 7, 5, 6, 7, 9]], 2)
    assert made.pairs == {(5, 6): 664, (664, 7): 665} and made.merged([9, 5, 6, 7, 5, 6]) == [9, 665, 664]
    assert made.split([9, 665, 664]) == [9, 5, 6, 7, 5, 6] and made.decode([665]) == base.decode([5, 6, 7])
    rows = list(vocabularies.run(2))
    assert len(rows) == 2 * len(vocabularies.SETTINGS) and all(row.value >= 1 for row in rows)
    with pytest.raises(DllmError, match="a dLLM that drafts"):
        next(vocabularies.run(2, drafter="suffix"))
