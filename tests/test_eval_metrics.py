"""The report's numbers against values computed elsewhere or by hand."""

from __future__ import annotations

import math

import pytest

from dllm.eval import metrics

# (tokens per forward, accuracy) and AUP of d3LLM's leaderboard for LLaDA and Dream (arXiv 2601.07568 and its data
# files).
GSM8K = {
    "vanilla": ([(1.0, 72.55)], 72.5),
    "Fast-dLLM": ([(1.0, 74.79), (2.77, 74.68)], 205.8),
    "D2F": ([(1.0, 74.98), (2.88, 74.39)], 213.8),
    "dParallel": ([(1.0, 74.0), (5.14, 72.63)], 358.1),
    "d3LLM": ([(1.0, 74.02), (9.11, 73.09)], 637.7),
}
MATH = {
    "vanilla": ([(1.0, 32.2)], 32.2),
    "Fast-dLLM": ([(1.0, 32.1), (1.97, 30.82)], 47.2),
    "D2F": ([(1.0, 29.1), (2.66, 28.94)], 49.0),
    "dParallel": ([(1.0, 32.0), (3.17, 30.18)], 64.5),
    "d3LLM": ([(1.0, 32.76), (5.74, 30.36)], 107.6),
}
DREAM = {
    "vanilla": ([(1.0, 83.94)], 83.9),
    "Fast-dLLM": ([(1.0, 83.68), (1.44, 79.0)], 116.5),
    "dParallel": ([(1.0, 83.8), (3.02, 82.12)], 245.7),
    "EAGLE-3": ([(1.0, 76.57), (5.12, 76.57)], 319.0),
}


@pytest.mark.parametrize(("task", "best"), [(GSM8K, 74.98), (MATH, 41.15), (DREAM, 83.94)])
def test_aup_reproduces_the_leaderboard(task, best):
    for points, published in task.values():
        assert metrics.aup(points, best) == pytest.approx(published, abs=0.06)


def test_aup_cuts_points_that_lose_more_than_five():
    assert metrics.aup([(1.0, 70.0), (2.0, 64.9)]) == metrics.aup([(1.0, 70.0)]) == 70.0
    assert metrics.aup([(2.0, 70.0), (1.0, 70.0)]) == pytest.approx(140.0)  # sorted; no loss, so the plain area
    assert math.isnan(metrics.aup([]))


@pytest.mark.parametrize(("first", "then"), [(70.0, 65.0), (100 * 0.62, 100 * 0.57), (100 * 0.83, 100 * 0.78)])
def test_aup_keeps_a_point_that_loses_exactly_five(first, then):
    assert metrics.aup([(1.0, first), (2.0, then)]) > first == metrics.aup([(1.0, first), (2.0, then - 0.01)])


def test_areas_begin_at_a_common_point():
    """A single fast point is no curve of its own: it would count all its tokens, whatever it lost."""
    curves = {"plain": [(1.0, 100.0)], "fast and wrong": [(25.0, 70.0)], "fast and right": [(7.58, 100.0)]}
    areas = metrics.areas(curves)
    assert areas["plain"] == 100.0 and areas["fast and right"] == pytest.approx(758.0)
    assert math.isnan(areas["fast and wrong"])
    without = metrics.areas({k: v for k, v in curves.items() if k != "plain"})
    assert without["fast and right"] == pytest.approx(758.0) and math.isnan(without["fast and wrong"])


def test_areas_of_slow_starts_are_the_leaderboards():
    """Curves that begin at one token per forward keep their own beginning; of several slow settings the most accurate
    is where the others begin."""
    assert metrics.areas({k: v for k, (v, _) in GSM8K.items()}) == pytest.approx(
        {k: area for k, (_, area) in GSM8K.items()}, abs=0.06
    )
    areas = metrics.areas(
        {"random": [(1.0, 40.0)], "confidence": [(1.0, 90.0)], "one": [(3.0, 50.0)], "two": [(3.0, 85.0)]}
    )
    assert areas["random"] == 40.0 and math.isnan(areas["one"]) and 90.0 < areas["two"] < 270.0
    assert metrics.areas({}) == {}
    near = metrics.areas({"a": [(1.0, 40.0)], "b": [(1.04, 90.0)], "c": [(3.0, 85.0)]})  # within 5 % of the slowest
    assert near["b"] == pytest.approx(1.04 * 90) and 1.04 * 90 < near["c"] < 3 * 90


def test_intervals_of_one_sample():
    assert metrics.interval([1.0]) == pytest.approx((0.025, 1.0))  # exact binomial: 0.05 / 2
    assert metrics.interval([0.5]) == (0.5, 0.5)  # a score that is no verdict


def test_interval():
    low, high = metrics.interval([0.0] * 50 + [1.0] * 50)
    assert 0.38 < low < 0.42 and 0.58 < high < 0.62  # normal theory: 0.402 … 0.598
    assert metrics.interval([1.0] * 100) == pytest.approx((0.9638, 1.0), abs=1e-3)  # exact binomial
    assert metrics.interval([0, 1, 1, 0, 1], seed=4) == metrics.interval([0, 1, 1, 0, 1], seed=4)
    assert all(map(math.isnan, metrics.interval([])))


def test_mcnemar_is_the_exact_binomial_of_the_discordant_pairs():
    a = [1] * 8 + [0] * 2 + [1, 0]
    b = [0] * 8 + [1] * 2 + [1, 0]
    assert metrics.mcnemar(a, b) == {"only_a": 8, "only_b": 2, "p": pytest.approx(0.109375)}
    assert metrics.mcnemar([1, 0], [1, 0])["p"] == 1.0
    assert metrics.mcnemar([0.5], [0.49]) == {"only_a": 1, "only_b": 0, "p": 1.0}  # half a point is right


def test_paired_comparisons():
    a = [{"tokens": 10, "nfe": 10}, {"tokens": 20, "nfe": 20}, {"tokens": 30, "nfe": 30}]
    b = [{"tokens": 10, "nfe": 5}, {"tokens": 20, "nfe": 10}, {"tokens": 30, "nfe": 15}]
    value, low, high = metrics.paired_ratio(a, b, "tokens", "nfe")
    assert (value, low, high) == pytest.approx((2.0, 2.0, 2.0))
    difference, low, high = metrics.paired_difference([0] * 40, [1] * 20 + [0] * 20)
    assert difference == 0.5 and 0.3 < low < 0.5 < high < 0.7
    assert metrics.paired_difference([1, 1], [1, 1]) == (0.0, 0.0, 0.0)
    none = [{"tokens": 0, "nfe": 3}]
    assert math.isnan(metrics.paired_ratio(none, none, "tokens", "nfe")[0])


def test_a_gain_is_paired():
    a, b = [(10, 10), (20, 20), (30, 20)], [(10, 5), (20, 10), (30, 10)]
    gain, low, high = metrics.paired_gain(a, b)
    assert gain == pytest.approx(60 / 25 - 60 / 50) and 1.0 <= low <= gain <= high <= 1.5
    assert metrics.paired_gain(a, a) == (0, 0, 0)
    assert math.isnan(metrics.paired_gain(a[:1], b[:1])[1])


def test_frontier():
    points = [(1.0, 70.0), (2.0, 70.0), (3.0, 60.0), (2.5, 55.0), (0.5, 80.0)]
    assert metrics.frontier(points) == [4, 1, 2]


def row(correct, tokens, nfe, seconds=1.0, **more):
    clock = {
        "seconds": seconds,
        "share": seconds / 2,
        "prefill_seconds": 0.1,
        "decode_seconds": seconds - 0.1,
        "peak_mb": 5.0,
    }
    return {"correct": correct, "tokens": tokens, "tokens_raw": tokens + 1, "nfe": nfe, "nfe_equiv": nfe / 2,
    "finish": "stop", "error": None, "clock": clock, **more}  # fmt: skip


def test_summary_counts_what_it_says():
    failed = row(
        0.0, 0, 0, error="RuntimeError: x", finish="error", nfe_equiv=None, clock={"seconds": 0.0, "share": 0.0}
    )
    cell = metrics.summarize([row(1.0, 10, 5), row(0.0, 0, 3), row(1.0, 20, 4, 3.0), failed])
    assert (cell["n"], cell["errors"], cell["accuracy"], cell["empty"]) == (4, 1, 0.5, 1)  # an error is a wrong answer
    assert cell["tpf"] == pytest.approx(30 / 12)  # of sums …
    assert cell["tpf_mean"] == pytest.approx((2 + 0 + 5) / 3)  # … and the mean of ratios; the empty answer is 0 tokens
    assert (cell["nfe"], cell["nfe_equiv"]) == pytest.approx((4.0, 2.0))
    assert cell["clock"]["tokens_per_second"] == pytest.approx(30 / 2.5)
    assert cell["clock"]["tokens_per_second_sample"] == pytest.approx((10 + 0 + 20 / 3) / 3)
    assert cell["clock"]["prefill_seconds"] == pytest.approx(0.3)
    assert cell["finish"] == {"stop": 3}
