"""Rows of a batch: drafted for together, verified together as chains or trees, of lengths that serve them all."""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np
import pytest
import torch
from drafting_kit import KINDS, Noise, Script, plain, tiny_verifier

import dllm
from dllm.drafting.control import CostAware, Cut, Length
from dllm.drafting.lattice import DraftFailure
from dllm.drafting.proposal import chain

PROMPTS = [[3, 17, 5, 9], [4, 8], [6, 6, 2, 11, 7, 30, 21], [12]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "spec",
    [
        dict(tree=7, length="fixed:k=4"),
        dict(search="tree", graft="lookup", tree=9),
        dict(search="sample_tree", length="fixed:k=4"),
    ],
    ids=["tree", "grafted", "sampled"],
)
def test_trees_of_a_batch_give_each_row_its_own_text(kind, spec):
    model = tiny_verifier(kind)
    law = dict(temperature=0.7, seed=5) if spec.get("search") == "sample_tree" else {}
    many = dllm.speculate(model, Settled(), PROMPTS, max_new_tokens=14, **law, **spec)
    for i, (out, prompt) in enumerate(zip(many, PROMPTS, strict=True)):
        assert max(r.nodes for r in out.rounds) > 1
        if law:
            law["seed"] = 5 + i
            assert out.sequences == dllm.speculate(model, Settled(), prompt, max_new_tokens=14, **law, **spec).sequences
        else:
            assert out.sequences == plain(model, prompt, 14)


class Settled(Noise):
    """Noise that is a function of the text."""

    def draft(self, ids, k, *, generator=None):
        self.generator = torch.Generator().manual_seed(sum(i * t for i, t in enumerate(ids, 1)))
        return super().draft(ids, k)


class Choir(Script):
    """Knows the texts of all rows, and drafts for those that ask together."""

    calls: ClassVar[list[int]] = []

    @property
    def company(self):
        return "choir"

    def together(self, asks):
        Choir.calls.append(len(asks))
        drafts = super().together(asks)
        return [DraftFailure("silent") if a.ids[0] == 12 else d for a, d in zip(asks, drafts, strict=True)]


def test_rows_of_one_company_are_asked_once_a_round_and_a_failure_is_one_rows():
    model = tiny_verifier()
    texts = [plain(model, p, 12) for p in PROMPTS]

    class Each(Choir):
        def reset(self, ids, need):
            super().reset(ids, need)
            self.text = next(t for t in texts if t[: len(ids)] == list(ids))

    Choir.calls = []
    outs = dllm.speculate(model, Each(texts[0]), PROMPTS, max_new_tokens=12, length="fixed:k=3")
    assert [o.sequences for o in outs] == texts
    assert Choir.calls[:2] == [4, 4] and len(Choir.calls) == max(o.n_verify for o in outs) - 1
    assert [o.draft_failures > 0 for o in outs] == [False, False, False, True]
    assert [o.n_verify for o in outs] == [3, 3, 3, 12]
    for r in outs[0].rounds[:2]:
        assert (r.fellows, r.slots) == (4, 3)


def costly(rows, verify, draft=0.0):
    c = CostAware()
    c.rows = rows
    for n, seconds in enumerate(verify, 1):
        c.costs.verifies.of(rows).add(n, seconds)
    for k in range(1, len(verify)):
        c.costs.drafts.of(rows).add(k, draft)
    return [c.fork() for _ in range(rows)]


@pytest.mark.parametrize("seed", range(6))
def test_rows_agree_upon_the_width_that_is_best_for_all(seed):
    """Brute force over every number of nodes of every row: the verify costs what its widest row does."""
    rng = np.random.default_rng(seed)
    n, rows = 4, 3
    verify = np.cumsum(rng.uniform(0.01, 1.0, n + 1)) + 1
    mine = costly(rows, verify)
    conf = rng.uniform(0.1, 0.97, (rows - 1, n))
    cuts = [Cut(c, chain(range(n), list(row)), False, n) for c, row in zip(mine, conf, strict=False)]
    chosen = mine[0].cuts(cuts, rows)

    def rate(lengths):
        hoped = [np.cumprod([c.calib(i, x) for i, x in enumerate(row)]) for c, row in zip(mine, conf, strict=False)]
        tokens = rows + sum(h[:k].sum() for h, k in zip(hoped, lengths, strict=True))  # a third row has no draft
        return tokens / verify[max(lengths)]

    best = max(map(rate, itertools.product(range(n + 1), repeat=rows - 1)))
    assert rate(chosen) == pytest.approx(best, rel=1e-9)


def test_a_doubtful_row_does_not_widen_the_verify_and_may_use_what_a_sure_one_pays_for():
    verify = [1.0 + 0.4 * i for i in range(9)]
    sure, doubtful = chain(range(8), [0.97] * 8), chain(range(8), [0.15] * 8)

    def cut(*drafts):
        mine = costly(len(drafts), verify)
        return mine[0].cuts([Cut(c, d, False, 8) for c, d in zip(mine, drafts, strict=True)], len(drafts))

    assert cut(doubtful) == [0] and cut(sure) == [8]
    both = cut(doubtful, sure)
    assert both[0] == both[1] > 0  # what is fed as padding otherwise
    assert cut(*[doubtful] * 7, sure)[-1] < both[1]


def test_lengths_are_those_of_a_row_alone_where_rows_are_alike():
    verify, mine = [1.0, 1.0, 1.0, 1.6, 1.6, 1.6, 3.0], None
    for rows in (1, 2, 4):
        mine = costly(rows, [rows * v for v in verify], rows * 0.3)
        for c in mine:
            c.fellows = rows
        assert mine[0].lengths([Length(c, 6) for c in mine], rows) == [5] * rows == [mine[0].next_k(6)] * rows
