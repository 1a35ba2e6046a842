"""Settings at which a method is another one, on a checkpoint whose confidences are spread, as ragged batches."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN

import dllm
from dllm.decoding.canvas import Canvas, Leaves, Span, State
from dllm.decoding.prediction import Prediction
from dllm.decoding.slots import View
from dllm.models.hub import load
from dllm.samplers.localleap import LocalLeap
from dllm.samplers.threshold import Threshold

PROMPTS = [[3, 14, 15, 92, 65], [35, 89], [79, 32, 38, 46, 26, 43, 38, 32]]
DELIMITERS = list(range(0, 156, 5))
EOS = 124


@cache
def model() -> Any:
    return load(GOLDEN / "checkpoints" / "tiny-llada-random", dtype="float64", device="cpu")


def decode(sampler: Any, prompts: Any = PROMPTS, **arguments: Any) -> list[tuple[list[int], int, Any]]:
    given = {"max_new_tokens": 16, "block_length": 8, "eos": EOS, "early_stop": False, "trace": True, **arguments}
    outputs = dllm.generate(model(), prompts, sampler=sampler, **given)
    return [(o.sequences, o.nfe, o.trace.commits) for o in outputs]


INF = float("inf")


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("localleap:kappa=0.8,tau=0.8", "threshold:tau=0.8"),
        ("localleap:kappa=0.8,tau=0.5,radius=0", "threshold:tau=0.8"),
        ("localleap:kappa=0.8,tau=0.95", "threshold:tau=0.8"),
        ("credit:alpha=0,tau=0.8", "threshold:tau=0.8"),
        ("credit:beta=0,gamma=1e9,tau=0.8", "threshold:tau=0.8"),
        ("eb:gamma=0", "entropy"),
        ("eb:gamma=inf", "threshold:tau=0"),
        ("factor:f=inf", "threshold:tau=0"),
        ({"name": "adablock", "delimiters": DELIMITERS, "tau_delimiter": INF, "tau": 0.8}, "threshold:tau=0.8"),
        ({"name": "prophet", "high": INF, "mid": INF, "low": INF}, "confidence"),
        ([{"name": "prophet", "high": INF, "mid": INF, "low": INF}, "threshold"], "threshold"),
        ("eoser:gamma_min=1,gamma_max=1,whole=false", "confidence"),
        ("sched:high=2,low=2", "prophet:high=2,mid=2,low=2,region=all"),
        ("localleap+credit:alpha=0", "localleap"),
        ("threshold:tau=1", "confidence"),
        ("ccd:expand=0", "ccd:seek=false,expand=0"),
    ],
)
@pytest.mark.parametrize("cache_", ["none", "dual"])
def test_identity(left: Any, right: Any, cache_: str) -> None:
    assert decode(left, cache=cache_) == decode(right, cache=cache_)


def test_the_limits_differ_from_the_defaults() -> None:
    """The settings above are no accident: at others the same pairs differ."""
    assert decode("localleap:kappa=0.8,tau=0.5") != decode("threshold:tau=0.8")
    assert decode("credit:tau=0.8") != decode("threshold:tau=0.8")
    adablock = {"name": "adablock", "delimiters": DELIMITERS, "tau_delimiter": 0.1, "tau": 0.8}
    assert decode(adablock) != decode("threshold:tau=0.8")
    assert decode("eoser:gamma_min=0.01,whole=false") != decode("confidence")
    assert decode("prophet:high=2,mid=2,low=2") != decode("confidence")


def test_one_forward_a_block_or_one_a_column() -> None:
    assert [nfe for _, nfe, _ in decode("threshold:tau=0")] == [2, 2, 2]
    assert [nfe for _, nfe, _ in decode("threshold:tau=1")] == [16, 16, 16]


def test_prophet_at_once_is_one_forward() -> None:
    at_once = {"name": "prophet", "high": -INF, "mid": -INF, "low": -INF}
    for cache_ in ("none", "prefix", "dual"):
        assert [nfe for _, nfe, _ in decode(at_once, cache=cache_)] == [1, 1, 1]


def test_credit_is_no_slower_than_the_threshold_it_feeds() -> None:
    plain, credited = decode("threshold:tau=0.8"), decode("credit:tau=0.8")
    assert sum(nfe for _, nfe, _ in credited) <= sum(nfe for _, nfe, _ in plain)


def test_daedal_without_growth_is_a_threshold_over_its_first_length() -> None:
    spec = {"name": "daedal", "initial": 8, "tau_eos": 0, "tau_expand": 0, "tail": 4, "tau_high": 0.8}
    mask = model().mask_id
    canvases = [p + [mask] * 8 + [EOS] * 2 for p in PROMPTS]
    grown = decode(spec, max_new_tokens=16, block_length=4)
    fixed = decode("threshold:tau=0.8", canvases, infill=True, max_new_tokens=0, block_length=4)
    for (ids, nfe, commits), (expected, forwards, order) in zip(grown, fixed, strict=True):
        assert ids == expected
        assert nfe == forwards + 1  # the forward of stage 1
        assert [sorted(p) for p in commits[1:]] == [sorted(p) for p in order]


def test_localleap_widens_the_commit_set() -> None:
    """I10: above the threshold's own set, growing with the radius, shrinking as a bar rises."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = torch.randn(1, 24, 6, generator=generator) * 3
        view, pred = seen(logits)

        def chosen(view: View = view, pred: Prediction = pred, **params: Any) -> torch.Tensor:
            return LocalLeap(**{"kappa": 0.9, "tau": 0.6, "radius": 2, **params}).select(view, pred, pred.confidence)

        plain = Threshold(tau=0.9).select(view, pred, pred.confidence)
        assert not (plain & ~chosen()).any()
        for smaller, larger in (
            (chosen(radius=1), chosen(radius=3)),
            (chosen(tau=0.8), chosen()),
            (chosen(), chosen(tau=0.5)),
        ):
            assert not (smaller & ~larger).any()


def seen(logits: torch.Tensor) -> tuple[View, Prediction]:
    """The first step of one row whose columns are all masked."""
    width = logits.shape[1]
    ids = torch.full((1, width), 6)
    zero = torch.zeros(1, dtype=torch.long)
    masked = torch.ones_like(ids, dtype=torch.bool)
    canvas = Canvas(ids, masked, ~masked, zero, zero + width, 6)
    state = State.begin(canvas, zero, canvas.length, Leaves(), Leaves())
    reads = torch.arange(width)[None]
    return View(state, Span(zero, zero + width, zero + width, reads, zero)), Prediction(logits, reads)
