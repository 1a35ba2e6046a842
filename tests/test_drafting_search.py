"""Lattice, searches, proxy, retrieval: hand examples of the papers, and brute force."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from drafting_kit import from_columns
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.drafting.config import SpecConfig
from dllm.drafting.drafters import Need
from dllm.drafting.lattice import DraftFailure, build
from dllm.drafting.ngram import NgramTable
from dllm.drafting.proposal import Proposal, Rows, chain
from dllm.drafting.retrieval import SuffixAutomaton
from dllm.drafting.search import (
    EAL,
    SEARCHES,
    Argmax,
    BestFirstTree,
    CPSBeam,
    CPSSample,
    Edges,
    Sample,
    SampleTree,
    Viterbi,
    union,
)
from dllm.errors import DllmError

A, B, X, Y, DOT, BANG, EOS = range(7)
LN = math.log
COLUMNS = [[(A, LN(0.6)), (B, LN(0.4))], [(X, LN(0.55)), (Y, LN(0.45))], [(DOT, LN(0.9)), (BANG, LN(0.1))]]


class Bigram:
    """A proxy written out as a table; every context counts as known."""

    order = 2

    def __init__(self, table, default=0.5):
        self.table, self.default = table, default

    def state(self, ids):
        return ids[-1] if len(ids) else None

    def step(self, state, token):
        return token

    def trust(self, state):
        return 1.0

    def logp(self, state, tokens):
        return [LN(self.table.get((state, t), self.default)) for t in tokens]

    def update(self, ids):
        pass


HAND = Bigram({(A, X): 0.1, (A, Y): 0.9, (B, X): 0.8, (B, Y): 0.2})


# -- lattice


@pytest.mark.parametrize("rows", [True, False])
def test_trees_of_siblings_at_several_slots(rows):
    """Siblings are different tokens and share their row; a row of fewer tokens than children has them all."""
    probs = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.6, 0.4, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    lat = build(probs.log(), 0, tau_mass=1.0, with_rows=rows)
    g = torch.Generator().manual_seed(3)
    seen = set()
    for _ in range(40):
        tree = SampleTree(2, 3, "3-2")(lat, (), generator=g)
        assert len(tree) == 2 + 2 * 2 + 4 * 2 and tree.rows is not None
        for children in tree.children.values():
            slot = tree.depths[children[0]] - 1
            assert len({tree.tokens[c] for c in children}) == len(children) == (2, 2, 2)[slot]
            assert [tree.conf[c] for c in children] == [pytest.approx(lat.confidence[slot] / r) for r in (1, 2)]
            for c in children:
                assert torch.allclose(tree.rows.dense(c, 4), probs[slot].double(), atol=1e-6)
        survival = tree.survival()
        assert survival == sorted(survival, reverse=True)
        seen.add(tree.tokens)
    assert len(seen) > 20


def test_pruning_by_hand():
    p = torch.tensor([[0.50, 0.25, 0.15, 0.06, 0.04]])
    lat = build(p.log(), 7, tau_mass=0.8, keep=[3])
    assert [t for t, _ in lat.columns[0]] == [0, 1, 2, 3] and lat.columns[0][3][1] == pytest.approx(LN(0.06))
    assert lat.start == 7
    assert float(1 - build(p.log(), 7, tau_mass=0.8).logp[0].exp().sum()) == pytest.approx(0.10, abs=1e-6)
    assert [t for t, _ in build(p.log(), 0, m_max=2, keep=[3]).columns[0]] == [0, 1, 3]


def test_a_nucleus_ends_where_it_holds_its_mass_exactly():
    """The smallest set with the mass: a token more would be one more than is asked for."""
    logits = torch.tensor([[0.0, 0.0, -1.0, -2.0]])
    p = build(logits, 0, tau_mass=1.0).logp[0].exp()
    for n in (1, 2):
        bar = float(p[:n].cumsum(0)[-1])
        assert len(build(logits, 0, tau_mass=bar).columns[0]) == n
        assert len(build(logits, 0, tau_mass=bar + 1e-4).columns[0]) == n + 1


def test_equal_tokens_of_a_tree_go_lowest_id_first():
    lat = from_columns([[(5, LN(0.5)), (2, LN(0.5))], [(4, LN(0.3)), (1, LN(0.3)), (3, LN(0.4))]])
    assert BestFirstTree(1)(lat, ()).tokens == (2,) and BestFirstTree(2)(lat, ()).tokens == (2, 5)
    tree = BestFirstTree(8)(lat, ())
    for parent in (0, 1):
        assert [tree.tokens[c] for c in tree.children[parent]] == [3, 1, 4]
    narrow = BestFirstTree(9, fanout=2)(lat, ())
    assert [narrow.tokens[c] for c in narrow.children[0]] == [3, 1]


def test_bans_come_before_the_softmax_and_an_empty_column_ends_the_draft():
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 9.0], [1.0, 1.0, 1.0]])
    banned = torch.tensor([False, False, True])
    need = Need(3, tau_mass=1.0)
    lat = need.lattice(logits, 0, banned)
    assert lat.k == 3 and all(t != 2 for c in lat.columns for t, _ in c)
    assert sum(math.exp(lp) for _, lp in lat.columns[0]) == pytest.approx(1)
    empty = torch.tensor([[1.0, 1.0, 1.0], [float("-inf"), float("-inf"), 3.0], [1.0, 1.0, 1.0]])
    assert need.lattice(empty, 0, banned).k == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_a_draft_failure(bad):
    with pytest.raises(DraftFailure):
        build(torch.tensor([[0.0, bad], [1.0, 1.0]]), 0)


def test_suffix_and_rows():
    lat = build(torch.randn(5, 9), 10, with_rows=True)
    rest = lat.suffix(2)
    assert rest.k == 3 and rest.start == 12 and rest.columns == lat.columns[2:] and torch.equal(rest.rows, lat.rows[2:])
    assert lat.first_eos([int(lat.argmax[3])]) <= 3


# -- searches by hand


def score(columns, tokens, proxy, lam):
    edges, total, state = Edges(from_columns(columns), (), proxy, lam), 0.0, None
    state = edges.root
    for i, token in enumerate(tokens):
        w, state = next((w, s) for t, w, s in edges.out(i, state) if t == token)
        total += w
    return total


def test_cps_by_hand():
    lat = from_columns(COLUMNS)
    expected = {(A, X): -2.4515, (A, Y): -1.4532, (B, X): -1.6145, (B, Y): -2.4079}
    for path, value in expected.items():
        assert score(COLUMNS, (*path, DOT), HAND, 0.5) == pytest.approx(value, abs=1e-4)
        assert score(COLUMNS, (*path, BANG), HAND, 0.5) == pytest.approx(value - 1.0986, abs=1e-4)
    assert CPSBeam()(lat, (), proxy=HAND).tokens == Viterbi()(lat, (), proxy=HAND).tokens == (A, Y, DOT)
    assert Argmax()(lat, ()).tokens == (A, X, DOT)


def test_the_beam_can_fail_and_viterbi_cannot():
    lat = from_columns(COLUMNS[:2])
    proxy = Bigram({(A, X): 0.05, (A, Y): 0.05, (B, X): 0.9, (B, Y): 0.2})
    assert CPSBeam(beam=1)(lat, (), proxy=proxy).tokens == (A, X)
    assert CPSBeam(beam=2)(lat, (), proxy=proxy).tokens == Viterbi()(lat, (), proxy=proxy).tokens == (B, X)
    assert score(COLUMNS[:2], (A, X), proxy, 0.5) == pytest.approx(-2.3988, abs=1e-4)
    assert score(COLUMNS[:2], (B, X), proxy, 0.5) == pytest.approx(-1.1563, abs=1e-4)


def test_sum_of_logs_ends_early_and_eal_does_not():
    columns = [[(A, LN(0.9)), (EOS, LN(0.1))], [(B, LN(0.3)), (EOS, LN(0.05))], [(X, LN(0.3)), (EOS, LN(0.05))]]
    lat, eos = from_columns(columns), frozenset([EOS])
    for search in (CPSBeam(lam=1.0), Viterbi(lam=1.0)):
        assert search(lat, (), eos=eos).tokens == (EOS,)
    path, value = EAL().solve(Edges(lat, (), None, 1.0), eos)
    assert path.tokens == (A, B, X) and value == pytest.approx(1.251)


def test_eal_ends_where_every_path_has_ended():
    columns = [[(A, LN(0.9)), (B, LN(0.1))], [(EOS, 0.0)], [(X, LN(0.5)), (Y, LN(0.5))]]
    path, value = EAL().solve(Edges(from_columns(columns), (), None, 1.0), frozenset([EOS]))
    assert path.tokens == (A, EOS) and path.conf == pytest.approx((0.9, 1.0)) and value == pytest.approx(1.8)


def test_eal_by_hand():
    path, value = EAL().solve(Edges(from_columns(COLUMNS), (), HAND, 0.5))
    assert path.tokens == (A, Y, DOT) and value == pytest.approx(1.1301, abs=1e-4)


# -- against brute force

problem = st.integers(0, 10**6)


def random_problem(seed, k=4, m=3, vocab=6):
    r = random.Random(seed)
    columns = []
    for _ in range(k):
        p = [r.random() + 0.05 for _ in range(m)]
        columns.append([(t, LN(x / sum(p))) for t, x in zip(r.sample(range(vocab), m), p, strict=True)])
    table = NgramTable(vocab, order=r.choice([2, 3, 4]), kappa=r.choice([0.5, 4.0]))
    table.update([r.randrange(vocab) for _ in range(30)])
    eos = frozenset(r.sample(range(vocab), r.choice([0, 1])))
    ctx = [r.randrange(vocab) for _ in range(3)]
    return from_columns(columns), table, eos, ctx


def paths(lat, ctx, proxy, lam, eos):
    """Every complete path with its step weights."""
    edges = Edges(lat, ctx, proxy, lam)

    def grow(i, state, tokens, weights):
        if i == lat.k or (tokens and tokens[-1] in eos):
            yield tuple(tokens), list(weights)
            return
        for t, w, s in edges.out(i, state):
            yield from grow(i + 1, s, [*tokens, t], [*weights, w])

    return list(grow(0, edges.root, [], []))


def accepted_length(weights):
    return sum(math.exp(sum(weights[: i + 1])) for i in range(len(weights)))


@settings(max_examples=60)
@given(problem)
def test_viterbi_and_eal_equal_brute_force_and_the_beam_is_below(seed):
    lat, proxy, eos, ctx = random_problem(seed)
    every = paths(lat, ctx, proxy, 0.5, eos)
    weights = dict(every)
    best = max(sum(w) for _, w in every)
    v = Viterbi()(lat, ctx, eos=eos, proxy=proxy)
    assert sum(weights[v.tokens]) == pytest.approx(best)
    for beam in (1, 2, 3):
        found = sum(weights[CPSBeam(beam=beam)(lat, ctx, eos=eos, proxy=proxy).tokens])
        assert found <= best + 1e-9
    wide = CPSBeam(beam=3**4)(lat, ctx, eos=eos, proxy=proxy)
    assert sum(weights[wide.tokens]) == pytest.approx(best)
    path, value = EAL().solve(Edges(lat, ctx, proxy, 0.5), eos)
    assert value == pytest.approx(max(accepted_length(w) for _, w in every))
    assert accepted_length(weights[path.tokens]) == pytest.approx(value)


@settings(max_examples=40)
@given(problem)
def test_longer_lattices_never_lower_the_expected_length(seed):
    lat, proxy, eos, ctx = random_problem(seed)
    values = [EAL().solve(Edges(lat.head(n), ctx, proxy, 0.5), eos)[1] for n in range(1, lat.k + 1)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))


@settings(max_examples=40)
@given(problem, st.integers(1, 14))
def test_tree_is_the_most_probable_prefix_set(seed, budget):
    lat, proxy, eos, ctx = random_problem(seed, k=3)
    every = {}
    for tokens, weights in paths(lat, ctx, proxy, 0.5, eos):
        for n in range(1, len(tokens) + 1):
            every[tokens[:n]] = math.exp(sum(weights[:n]))
    tree = BestFirstTree(budget)(lat, ctx, eos=eos, proxy=proxy)
    prefixes = node_paths(tree)
    assert len(set(prefixes)) == len(tree) == min(budget, len(every))
    assert all(p[:-1] in prefixes or len(p) == 1 for p in prefixes)
    assert sum(every[p] for p in prefixes) == pytest.approx(sum(sorted(every.values(), reverse=True)[: len(tree)]))
    assert tree.survival() == pytest.approx([every[p] for p in prefixes])
    larger = node_paths(BestFirstTree(budget + 3)(lat, ctx, eos=eos, proxy=proxy))
    assert larger[: len(prefixes)] == prefixes


@settings(max_examples=25)
@given(problem)
def test_no_fanout_by_slot_beats_the_tree(seed):
    """However many children the nodes of each slot get, and whichever paths have more: a head that ranks slots or nodes
    (SpecBlock) can at most find the tree that best first finds, as long as the weights are right."""
    lat, proxy, eos, ctx = random_problem(seed, k=3)
    edges = Edges(lat, ctx, proxy, 0.5)

    def reached(i, state, fanout, chance):
        """The chances of all nodes behind one."""
        if i < len(fanout):
            for t, w, s in sorted(edges.out(i, state), key=lambda e: -e[1])[: fanout[i]]:
                yield chance * math.exp(w)
                yield from () if t in eos else reached(i + 1, s, fanout, chance * math.exp(w))

    for fanout in itertools.product((1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)):
        chances = list(reached(0, edges.root, fanout, 1.0))
        best = BestFirstTree(len(chances))(lat, ctx, eos=eos, proxy=proxy)
        assert len(best) == len(chances) and sum(best.survival()) >= sum(chances) - 1e-9


def node_paths(tree):
    out = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        out.append((*(out[parent] if parent >= 0 else ()), token))
    return out


@settings(max_examples=30)
@given(problem)
def test_a_proxy_that_knows_nothing_changes_nothing(seed):
    lat, _, _, ctx = random_problem(seed)
    for search in (CPSBeam(), Viterbi(), EAL(), BestFirstTree(6)):
        assert search(lat, ctx, proxy=NgramTable(6)).tokens == search(lat, ctx).tokens


def test_every_search_is_deterministic_under_a_seed():
    lat, proxy, eos, ctx = random_problem(3)
    for name, make in SEARCHES.items():
        runs = [
            make()(lat, ctx, eos=eos, proxy=proxy, generator=torch.Generator().manual_seed(5)).tokens for _ in range(2)
        ]
        assert runs[0] == runs[1], name


@pytest.mark.parametrize("search", [Sample(), CPSSample(), SampleTree(2, 3)])
def test_sampled_rows_are_the_law_of_the_draw(search):
    """First-slot draws follow the row that is handed over; the confidence does not depend on the draw."""
    lat, proxy, _, ctx = random_problem(11)
    g = torch.Generator().manual_seed(0)
    counts, rows, confs = Counter(), None, set()
    for _ in range(4000):
        p = search(lat, ctx, proxy=proxy, generator=g)
        assert p.kind == "sampled"
        counts[p.tokens[0]] += 1
        rows = p.rows.dense(0, 6)
        confs.add(p.conf)
    assert len(confs) == 1
    assert rows.sum() == pytest.approx(1)
    for t in range(6):
        assert counts[t] / 4000 == pytest.approx(float(rows[t]), abs=0.03)


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_say_what_they_draw(name):
    lat, proxy, eos, ctx = random_problem(3)
    search = SEARCHES[name]()
    p = search(lat, ctx, eos=eos, proxy=proxy, generator=torch.Generator().manual_seed(5))
    assert search.sampled == (p.kind == "sampled")
    assert search.tree == (p.parents != tuple(range(-1, len(p) - 1)))


def test_rows_of_slots_with_few_candidates():
    """Slots of one and of three tokens, token 0 among them: padding is no token."""
    lat = from_columns([[(0, 0.0)], [(0, LN(0.5)), (1, LN(0.3)), (2, LN(0.2))]])
    rows = CPSSample(lam=1.0)(lat, (), generator=torch.Generator().manual_seed(0)).rows
    assert rows.dense(0, 3).tolist() == [1, 0, 0]
    assert rows.dense(1, 3).tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_sampled_siblings_share_the_confidence_of_their_slot():
    """The second head is tried only where the first was rejected: half the confidence, and so on."""
    lat = from_columns([[(t, LN(p)) for t, p in enumerate((0.5, 0.3, 0.2))], [(4, LN(0.8)), (5, LN(0.2))]])
    tree = SampleTree(3, 2)(lat, (), generator=torch.Generator().manual_seed(0))
    assert tree.depths == (1, 2) * 3
    assert tree.conf == pytest.approx((0.5, 0.8, 0.25, 0.8, 0.5 / 3, 0.8))


def test_a_tree_has_eight_children_a_node_where_nothing_else_is_said():
    lat = from_columns([[(t, LN(0.1)) for t in range(10)]])
    assert len(BestFirstTree()(lat, ())) == 8
    wide = from_columns([[(t, LN(0.125)) for t in range(8)] for _ in range(2)])
    assert len(BestFirstTree()(wide, ())) == 32


def test_an_empty_lattice_is_worth_nothing():
    path, value = EAL().solve(Edges(from_columns([]), (), None, 1.0))
    assert (path.tokens, value) == ((), 0.0)
    for make in SEARCHES.values():
        assert len(make()(from_columns([]), ())) == 0


# -- proposals


def test_only_point_and_sampled_exist():
    with pytest.raises(DllmError, match=r"point.*sampled"):
        Proposal((1,), (-1,), "soft")
    with pytest.raises(DllmError, match="rows"):
        Proposal((1,), (-1,), "sampled")
    with pytest.raises(DllmError, match="rows"):
        Proposal((1,), (-1,), "point", Rows(torch.ones(1, 1)))
    with pytest.raises(DllmError, match="parents"):
        Proposal((1, 2), (-1, 1))


def test_rows_are_picked_by_any_sequence_of_nodes():
    rows = Rows(torch.eye(4), torch.arange(4).expand(4, -1))
    drawn = chain([0, 1, 2, 3], rows=rows)
    for nodes in ([0, 1], (0, 1), range(2)):
        assert drawn.pick(nodes).rows.prob.tolist() == torch.eye(4)[:2].tolist()
        assert rows.pick(nodes).index.shape == (2, 4)


def test_within_cuts_depth_and_what_follows_an_end_token():
    p = Proposal((1, 9, 2, 3, 4), (-1, -1, 0, 1, 2), conf=(0.5,) * 5)
    assert p.within(9, frozenset([9])).tokens == (1, 9, 2, 4)
    assert p.within(2).tokens == (1, 9, 2, 3) and p.within(2).parents == (-1, -1, 0, 1)
    assert p.head(3).parents == (-1, -1, 0) and p.depths == (1, 1, 2, 2, 3)


def test_a_union_keeps_what_is_likeliest_to_be_reached():
    parts = [chain((1, 2), (0.9, 0.5)), chain((1, 3), (0.8, 0.4)), chain((4,), (0.3,))]
    both = union(parts, budget=4)
    assert node_paths(both) == [(1,), (1, 2), (1, 3), (4,)]
    assert both.survival() == pytest.approx([0.9, 0.45, 0.36, 0.3])
    assert node_paths(union(parts, budget=3)) == [(1,), (1, 2), (1, 3)]


def test_configured_searches():
    assert SpecConfig(tree=8).build_search(True) == BestFirstTree(8, 0.5)
    assert SpecConfig(tree=8, search="tree:lam=0.7,fanout=2").build_search(False) == BestFirstTree(8, 0.7, 2)
    assert SpecConfig(tree=8, search="cps:lam=0.7").build_search(False) == BestFirstTree(8, 0.7)
    assert SpecConfig(tree=8, search="argmax").build_search(False) == BestFirstTree(8, 1.0)
    assert SpecConfig(search="tree").build_search(False) == BestFirstTree()
    assert SpecConfig(tree=8, search="sample_tree").build_search(True) == SampleTree(3, 2)
    deeper = SpecConfig(tree=16, search="sample_tree:width=3,deeper=2-1").build_search(True)
    assert deeper == SampleTree(3, 3, "2-1") and deeper.branching == [3, 2, 1]  # 3 + 6 + 6 nodes
    assert SpecConfig(tree=2, search="sample_tree:deeper=2").build_search(True) == SampleTree(2, 1, 2)
    for wrong in ("2,2", 0, "2--1", "x"):
        with pytest.raises(DllmError, match="children by slot"):
            SampleTree(deeper=wrong)
    assert SpecConfig().build_search(True) == Sample() and SpecConfig().build_search(False) == EAL()
    assert SpecConfig(corpus=[[1, 2], [3]]).corpus == ((1, 2), (3,))


# -- the n-gram table


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 4), st.sampled_from([1.0, 0.9]))
def test_ngram_rows_are_distributions(text, order, decay):
    table = NgramTable(5, order, decay=decay)
    table.update(text)
    for state in [table.state(text), table.state(text[:-1]), ()]:
        assert sum(math.exp(lp) for lp in table.logp(state, range(5))) == pytest.approx(1)


def test_ngram_learns_backs_off_and_forgets():
    table = NgramTable(50)
    assert table.logp((), [3]) == pytest.approx([-LN(50)]) and table.trust(()) == 0
    table.update([1, 2, 3, 1, 2, 3, 1, 2])
    assert table.state([9, 1, 2]) == (1, 2) and table.state([9, 9, 2]) == (2,) and table.state([9]) == ()
    assert table.logp((1, 2), [3])[0] > LN(0.5) > table.logp((1, 2), [4])[0]
    fading = NgramTable(50, decay=0.5)
    fading.update([1, 2, 7, 1, 2, 8])
    assert fading.logp((1, 2), [8])[0] > fading.logp((1, 2), [7])[0]
    fitted = NgramTable(50).fit([[4, 5]] * 40)
    online = NgramTable(50, base=fitted)
    assert online.state([9, 4]) == (4,) and online.logp((4,), [5])[0] > LN(0.9) and online.trust((4,)) > 0.5
    online.update([4, 6] * 200)
    assert online.logp((4,), [6])[0] > LN(0.4) and fitted.logp((4,), [6])[0] < LN(0.01)
    assert sum(math.exp(lp) for lp in online.logp((4,), range(50))) == pytest.approx(1)


# -- retrieval


@settings(max_examples=100)
@given(st.lists(st.integers(0, 2), max_size=40))
def test_suffix_automaton_finds_the_longest_repeated_suffix(text):
    sam = SuffixAutomaton()
    for i, token in enumerate(text):
        sam.append(token)
        seen = text[: i + 1]
        n = max(
            (
                m
                for m in range(len(seen))
                if any(seen[j : j + m] == seen[len(seen) - m :] for j in range(len(seen) - m))
            ),
            default=0,
        )
        assert sam.match == n
        if n:
            assert sam.end <= i and seen[sam.end - n : sam.end] == seen[len(seen) - n :]


def test_a_continuation_runs_into_itself():
    sam = SuffixAutomaton()
    for token in [1, 2, 3, 1, 2, 3, 1]:
        sam.append(token)
    assert next(sam.continuations(7))[1] == [2, 3, 1, 2, 3, 1, 2]
