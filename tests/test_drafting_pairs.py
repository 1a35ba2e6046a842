"""Pair scores: searches over them against hand examples, brute force and public codes; the laws of what is drawn."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import golden_cases
import pytest
import torch
from drafting_kit import VOCAB, plain, tiny_verifier
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm
from dllm.drafting import row as host
from dllm.drafting.drafters import Drafter, Need
from dllm.drafting.lattice import Lattice
from dllm.drafting.ngram import NgramTable
from dllm.drafting.pairs import Pairs, PairScores, before_of, conditional
from dllm.drafting.search import EAL, Argmax, BestFirstTree, CPSBeam, CPSSample, Edges, Sample, SampleTree, Viterbi
from dllm.errors import DllmError

X, Y, Z, ANCHOR = range(4)
HAND = [
    [[0.40, 0.35, 0.25]] * 3,
    [[0.30, 0.25, 0.20], [0.25, 0.50, 0.15], [0.05, 0.05, 0.90]],
]


def paired(tokens, logq, anchor=ANCHOR, marginals=None):
    """A lattice of candidates (k, M) and log q(b | a) (k, M, M); its marginals matter to no search."""
    tokens = torch.tensor(tokens)
    logp = torch.full(tokens.shape, -math.log(tokens.shape[1])) if marginals is None else marginals
    return Lattice(tokens, logp, tokens[:, 0], 0, pairs=Pairs(before_of(tokens, torch.tensor([anchor])), logq))


def test_by_hand_the_greedy_walk_the_longest_and_the_likeliest_path_differ():
    lat = paired([[X, Y, Z]] * 2, torch.tensor(HAND, dtype=torch.float64).log())
    assert Argmax()(lat, [ANCHOR]).tokens == (X, X)
    path, value = EAL().solve(Edges(lat, [ANCHOR], None, 1.0))
    assert path.tokens == (Y, Y) and value == pytest.approx(0.525) and path.conf == pytest.approx((0.35, 0.50))
    for search in (Viterbi(), CPSBeam(), CPSBeam(beam=9)):
        assert search(lat, [ANCHOR]).tokens == (Z, Z)
    tree = BestFirstTree(6)(lat, [ANCHOR])
    assert tree.survival() == pytest.approx([0.40, 0.35, 0.25, 0.225, 0.175, 0.12])
    assert tree.tokens == (X, Y, Z, Z, Y, X) and tree.parents == (-1, -1, -1, 2, 1, 0)


# -- against brute force


def random_pairs(seed, k=4, m=3, vocab=7, law="candidates"):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.randperm(vocab, generator=g)[:m] for _ in range(k)])
    own = torch.log_softmax(torch.randn(k, vocab, generator=g, dtype=torch.float64), -1).gather(1, tokens)
    own, order = own.sort(dim=-1, descending=True)
    tokens = tokens.gather(1, order)
    w = 2 * torch.randn(k, m, m, generator=g, dtype=torch.float64)
    lat = paired(tokens.tolist(), conditional(own, own[:, None] + w, law), marginals=own)
    return lat, frozenset(torch.randperm(vocab, generator=g)[: seed % 2].tolist())


def every_path(lat, eos):
    """tokens -> their probabilities, of all paths through the table itself, up to an end token."""
    logq, columns, out = lat.pairs.logq.double().exp().tolist(), lat.tokens.tolist(), {}
    for places in itertools.product(range(lat.tokens.shape[1]), repeat=lat.k):
        tokens = [column[b] for column, b in zip(columns, places, strict=True)]
        steps = [logq[j][places[j - 1] if j else 0][places[j]] for j in range(lat.k)]
        n = next((i + 1 for i, t in enumerate(tokens) if t in eos), lat.k)
        out[tuple(tokens[:n])] = steps[:n]
    return out


def length(steps):
    return sum(math.prod(steps[: i + 1]) for i in range(len(steps)))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(["candidates", "mass"]))
def test_searches_over_pairs_equal_all_paths(seed, law):
    lat, eos = random_pairs(seed, law=law)
    every = every_path(lat, eos)
    assert math.prod(every[Viterbi()(lat, [ANCHOR], eos=eos).tokens]) == pytest.approx(
        max(map(math.prod, every.values()))
    )
    path, value = EAL().solve(Edges(lat, [ANCHOR], None, 1.0), eos)
    assert value == pytest.approx(max(map(length, every.values()))) and length(every[path.tokens]) == pytest.approx(
        value
    )
    beam = CPSBeam(beam=3**4)(lat, [ANCHOR], eos=eos).tokens
    assert math.prod(every[beam]) == pytest.approx(max(map(math.prod, every.values())))
    nodes = {tokens[:n]: math.prod(p[:n]) for tokens, p in every.items() for n in range(1, len(p) + 1)}
    tree = BestFirstTree(11)(lat, [ANCHOR], eos=eos)
    assert tree.survival() == pytest.approx(sorted(nodes.values(), reverse=True)[:11])


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_the_ngram_proxy_tempers_pairs_as_it_tempers_marginals(seed):
    """One socket: the table's context of two tokens and the pair's of one are states of one graph."""
    lat, _ = random_pairs(seed)
    table = NgramTable(7, 3, kappa=1.0)
    table.update([t for row in lat.tokens.tolist() for t in row] * 2)
    ctx = [5, ANCHOR]

    def weights(tokens):
        text, total = list(ctx), []
        for j, t in enumerate(tokens):
            before = lat.pairs.before[j].tolist().index(text[-1])
            logq = float(lat.pairs.logq[j, before, lat.tokens[j].tolist().index(t)])
            mix = 0.5 * table.trust(table.state(text))
            total.append((1 - mix) * logq + mix * table.logp(table.state(text), [t])[0])
            text.append(t)
        return total

    every = {tokens: weights(tokens) for tokens in itertools.product(*lat.tokens.tolist())}
    best = max(sum(w) for w in every.values())
    assert sum(every[Viterbi()(lat, ctx, proxy=table).tokens]) == pytest.approx(best)
    value = EAL().solve(Edges(lat, ctx, table, 0.5))[1]
    assert value == pytest.approx(max(length([math.exp(x) for x in w]) for w in every.values()))


def test_a_table_counts_what_the_verifier_says_by_its_probabilities():
    """Behind (5, 6): .5 and .25 of an observation; each loses 3/4 of itself to the shorter context, and so does (6)."""
    table = NgramTable(8, 3, kappa=1.0)
    table.feed([4, 5, 6], [1, 2], [0.5, 0.25])
    unigram = (0.25 * 0.5 + 0.75 * 0.75 / 8) / 0.75
    bigram = (0.25 * 0.5 + 0.75 * 0.75 * unigram) / 0.75
    assert math.exp(table.logp((6,), [1])[0]) == pytest.approx(bigram)
    assert math.exp(table.logp((5, 6), [1])[0]) == pytest.approx((0.25 * 0.5 + 0.75 * 0.75 * bigram) / 0.75)
    assert table.trust((5, 6)) == pytest.approx(0.75 / 1.75) and table.state([4, 5, 6]) == (5, 6)
    table.feed([4, 5, 6], [1], [0.9])
    assert sum(map(math.exp, table.logp((5, 6), range(8)))) == pytest.approx(1)


def test_what_a_verifier_said_fades_with_the_text():
    """By hand: two tokens on, an old word weighs a quarter of a new one."""
    table = NgramTable(8, 2, decay=0.5)
    table.feed([6], [1], [0.8])
    table.age(2)
    table.feed([6], [1, 2], [0.5, 0.1])
    assert table.total[(6,)] / table.unit == pytest.approx(0.8 / 4 + 0.6)
    assert table.counts[(6,)][1] / table.unit == pytest.approx(0.8 / 4 + 0.5)
    table.update([3] * 2000)  # as long as it may be
    assert 0 < table.unit <= 1e9 * 2 and all(map(math.isfinite, table.logp((), range(8))))

    made = []

    class Watched(NgramTable):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "NgramTable", Watched)
        model, prompt, options = tiny_verifier(), [3, 1, 4, 1, 5], dict(ngrams="verifier", length="fixed:k=3")
        for decay in (1.0, 0.9):
            out = dllm.speculate(model, Sure(VOCAB), prompt, max_new_tokens=12, decay=decay, **options)
            assert out.sequences == plain(model, prompt, 12) and made[-1].unit == pytest.approx(decay**-12)


def test_the_loop_feeds_the_proxy_at_every_verified_node():
    """Greedy texts stay the verifier's own, and behind each context stands what its logits say there."""
    model = tiny_verifier()
    prompt, tables = [3, 1, 4, 1, 5], []

    class Watched(NgramTable):
        def feed(self, ids, tokens, prob):
            super().feed(ids, tokens, prob)
            tables.append((tuple(ids), tuple(tokens), tuple(prob)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "NgramTable", Watched)
        drafter = Sure(VOCAB)
        out = dllm.speculate(model, drafter, prompt, max_new_tokens=12, ngrams="verifier", length="fixed:k=3")
    assert out.sequences == plain(model, prompt, 12)
    assert len(tables) == sum(r.nodes + 1 for r in out.rounds)
    logits = model(torch.tensor([prompt])).logits[0, -1].float()
    best = logits.softmax(-1).topk(8)
    ids, tokens, prob = tables[0]
    assert ids == tuple(prompt[-3:]) and tokens == tuple(best.indices.tolist())
    assert prob == pytest.approx(best.values.tolist(), abs=1e-5)


class Sure(Drafter):
    """One forward that says nothing: every token is as likely."""

    def __init__(self, vocab):
        self.vocab = vocab

    def draft(self, ids, k, *, generator=None):
        return self.need.lattice(torch.zeros(k, self.vocab), len(ids))


# -- against public codes: golden/README.md says which


@pytest.mark.parametrize("checkpoint", [name for name, _ in golden_cases.cases("lattice")])
def test_laws_and_best_paths_of_public_heads(checkpoint):
    for case in golden_cases.read(checkpoint, "lattice"):
        tokens, m = case["candidate_ids"], len(case["candidate_ids"][0])
        base = torch.tensor(case.get("unary") or case["base_logits"], dtype=torch.float64)
        given_ = [t if len(t) == m else t * m for t in case.get("pair_scores") or case["pair_bias"]]
        scores = torch.tensor(given_, dtype=torch.float64)
        scores = scores if "pair_scores" in case else scores + base[:, None]
        own = torch.log_softmax(base, -1) + torch.tensor(case["log_mass"])[:, None]
        for name, law in case["laws"].items():
            logq = torch.tensor([t if len(t) == m else t * m for t in law["log_q"]], dtype=torch.float64)
            short = {"candidates": "candidates", "candidates_times_mass": "mass"}.get(name)
            if short is not None:
                torch.testing.assert_close(conditional(own, scores, short), logq, atol=1e-4, rtol=0)
            lat, anchor = paired(tokens, logq, case["anchor_id"]), [case["anchor_id"]]
            path, value = EAL().solve(Edges(lat, anchor, None, 1.0))
            assert list(path.tokens) == law["best_expected_length"]["ids"], (case["id"], name)
            assert value == pytest.approx(law["best_expected_length"]["expected_length"], rel=1e-5)
            best = Viterbi()(lat, anchor)
            assert list(best.tokens) == law["best_product"]["ids"], (case["id"], name)
            assert math.prod(best.conf) == pytest.approx(law["best_product"]["product"], rel=1e-4)
            walk = case["greedy_walk"]
            if case.get("greedy_inside_candidates", True):
                assert list(Argmax()(lat, anchor).tokens) == walk, (case["id"], name)


# -- from a head's scores to a lattice


def head(vocab=9, rank=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    P, S = torch.randn(2, vocab, rank, generator=g)
    return P, S, lambda before, ids: P[before] @ S[ids].mT


@pytest.mark.parametrize("law", ["candidates", "mass", "full"])
def test_a_lattice_has_the_law_of_its_head(law):
    """w = <P[a], S[b]>; every entry by its definition over the whole vocabulary."""
    P, S, score = head()
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    logits[:, 2] = float("-inf")
    lat = Need(9, m_max=5, eos=frozenset([8])).lattice(logits, 3, pairs=PairScores(score, torch.tensor([6]), law))
    lat.check()
    assert lat.pairs.before[0].tolist() == [6] + [-1] * (lat.tokens.shape[1] - 1)
    full = torch.log_softmax(logits, -1)
    for j, column in enumerate(lat.columns):
        ids = [t for t, _ in column]
        assert set(full[j].topk(5).indices.tolist()) | {8} == set(ids), "the best of each slot, whatever their mass"
        for a, before in enumerate(lat.pairs.before[j].tolist()):
            if before >= 0:
                s = full[j] + P[before] @ S.T
                inside = s[ids]
                expected = {
                    "candidates": inside - inside.logsumexp(0),
                    "mass": inside - inside.logsumexp(0) + full[j][ids].logsumexp(0),
                    "full": inside - s.logsumexp(0),
                }[law]
                torch.testing.assert_close(lat.pairs.logq[j, a, : len(ids)], expected, atol=1e-5, rtol=0)


def test_the_rest_of_a_draft_goes_on_behind_what_was_emitted():
    """A candidate that was emitted weighs the next slot by its own row; any other token leaves the marginals."""
    lat, _ = random_pairs(4)
    rest = lat.suffix(2)
    kept = lat.tokens[1].tolist()
    for a, token in enumerate(kept):
        assert [w for _, w, _ in Edges(rest, [token], None, 1.0).out(0, ((token,),))] == lat.pairs.logq[2, a].tolist()
    other = next(t for t in range(7) if t not in kept)
    edges = Edges(rest, [other], None, 1.0)
    assert [w for _, w, _ in edges.out(0, edges.root)] == lat.logp[2].tolist()


def test_pairs_that_do_not_fit_their_lattice_are_refused():
    lat, _ = random_pairs(4)
    for logq in (lat.pairs.logq[:, :, :2], lat.pairs.logq + 1):
        with pytest.raises(DllmError, match="pairs"):
            Lattice(lat.tokens, lat.logp, lat.argmax, 0, pairs=Pairs(lat.pairs.before, logq)).check()
    with pytest.raises(DllmError, match="law"):
        PairScores(head()[2], torch.tensor([0]), "masses")


# -- draws


@pytest.mark.parametrize("search", [Sample(), CPSSample(lam=1.0), SampleTree(2, 3)])
def test_draws_follow_the_rows_that_are_handed_over(search):
    """Second tokens by the row behind the first one drawn; the confidence does not depend on the draw."""
    lat, _ = random_pairs(11, law="mass")
    g, counts, rows, confs = torch.Generator().manual_seed(0), Counter(), {}, set()
    for _ in range(4000):
        p = search(lat, [ANCHOR], generator=g)
        counts[p.tokens[:2]] += 1
        rows[p.tokens[0]] = p.rows.dense(1, 7)
        confs.add(p.conf)
        assert p.rows.dense(0, 7)[lat.tokens[0]].tolist() == pytest.approx(lat.pairs.logq[0, 0].softmax(0).tolist())
    assert len(confs) == 1
    first = Counter()
    for (a, _), n in counts.items():
        first[a] += n
    for (a, b), n in counts.items():
        assert n / first[a] == pytest.approx(float(rows[a][b]), abs=4 * (0.25 / first[a]) ** 0.5)
    for place, a in enumerate(lat.tokens[0].tolist()):
        logq = lat.pairs.logq[1, place]
        assert rows[a][lat.tokens[1]].tolist() == pytest.approx(logq.softmax(0).tolist()), "that of the pair table"
