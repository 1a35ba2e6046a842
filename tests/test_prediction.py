"""Prediction: confidences, entropies, filters and the inverse CDF against plain formulas."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.decoding import noise
from dllm.decoding.prediction import Law, Prediction, draw, first_argmax, inverse_cdf, nucleus, support


def sorted_nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """The rule by a full sort and whole numbers: a token stays while the mass before it is at most top_p."""
    kept = torch.zeros_like(probs, dtype=torch.bool)
    for row, marks in zip(probs.tolist(), kept, strict=True):
        before = 0
        for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
            if before <= Fraction(top_p) * 2**62 and row[i] > 0:
                marks[i] = True
            before += math.ceil(Fraction(row[i]) * 2**62)
    return kept


@given(
    st.integers(0, 10_000),
    st.sampled_from([0.1, 1.0, 4.0, 12.0, 60.0]),
    st.floats(0.01, 0.999),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=60)
def test_nucleus_equals_the_sorted_rule(seed: int, scale: float, top_p: float, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 700, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * scale
    logits[1] = logits[1].round()  # many ties
    probs = logits.softmax(-1)
    assert torch.equal(nucleus(probs, top_p), sorted_nucleus(probs, top_p))


def law(*masses: float, rest: float = 0.0, size: int = 600) -> torch.Tensor:
    """Probabilities of the first tokens; all others have `rest`."""
    return torch.cat([torch.tensor(masses, dtype=torch.float64), torch.full((size - len(masses),), rest).double()])[
        None
    ]


LAWS = {
    "uniform": law(rest=1 / 600),
    "one token": law(1.0),
    "one token, the last": law(1.0).flip(1),
    "two halves": law(0.0, 0.5, 0.0, 0.5),
    "many ties around one": law(0.25, 0.5, rest=0.25 / 598),
    "denormals": law(0.3, 0.7, rest=1e-44),
    "smallest floats": law(0.7, 0.3 - 1e-7, 1e-30, 1e-38, 1e-45),
    "a neighbour each": law(*[0.001 * (1 + 2**-23 * i) for i in range(500)]),
    "neighbours in float64": law(*[0.001 * (1 + 2**-52 * i) for i in range(500)]),
    "less than one": law(0.1, 0.1),
    "more than one": law(0.6, 0.6, 0.6),
}


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.25, 0.3, 0.5, 0.7, 0.9, 0.95, 1 - 1e-9, 0.99999999999])
@pytest.mark.parametrize("name", LAWS)
def test_nucleus_of_hard_laws_equals_the_sorted_rule(name: str, top_p: float) -> None:
    for probs in (LAWS[name], LAWS[name].float()):
        assert torch.equal(nucleus(probs, top_p), sorted_nucleus(probs, top_p))


def test_the_nucleus_is_the_same_alone_and_in_a_batch() -> None:
    probs = (torch.randn(6, 5000) * 4).softmax(-1)
    assert torch.equal(nucleus(probs, 0.9), torch.cat([nucleus(row[None], 0.9) for row in probs]))


def test_the_nucleus_breaks_ties_by_lowest_id() -> None:
    probs = torch.full((1, 8), 0.125)
    assert nucleus(probs, 0.3).tolist() == [[True] * 3 + [False] * 5]
    assert support(probs, Law(top_k=2, top_p=1.0)).sum() == 2


@pytest.mark.parametrize("size", [3, 511, 2048, 5000, 126_464])
def test_first_argmax_is_the_lowest_best_id(size: int) -> None:
    rows = torch.randint(0, 4, (5, size)).float()
    rows[1, -1] = 9
    rows[2] = -torch.inf
    assert torch.equal(first_argmax(rows)[:, 0], rows.argmax(-1))


@given(st.integers(0, 10_000), st.integers(2, 1500))
@settings(max_examples=40)
def test_inverse_cdf_picks_the_interval_that_holds_u(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = (torch.randn(4, size, dtype=torch.float64, generator=generator) * 3).softmax(-1)
    u = torch.rand(4, dtype=torch.float64, generator=generator)
    expected = torch.searchsorted(probs.cumsum(-1), u[:, None] * probs.sum(-1, keepdim=True), right=True)[:, 0]
    assert torch.equal(inverse_cdf(probs, u), expected)


def test_a_token_without_mass_is_never_drawn() -> None:
    probs = torch.zeros(2, 1030, dtype=torch.float64)
    probs[:, 600] = 1.0
    assert inverse_cdf(probs, torch.tensor([1e-17, 1 - 1e-16], dtype=torch.float64)).tolist() == [600, 600]


@pytest.mark.parametrize("gumbel", [False, True])
def test_draws_follow_the_filtered_distribution(gumbel: bool) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -8.0]).expand(20_000, -1)
    keys = torch.arange(20_000)
    law = Law(0.7, top_k=4, filtered=True, gumbel=gumbel)
    token, confidence, _, _ = draw(logits, law, torch.zeros_like(keys), keys, keys % 64)
    want = (logits[0, :4] / 0.7).softmax(-1)
    seen = torch.bincount(token, minlength=5) / 20_000
    assert seen[4] == 0
    assert torch.allclose(seen[:4].float(), want, atol=0.015)
    assert torch.allclose(confidence, want[token])


def test_scores_agree_with_plain_formulas() -> None:
    logits = torch.randn(2, 5, 300, dtype=torch.float64) * 3
    logits[..., 7] = -torch.inf
    pred = Prediction(logits, torch.arange(5).expand(2, -1))
    probs = logits.softmax(-1)
    top2 = probs.topk(2).values
    assert torch.allclose(pred.confidence, probs.amax(-1))
    assert torch.allclose(pred.log_confidence, probs.amax(-1).log())
    assert torch.allclose(pred.margin, top2[..., 0] - top2[..., 1])
    assert torch.allclose(pred.negative_entropy, -torch.special.entr(probs).sum(-1))
    assert torch.allclose(pred.gap, logits.topk(2).values.diff(dim=-1)[..., 0].neg())


def test_log_confidence_orders_what_rounds_to_one() -> None:
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 1], logits[0, 1, 1] = 30.0, 31.0
    pred = Prediction(logits, torch.arange(2)[None])
    assert pred.confidence[0, 0] == pred.confidence[0, 1] == 1
    assert pred.log_confidence[0, 1] > pred.log_confidence[0, 0]


def test_confidence_at_temperature_reads_the_untempered_law() -> None:
    logits = torch.randn(1, 6, 50)
    pred = Prediction(logits, torch.arange(6)[None], law=Law(1.5))
    assert torch.allclose(pred.confidence, logits.softmax(-1).gather(-1, pred.token[..., None])[..., 0], atol=1e-6)


def test_noise_is_a_pure_function_of_its_keys() -> None:
    seed, step, cols = torch.arange(3)[:, None], torch.tensor([[4]]), torch.arange(7)[None]
    table = noise.uniform(seed, step, cols)
    assert torch.equal(table[1:2, 3:4], noise.uniform(torch.tensor([[1]]), step, torch.tensor([[3]])))
    assert len(table.unique()) == table.numel()
    assert not torch.equal(table, noise.uniform(seed, step + 1, cols))
    many = noise.uniform(torch.zeros(1, dtype=torch.long), torch.arange(50_000), torch.zeros(1, dtype=torch.long))
    assert abs(float(many.mean()) - 0.5) < 0.01
    assert abs(float(many.var()) - 1 / 12) < 0.002


def test_the_streams_of_a_step_are_independent() -> None:
    """Token, order, transfer and remasking draws of one step: each uniform, no two alike, no value twice."""
    streams = (noise.TOKEN, noise.ORDER, noise.TRANSFER, noise.REMASK)
    seed, step = torch.arange(40)[:, None, None], torch.arange(10)[:, None]
    draws = torch.stack([noise.uniform(seed, step, torch.arange(50), s).flatten() for s in streams])
    assert (draws.mean(1) - 0.5).abs().max() < 0.01
    assert (draws.corrcoef() - torch.eye(4)).abs().max() < 0.03
    assert draws.unique().numel() == draws.numel()


def test_gumbel_rows_of_another_position_step_or_seed_are_others() -> None:
    at = [torch.tensor(x) for x in ([0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1])]
    rows = noise.gumbel_rows(*at, 5000)
    assert (rows.corrcoef() - torch.eye(4)).abs().max() < 0.06
    assert rows.mean().item() == pytest.approx(0.5772, abs=0.03) and rows.var().item() == pytest.approx(1.645, abs=0.1)
