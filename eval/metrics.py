"""The numbers of a report from finished samples: accuracy, work, speed, comparisons.

Work is counted per sample and only to the first stop: an empty answer is 0 tokens. Ratios are of sums (aggregate),
with the mean of the per-sample ratios beside them where the two are often confused. Whatever a clock had a part in
stands apart under `clock`.
"""

from __future__ import annotations

import itertools
import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from dllm.eval.records import Cell, Sample, Speed

Array = NDArray[np.float64]
Count = Literal["tokens", "tokens_raw", "nfe", "emitted", "seconds", "processor"]

RESAMPLES = 2000  # of every bootstrap: the interval's ends move by under a tenth of its width
ALPHA = 3.0  # d3LLM's penalty on accuracy loss (arXiv 2601.07568)
KEEP = 5.0  # points of accuracy below its first point after which a curve is cut


def interval(correct: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean (BCa); the exact binomial one where all samples agree and a bootstrap sees no
    spread."""
    values = np.asarray(correct, dtype=float)
    if len(values) == 0:
        return (math.nan, math.nan)
    if np.ptp(values) == 0:
        if values[0] not in (0.0, 1.0):
            return (float(values[0]), float(values[0]))
        exact = stats.binomtest(int(values.sum()), len(values)).proportion_ci(confidence, method="exact")
        return (float(exact.low), float(exact.high))
    return _bootstrap((values,), np.mean, confidence, seed, paired=False)


def _bootstrap(
    data: tuple[Array, ...], statistic: Callable[..., object], confidence: float, seed: int, paired: bool
) -> tuple[float, float]:
    low = high = math.nan
    for method in ("percentile",) if paired else ("BCa", "percentile"):  # BCa is undefined on a handful of samples
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                data,
                statistic,
                n_resamples=RESAMPLES,
                confidence_level=confidence,
                paired=paired,
                vectorized=True,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        low, high = float(found.low), float(found.high)
        if not math.isnan(low + high):
            break
    return (low, high)


def count(row: Sample, name: Count) -> float:
    """A count of one sample; `emitted`: tokens with the stops, `seconds` and `processor`: of the clock."""
    if name == "emitted":
        return sum(sum(turn["emitted"]) for turn in row["turns"])
    if name == "seconds":
        return row["clock"].get("seconds", math.nan)
    if name == "processor":
        return row["clock"].get("processor", math.nan)
    return row[name]


def ratio(rows: Sequence[Sample], top: Count, bottom: Count) -> float:
    """Ratio of the sums of two counts over the samples; NaN where the lower sum is 0."""
    total = sum(count(row, bottom) for row in rows)
    return sum(count(row, top) for row in rows) / total if total else math.nan


def ratio_interval(
    rows: Sequence[Sample], top: Count, bottom: Count, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """`ratio` with its bootstrap interval over the samples."""
    columns = tuple(np.asarray([count(row, key) for row in rows], dtype=float) for key in (top, bottom))
    value = float(columns[0].sum() / columns[1].sum()) if columns[1].sum() else math.nan
    if len(rows) < 2 or math.isnan(value):
        return (value, math.nan, math.nan)
    return (value, *_bootstrap(columns, _of_sums, confidence, seed, paired=True))


def _of_sums(top: Array, bottom: Array, axis: int = -1) -> Any:
    return top.sum(axis) / bottom.sum(axis)


def summarize(rows: Sequence[Sample], confidence: float = 0.95, seed: int = 0) -> Cell:
    """One cell of the report (one task, one setting). Failed samples count as wrong answers, and nowhere else."""
    fine = [row for row in rows if not row.get("error")]
    correct = verdicts([row for row in rows if row["correct"] is not None])
    low, high = interval(correct, confidence, seed)
    cell: Cell = {
        "n": len(rows),
        "errors": len(rows) - len(fine),
        "accuracy": _mean(correct),
        "low": low,
        "high": high,
        "tokens": sum(row["tokens"] for row in fine),
        "tokens_raw": sum(row["tokens_raw"] for row in fine),
        "empty": sum(row["tokens"] == 0 for row in fine),
        "nfe": _mean([row["nfe"] for row in fine]),
        "nfe_equiv": _mean([equiv for row in fine if (equiv := row.get("nfe_equiv")) is not None]),
        "tpf": ratio(fine, "tokens", "nfe"),
        "tpf_mean": _mean([row["tokens"] / row["nfe"] for row in fine if row["nfe"]]),
        "arness": _mean([order for row in fine if (order := row.get("arness")) is not None]),
        "finish": dict(sorted(Counter(row["finish"] for row in fine).items())),
    }
    accepted = [count for row in fine for count in row.get("accepted") or ()]
    if accepted:
        cell["accepted_per_cycle"] = _mean(accepted)
        cell["draft_forwards"] = _mean([row["draft_forwards"] for row in fine])
    if ours := [row for row in fine if "own" in row]:
        own = sum(row["own"] for row in ours)
        cell["own_ms"] = 1000 * own / sum(row["nfe"] for row in ours)
        cell["own_share"] = own / sum(row["clock"]["seconds"] for row in ours)
    if slots := [row["slots"] for row in fine if row.get("slots")]:
        cell["slots"] = acceptance(slots)
    if read := [(row["p"], row["correct"] or 0.0) for row in fine if "p" in row]:
        cell |= calibration(*zip(*read, strict=True), confidence=confidence, seed=seed)
        cell |= recalibration([row for row in fine if "labels" in row], confidence=confidence, seed=seed)
    cell["clock"] = clock(fine)
    return cell


def acceptance(slots: Sequence[Sequence[Sequence[int]]]) -> list[float]:
    """P(slot is accepted | it was judged) from how often each sample's slots were judged, and accepted."""
    out = []
    for slot in range(max(map(len, slots))):
        judged, accepted = (sum(one[slot][i] for one in slots if len(one) > slot) for i in (0, 1))
        out.append(accepted / judged if judged else math.nan)
    return out


BINS = 15  # of the calibration error, of equal mass


def brier(p: Array, correct: Array, axis: int = -1) -> Array:
    """Mean square of what was said minus what came true."""
    return np.asarray(((p - correct) ** 2).mean(axis))


def ece(p: Array, correct: Array, axis: int = -1) -> Array:
    """Expected calibration error: the gap between mean p and accuracy, averaged over bins of equal mass."""
    order = np.argsort(p, axis=axis, kind="stable")
    said, came = (np.array_split(np.take_along_axis(x, order, axis), BINS, axis) for x in (p, correct))
    gaps = [abs(s.sum(axis) - c.sum(axis)) for s, c in zip(said, came, strict=True)]
    return np.asarray(sum(gaps) / p.shape[axis])


def calibration(p: Sequence[float], correct: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Cell:
    """Brier score and calibration error of probabilities, with bootstrap intervals. The error of few samples is biased
    upwards: a bin of one sample is never calibrated."""
    said, came = np.asarray(p, dtype=float), np.asarray(correct, dtype=float)
    spread = len(said) > 1 and np.ptp((said - came) ** 2) > 0
    ends = [_bootstrap((said, came), f, confidence, seed, paired=True) if spread else (float(f(said, came)),) * 2
            for f in (brier, ece)]  # fmt: skip
    (b_low, b_high), (e_low, e_high) = ends
    return {
        "brier": float(brier(said, came)), "brier_low": b_low, "brier_high": b_high,
        "ece": float(ece(said, came)), "ece_low": e_low, "ece_high": e_high,
    }  # fmt: skip


COLDEST, HOTTEST = 0.05, 20.0  # temperatures that are tried: labels that are all right ask for 0


def temperature(levels: Sequence[Array], truth: Sequence[int]) -> float:
    """The temperature at which labels are most likely, given the log p of each one's candidates and which of them it is
    (temperature scaling, arXiv 1706.04599)."""

    def loss(heat: float) -> float:
        return -sum(float(special.log_softmax(z / np.exp(heat))[i]) for z, i in zip(levels, truth, strict=True))

    ends = (math.log(COLDEST), math.log(HOTTEST))
    return math.exp(float(optimize.minimize_scalar(loss, bounds=ends, method="bounded").x))


def recalibration(rows: Sequence[Sample], *, confidence: float = 0.95, seed: int = 0) -> Cell:
    """The temperature that fits labels that were read, and what their p are worth at it. So that nothing is judged by
    what it was fitted to, each half of the samples has the temperature of the other half. Empty where a half has no
    label that is right."""
    ordered = sorted(rows, key=lambda row: row["index"])
    levels = [np.log(np.maximum([*row["labels"].values()], np.finfo(float).tiny)) for row in ordered]
    places = [None if row["truth"] is None else [*row["labels"]].index(row["truth"]) for row in ordered]

    def fitted(which: Iterable[int]) -> float | None:
        known = [(levels[i], place) for i in which if (place := places[i]) is not None]
        return temperature(*zip(*known, strict=True)) if known else None

    heat = [fitted(range(1 - half, len(rows), 2)) for half in (0, 1)]
    whole = fitted(range(len(rows)))
    if whole is None or heat[0] is None or heat[1] is None:
        return {}
    heats = [t for t in heat if t is not None]
    p = [float(special.softmax(z / heats[i % 2]).max()) for i, z in enumerate(levels)]
    after = calibration(p, verdicts(ordered), confidence=confidence, seed=seed)
    return {
        "temperature": whole,
        "brier_fitted": after["brier"],
        "brier_fitted_low": after["brier_low"], "brier_fitted_high": after["brier_high"],
        "ece_fitted": after["ece"], "ece_fitted_low": after["ece_low"], "ece_fitted_high": after["ece_high"],
    }  # fmt: skip


def verdicts(rows: Iterable[Sample]) -> list[float]:
    """Who was right; a sample without a verdict was not."""
    return [row["correct"] or 0.0 for row in rows]


def clock(rows: Sequence[Sample]) -> Speed:
    """Seconds and speeds. `tokens_per_second` is Σ tokens ÷ Σ wall seconds; `…_sample` the mean over samples of
    its own speed."""
    clocks = [row["clock"] for row in rows]
    wall = sum(c["share"] for c in clocks)
    speeds = [row["tokens"] / row["clock"]["seconds"] for row in rows if row["clock"].get("seconds")]
    out: Speed = {
        "seconds": wall,
        "tokens_per_second": sum(row["tokens"] for row in rows) / wall if wall else math.nan,
        "tokens_per_second_sample": _mean(speeds),
    }
    if known := [c["prefill_seconds"] for c in clocks if "prefill_seconds" in c]:
        out["prefill_seconds"] = sum(known)
    if known := [c["decode_seconds"] for c in clocks if "decode_seconds" in c]:
        out["decode_seconds"] = sum(known)
    if known := [c["peak_mb"] for c in clocks if c.get("peak_mb")]:
        out["peak_mb"] = max(known)
    return out


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


# ---------------------------------------------------------------------------------------------------------- comparisons


class Discordant(TypedDict):
    """Documents that one of two settings alone got right, and how likely such a split is by chance."""

    only_a: int
    only_b: int
    p: float


def mcnemar(a: Sequence[float], b: Sequence[float]) -> Discordant:
    """Exact McNemar test of paired right/wrong verdicts: how many only `a` and only `b` got right, and the two-
    sided p."""
    right_a, right_b = np.asarray(a) >= 0.5, np.asarray(b) >= 0.5
    only_a, only_b = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    p = float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p": p}


def paired_difference(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of b − a over the same documents, with its paired bootstrap interval."""
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    difference = float((second - first).mean())
    if np.ptp(second - first) == 0:
        return (difference, difference, difference)
    return (difference, *_bootstrap((second - first,), np.mean, confidence, seed, paired=False))


def paired_ratio(
    a: Sequence[Sample], b: Sequence[Sample], top: Count, bottom: Count, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """(Σtop/Σbottom of b) ÷ (the same of a) over the same documents, with its paired bootstrap interval: the
    speed-up."""
    keys: tuple[Count, Count] = (top, bottom)
    columns = tuple(np.asarray([count(row, key) for row in rows], dtype=float) for rows in (a, b) for key in keys)

    if columns[0].sum() == 0 or columns[1].sum() == 0 or columns[3].sum() == 0:
        return (math.nan, math.nan, math.nan)
    return _compared(columns, operator.truediv, confidence, seed)


def paired_gain(a: ArrayLike, b: ArrayLike, confidence: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """Σtop/Σbottom of b − the same of a, rows (n, 2) of the two counts of the same documents, with its paired bootstrap
    interval."""
    columns = (*np.asarray(a, dtype=float).T, *np.asarray(b, dtype=float).T)
    return _compared(columns, operator.sub, confidence, seed)


def _compared(
    columns: tuple[Array, ...], how: Callable[[Array, Array], Array], confidence: float, seed: int
) -> tuple[float, float, float]:
    """Σtop/Σbottom of b beside that of a (`how`), with its paired bootstrap interval; columns: top and bottom of a and
    of b."""

    def beside(*sums: Array, axis: int = -1) -> Any:
        top_a, bottom_a, top_b, bottom_b = sums
        return how(_of_sums(top_b, bottom_b, axis), _of_sums(top_a, bottom_a, axis))

    value = float(beside(*columns))
    if len(columns[0]) < 2:
        return (value, math.nan, math.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (value, *_bootstrap(columns, beside, confidence, seed, paired=True))


# ------------------------------------------------------------------------------------------------------------------ AUP


def aup(points: Sequence[tuple[float, float]], best: float | None = None, alpha: float = ALPHA) -> float:
    """Accuracy under parallelism (d3LLM, arXiv 2601.07568) of one method on one task.

    `points` are (tokens per forward, accuracy in percent); `best` is the best accuracy of any method on the task.
    Points that fall more than 5 percentage points below the first are cut; the first enters unweighted, as in the
    authors' script. Curves can be compared only where they begin at one number of tokens per forward: see `areas`.
    """
    curve = sorted(points)
    if not curve:
        return math.nan
    first = curve[0]
    curve = [point for point in curve if _kept(point, first)]
    top = max(best if best is not None else -math.inf, *(y for _, y in curve))

    def weighted(y: float) -> float:
        return y * min(math.exp(-alpha * (1 - y / top)), 1.0) if top > 0 else 0.0

    area = first[0] * first[1]
    for (rho0, y0), (rho1, y1) in itertools.pairwise(curve):
        area += 0.5 * (rho1 - rho0) * (weighted(y1) + weighted(y0))
    return area


def areas(curves: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, float]:
    """AUP of every method on one task, all curves beginning at a common point.

    The first point of a curve is not weighted, so one that began at 25 tokens per forward would count them all whatever
    it lost. Here each begins at the slowest setting of any method (the most accurate of those within 5 % of it), unless
    it has a point there itself; what loses more than 5 points against its beginning is cut. NaN: nothing is left.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return {}
    slowest = 1.05 * min(rho for rho, _ in points)
    start = max((point for point in points if point[0] <= slowest), key=lambda point: point[1])
    best = max(y for _, y in points)
    out = {}
    for name, curve in curves.items():
        if min(rho for rho, _ in curve) <= slowest:
            out[name] = aup(curve, best)
        else:
            kept = [point for point in curve if _kept(point, start)]
            out[name] = aup([start, *kept], best) if kept else math.nan
    return out


def _kept(point: tuple[float, float], first: tuple[float, float]) -> bool:
    return point[1] >= first[1] - KEEP - 1e-9  # percentages of fractions are off by rounding


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates, from left to right."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    best, kept = -math.inf, []
    for i in order:
        if points[i][1] > best:
            best = points[i][1]
            kept.append(i)
    return kept[::-1]
