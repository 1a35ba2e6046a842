"""The chance of drawn siblings: what recursive rejection reaches, and what any rule could."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from dllm.bench import siblings
from dllm.drafting.accept import reject
from dllm.drafting.proposal import Proposal, Rows
from dllm.errors import DllmError

torch.set_num_threads(1)


def law(n, seed, zeros=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, generator=g, dtype=torch.float64) ** 3
    x[torch.randperm(n, generator=g)[:zeros]] = 0
    return x / x.sum()


def draws(q, k):
    """Ordered draws without replacement, as many as there are, with their chances."""
    k = min(k, int((q > 0).sum()))
    for some in permutations(range(len(q)), k):
        chance, left = 1.0, 1.0
        for token in some:
            chance, left = chance * float(q[token]) / max(left, 1e-300), left - float(q[token])
        if chance > 0:
            yield some, chance


def transport(p, q, k):
    """The linear programme: as much of the draws' law as can be moved to p, each draw only to its own tokens."""
    sets = {}
    for some, chance in draws(q, k):
        key = tuple(sorted(some))
        sets[key] = sets.get(key, 0.0) + chance
    pairs = [(i, token) for i, some in enumerate(sets) for token in some]
    rows = np.zeros((len(sets) + len(p), len(pairs)))
    for at, (i, token) in enumerate(pairs):
        rows[i, at] = rows[len(sets) + token, at] = 1
    return -linprog(-np.ones(len(pairs)), rows, [*sets.values(), *p.tolist()]).fun


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_best_rule_is_the_linear_programme(seed, k):
    p, q = law(5, seed, seed % 2), law(5, seed + 50, seed % 4)
    most = siblings.optimum(p, q, k)
    assert most == pytest.approx(transport(p, q, k), abs=1e-9)
    assert siblings.recursive(p, q, k) <= most + 1e-12
    assert [siblings.optimum(q, q, k), float(siblings.recursive(q, q, k))] == pytest.approx([1, 1])


def test_draws_within_the_first_tokens():
    q = law(5, 3, 1)
    for k in (1, 2, 3, 4):
        expected = [sum(c for some, c in draws(q, k) if max(some) <= m) for m in range(5)]
        assert siblings.within(q, k).tolist() == pytest.approx(expected)


def test_by_hand():
    """Two tokens, drawn both: one of them is always right. Drawn once: the overlap."""
    p, q = torch.tensor([0.9, 0.1]).double(), torch.tensor([0.2, 0.8]).double()
    for k, chance in ((1, 0.3), (2, 1.0)):
        assert [float(siblings.recursive(p, q, k)), siblings.optimum(p, q, k)] == pytest.approx([chance, chance])


@pytest.mark.parametrize("k", [2, 3])
def test_recursive_rejection_keeps_as_many_as_it_is_said_to(k):
    p, q, rounds = law(6, 4), law(6, 24), 1500
    g, kept = torch.Generator().manual_seed(0), 0
    for _ in range(rounds):
        tokens = torch.multinomial(q, k, generator=g).tolist()
        tree = Proposal(tuple(tokens), (-1,) * k, "sampled", Rows(q.expand(k, -1)))
        kept += reject(tree, lambda node, since: p, g).accepted
    expected = float(siblings.recursive(p, q, k))
    assert abs(kept / rounds - expected) < 4 * math.sqrt(expected * (1 - expected) / rounds)
    assert expected < siblings.optimum(p, q, k) - 0.05  # here the rule leaves something


def test_the_embedded_pair_row_by_row(monkeypatch):
    monkeypatch.setattr(siblings, "NEW", 6)
    rows = list(siblings.run(2))
    assert [row.name for row in rows][:3] == [f"word_problems, {k} drawn: kept" for k in (1, 2, 3)] and len(rows) == 6
    assert [row.value for row in rows] == sorted(row.value for row in rows[:3]) + sorted(row.value for row in rows[3:])
    with pytest.raises(DllmError, match="is a dLLM"):
        next(siblings.run(drafter="suffix"))
