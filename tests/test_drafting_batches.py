"""Rows of a batch: drafted for together, verified together as chains or trees, of lengths that serve them all."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import wraps
from typing import ClassVar

import numpy as np
import pytest
import torch
from drafting_kit import KINDS, Noise, Script, plain, tiny_verifier

import dllm
from dllm.drafting.autoregressive import ARDrafter
from dllm.drafting.control import CostAware, CostTable, Cut, Length
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Ask, Need, asked
from dllm.drafting.lattice import DraftFailure
from dllm.drafting.loans import Loans
from dllm.drafting.proposal import chain
from dllm.drafting.row import forked

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
        for _ in range(CostTable.TRIED):
            c.costs.verifies.of(rows).add(n, seconds)
    for k in range(1, len(verify)):
        for _ in range(CostTable.TRIED):
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


@pytest.mark.parametrize(
    ("name", "cache"),
    [("llada-trained", "none"), ("llada-trained", "approx"), ("dream-random", "approx"), ("sdar-random", "auto")],
)
def test_drafts_of_a_ragged_batch_are_those_of_each_text_alone(name, cache):
    """Also where a store keeps what is known, rounds leave texts of different lengths."""
    model = dllm.load(f"tests/golden/checkpoints/tiny-{name}", dtype="float64")
    drafter = DiffusionDrafter(model, vocabulary="ids", prefix_cache=cache, refresh=3)
    texts = [list(p) for p in PROMPTS]
    need, loans = Need(model.vocab_size), Loans(False)
    alone, many = ([forked(drafter) for _ in texts] for _ in range(2))
    for d, text in zip(alone, texts, strict=True):
        d.reset(text, need)
    for d, text in zip(many, texts, strict=True):
        d.reset(text, replace(need, loans=loans))
    assert len({d.company for d in many}) == 1
    for turn in range(5):
        ks = [3, 5, 2, 4 + turn]
        drafts = asked([Ask(d, text, k) for d, text, k in zip(many, texts, ks, strict=True)])
        for i, (d, text, k) in enumerate(zip(alone, texts, ks, strict=True)):
            own = d.draft(text, k)
            assert drafts[i].tokens.equal(own.tokens) and drafts[i].argmax.equal(own.argmax)
            assert torch.allclose(drafts[i].logp, own.logp, atol=1e-6) and drafts[i].start == own.start == len(text)
            new = own.argmax[: 1 + (i + turn) % 3].tolist()
            text.extend(new)
            for row in (d, many[i]):
                row.observe(text, new, {})
    assert [d.forwards for d in many] == [5] * 4


def test_one_forward_drafts_for_all_rows(monkeypatch):
    model = dllm.load("tests/golden/checkpoints/tiny-llada-trained", dtype="float64")
    verifier, shapes, forward = tiny_verifier(), [], type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, ids, *a, **kw: (shapes.append(len(ids)), forward(self, ids, *a, **kw))[1]
    )
    drafter = DiffusionDrafter(model, vocabulary="ids")
    outs = dllm.speculate(verifier, drafter, PROMPTS, max_new_tokens=6, length="fixed:k=3", carry="off")
    assert [o.sequences for o in outs] == [plain(verifier, p, 6) for p in PROMPTS]
    assert shapes[0] == 4 and len(shapes) == max(o.draft_forwards for o in outs)


@pytest.mark.parametrize("law", [{}, dict(temperature=0.8, seed=4)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kind", ["llama", "gemma3-mixed"])
def test_a_causal_lm_drafts_for_all_rows(kind, law, monkeypatch):
    """One forward a token for the batch, also once rows have ended; a row drafts as it does alone."""
    verifier, model, shapes = tiny_verifier(), tiny_verifier(kind, seed=5), []
    forward = type(model).forward
    spec = dict(length="fixed:k=3", carry="off", **law)
    alone = []
    for i, p in enumerate(PROMPTS):
        own = {**spec, **({"seed": law["seed"] + i} if law else {})}
        alone.append(dllm.speculate(verifier, ARDrafter(model), p, max_new_tokens=15, **own))

    @wraps(forward)
    def counted(self, *a, **kw):
        shapes.append(len(kw["input_ids"])) if self is model else None
        return forward(self, *a, **kw)

    monkeypatch.setattr(type(model), "forward", counted)
    many = dllm.speculate(verifier, ARDrafter(model), PROMPTS, max_new_tokens=15, **spec)
    for one, out in zip(alone, many, strict=True):
        assert out.sequences == one.sequences and out.spans == one.spans
    assert shapes[0] == 4 and len(shapes) < sum(o.draft_forwards for o in many) / 2
