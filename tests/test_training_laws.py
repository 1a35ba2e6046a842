"""The measures between the verifier's and the drafter's law: identities, gradients, and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dllm.training.laws import DIVERGENCES, accepted, expected_length, folded, kept, tvd, tvd_plus

torch.set_num_threads(1)
V = 4


def laws(n, seed=0, size=V):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, size, generator=g, dtype=torch.float64).mul(1.5).log_softmax(-1).unbind(0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_zero_for_equal_laws_and_positive_for_others(name):
    p, q = laws(50)
    assert DIVERGENCES[name](p, p).abs().max() < 1e-12
    assert DIVERGENCES[name](p, q).min() > 1e-3


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_are_those_of_finite_differences(name):
    p, q = laws(6)
    logits = q.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: DIVERGENCES[name](p, x.log_softmax(-1)), logits)


@pytest.mark.parametrize("name", ("jsd", "tvd"))
def test_symmetric_divergences_have_their_bounds(name):
    p, q = laws(50)
    torch.testing.assert_close(DIVERGENCES[name](p, q), DIVERGENCES[name](q, p))
    apart = torch.full((2, 1, V), -80.0, dtype=torch.float64)
    apart[0, 0, 0] = apart[1, 0, 1] = 0.0  # laws without a common token
    assert float(DIVERGENCES[name](*apart)) == pytest.approx({"jsd": math.log(2), "tvd": 1.0}[name])


def test_divergences_by_hand():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert float(DIVERGENCES["forward-kl"](p, q)) == pytest.approx(0.5 * math.log(2))
    assert float(DIVERGENCES["reverse-kl"](p, q)) == float("inf")  # it drafts what the verifier never says
    assert float(DIVERGENCES["tvd"](p, q)) == pytest.approx(0.25)
    m = (0.375, 0.5, 0.125)
    halves = 0.5 * math.log(0.5 / m[0]) + 0.25 * math.log(0.25 / m[0]) + 0.25 * math.log(0.25 / m[2])
    assert float(DIVERGENCES["jsd"](p, q)) == pytest.approx(halves / 2)


def test_total_variation_is_the_chance_of_a_rejection():
    p, q = laws(20)
    torch.testing.assert_close(1 - accepted(p, q).sum(-1), tvd(p, q))


def test_the_policy_gradient_of_tvd_plus_is_that_of_tvd_over_the_deviation_of_its_rewards():
    p, q = laws(3)
    logits = q.clone().requires_grad_()
    tokens = torch.multinomial(q.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(1))
    found = tvd_plus(p, logits.log_softmax(-1), tokens)
    torch.testing.assert_close(found.detach(), tvd(p, q))  # what is shown is the total variation
    (mine,) = torch.autograd.grad(found.sum(), logits)
    (plain,) = torch.autograd.grad(tvd(p, logits.log_softmax(-1)).sum(), logits)
    reward = (p > q).double()
    mean = (reward * q.exp()).sum(-1).mean()
    torch.testing.assert_close(mine, plain / (mean * (1 - mean)).sqrt(), atol=4e-3, rtol=0.02)


def test_tvd_plus_of_equal_rewards_moves_nothing():
    p, _ = laws(3)
    logits = p.clone().requires_grad_()
    (grad,) = torch.autograd.grad(tvd_plus(p, logits.log_softmax(-1), torch.zeros(3, 2).long()).sum(), logits)
    assert not grad.any()


@pytest.mark.parametrize(("share", "n"), ((0.4, 4), (1.0, 10), (0.01, 1)))
def test_a_selection_keeps_its_share_and_the_largest_gaps(share, n):
    gap = torch.tensor([3.0, 1.0, 1.0, 9.0, 1.0, 1.0, -2.0, 1.0, 0.0, 1.0])
    chosen = kept(gap, share)
    assert int(chosen.sum()) == n and set(chosen.tolist()) <= {0.0, 1.0}
    order = [3, 0, 1, 2, 4, 5, 7, 9, 8, 6]  # by gap, then by place
    assert chosen.nonzero()[:, 0].tolist() == sorted(order[:n])


def test_a_folded_law_is_a_law_and_no_further_from_another_one():
    p, q = laws(30, size=12)
    best = p.topk(3, -1).indices
    small_p, small_q = folded(p, best), folded(q, best)
    torch.testing.assert_close(small_q.exp().sum(-1), torch.ones(30, dtype=torch.float64))
    torch.testing.assert_close(small_q[:, :3], q.gather(-1, best))
    for name, divergence in DIVERGENCES.items():
        assert (divergence(small_p, small_q) <= divergence(p, q) + 1e-12).all(), name


def judged(p, q, draws):
    """Mass of each token by all outcomes of the draws: each stays with min(1, left / q), else what is left shrinks."""
    mass = torch.zeros_like(p)
    for some in itertools.product(range(len(p)), repeat=draws):
        left, chance = p, torch.stack([q[x] for x in some]).prod()
        for x in some:
            keep = min(1.0, float(left[x] / q[x]))
            mass[x] += chance * keep
            chance = chance * (1 - keep)
            rest = (left - q).clamp_min(0)
            left = rest / rest.sum() if float(rest.sum()) > 0 else left
    return mass


@pytest.mark.parametrize("draws", (1, 2, 3))
def test_accepted_mass_is_that_of_all_draws(draws):
    p, q = laws(3)
    for i, mass in enumerate(accepted(p, q, draws)):
        torch.testing.assert_close(mass, judged(p[i].exp(), q[i].exp(), draws))


@pytest.mark.parametrize("draws", (1, 2))
def test_expected_length_is_that_of_all_texts_and_draws(draws):
    slots, size = 3, 3
    g = torch.Generator().manual_seed(5)
    q = torch.randn(slots, size, generator=g, dtype=torch.float64).log_softmax(-1)
    verifier = {  # a law behind every text
        text: torch.randn(size, generator=g, dtype=torch.float64).log_softmax(-1)
        for n in range(slots)
        for text in itertools.product(range(size), repeat=n)
    }

    def length(text):
        if len(text) == slots:
            return 0.0
        mass = judged(verifier[text].exp(), q[len(text)].exp(), draws)
        return sum(float(mass[v]) * (1 + length((*text, v))) for v in range(size))

    texts = list(itertools.product(range(size), repeat=slots))
    p = torch.stack([verifier[text[:i]] for text in texts for i in range(slots)])
    tokens = torch.tensor(texts).flatten()
    row, column = torch.arange(len(texts)).repeat_interleave(slots), torch.arange(slots).repeat(len(texts)) + 2
    found = expected_length(p, q.repeat(len(texts), 1), tokens, row, column, (len(texts), slots + 3), draws)
    weight = p.gather(-1, tokens[:, None]).view(-1, slots).sum(-1).exp()  # of each text by the verifier
    assert float((weight * found).sum()) == pytest.approx(length(()), rel=1e-9)


def test_expected_length_of_a_greedy_verifier_by_hand():
    p = torch.full((5, V), float("-inf"), dtype=torch.float64)
    tokens = torch.tensor([1, 2, 3, 0, 0])
    p[torch.arange(5), tokens] = 0.0
    _, q = laws(5)
    a = q.exp()[torch.arange(5), tokens]
    row, column = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([4, 5, 6, 2, 3])
    found = expected_length(p, q, tokens, row, column, (2, 8))
    torch.testing.assert_close(found, torch.stack([a[0] * (1 + a[1] * (1 + a[2])), a[3] * (1 + a[4])]))
    twice = expected_length(p, q, tokens, row, column, (2, 8), draws=2)
    b = 1 - (1 - a) ** 2
    torch.testing.assert_close(twice, torch.stack([b[0] * (1 + b[1] * (1 + b[2])), b[3] * (1 + b[4])]))


@pytest.mark.parametrize("draws", (1, 2))
def test_the_gradient_of_expected_length_is_that_of_finite_differences(draws):
    p, q = laws(5)
    row, column = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 1, 2])
    logits, tokens = q.clone().requires_grad_(), p.argmax(-1)
    assert torch.autograd.gradcheck(
        lambda x: expected_length(p, x.log_softmax(-1), tokens, row, column, (2, 3), draws), logits
    )


def test_a_draft_of_the_verifiers_own_law_is_accepted_whole():
    p, _ = laws(4)
    row, column = torch.zeros(4).long(), torch.arange(4)
    assert float(expected_length(p, p, p.argmax(-1), row, column, (1, 4))) == pytest.approx(4.0)
