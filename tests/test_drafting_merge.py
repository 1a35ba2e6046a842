"""Drafts of several sources in one tree: the best of the budget by brute force, texts unchanged, what was judged is
learned."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from drafting_kit import VOCAB, Noise, Script, from_columns, plain, tiny_verifier
from test_drafting_law import LATTICE, by_the_loop, pvalue

import dllm
from dllm.drafting import EMPTY, Drafter, Fixed, Proposal, Rows, Store, as_drafter, chain, config
from dllm.drafting.merge import Branches, Slots, merge, pooled
from dllm.drafting.ngram import NgramTable
from dllm.drafting.search import BestFirstTree, Edges
from dllm.drafting.store import BEST, as_store
from dllm.drafting.trust import Trust
from dllm.errors import DllmError

torch.set_num_threads(1)
PROMPT = [3, 17, 5, 9, 22, 4]


def lattice_voice(columns, name="model", eos=frozenset()):
    columns = [[(t, float(torch.tensor(p).log())) for t, p in column.items()] for column in columns]
    return Slots(name, Edges(from_columns(columns), [0], None, 1.0))


# -- pooling


def test_one_source_alone_is_itself_and_so_are_two_that_agree():
    assert pooled([{1: 0.7, 2: 0.2}]) == {1: 0.7, 2: 0.2}
    assert pooled([{1: 0.7, 2: 0.2}, {1: 0.7, 2: 0.2}]) == pytest.approx({1: 0.7, 2: 0.2})


def test_of_several_the_surest_counts():
    assert pooled([{1: 0.6, 2: 0.3}, {1: 0.8}, {4: 0.3}]) == {1: 0.8, 2: 0.3, 4: 0.3}


# -- the tree


def candidates(voices, depth):
    """Every node of the union with its chance to be reached."""
    out, level = {}, [((), 1.0)]
    for _ in range(depth):
        grown = []
        for path, reached in level:
            said = [some for voice in voices if (some := voice.says(path))]
            grown += [((*path, t), reached * p) for t, p in (pooled(said) if said else {}).items()]
        out.update(grown)
        level = grown
    return out


def closed(paths):
    return all(len(path) == 1 or path[:-1] in paths for path in paths)


@pytest.mark.parametrize("budget", [1, 3, 5])
def test_no_tree_of_the_budget_is_better(budget):
    retrieved = Proposal((4, 5, 1, 7), (-1, 0, -1, 2), conf=(0.6, 0.9, 0.3, 0.8))
    voices = [lattice_voice([{1: 0.5, 2: 0.4}, {4: 0.6, 7: 0.3}]), Branches("text", retrieved)]
    reach = candidates(voices, 2)
    best = max(sum(reach[p] for p in some) for some in combinations(reach, budget) if closed(set(some)))
    found = merge(voices, budget, 2).proposal
    assert sum(found.survival()) == pytest.approx(best) and len(found) == budget
    assert found.survival() == sorted(found.survival(), reverse=True)
    assert merge(voices, 50, 2).proposal.head(budget).tokens == found.tokens  # a larger budget holds the smaller
    assert set(merge(voices, 50, 9).proposal.paths[1:]) == set(candidates(voices, 9))


def test_a_lattice_alone_gives_the_tree_of_its_search():
    proxy = NgramTable(VOCAB, 3).fit([[1, 4, 1, 4, 2]])
    lat, ctx = from_columns([[(1, -0.2), (2, -1.8)], [(4, -0.5), (5, -1.2)], [(1, -0.4), (2, -2.0)]]), [4, 1]
    tree = BestFirstTree(6, 0.5)(lat, ctx, proxy=proxy)
    found = merge([Slots("model", Edges(lat, ctx, proxy, 0.5))], 6, 3).proposal
    assert found.paths == tree.paths and found.conf == pytest.approx(tree.conf)


def test_marginals_prune_what_was_retrieved_and_free_places_are_used():
    lattice = [{1: 0.9}, {2: 0.9}]
    text = Branches("text", chain([8, 9], [0.8, 0.8]))
    assert merge([lattice_voice(lattice), text], 2, 2).proposal.paths[1:] == ((1,), (1, 2))
    unsure = lattice_voice([{1: 0.2, 5: 0.1}, {2: 0.1}])
    assert merge([unsure, text], 2, 2).proposal.paths[1:] == ((8,), (8, 9))
    agreed = merge([lattice_voice([{8: 0.3, 1: 0.4}, {9: 0.5}]), text], 9, 2)
    assert agreed.proposal.tokens[:2] == (8, 9) and agreed.origin[(8,)][0] == "model+text"
    assert agreed.origin[(1,)][0] == "model" and agreed.origin[(1, 9)][0] == "model"
    assert merge([Branches("a", EMPTY)], 4, 4).proposal == EMPTY
    ends = merge([lattice_voice(lattice), text], 9, 2, eos=frozenset({1}))
    assert (1,) in ends.origin and (1, 2) not in ends.origin
    with pytest.raises(DllmError, match="only point proposals can be merged"):
        Branches("drawn", Proposal((1,), (-1,), "sampled", Rows(torch.ones(1, 2))))


def test_any_number_of_sources_as_deep_as_each_knows():
    voices = [
        Branches(name, chain([t, t, t, t][:n], [0.5] * n)) for name, t, n in (("a", 1, 1), ("b", 2, 4), ("c", 3, 2))
    ]
    assert sorted(map(len, merge(voices, 20, 4).proposal.paths[1:])) == [1, 1, 1, 2, 2, 3, 4]


# -- what a word is worth


def test_what_was_judged_is_learned_by_who_proposed_it():
    kept = Trust()
    for _ in range(2):
        own = Trust(kept)
        assert own.of("text", 0, 0.5) == pytest.approx(kept.of("text", 0, 0.5), abs=0.1)
        for i in range(40):
            own.learn("text", 0, 0.5, i % 10 == 0)
            own.learn("model+text", 0, 0.5, i % 10 != 0)
        assert own.of("text", 0, 0.5) < 0.2 and own.of("model+text", 0, 0.5) > 0.8
        before = kept.of("text", 0, 0.5)
        kept.add(own)
        assert kept.of("text", 0, 0.5) < before  # only now
    assert Trust(kept).of("other", 0, 0.7) == 0.7


# -- the loop


@pytest.mark.parametrize("graft", ["suffix", ["recycle", "stand"], [Noise(1), "suffix", Noise(2)]])
def test_texts_are_the_verifiers_own(graft):
    model, store = tiny_verifier(), Store()
    text = plain(model, PROMPT, 30)
    for agree in ("sometimes", "never"):
        out = dllm.speculate(
            model, Script(text, agree), PROMPT, tree=8, graft=graft, max_new_tokens=30, length="fixed:k=4", store=store
        )
        assert out.sequences == text and max(r.nodes for r in out.rounds) <= 8
    assert store.trust.kept


def test_rows_of_a_batch_merge_each_by_itself():
    model = tiny_verifier()
    prompts = [PROMPT, PROMPT[:3]]
    options = dict(tree=6, graft=["suffix", "recycle"], max_new_tokens=20, length="fixed:k=4")
    rows = dllm.speculate(model, "stand", prompts, store=Store(), **options)
    alone = [dllm.speculate(model, "stand", prompt, store=Store(), **options) for prompt in prompts]
    assert [row.sequences for row in rows] == [plain(model, prompt, 20) for prompt in prompts]
    assert [row.spans for row in rows] == [one.spans for one in alone]


def test_a_second_source_that_is_right_takes_the_places():
    model = tiny_verifier()
    text = plain(model, PROMPT, 30)
    options = dict(tree=6, max_new_tokens=30, length="fixed:k=4")
    alone = dllm.speculate(model, Noise(), PROMPT, **options)
    both = dllm.speculate(model, Noise(), PROMPT, graft=Script(text, lattice=False), store=Store(), **options)
    assert both.sequences == text and both.tau > 2 * alone.tau


def test_what_is_grafted_is_opened_once_a_call_and_needs_a_drafter(monkeypatch):
    model, opened = tiny_verifier(), []
    monkeypatch.setattr(config, "as_drafter", lambda what: opened.append(what) or as_drafter(what))
    options = dict(tree=6, graft="suffix", max_new_tokens=4)
    dllm.speculate(model, Noise(), [PROMPT, PROMPT[:3]], **options)
    assert opened.count("suffix") == 1
    with pytest.raises(DllmError, match="there is none"):
        dllm.speculate(model, None, PROMPT, **options)


def test_a_tree_that_is_a_chain_keeps_to_its_nodes():
    model = tiny_verifier()
    text = plain(model, PROMPT, 20)
    drafter = Script([*text, *[1] * 20], lattice=False)
    out = dllm.speculate(model, drafter, PROMPT, tree=4, length="failfast:chunk=3", max_new_tokens=20)
    assert out.sequences == text and max(r.nodes for r in out.rounds) == 3


class Banned(Drafter):
    name = "banned"
    banned = frozenset({7})

    def draft(self, ids, k, *, generator=None):
        return from_columns([[(5, -0.1), (7, -3.0)]])


def test_specials_of_the_drafter_may_be_retrieved_but_not_drafted():
    model = tiny_verifier()
    text = plain(model, PROMPT, 6)
    options = dict(tree=1, max_new_tokens=6, length="fixed:k=4")
    assert dllm.speculate(model, Banned(), PROMPT, graft=Script(text), **options).sequences == text
    with pytest.raises(DllmError, match="special id 7"):
        dllm.speculate(model, Banned(), PROMPT, graft="suffix", **{**options, "tree": 8})


def test_what_was_learned_is_kept_in_the_file(tmp_path):
    model, file = tiny_verifier(), tmp_path / "kept"
    options = dict(tree=6, graft=["suffix", "recycle"], max_new_tokens=20, length="fixed:k=4", store=file)
    dllm.speculate(model, Noise(), PROMPT, **options)
    store = Store.load(file)
    assert any(who == "noise" for who in store.trust.kept)
    assert sum(c.tries.sum() for c in store.trust.kept.values()) > 5
    assert store.successors.ranks() == as_store(file).successors.ranks() and len(store.successors.ranks()) == BEST
    store.save(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    assert dllm.speculate(model, "recycle", PROMPT, store=tmp_path / "copy", max_new_tokens=4).n_verify


@pytest.mark.parametrize("name", ["recycle", "stand"])
def test_two_sources_that_saw_the_same_rounds_teach_the_store_once(name):
    model, store = tiny_verifier(), dllm.Store()
    out = dllm.speculate(model, name, PROMPT, graft=name, tree=6, max_new_tokens=40, length="fixed:k=4", store=store)
    judged = sum(r.nodes + 1 for r in out.rounds)
    assert store.successors.tries <= 40 and (name == "stand" or store.successors.tries > 20)
    singles = sum(row.n for gram, row in store.grams.rows.items() if len(gram) == 1)
    assert singles == (judged if name == "stand" else 0)


class Columns(Drafter):
    """Slots of the lattice of the law tests."""

    name = "columns"

    def draft(self, ids, k, *, generator=None):
        return LATTICE.suffix(len(ids) - 1).head(k)


def test_sampling_from_merged_trees_is_exact():
    g, store, texts = torch.Generator().manual_seed(4), Store(), []
    for _ in range(800):
        kw = dict(tree=5, store=store, graft=["recycle", "suffix"])
        texts.append(by_the_loop(BestFirstTree(5), Fixed(3), g, Columns(), **kw))
    assert pvalue(texts) > 1e-3
