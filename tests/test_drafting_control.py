"""Length controllers: the papers' hand examples, optimality against brute force, metrics."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drafting_kit import VOCAB, Clock, Noise, Script, TimedScript, plain, timed, tiny_verifier
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm
from dllm.drafting import front
from dllm.drafting.config import SpecConfig
from dllm.drafting.control import (
    ADL,
    CostAware,
    CostTable,
    FailFast,
    Fixed,
    Heuristic,
    Judged,
    RejectionThreshold,
    RoundStats,
)
from dllm.drafting.estimate import AcceptanceHead, Calibrator
from dllm.drafting.front import calibrate
from dllm.drafting.lattice import Lattice
from dllm.drafting.proposal import Proposal, Rows, Spread, chain
from dllm.drafting.registry import as_verifier
from dllm.drafting.search import EAL
from dllm.errors import DllmError

PROMPT = [3, 17, 5, 9, 22, 4, 31, 8, 2, 11]


def stats(l_gen, accepted, bonus=0):
    return RoundStats(k=max(l_gen, 1), l_gen=l_gen, accepted=accepted, emitted=accepted + bonus)


def test_adl_toy_by_hand():
    c = ADL(k_min=2, k_max=8, delta=2, rho=0.5, k_first=8, count_bonus=False)
    seen = []
    for round_ in [(6, 6), (5, 2), (1, 1), (2, 2)]:
        c.update(stats(*round_))
        seen.append((c.gen, c.acc, c.next_k(99)))
    assert seen == [(3, 3, 5), (4, 2.5, 4), (2.5, 1.75, 2), (2.25, 1.875, 2)]


def test_adl_with_paper_defaults_never_grows_without_the_bonus_token():
    c = ADL(count_bonus=False)
    assert c.next_k(99) == 30
    ks, gens, accs = [], [], []
    for round_ in [(30, 8), *[(20, 20)] * 4]:
        c.update(stats(*round_))
        ks.append(c.next_k(99))
        gens.append(c.gen)
        accs.append(c.acc)
    assert ks == [20] * 5 and gens == [15, 17.5, 18.75, 19.375, 19.6875] and accs == [4, 12, 16, 18, 19]
    c = ADL(count_bonus=True)
    c.update(stats(30, 8, 0))
    for _ in range(4):
        c.update(stats(20, 20, 1))
    assert c.acc == 19.9375 and c.next_k(99) == 29


def test_adl_starting_from_the_first_round():
    c = ADL(ema_init="first", count_bonus=False)
    c.update(stats(28, 28))
    assert c.gen == 28 and c.next_k(99) == 30
    with pytest.raises(DllmError, match="ema_init"):
        ADL(ema_init="second")


def test_an_end_token_in_the_first_slot_does_not_collapse_the_length():
    c = ADL()
    c.update(stats(0, 0, 1))
    assert c.next_k(99) >= c.k_min == 20


def test_failfast_grows_by_chunks_while_confident():
    c = FailFast(chunk=3, tau=0.5, k_max=8)
    assert c.next_k(99) == 3 and c.next_k(2) == 2
    assert c.more([0.9, 0.9, 0.9], 99) == 3 and c.more([0.9] * 6, 99) == 2 and c.more([0.9] * 6, 7) == 1
    assert c.more([0.9, 0.4, 0.9], 99) == 0 and c.more([0.9] * 8, 99) == 0 and c.more([], 99) == 0


def test_heuristic_and_fixed():
    c = Heuristic(5)
    c.update(RoundStats(nodes=5, accepted=5))
    assert c.next_k(99) == 7
    c.update(RoundStats(nodes=7, accepted=3))
    assert c.next_k(99) == 6 and Fixed(4).next_k(3) == 3 and Fixed(4).next_k(99) == 4
    with pytest.raises(DllmError, match="at least 1"):
        Fixed(0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(length="fixed:k=2.5"), r"'fixed': k=2.5 must be an integer \(default 8\)"),
        (dict(length="fixed:k=1e1"), "k=10.0 must be an integer"),
        (dict(length="fixed:kk=3"), "unknown parameter 'kk' of length controller 'fixed'; did you mean 'k'"),
        (dict(length={"name": "cost", "k_mac": 3}), "did you mean 'k_max'"),
        (dict(length="cost:margin=wide"), "margin='wide' must be a number"),
        (dict(length="cost:k_max=true"), "k_max=True must be an integer"),
        (dict(length="adl:rho=7"), r"rho=7 must be in \(0, 1\]"),
        (dict(length="failfast:tau=2"), r"tau=2 must be in \[0, 1\]"),
        (dict(length=5), "a length controller is a name"),
        (dict(length=Fixed), "a length controller is a name"),
        (dict(search="eal:lam=x"), "lam='x' must be a number"),
        (dict(search="eal:lam=nan"), "lam=nan must be a number"),
        (dict(search="eal:lam=1.5"), r"lam=1.5 must be in \[0, 1\]"),
        (dict(search="cps:beam=0"), "beam=0 must be at least 1"),
        (dict(search="tree:fanout=2.5"), "fanout=2.5 must be an integer"),
        (dict(search=EAL), "a search is a name"),
        (dict(tree=2.5), "tree=2.5 must be an integer"),
        (dict(tree="many"), "tree='many' must be an integer"),
        (dict(tau_mass="most"), "tau_mass='most' must be a number"),
        (dict(m_max=0), "m_max=0 must be at least 1"),
        (dict(decay=0), "decay"),
        (dict(corpus=["a text"]), "corpus is a list of id sequences"),
        (dict(graft="suffix:min_match=0", tree=4), "min_match=0 must be at least 1"),
        (dict(graft="recycle:width=two", tree=4), "width='two' must be an integer"),
        (dict(controller="cost"), "controller is a Controller"),
        (dict(spec=7), "spec is a SpecConfig"),
        (dict(max_new_tokens="5"), "max_new_tokens='5' must be an integer"),
        (dict(max_new_tokens=1.5), "max_new_tokens=1.5 must be an integer"),
        (dict(max_new_tokens=-1), "max_new_tokens=-1 must be an integer of at least 0"),
        (dict(temperature="hot"), "temperature='hot' must be 0"),
        (dict(temperature=float("nan")), "temperature=nan must be 0"),
        (dict(temperature=-1), "temperature=-1 must be 0"),
        (dict(seed="x"), "seed='x' must be an integer"),
        (dict(seed=1 << 70), r"seed=\d+ must be an integer, below"),
        (dict(temperature=1, top_k=1.5), "top_k=1.5 must be an integer"),
        (dict(temperature=1, top_p="x"), r"top_p='x' must be in \(0, 1\]"),
        (dict(top_p=2), r"top_p=2 must be in \(0, 1\]"),
        (dict(logits_processor=7), "logits_processor is a list of processors"),
        (dict(logits_processor=[5]), "logits_processor is a list of processors"),
        (dict(tokenizer=5), "tokenizer= is a loaded tokenizer, not int"),
        (dict(streamer=5), "streamer= has the methods put and end"),
        (dict(chat="x"), "chat=.x. must be True or False"),
        (dict(drafter={"name": ["suffix"]}), "the name of a drafter, its preset and its keys are words"),
    ],
)
def test_settings_of_the_wrong_kind_take_one_line(options, says):
    with pytest.raises(DllmError, match=says) as caught:
        dllm.speculate(tiny_verifier(), prompt=PROMPT, **{"drafter": Noise(), "max_new_tokens": 2, **options})
    assert "\n" not in str(caught.value)


def test_numbers_in_exponent_form_are_numbers():
    for length in ("cost:margin=1e-2", {"name": "cost", "margin": "1e-2"}, "cost:margin=0.01"):
        assert SpecConfig(length=length).build_controller().margin == 0.01
    assert SpecConfig(search="eal:power=1e0,lam=5e-1").build_search(False) == EAL(0.5, 1.0)
    assert (
        SpecConfig(tau_mass="9e-1").tau_mass == 0.9 and SpecConfig(length="fixed:k=12").build_controller().k_max == 12
    )


def test_rejection_threshold():
    p = chain([1, 2, 3, 4], [0.9, 0.8, 0.5, 0.9])
    assert RejectionThreshold(h=0.5).trim(p) == 2 and RejectionThreshold(h=1.0).trim(p) == 4
    assert RejectionThreshold(h=0.01).trim(p) == 1
    tree = Proposal((1, 2, 3), (-1, -1, 0), conf=(0.9, 0.05, 0.9))
    assert RejectionThreshold(h=0.5).trim(tree) == 1


# -- cost


def fed(verify, draft=None):
    c = CostAware(k_max=len(verify) - 2)
    for table, seconds in ((c.verify, verify), (c.draft, draft or [0.0] * len(verify))):
        for n, t in enumerate(seconds):
            table.mean[n], table.seen[n] = t, table.TRIED
            table.keys.append(n)
    return c


@settings(max_examples=50)
@given(st.integers(0, 10**6))
def test_the_submitted_length_maximises_tokens_per_second(seed):
    r = np.random.default_rng(seed)
    verify = np.cumsum(r.exponential(size=9)) + 1
    c = fed(verify.tolist())
    conf = r.uniform(0.05, 0.97, size=7).tolist()
    a = [c.calib(i, x) for i, x in enumerate(conf)]
    survival = np.cumprod(a)
    rate = [(1 + survival[:k].sum()) / verify[k + 1] for k in range(8)]
    assert c.trim(chain(range(7), conf)) == int(np.argmax(rate))


def test_staircases_are_searched_completely():
    """A rule that stops at the first length that does not pay misses the far end of a step."""
    verify = [1.0, 1.0, 1.0, 1.0, *[2.5] * 10]
    c = fed(verify)
    conf = [0.95] * 12
    hoped = 1 + np.concatenate([[0.0], np.cumsum(np.cumprod([c.calib(i, x) for i, x in enumerate(conf)]))])
    rates = hoped / c.verify.table(13)[1:]
    assert int(np.argmax(rates[:4])) == 2 and rates[3] < rates[2]  # the next step looks bad
    assert c.trim(chain(range(12), conf)) == 12


def test_drafting_pauses_where_it_does_not_pay_and_probes_within_its_share():
    c = CostAware(probe=0.1)
    for n in range(1, 9):  # a dear drafter, linear verification
        c.verify.add(n, float(n))
        c.draft.add(n, 5.0)
    asked, lost = [], 0.0
    for _ in range(200):
        k = c.next_k(99)
        n = c.trim(chain([1] * k, [0.02] * k), k=k) if k else 0
        assert not n  # a probe is one slot, which the text will judge
        c.update(RoundStats(k=k, unsent=[Judged(0, 0.02, False)][:k], t_draft=5.0 * k, t_verify=1.0))
        asked.append(k)
        lost += 5 * k
        assert lost <= 0.1 * c.costs.spent + 5
    assert c.paused and set(asked) == {0, 1} and 3 <= sum(asked) <= 6
    draws = chain([1], [0.02], Rows(torch.ones(1, 1)))
    c.costs.lost, c.probing = 0.0, True
    assert c.trim(draws, k=1) == 1, "of draws nothing is learned that is not submitted"
    c.hits[:], c.tries[:] = 1000, 1000
    c.draft.mean = dict.fromkeys(c.draft.keys, 1e-6)
    c.draft._table = None
    assert c.next_k(99) > 1 and not c.paused
    with pytest.raises(DllmError, match="share"):
        CostAware(probe=32)


def test_a_measured_length_costs_what_it_did_and_the_others_as_little_as_they_may():
    """Costs need not grow: two rows of a matrix can take longer than four."""
    t = CostTable()
    assert t.table(3)[0] > 0
    t.add(1, 1.0)
    t.add(9, 3.0)  # bucket 8
    assert t.table(8)[1] == 1.0 and t.table(8)[8] == 3.0 and 1 < t.table(8)[4] < 3
    t.add(2, 2.9)
    assert t.table(8)[2] < 1.5  # once may be a hiccup
    t.add(2, 2.8)
    t.add(4, 1.6)
    t.add(4, 1.5)
    assert t.table(8)[2] == 2.8 and t.table(8)[4] == 1.5 and t.table(8)[3] == pytest.approx(1 + 2 * 0.5 / 3)
    t.add(32, 2.0)
    assert t.table(8)[8] < 2.0  # measured once, and a longer one was faster
    for _ in range(200):
        t.add(1, 2.0)
    assert t.table(1)[1] == pytest.approx(2.0, rel=0.05)


def test_calibration_is_censored_and_starts_at_the_confidence():
    c = Calibrator()
    assert c(0, 0.7) == pytest.approx(0.7) and c(0, 0.0) == 0.02 and c(0, 1.0) == 0.98
    for _ in range(100):
        c.add(0, 0.75, False)
    assert c(0, 0.75) < 0.1 and c(3, 0.75) == pytest.approx(0.75)
    model = tiny_verifier()
    text = plain(model, PROMPT, 20)
    out = dllm.speculate(
        model, Script(text, "sometimes"), PROMPT, max_new_tokens=20, length="fixed:k=6", search="argmax"
    )
    for r in out.rounds:  # slots behind the first rejection are not judged
        assert len(r.observed) == min(r.accepted + 1, r.nodes)
        assert [node.accepted for node in r.observed] == [True] * r.accepted + [False] * (len(r.observed) - r.accepted)


def test_an_acceptance_head_begins_at_the_confidence_and_takes_the_step_of_its_posterior():
    """By hand: x = (1, 0, 0, 1, -1, 0, 0, 0) and p = 1/2 have x'x = 3, weight 1/4, so each weight moves by x / 2 over
    1 + 3/4."""
    head = AcceptanceHead()
    for conf in (0.1, 0.5, 0.9):
        assert head(3, conf) == pytest.approx(conf) and head(0, conf, Spread(1.0, 0.3)) == pytest.approx(conf)
    assert head(0, 0.0) == pytest.approx(0.02) and head(0, 1.0) == pytest.approx(0.98)
    head.add(0, 0.5, True)
    assert head.mean == pytest.approx([2 / 7, 1, 0, 2 / 7, -2 / 7, 0, 0, 0])
    assert head.cov[0, 0] == pytest.approx(1 - 1 / 7 + head.DRIFT) and head.cov[0, 4] == pytest.approx(1 / 7)
    assert head(0, 0.5) == pytest.approx(1 / (1 + np.exp(-6 / 7)))


def test_an_acceptance_head_learns_what_confidence_alone_does_not_tell():
    """Nodes of one confidence pass by their margin; counts by slot and confidence can only learn the mean."""
    rng, head, counts = np.random.default_rng(0), AcceptanceHead(), Calibrator()
    loss = {"head": 0.0, "counts": 0.0}
    for i in range(600):
        margin = float(rng.uniform(0, 4))
        node, passed = (
            (int(rng.integers(4)), 0.6, Spread(margin, 1.0)),
            bool(rng.uniform() < 1 / (1 + np.exp(4 - 2 * margin))),
        )
        for name, estimate in (("head", head), ("counts", counts)):
            p = estimate(*node)
            loss[name] -= np.log(p if passed else 1 - p) * (i >= 300)
            estimate.add(*node[:2], passed, node[2])
    assert loss["head"] < 0.75 * loss["counts"]
    assert head(1, 0.6, Spread(3.5, 1.0)) > 0.9 and head(1, 0.6, Spread(0.5, 1.0)) < 0.1
    assert 0.4 < counts(1, 0.6, Spread(3.5, 1.0)) < 0.6


def test_a_lattice_says_how_sure_each_slot_is():
    """By hand: one candidate of mass 0.8 has its rest for a rival, two of 1/2 have none."""
    low = float("-inf")
    logp = torch.tensor([[0.8, 0.0], [0.5, 0.5], [0.6, 0.3]]).log()
    lat = Lattice(
        torch.tensor([[4, -1], [5, 6], [7, 8]]), logp.masked_fill(logp == low, low), torch.tensor([4, 5, 7]), 9
    )
    shares = [[0.8, 0.2], [0.5, 0.5], [0.6, 0.3, 0.1]]
    entropy = [-sum(p * np.log(p) for p in row) for row in shares]
    assert [s.entropy for s in lat.spread] == pytest.approx(entropy, abs=1e-6)
    assert [s.margin for s in lat.spread] == pytest.approx([np.log(4), 0, np.log(2)], abs=1e-6)
    tree = lat.marked(Proposal((4, 5, 6, 7), (-1, 0, 0, 2), conf=(0.8, 0.5, 0.5, 0.6)))
    assert [s for _, _, s in tree.pick([0, 2, 3]).told] == [lat.spread[0], lat.spread[1], lat.spread[2]]
    assert [s for _, _, s in tree.head(2).then(chain([1])).told] == [None] * 3  # what is not known of all is of none


@pytest.mark.parametrize("length", ["cost:accept=head", "rejection:accept=head", "rejection:accept=counts"])
def test_what_is_learned_of_acceptance_belongs_to_the_pair_and_changes_no_text(length):
    model = tiny_verifier()
    text = plain(model, PROMPT, 20)
    drafter = Script(text, "sometimes")
    for tree in (0, 8):
        assert dllm.speculate(model, drafter, PROMPT, max_new_tokens=20, length=length, tree=tree).sequences == text
    pair = [c.pair if hasattr(c, "pair") else c.costs.calib for c in as_verifier(model).controllers.values()]
    begun = type(pair[0])()
    assert len(pair) == 2 and all(p(0, 0.8, Spread(1.8, 0.6)) != begun(0, 0.8, Spread(1.8, 0.6)) for p in pair)


def test_calibrate_measures_both_models():
    c = calibrate(tiny_verifier(), Noise(), lengths=(0, 1, 4, 8), repeats=2)
    assert c.verify.keys == [1, 2, 5, 8] and c.draft.keys == [1, 4, 8] and all(v > 0 for v in c.verify.mean.values())
    out = dllm.speculate(tiny_verifier(), Noise(), PROMPT, max_new_tokens=10, controller=c)
    assert len(out.tokens) == 10


def test_seconds_are_those_of_the_whole_call(monkeypatch, clock):
    """Asking the model for its own processors is work on the text, too."""
    model, own = tiny_verifier(), front.own_processors

    def slowly(*args):
        clock.now += 0.5
        return own(*args)

    monkeypatch.setattr(front, "own_processors", slowly)
    outs = dllm.speculate(model, Noise(), [PROMPT, PROMPT[:4]], max_new_tokens=2)
    assert all(out.seconds >= 0.5 and sum(out.wall.values()) == 0 for out in outs)


def test_costs_outlive_a_call():
    model, noise = tiny_verifier(), Noise()
    dllm.speculate(model, noise, PROMPT, max_new_tokens=10)
    (controller,) = as_verifier(model).controllers.values()
    assert controller.verify.keys
    dllm.speculate(model, noise, PROMPT, max_new_tokens=10)
    assert len(as_verifier(model).controllers) == 1


def test_costs_and_calibration_belong_to_the_pair_record_and_pause_to_the_text():
    model, noise = tiny_verifier(), Noise()
    for _ in range(2):
        dllm.speculate(model, noise, PROMPT, max_new_tokens=20)
    (c,) = as_verifier(model).controllers.values()
    one = c.fork()
    assert one.costs is c.costs and one.verify.keys and one.draft.keys and c.costs.overhead > 0
    assert c.costs.tries > 4 and c.costs.calib.tries.sum() > 0 and one.calib.tries.sum() > 0
    one.update(RoundStats(k=2, nodes=1, observed=[Judged(0, 0.6, False)], t_draft=0.1, t_verify=0.1))
    one.draft.mean, one.draft._table = dict.fromkeys(one.draft.keys, 1e6), None
    one.next_k(9)
    two = one.fork()
    assert one.paused and one.tries[1] == 1 and not two.paused and two.tries.sum() == 0
    assert CostAware(k_max=4).fork().draft.keys == []


def test_what_is_not_submitted_is_judged_by_the_text_that_follows():
    class None_(Fixed):
        def trim(self, proposal, carried=False, k=0):
            return 0

        def next_k(self, room):
            self.asked = getattr(self, "asked", -1) + 1
            return 0 if self.asked % 4 else super().next_k(room)

    model = tiny_verifier()
    text = plain(model, PROMPT, 12)
    for agree, passed in (("always", 4), ("never", 0)):
        out = dllm.speculate(
            model, Script(text, agree), PROMPT, max_new_tokens=12, controller=None_(6), carry="off", search="argmax"
        )
        assert out.sequences == text and out.tau == 1 and out.n_draft == 3 and not any(r.observed for r in out.rounds)
        said = [(node.slot, node.accepted) for r in out.rounds for node in r.unsent]
        assert said == [(i, True) for i in range(4)] * 2 + [(i, True) for i in range(3)] if passed else [(0, False)] * 3


def test_siblings_count_once_and_failures_count():
    nodes = [Judged(0, 0.6, False), Judged(0, 0.3, True), Judged(1, 0.5, False), Judged(1, 0.2, False)]
    r = RoundStats(k=2, observed=nodes, pending=2)
    assert r.judged == {0: True, 1: False}
    c = CostAware()
    c.update(r)
    assert c.tries[:3].tolist() == [0, 1, 1] and c.hits[:3].tolist() == [0, 1, 0]
    c.update(RoundStats(k=4, failed=True, pending=1, t_draft=0.5, t_verify=0.1))
    assert c.tries[1] == 2 and c.hits[1] == 1 and c.draft.mean == {4: 0.5}


@pytest.mark.parametrize("length", ["cost", "fixed:k=9", "adl", "failfast", "heuristic:k=7", "rejection"])
def test_k_caps_every_controller(length):
    model = tiny_verifier()
    text = plain(model, PROMPT, 12)
    out = dllm.speculate(model, Script(text), PROMPT, max_new_tokens=12, length=length, k=3)
    most = max(r.k for r in out.rounds)
    assert out.sequences == text and most <= 3 and (most == 3 or length == "cost")  # which goes by the clock
    none = dllm.speculate(model, Script(text), PROMPT, max_new_tokens=12, length=length, k=0)
    assert none.sequences == text and none.n_draft == 0


def test_metrics_count_what_happened():
    model = tiny_verifier()
    text = plain(model, PROMPT, 24)
    out = dllm.speculate(
        model, Script(text), PROMPT, max_new_tokens=24, length="fixed:k=5", search="argmax", carry="off"
    )
    assert out.tau == 6 and out.accepted_per_round == 5 and out.acceptance_rate == 1 and out.n_draft == 4
    assert out.per_slot_acceptance == [1] * 5 and set(out.wall) == {
        "replay", "draft", "search", "verify", "commit", "other",
    }  # fmt: skip
    assert sum(out.wall.values()) <= out.seconds and out.speedup_vs(2 * out.seconds) == pytest.approx(2)
    carried = dllm.speculate(
        model, Script(text, "sometimes"), PROMPT, max_new_tokens=24, length="fixed:k=9", search="argmax", carry="always"
    )
    assert carried.n_carried > 0 and carried.n_draft < carried.n_verify and carried.sequences == text
    assert SpecConfig.of({"tree": 4}, {"k": 3}).k == 3


class Halves(Fixed):
    """Submits two tokens of every draft."""

    def trim(self, proposal, carried=False, k=0):
        return 2


@pytest.mark.parametrize("tree", [0, 3])
def test_a_perfect_draft_stays_perfect_when_its_rest_is_carried(tree):
    model = tiny_verifier()
    text = plain(model, PROMPT, 24)
    out = dllm.speculate(
        model, Script(text), PROMPT, max_new_tokens=24, controller=Halves(9), carry="always", tree=tree, search="argmax"
    )
    assert out.sequences == text and out.n_carried >= 2 * out.n_draft - 1 >= 5
    assert out.tau == 3 and out.acceptance_rate == 1 and all(r.nodes == 2 for r in out.rounds)
    assert [r.k for r in out.rounds[:4]] == [9, 6, 3, 9]  # three are emitted a round; an empty rest is no draft


def test_tokens_behind_a_stop_are_not_counted_as_accepted():
    model = tiny_verifier()
    text = plain(model, PROMPT, 24)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(chr(65 + i) for i in ids))
    end = chr(65 + text[len(PROMPT) + 3])
    assert end not in tokenizer.decode(text[len(PROMPT) : len(PROMPT) + 3])
    for tree in (0, 9):
        out = dllm.speculate(
            model,
            Script(text),
            PROMPT,
            max_new_tokens=24,
            controller=Fixed(9),
            tokenizer=tokenizer,
            stop=end,
            tree=tree,
        )
        assert out.sequences == text[: len(PROMPT) + 4] and out.finish_reason == "stop"
        assert out.spans == [(4, 4)] and out.accepted_per_round == 4


# -- a simulated clock: 10 ms (1 + 0.03 n) for a verify of n tokens a row, the drafter as said


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def story(seed, n=420):
    """A text without a pattern; each has its own beginning."""
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


def drafted(clock, controller, agree, n, seconds=0.0, seed=0):
    """Rounds, slots asked for, and seconds against plain decoding, of a text of n tokens."""
    d = TimedScript(clock, story(seed), agree, seconds)
    (out,), took = timed(clock, controller, [d], n)
    assert out.tokens == d.text[4 : 4 + n]
    return out, d.asked, took / (0.0103 * n + 0.0009)


@pytest.mark.parametrize("failed", [40, 400])
def test_a_text_whose_drafts_fail_spoils_nothing_for_the_next(clock, failed):
    c = CostAware()
    _, _, cost = drafted(clock, c, "never", failed, seed=1)
    assert cost < 1.06
    out, _, _ = drafted(clock, c, "always", 64, seed=2)
    assert out.tau >= 12
    again, _, _ = drafted(clock, CostAware(), "always", 64, seed=2)
    assert out.n_verify <= again.n_verify  # it has the costs already


@pytest.mark.parametrize(
    "seconds", [0.02, 0.01, 0.003, lambda k: 0.005 * k, lambda k: 0.02 * k], ids=["2", "1", "0.3", "0.5 k", "2 k"]
)
def test_a_useless_drafter_costs_little_of_the_first_text(clock, seconds):
    """In verifies: a draft of two forwards, of one, ..., and drafters that pay by the slot."""
    c = CostAware()
    for seed in (1, 2):
        out, asked, cost = drafted(clock, c, "never", 64, seconds, seed)
        assert cost < 1.07 and max(asked, default=0) <= 3 and out.tau == 1
    _, asked, cost = drafted(clock, c, "never", 400, seconds, 3)
    assert cost < 1.05 and len(asked) > 2  # probed to the end, within its share
    out, _, _ = drafted(clock, c, "always", 400, seconds, 4)  # and where it is of use, it is used
    assert out.tau > {0.02: 2, 0.01: 3, 0.003: 3}.get(seconds, 1)  # the dearer, the later it is noticed


def test_a_free_draft_is_always_made_and_trimmed_by_its_confidence(clock):
    c = CostAware(k_max=16)
    drafted(clock, c, "sometimes", 200, 0.0001)
    f = c.fork()
    assert f.next_k(99) == 16 and f.next_k(7) == 7
    sure, doubtful = f.trim(chain([1] * 16, [0.97] * 16), k=16), f.trim(chain([1] * 16, [0.3] * 16), k=16)
    assert doubtful < 3 < sure
    for _ in range(50):
        f.update(RoundStats(k=16, nodes=1, observed=[Judged(0, 0.8, False)], t_verify=0.0106))
    assert f.next_k(99) == 16 and not f.paused


def test_a_good_drafter_is_used_at_once(clock):
    for seconds in (0.0, 0.003, 0.01):
        c = CostAware()
        first, asked, _ = drafted(clock, c, "always", 64, seconds, 1)
        assert first.n_verify <= 6 and asked[:2] == [1, 1]  # its cost was unknown for two rounds
        second, _, _ = drafted(clock, c, "always", 64, seconds, 2)
        assert second.n_verify <= 4


def test_verifies_are_measured_by_their_rows(clock):
    c = CostAware()
    drafted(clock, c, "sometimes", 40, 0.001, 50)
    single = dict(c.verify.mean)
    scripts = [TimedScript(clock, story(60 + i), "sometimes", 0.001) for i in range(16)]
    results, _ = timed(clock, c, scripts, 40, scale=lambda rows: rows / 4)
    assert all(r.tokens == s.text[4:44] for r, s in zip(results, scripts, strict=True))
    assert set(c.costs.verifies.tables) == {1, 16} and c.verify.mean == single
    for rows, scale in ((1, 1.0), (16, 4.0)):  # every length that was seen has its own cost, exactly
        for n, seconds in c.costs.verifies.of(rows).mean.items():
            assert seconds == pytest.approx(0.01 * (1 + 0.03 * n) * scale, rel=0.03), (rows, n)
        assert c.costs.verifies.seconds(rows, 1)[1] == pytest.approx(0.0103 * scale, rel=0.03)
    assert c.costs.verifies.seconds(12, 1)[1] == pytest.approx(
        0.0103 * 4 * 12 / 16, rel=0.03
    )  # as the nearest that was seen
    assert [r.rows for r in results[0].rounds[:2]] == [16, 16] and results[0].rounds[1].width >= 1


def test_a_dear_drafter_is_not_asked_where_the_verify_is_shared(clock):
    """One forward of the drafter a row against a forward of the verifier for all: it pays alone, not in a batch."""
    c = CostAware()
    for i in range(2):
        alone, _, _ = drafted(clock, c, "always", 64, 0.01, 70 + i)
    assert alone.n_verify <= 4
    scripts = [TimedScript(clock, story(80 + i), "sometimes", 0.01) for i in range(16)]
    _, took = timed(clock, c, scripts, 64)
    assert took < 1.4 * 64 * 0.0103 and all(len(s.asked) < 20 for s in scripts)
