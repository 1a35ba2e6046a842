"""Lookahead: tokens of the plain call from no more forwards, for every sampler, cache, width and drafter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from golden_cases import model, read
from scripted import tiny
from sweeps import some

import dllm
from dllm.decoding.invariants import Checked
from dllm.errors import DllmError
from dllm.samplers import registry
from dllm.samplers.learn2pd import Filter

PROMPTS = [[3, 4, 5, 6, 7, 8], [9, 10, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
CALL: dict[str, Any] = {"max_new_tokens": 16, "block_length": 8}
SETTINGS: list[Any] = [
    2,
    {"rows": 4, "retain": False, "multi_source": False},
    {"rows": 4, "drafter": "ladder"},
    {"rows": 8, "max_rows": 12},
]
STATIC = "confidence"
CACHES = ["none", "prefix", "dual", "dual:left=2,right=3", "interval:warmup=1,every=3", "delayed:every=3", "dllm_cache"]
RANDOM, SDAR, DREAM = "tiny-llada-random", "tiny-sdar-random", "tiny-dream-random"
# settings under which a sampler shows its rule within sixteen tokens of a random model
HALF = Filter({"linear1.weight": torch.eye(8), "linear1.bias": torch.zeros(8),
               "linear2.weight": torch.eye(8), "linear2.bias": torch.full((8,), -0.4)}, 8, tau=0.5)  # fmt: skip
SPECS = {"learn2pd": {"name": "learn2pd", "filter": HALF}}
SHOWING = {
    "adablock": "adablock:delimiters=[40, 65, 102, 124, 150],tau=0.1",
    "threshold": "threshold:tau=0.4",
    "localleap": "localleap:kappa=0.6,tau=0.4",
    "credit": "credit:tau=0.5",
    "wino": "wino:tau_draft=0.4,tau_verify=0.6,least=2",
    "klass": "klass:kappa=0.4,epsilon=0.5",
    "remdm": "remdm:loops=4",
    "clad": "clad:tau=0.5,layers=1",
    "dapd": "dapd:tau_max=0.3,sure=0.95",
    "dawn": "dawn:layers=1,tau_sink=0.1,tau_edge=0.05,tau_low=0.6",
}


@cache
def plain(checkpoint: str, sampler: str, cache_: str, extra: tuple[tuple[str, Any], ...] = ()) -> Any:
    return decode(checkpoint, sampler, cache_, **dict(extra))


def decode(checkpoint: str, sampler: str, cache_: str, **extra: Any) -> Any:
    settled = {"mask_id": 158} if "fast-dllm" in checkpoint else {}
    spec = SPECS.get(sampler, sampler)
    arguments = {**CALL, **extra}
    return dllm.generate(model(checkpoint, **settled), PROMPTS, sampler=spec, cache=cache_, **arguments, trace=True)


def agrees(checkpoint: str, sampler: str, cache_: str, setting: Any, **extra: Any) -> list[Any]:
    """Check one ragged batch against the plain call; the outputs with lookahead."""
    base = plain(checkpoint, STATIC if sampler == "freedave" else sampler, cache_, tuple(extra.items()))
    outs = decode(checkpoint, sampler, cache_, lookahead=setting, **extra)
    for a, b in zip(base, outs, strict=True):
        assert b.sequences == a.sequences
        assert b.trace.commits == a.trace.commits  # the same steps, too
        assert b.trace.windows == a.trace.windows
        assert b.finish_reason == a.finish_reason
        assert b.nfe <= a.nfe
        capped = a.finish_reason == "cap"  # such a row ends with a forward of its own
        assert b.stats["steps"] == a.nfe - capped
        assert b.stats["forwards"] + b.stats["reruns"] == b.nfe - capped
        assert b.lossless
    assert outs[0].calls <= base[0].calls
    return outs


def usable(sampler: str, cache_: str, checkpoint: str) -> bool:
    try:
        plain(checkpoint, sampler, cache_)
    except DllmError:
        return False
    return True


def half(names: Sequence[str], settings: Sequence[Any]) -> list[Any]:
    """Each name with the number of every other setting; all in the sweep."""
    turns = {name: turn for turn, name in enumerate(names)}
    return some(product(names, range(len(settings))), lambda case: (turns[case[0]] + case[1]) % 2 == 0)


@pytest.mark.parametrize(("name", "i"), half(registry.names(), SETTINGS))
def test_every_sampler(name: str, i: int) -> None:
    """Each sampler with widths and drafters, the caches dealt out among them."""
    sampler = SHOWING.get(name, name)
    checkpoint, caches = next(
        (checkpoint, caches)
        for checkpoint in (RANDOM, SDAR, "tiny-fast-dllm-v2-random")
        if (caches := [c for c in ("none", "prefix", "dual", "block") if usable(sampler, c, checkpoint)])
    )
    agrees(checkpoint, sampler, caches[i % len(caches)], SETTINGS[i])


@pytest.mark.parametrize("cache_", CACHES)
def test_every_cache(cache_: str) -> None:
    for sampler, setting in zip(("confidence", "credit:tau=0.5", "confidence", "dsb"), SETTINGS, strict=True):
        agrees(RANDOM, sampler, cache_, setting)


@pytest.mark.parametrize("sampler", ["confidence", "threshold:tau=0.4"])
def test_block_causal_models_look_across_the_edge(sampler: str) -> None:
    for setting in [*SETTINGS[1:], 8]:
        outs = agrees(SDAR, sampler, "block", setting, early_stop=False)
        assert all(out.stats["reruns"] == 0 for out in outs)


def test_a_canvas_cut_on_a_block_causal_model() -> None:
    for setting in SETTINGS:
        agrees(SDAR, "slowfast", "none", setting)


def test_guesses_beyond_the_edge_need_masks_ahead() -> None:
    prompts = [case["prompt_ids"] for case in read(SDAR, "freedave_block_eager")[:3]]
    call = {"sampler": "threshold:tau=0.4", "cache": "block", "max_new_tokens": 16, "early_stop": False}
    near, far, base = (
        dllm.generate(model(SDAR), prompts, **call, lookahead=setting)
        for setting in ({"rows": 4, "ahead": 0}, {"rows": 4, "ahead": 1}, None)
    )
    assert [out.sequences for out in far] == [out.sequences for out in near] == [out.sequences for out in base]
    assert sum(out.nfe for out in far) < sum(out.nfe for out in near) <= sum(out.nfe for out in base)
    usual, inside = (
        dllm.generate(model(SDAR), prompts, **call, lookahead=s) for s in (4, {"rows": 4, "cross_blocks": False})
    )
    assert [out.nfe for out in usual] == [out.nfe for out in far]
    assert [out.nfe for out in inside] == [out.nfe for out in near]


@pytest.mark.parametrize("sampler", ["confidence", "threshold:tau=0.3,lone_opening=true"])
def test_shifted_models(sampler: str) -> None:
    for cache_ in ("none", "prefix", "dual"):
        agrees(DREAM, sampler, cache_, 4, max_new_tokens=8)


@pytest.mark.parametrize(
    ("sampler", "cache_", "extra"),
    [
        ("confidence", "none", {"temperature": 0.7}),
        ("random", "dual", {"temperature": 0.7, "top_p": 0.9}),
        ("dream:alg=origin", "none", {"temperature": 0.7, "gumbel": True, "max_new_tokens": 4}),
        ("threshold:tau=0.4", "dual", {"cfg_scale": 1.0}),
        ("confidence", "none", {"cfg_scale": 1.0, "temperature": 0.5}),
    ],
)
def test_sampling_and_guidance(sampler: str, cache_: str, extra: dict[str, Any]) -> None:
    agrees(RANDOM, sampler, cache_, 4, **extra)


@pytest.mark.parametrize("drafter", ["roll", "ladder"])
def test_true_steps_are_checked_and_guesses_are_not(drafter: str) -> None:
    checked = Checked()
    outs = decode(RANDOM, "lopa", "none", lookahead={"rows": 2, "drafter": drafter}, check=checked)
    longest = max(out.stats["steps"] for out in outs)
    assert sum(out.stats["steps"] for out in outs) >= checked.steps >= longest > 0  # rows of a tick step together


def test_drafts_save_forwards() -> None:
    base = sum(out.nfe for out in plain(RANDOM, "confidence", "dual"))
    none = agrees(RANDOM, "confidence", "dual", 1)
    assert sum(out.nfe for out in none) == base
    assert all(out.stats["rows"] == out.stats["forwards"] for out in none)  # the true one of each
    for rows in (2, 4, 8):
        outs = agrees(RANDOM, "confidence", "dual", rows)
        assert sum(out.nfe for out in outs) < 0.8 * base
        assert all(out.stats["rows"] <= rows * out.stats["forwards"] for out in outs)


@pytest.mark.parametrize("cache_", ["none", "dual", "delayed:every=3"])
@pytest.mark.parametrize(
    "setting", [4, {"rows": 4, "drafter": "ladder", "multi_source": False}, {"rows": 3, "ahead": 0}]
)
def test_a_row_is_guessed_in_a_batch_as_it_is_alone(cache_: str, setting: Any) -> None:
    """Not only its tokens: forwards, hits and evaluated guesses do not depend on its neighbours either."""
    prompts = [*PROMPTS, [40]]

    def work(out: Any) -> Any:
        return out.nfe, {k: out.stats[k] for k in ("hits", "retained", "rows", "depth", "reruns")}

    call: dict[str, Any] = {"cache": cache_, "lookahead": setting, **CALL}
    together = dllm.generate(model(RANDOM), prompts, **call)
    assert sum(out.stats["hits"] for out in together) > 0
    for i, out in enumerate(together):
        assert work(out) == work(dllm.generate(model(RANDOM), prompts[i], seed=i, **call))


def test_rows_enter_as_they_would_without_lookahead() -> None:
    prompts = [*PROMPTS, [30, 31], [40, 41, 42]]
    for sampler in ("confidence", "threshold:tau=0.3"):
        base = dllm.generate(model(RANDOM), prompts, sampler=sampler, cache="dual", batch_size=2, **CALL)
        outs = dllm.generate(model(RANDOM), prompts, sampler=sampler, cache="dual", batch_size=2, lookahead=4, **CALL)
        assert [o.sequences for o in outs] == [o.sequences for o in base]
        assert outs[0].calls <= base[0].calls


@pytest.mark.sweep
@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("cache_", [*CACHES, "block"])
@pytest.mark.parametrize("drafter", ["roll", "ladder"])
@pytest.mark.parametrize("rows", [2, 4, 8])
def test_sweep(name: str, cache_: str, drafter: str, rows: int) -> None:
    for sampler in {name, SHOWING.get(name, name)}:
        for checkpoint in (RANDOM, SDAR, DREAM):
            if usable(sampler, cache_, checkpoint):
                agrees(checkpoint, sampler, cache_, {"rows": rows, "drafter": drafter})
                agrees(checkpoint, sampler, cache_, {"rows": rows, "drafter": drafter}, temperature=0.6, seed=5)


@pytest.mark.parametrize("setting", [2, 3, 5])
def test_guesses_read_other_numbers_of_columns_than_the_forward_with_a_shadow_did(setting: int) -> None:
    """A block of a prompt has fewer masks than the one before: the shadow that was fed is wider than the guess."""
    net = tiny(block_size=4)
    prompts = [[18, 39], [39, 18, 30, 32, 39]]
    call: dict[str, Any] = {"max_new_tokens": 4, "block_length": 4, "cache": "block", "sampler": "wino", "infill": True}
    base = dllm.generate(net, prompts, **call)
    ahead = dllm.generate(net, prompts, **call, lookahead=setting)
    assert [o.sequences for o in ahead] == [o.sequences for o in base]
    assert sum(o.nfe for o in ahead) < sum(o.nfe for o in base)
