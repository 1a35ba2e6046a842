"""T > 0: the law of the output is the verifier's, and published shortcuts that break it are caught by the same test.

A tabular verifier over five tokens, texts of three tokens: 125 outcomes, chi-square against the exact joint. The suite
draws 3 000 texts a scheme, `-m sweep` 60 000. All rounds of a text read one lattice: its later slots are carried over.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from sweeps import size
from transformers import TopPLogitsWarper

from dllm.drafting.accept import draw, odds, reject, walk_sample
from dllm.drafting.config import SpecConfig
from dllm.drafting.control import Controller
from dllm.drafting.drafters import Drafter
from dllm.drafting.lattice import build, draws, listed, uniforms
from dllm.drafting.loop import judged, proposed
from dllm.drafting.ngram import NgramTable
from dllm.drafting.pairs import Pairs, before_of, conditional
from dllm.drafting.proposal import Proposal, Rows, chain
from dllm.drafting.request import Request
from dllm.drafting.row import Speculation
from dllm.drafting.search import EAL, BestFirstTree, CPSSample, Sample, SampleTree
from dllm.drafting.vocabulary import Shared

torch.set_num_threads(1)
V, LENGTH = 5, 3
N = int(os.environ.get("DLLM_LAW_TEXTS", "3000"))
TABLE: dict[tuple[int, ...], torch.Tensor] = {}
ROWS = torch.from_numpy(np.random.default_rng(11).dirichlet(np.full(V, 1.0), size=LENGTH))  # the drafter's, by slot
LATTICE = build(ROWS.log(), 0, tau_mass=1.0, with_rows=True)
PROXY = NgramTable(V, 2)
PROXY.update([0, 1, 2, 3, 0, 1, 4, 2, 0, 3, 1])


def p_next(prefix):
    """The verifier: a fixed random distribution for every prefix."""
    key = tuple(prefix)
    if key not in TABLE:
        TABLE[key] = torch.from_numpy(np.random.default_rng([3, *[t + 1 for t in key]]).dirichlet(np.full(V, 0.8)))
    return TABLE[key]


def exact():
    return {
        (a, b, c): float(p_next(())[a] * p_next((a,))[b] * p_next((a, b))[c])
        for a in range(V)
        for b in range(V)
        for c in range(V)
    }


def pvalue(texts):
    law = exact()
    counts = dict.fromkeys(law, 0)
    for text in texts:
        counts[tuple(text)] += 1
    expected, seen = np.array([law[k] for k in law]) * len(texts), np.array([counts[k] for k in law])
    small = expected < 5
    seen, expected = np.append(seen[~small], seen[small].sum()), np.append(expected[~small], expected[small].sum())
    return chisquare(seen, expected * seen.sum() / expected.sum()).pvalue


def write(round_, g):
    """Rounds until the text has three tokens. A round gets the text and returns the tokens it emits."""
    text: list[int] = []
    while len(text) < LENGTH:
        text += round_(tuple(text), g)
    return text[:LENGTH]


def prob_after(prefix):
    return lambda node, since: p_next((*prefix, *since))


def propose(search, prefix, g):
    return search(LATTICE.suffix(len(prefix)), [0, *prefix], proxy=PROXY, generator=g)


def paired(prefix):
    """The rest of a lattice of three slots, as it is carried over, whose pairs depend on the token before."""
    lat = build(ROWS.log(), 0, tau_mass=1.0)
    w = torch.from_numpy(np.random.default_rng(5).normal(size=(LENGTH, V, V))) * 2
    logq = conditional(lat.logp.double(), lat.logp.double()[:, None] + w, "mass")
    return replace(lat, pairs=Pairs(before_of(lat.tokens, torch.tensor([0])), logq)).suffix(len(prefix))


def sampled_pairs(search, prefix, g):
    return reject(search(paired(prefix), [0, *prefix], generator=g), prob_after(prefix), g).emitted


def point(search, prefix, g):
    return walk_sample(propose(search, prefix, g), prob_after(prefix), g).emitted


def sampled(search, prefix, g):
    return reject(propose(search, prefix, g), prob_after(prefix), g).emitted


SOUND = {
    "point chain": partial(point, EAL()),
    "sampled chain": partial(sampled, Sample()),
    "cps_sample": partial(sampled, CPSSample()),
    "point tree": partial(point, BestFirstTree(6)),
    "siblings without replacement": partial(sampled, SampleTree(3, 2)),
    "siblings at every slot": partial(sampled, SampleTree(2, 3, "3-2")),
    "siblings at every slot over pairs": partial(sampled_pairs, SampleTree(2, 3, "2-2")),
    "chain over pairs": partial(sampled_pairs, Sample()),
    "siblings over pairs": partial(sampled_pairs, SampleTree(3, 2)),
}


@pytest.mark.parametrize("name", SOUND)
def test_exact(name):
    g = torch.Generator().manual_seed(1)
    assert pvalue([write(SOUND[name], g) for _ in range(N)]) > 1e-3


# -- rules found in public code or papers that are not exact: they must fail, or this test would see nothing


def soft_ratio(prefix, g):
    """A deterministic path accepted with p / q of soft rows (assisted generation with argmax ids and soft logits)."""
    lat = LATTICE.suffix(len(prefix))
    path = chain(lat.argmax.tolist())
    return reject(Proposal(path.tokens, path.parents, "sampled", Rows(lat.rows.exp())), prob_after(prefix), g).emitted


def drafted_only_residual(prefix, g):
    """The residual subtracts q at the drafted token alone."""
    p_of, draft = prob_after(prefix), propose(Sample(), prefix, g)
    out: list[int] = []
    for node, token in enumerate(draft.tokens):
        p, q = p_of(node - 1, out), draft.rows.dense(node, V)
        if float(torch.rand((), generator=g)) * q[token] < p[token]:
            out.append(token)
            continue
        left = p.clone()
        left[token] = max(0.0, float(p[token] - q[token]))
        return [*out, draw(left / left.sum(), g)]
    return [*out, draw(p_of(0, out), g)]


def keep_going(prefix, g):
    """Later draft tokens are tested after a rejection, with logits that were conditioned on the rejected token."""
    p_of, draft = prob_after(prefix), propose(Sample(), prefix, g)
    out: list[int] = []
    for node, token in enumerate(draft.tokens):
        p, q = p_of(node - 1, draft.tokens[:node]), draft.rows.dense(node, V)
        if float(torch.rand((), generator=g)) * q[token] < p[token]:
            out.append(token)
        else:
            left = (p - q).clamp_min(0)
            out.append(draw(left / left.sum(), g))
    return out


def best_of_several(prefix, g):
    """Of several sampled paths the one the verifier likes best is tested against the rows of a single draw."""
    drafts = [propose(Sample(), prefix, g) for _ in range(3)]

    def liking(d):
        return sum(float(p_next((*prefix, *d.tokens[:i]))[t].log()) for i, t in enumerate(d.tokens))

    return reject(max(drafts, key=liking), prob_after(prefix), g).emitted


def beam_with_soft_rows(prefix, g):
    """A searched path presented as if it had been drawn left to right."""
    lat, state = LATTICE.suffix(len(prefix)), (0, *prefix)
    path = EAL()(lat, state, proxy=PROXY)
    rows = []
    for slot, _ in enumerate(path.tokens):
        before = [*state, *path.tokens[:slot]]
        logg = torch.tensor(PROXY.logp(PROXY.state(before), range(V)))
        rows.append(torch.softmax(0.5 * lat.rows[slot] + 0.5 * logg, 0))
    return reject(
        Proposal(path.tokens, path.parents, "sampled", Rows(torch.stack(rows))), prob_after(prefix), g
    ).emitted


def pairs_with_the_rows_of_their_marginals(prefix, g):
    """Draws along pairs, tested against the slots' own rows."""
    lat = paired(prefix)
    draft = Sample()(lat, [0, *prefix], generator=g)
    return reject(replace(draft, rows=Rows(*replace(lat, pairs=None).law)), prob_after(prefix), g).emitted


def trim_by_the_draw(prefix, g):
    """Unlikely draws are not submitted: what is submitted no longer follows the rows."""
    draft = propose(Sample(), prefix, g)
    n = next((i for i, t in enumerate(draft.tokens) if draft.rows.dense(i, V)[t] < 0.25), len(draft))
    return reject(draft.head(n), prob_after(prefix), g).emitted


def row_after(text):
    """A drafter's row that depends on every token before it."""
    return torch.from_numpy(np.random.default_rng([7, *[t + 1 for t in text]]).dirichlet(np.full(V, 0.5)))


def cut_before_the_last_chunk(prefix, g):
    """A draft grown token by token is dropped whole where its last row is uncertain: that row knows the first draws."""
    tokens: list[int] = []
    rows = []
    while len(prefix) + len(tokens) < LENGTH - 1:
        rows.append(row_after([*prefix, *tokens]))
        tokens.append(draw(rows[-1], g))
    if not rows or float(rows[-1].max()) <= CERTAIN:
        return [draw(p_next(prefix), g)]
    draft = Proposal(tuple(tokens), tuple(range(-1, len(tokens) - 1)), "sampled", Rows(torch.stack(rows)))
    return reject(draft, prob_after(prefix), g).emitted


CERTAIN = 0.7
WRONG = [
    soft_ratio,
    drafted_only_residual,
    keep_going,
    best_of_several,
    beam_with_soft_rows,
    pairs_with_the_rows_of_their_marginals,
    trim_by_the_draw,
    cut_before_the_last_chunk,
]


@pytest.mark.parametrize("rule", WRONG, ids=lambda r: r.__name__)
def test_wrong_rules_are_caught(rule):
    g = torch.Generator().manual_seed(1)
    assert pvalue([write(rule, g) for _ in range(N // 2)]) < 1e-6


# -- identities


def test_micro_examples():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.6, 0.2])
    g, n = torch.Generator().manual_seed(0), 6000
    accepted, corrections, law = 0, torch.zeros(3), torch.zeros(3)
    for _ in range(n):
        token = draw(q, g)
        v = reject(Proposal((token,), (-1,), "sampled", Rows(q[None])), lambda *_: p, g)
        accepted += v.accepted
        law[v.emitted[0]] += 1
        if not v.accepted:
            corrections[v.emitted[0]] += 1
    assert accepted / n == pytest.approx(0.7, abs=0.02)  # sum of min(p, q)
    assert corrections[1:].sum() == 0  # the residual is all on token 0
    assert (law / n).numpy() == pytest.approx(p.numpy(), abs=0.02)
    hits, misses = 0, torch.zeros(3)
    for _ in range(n):
        v = walk_sample(chain([2]), lambda *_: p, g)
        hits += v.accepted
        if not v.accepted:
            misses[v.emitted[0]] += 1
    assert hits / n == pytest.approx(0.2, abs=0.02)
    assert (misses / misses.sum()).numpy() == pytest.approx([0.625, 0.375, 0], abs=0.02)


def test_acceptance_of_the_toy():
    """Acceptance of one slot: sampled .65, argmax .25, top-2 tree .45, two siblings without replacement .787."""
    p, q = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05]), torch.tensor([0.1, 0.6, 0.15, 0.1, 0.05])
    lat = build(q.log()[None], 0, tau_mass=1.0, with_rows=True)
    g, n = torch.Generator().manual_seed(3), 6000

    def rate(make, accept):
        return sum(accept(make(), lambda *_: p, g).accepted for _ in range(n)) / n

    assert rate(lambda: Sample()(lat, [], generator=g), reject) == pytest.approx(0.65, abs=0.02)
    assert rate(lambda: chain([1]), walk_sample) == pytest.approx(0.25, abs=0.02)
    assert rate(lambda: BestFirstTree(2)(lat, []), walk_sample) == pytest.approx(0.25 + 0.20, abs=0.02)
    assert rate(lambda: SampleTree(2, 1)(lat, [], generator=g), reject) == pytest.approx(0.787, abs=0.02)


def test_a_zero_entry_is_never_drawn():
    g = torch.Generator().manual_seed(0)
    assert {draw(torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]), g) for _ in range(500)} == {1, 3}


# -- the whole loop


class Tabular:
    """What `Speculation` asks of a verifier."""

    vocab, max_positions, tokenizer, turn, model = V, None, None, None, None


class Slots(Drafter):
    """A one-forward drafter whose rows depend on the text before the draft."""

    def draft(self, ids, k, *, generator=None):
        at = len(ids) - 1
        return self.need.lattice(ROWS[at : at + k].log() + torch.tensor([*ids, *[0] * V])[:V].sin(), len(ids))


def by_the_loop(search, controller, g, drafter=None, eos=frozenset(), **kw):
    request = Request([0], 1 + LENGTH, eos, do_sample=True, generator=g)
    row = Speculation(request, Tabular(), drafter or Slots(), search, controller, SpecConfig(**kw))
    while not row.done:
        (p,) = proposed([row])
        paths: list[tuple[int, ...]] = [()]
        for token, parent in zip(p.tokens, p.parents, strict=True):
            paths.append((*paths[parent + 1], token))
        row.settle(*judged([row], [torch.stack([p_next([*row.ids[1:], *path]) for path in paths]).log()]))
        row.finish_round()
    return row.ids[1:]


LOOPS = {
    "sample, carried over, cost": (Sample(), "cost:k_max=3", dict(carry="always", reuse_min=1)),
    "cps_sample, carried over": (CPSSample(), "fixed:k=3", dict(carry="always", reuse_min=1)),
    "sibling tree": (SampleTree(2, 2), "rejection", dict(tree=5)),
    "siblings at two slots": (SampleTree(2, 2, "2"), "rejection", dict(tree=6)),
    "point tree": (BestFirstTree(5), "cost:k_max=3", dict(tree=5)),
    "chunks": (Sample(), "failfast:chunk=1,tau=0.1,k_max=3", {}),
    "blocks, carried over": (Sample(), "cost:k_max=3", dict(carry="always", reuse_min=1, verify="block")),
    "blocks in chunks": (CPSSample(), "failfast:chunk=1,tau=0.1,k_max=3", dict(verify="block")),
}


def loop_pvalue(name, n):
    search, length, kw = LOOPS[name]
    controller: Controller = SpecConfig(length=length).build_controller()
    g = torch.Generator().manual_seed(4)
    return pvalue([by_the_loop(search, controller.fork(), g, **kw) for _ in range(n)])


@pytest.mark.parametrize("name", [n for n in LOOPS if "carried over" in n and "cps" not in n])
def test_the_loop_is_exact(name):
    assert loop_pvalue(name, 1500) > 1e-3


def along(texts, rows):
    """The product of entries of rows, a text at a time."""
    return float(np.prod([float(row[t]) for t, row in zip(texts, rows, strict=True)]))


def by_blocks(n, spoilt=False):
    """The law of a text behind a judged draft of n tokens, and how many stay in the mean, by enumeration of all drafts
    and of where each may be cut."""
    law, mean = dict.fromkeys(exact(), 0.0), 0.0
    for draft in product(range(V), repeat=n):
        p = torch.stack([p_next(draft[:i]) for i in range(n + 1)])
        stays, rest = odds(p, torch.cat([ROWS[:n], torch.zeros(1, V).double()]), torch.tensor(draft))
        if spoilt:  # the token rule's last test, in place of what is covered
            stays[-1] = min(1.0, float(p[n - 1][draft[-1]] / ROWS[n - 1][draft[-1]]))
        for at in range(n + 1):
            cut = along(draft, ROWS[:n]) * float((1 - stays[at:]).prod()) * (float(stays[at - 1]) if at else 1.0)
            mean += cut * at
            for text in law:
                if text[:at] == draft[:at]:
                    rows = [rest[at], *(p_next(text[:i]) for i in range(at + 1, LENGTH))]
                    law[text] += cut * along(text[at:], rows[: LENGTH - at])
    return law, mean


@pytest.mark.parametrize("n", [1, 2, 3])
def test_blocks_keep_the_law_to_the_last_bit_and_more_tokens_than_the_ratio_test(n):
    law, mean = by_blocks(n)
    assert max(abs(law[text] - p) for text, p in exact().items()) < 1e-14
    by_tokens = sum(  # a prefix of m tokens stays with the product of min(p, q)
        along(prefix, [torch.minimum(p_next(prefix[:i]), ROWS[i]) for i in range(m)])
        for m in range(1, n + 1)
        for prefix in product(range(V), repeat=m)
    )
    assert mean == pytest.approx(by_tokens) if n == 1 else mean > by_tokens + 1e-3
    if n > 1:
        wrong, _ = by_blocks(n, spoilt=True)
        assert max(abs(wrong[text] - p) for text, p in exact().items()) > 1e-3


def test_draws_are_independent_and_those_of_the_first_row_without_replacement():
    g, first, second = torch.Generator().manual_seed(2), ROWS[0], ROWS[1]
    seen = Counter()
    for _ in range(6000):
        (a, b), (c, _) = draws(ROWS[:2], uniforms(2, 2, g)).tolist()
        seen[a, b, c] += 1
    law = {
        (a, b, c): float(first[a] * first[b] / (1 - first[a]) * second[c])
        for a, b in permutations(range(V), 2)
        for c in range(V)
    }
    expected = np.array([law[k] for k in law]) * 6000
    found, common = np.array([seen[k] for k in law]), expected >= 5
    assert found.sum() == 6000
    rest = [found[~common].sum()], [expected[~common].sum()]
    assert chisquare(np.append(found[common], rest[0]), np.append(expected[common], rest[1])).pvalue > 1e-3
    assert draws(torch.eye(3)[:1], uniforms(1, 3, g)).tolist() == [[0, -1, -1]]


class WithDraws(Slots):
    """The same, which makes the draws of a new lattice where its rows are."""

    def draft(self, ids, k, *, generator=None):
        at, u = len(ids) - 1, self.need.uniforms(k, generator)
        logits = ROWS[at : at + k].log() + torch.tensor([*ids, *[0] * V])[:V].sin()
        table, rows = self.need.told(logits, None, u)
        return listed(table, rows, len(ids), self.need.draws)


class Kept(Slots):
    """The same over three of the five ids, drawn under the verifier's warpers: the other two have the probability 0."""

    ids = torch.tensor([4, 0, 3])

    def draft(self, ids, k, *, generator=None):
        at, u = len(ids) - 1, self.need.uniforms(k, generator)
        need = replace(self.need, warp=partial(TopPLogitsWarper(0.9), None))
        logits = ROWS[at : at + k, self.ids.sort().values].log()
        table, rows = need.told(logits, None, u, shared=Shared(self.ids, self.ids))
        assert rows[:, [1, 2]].isneginf().all() and not {1, 2} & set(
            table[:, 2 : 3 + self.need.draws].flatten().tolist()
        )
        return listed(table, rows, len(ids), self.need.draws)


@pytest.mark.parametrize("drafter", [WithDraws, Kept], ids=lambda d: d.__name__)
@pytest.mark.parametrize("search", [Sample(), SampleTree(2, 2)], ids=lambda s: type(s).__name__)
def test_draws_that_come_with_a_lattice_are_exact(search, drafter):
    """What is left of it is drawn anew."""
    g, controller = torch.Generator().manual_seed(6), SpecConfig(length="fixed:k=3").build_controller()
    kw = dict(carry="always", reuse_min=1)
    assert pvalue([by_the_loop(search, controller.fork(), g, drafter(), **kw) for _ in range(1200)]) > 1e-3


# -- what is submitted must not depend on what was drawn, end tokens and sequential drafters included


END = V - 1


class Whole(Controller):
    """Submits whole drafts only: the harshest reader of a draft's length."""

    k_max = 3

    def trim(self, proposal, carried=False, k=0):
        return len(proposal) if len(proposal) == k else 0


class Ends(Slots):
    def draft(self, ids, k, *, generator=None):
        rows = ROWS[len(ids) - 1 : len(ids) - 1 + k].clone()
        rows[:, END] = rows.sum(-1)  # every other draw is the end token
        return self.need.lattice(rows.log(), len(ids))


class CutAtTheEnd(Sample):
    """The draft as a searcher of paths would end it, before the controller has seen it."""

    def __call__(self, lat, ctx, *, eos=frozenset(), proxy=None, generator=None):
        return super().__call__(lat, ctx, generator=generator).within(99, eos)


def absorbing(monkeypatch, eos):
    """The verifier repeats an end token for ever."""
    for end in eos:
        for before in ((), *((first,) for first in range(V))):
            monkeypatch.setitem(TABLE, (*before, end), torch.eye(V, dtype=torch.float64)[end])


def padded(text):
    """Texts that end early as one outcome each: what follows the end token is the end token."""
    return [*text, *[END] * (LENGTH - len(text))]


@pytest.mark.parametrize(
    "search", [Sample(), SampleTree(2, 2), CPSSample(), CutAtTheEnd()], ids=lambda s: type(s).__name__
)
def test_drafts_with_end_tokens(search, monkeypatch):
    absorbing(monkeypatch, frozenset([END]))
    g = torch.Generator().manual_seed(1)
    run = partial(by_the_loop, search, Whole(), g, Ends(), frozenset([END]), carry="off")
    p = pvalue([padded(run()) for _ in range(600)])
    assert p < 1e-6 if isinstance(search, CutAtTheEnd) else p > 1e-3


class Sequential(Drafter):
    """Draws token after token, as a small causal LM does; its confidences tell how the draws before them turned out."""

    def draft(self, ids, k, *, generator=None):
        tokens, rows = [], []
        for _ in range(k):
            rows.append(row_after([*ids[1:], *tokens]))
            tokens.append(draw(rows[-1], generator))
        conf = tuple(float(row.max()) for row in rows)
        return Proposal(tuple(tokens), tuple(range(-1, k - 1)), "sampled", Rows(torch.stack(rows)), conf)


class Hopeful(Controller):
    """Submits a draft whose last row is certain."""

    k_max = 3

    def trim(self, proposal, carried=False, k=0):
        return len(proposal) if not proposal.conf or proposal.conf[-1] > CERTAIN else 0


class AsAsked(Whole):
    """Submits a draft only where it has the length that was asked for."""

    def next_k(self, room):
        self.k = super().next_k(room)
        return self.k

    def trim(self, proposal, carried=False, k=0):
        return len(proposal) if len(proposal) == self.k else 0


class GrowThenCut(Hopeful):
    """Asks for token after token, then submits the whole draft or nothing of it."""

    def next_k(self, room):
        return min(1, room)

    def more(self, conf, room):
        return 1 if len(conf) < min(self.k_max, room) else 0


class Chunks(Drafter):
    """A one-forward drafter whose row depends on the draws of the chunks before it."""

    def draft(self, ids, k, *, generator=None):
        return self.need.lattice(row_after(ids[1:])[None].log(), len(ids))


class Long(Chunks):
    """The same as a finished chain that ends early where an end token was drawn."""

    def draft(self, ids, k, *, generator=None):
        draft = Sequential.draft(self, ids, k, generator=generator)
        n = next((i + 1 for i, t in enumerate(draft.tokens) if t == END), k)
        return draft.head(n)


@pytest.mark.parametrize("eos", [frozenset(), frozenset([END])], ids=["no end token", "end token"])
def test_a_controller_that_grows_and_trims_a_sampled_draft(eos, monkeypatch):
    absorbing(monkeypatch, eos)
    g = torch.Generator().manual_seed(2)
    texts = [padded(by_the_loop(Sample(), GrowThenCut(), g, Chunks(), eos, carry="off")) for _ in range(1500)]
    assert pvalue(texts) > 1e-3


def test_the_length_of_a_sequential_draft_is_not_read(monkeypatch):
    absorbing(monkeypatch, frozenset([END]))
    g = torch.Generator().manual_seed(2)
    texts = [padded(by_the_loop(Sample(), AsAsked(), g, Long(), frozenset([END]))) for _ in range(1500)]
    assert pvalue(texts) > 1e-3


def test_confidences_of_sequential_draws_are_not_read():
    g = torch.Generator().manual_seed(1)
    assert pvalue([by_the_loop(Sample(), Hopeful(), g, Sequential()) for _ in range(1000)]) > 1e-3


@pytest.mark.sweep
@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_is_exact_60k(name):
    assert loop_pvalue(name, size(60_000, 2000)) > 1e-3


@pytest.mark.sweep
@pytest.mark.parametrize("name", SOUND)
def test_exact_60k(name):
    g = torch.Generator().manual_seed(5)
    assert pvalue([write(SOUND[name], g) for _ in range(size(60_000, 6000))]) > 1e-3
