"""Chains of several sources: the best of what was retrieved and of what a drafter says, by what each word is worth."""

from __future__ import annotations

import pytest
import torch
from drafting_kit import Noise, Script, plain, tiny_verifier

import dllm
from dllm.drafting.control import CostAware, Length
from dllm.drafting.merge import best_chain
from dllm.drafting.proposal import EMPTY, Proposal, chain
from dllm.drafting.retrieval import SuffixDrafter
from dllm.errors import DllmError

torch.set_num_threads(1)
PROMPT = [5, 9, 33, 10, 12, 34, 7, 31, 19]


class Copied(SuffixDrafter):
    """What the text says, as if it had been there before."""

    def __init__(self, text):
        super().__init__()
        self.said = text

    def draft(self, ids, k, *, generator=None):
        tokens = self.said[len(ids) : len(ids) + k]
        return chain(tokens, [0.9] * len(tokens))


def test_the_best_path_of_a_tree_is_the_one_from_which_most_is_to_be_expected():
    tree = Proposal((1, 2, 3, 4, 5), (-1, -1, 0, 1, 3), conf=(0.6, 0.4, 0.1, 0.9, 0.9))
    chance = tree.survival()
    leaves = {2: (0, 2), 4: (1, 3, 4)}
    best = max(leaves.values(), key=lambda path: sum(chance[i] for i in path))
    found = best_chain(tree)
    assert found.tokens == tuple(tree.tokens[i] for i in best) and found.is_chain and found.conf == (0.4, 0.9, 0.9)
    assert not len(best_chain(EMPTY))


@pytest.mark.parametrize("length", ["cost", "fixed:k=3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_the_verifiers_own(length, temperature):
    model, prompts = tiny_verifier(), [PROMPT * 3, PROMPT[:4]]
    options = dict(max_new_tokens=20, temperature=temperature, seed=3, eos=[])
    for drafter, graft in ((Noise(), "suffix"), ("suffix", "lookup"), (Noise(), ["suffix", "recycle"])):
        outs = dllm.speculate(model, drafter, prompts, graft=graft, length=length, **options)
        if temperature:
            assert all(len(out.emitted) == 20 for out in outs)
        else:
            assert [out.sequences for out in outs] == [plain(model, p, 20) for p in prompts]


def test_a_word_that_proves_true_takes_the_place_of_one_that_does_not():
    model = tiny_verifier()
    text = plain(model, PROMPT, 40)
    options = dict(max_new_tokens=32, length="fixed:k=4", carry="off")
    alone = dllm.speculate(model, Noise(), PROMPT, **options)
    both = dllm.speculate(model, Noise(), PROMPT, graft=Copied(text), **options)
    assert both.sequences == alone.sequences == text[: len(both.sequences)]
    assert alone.tau < 1.3 and both.tau > 4
    judged = [node for r in both.rounds for node in r.observed]
    assert judged and not any(node.own for node in judged if node.accepted and node.slot > 1)


def test_a_draft_that_costs_is_not_asked_for_where_the_offer_promises_more():
    c = CostAware(k_max=3)
    for n in range(1, 5):
        c.verify.add(n, 1.0)
        c.draft.add(n, 0.4)
    c.costs.lost = 1.0  # no probe is due
    assert c.lengths([Length(c, 3)], 1)[0] > 0
    assert c.lengths([Length(c, 3, [0.95, 0.9, 0.85])], 1) == [0]
    assert c.lengths([Length(c, 3, [0.1, 0.01])], 1)[0] > 0


def test_with_cost_the_drafter_rests_while_the_text_repeats_itself():
    model = tiny_verifier()
    text = plain(model, PROMPT, 80)
    copied, script = Copied(text), Script(text, "never", lattice=False)
    out = dllm.speculate(model, script, PROMPT, graft=copied, max_new_tokens=64)
    assert out.sequences == text[: len(out.sequences)] and out.tau > 3
    assert sum(r.k > 0 for r in out.rounds) <= len(out.rounds) / 2 + 2


def test_chains_take_what_costs_no_forward():
    model = tiny_verifier()
    with pytest.raises(
        DllmError, match=r"grafts that cost no forward, which noise is not: make it the drafter, or give"
    ):
        dllm.speculate(model, "suffix", PROMPT, graft=Noise(), max_new_tokens=4)
    with pytest.raises(DllmError, match="there is none"):
        dllm.speculate(model, None, PROMPT, graft="suffix", max_new_tokens=4)
    with pytest.raises(DllmError, match="graft merges points"):
        dllm.speculate(model, Noise(), PROMPT, graft="suffix", search="sample", temperature=1.0, max_new_tokens=4)


def test_a_sampled_chain_of_two_sources_has_the_verifiers_law():
    model, counts = tiny_verifier(), torch.zeros(40, 40)
    text = plain(model, PROMPT[:3], 8)
    rows, calls = 100, 6
    n = rows * calls
    for call in range(calls):
        outs = dllm.speculate(
            model, Script(text, "sometimes"), [PROMPT[:3]] * rows, graft=Copied(text), max_new_tokens=2,
            temperature=1.0, seed=call * rows, eos=[], length="fixed:k=2",
        )  # fmt: skip
        for out in outs:
            counts[tuple(out.emitted)] += 1
    first = torch.softmax(model(torch.tensor([PROMPT[:3]])).logits[0, -1], -1)
    seen = counts.sum(1) / n
    assert (seen - first).abs().max() < 4 * (0.25 / n) ** 0.5
    a = int(first.argmax())
    second = torch.softmax(model(torch.tensor([[*PROMPT[:3], a]])).logits[0, -1], -1)
    assert (counts[a] / counts[a].sum() - second).abs().max() < 4 * (0.25 / float(counts[a].sum())) ** 0.5
