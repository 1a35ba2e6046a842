"""A tick waits for the device once, and captured ticks decode what eager ones do: samplers under caches, in ragged
batches where rows refresh at different ticks and take the place of others.

That a tick asks nothing beside is shown on shapes without values (test_samplers_questions), golden decodes by graphs in
test_graphs_golden.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from replay import standing_in, waits
from scripted import tiny
from sweeps import dealt

import dllm
from dllm.call.job import prepare
from dllm.decoding.cache.registry import POLICIES
from dllm.decoding.meter import Meter
from dllm.errors import DllmError
from dllm.samplers import registry

PROMPTS = [[5, 6], [1, 2, 3, 30, 31, 32, 33], [7, 8, 9, 10], [4]]
CALL: dict[str, Any] = {"max_new_tokens": 12, "block_length": 4, "early_stop": False, "batch_size": 2}
OTHERS = {"daedal", "eotp", "lopa"}  # docs/decoding.md says why these wait
OTHERS |= {"freedave"}  # a lookahead
COMPOSED = ["adablock:delimiters=[3]+credit+prophet", "localleap+credit", "prophet:region=all+dsb", "editing+klass"]
SPECS = [n if n != "adablock" else "adablock:delimiters=[3]" for n in sorted(set(registry.names()) - OTHERS)] + COMPOSED


def agrees(sampler: str, cache: str) -> None:
    """One wait a tick, and the same by graphs. Skips what the library refuses."""
    v2 = sampler == "fast_dllm_v2"
    model = tiny(block_size=4 if POLICIES[cache].blockwise or v2 else None, shift=int(v2))
    call = {**CALL, "sampler": sampler, "cache": cache}
    try:
        job = prepare(model, PROMPTS, call)
    except DllmError as reason:
        pytest.skip(str(reason))
    meter, ticks = Meter(len(PROMPTS)), list[int]()

    def decode() -> None:
        ticks.extend(len(t.rows) for t in job.ticks(meter))

    found, asked = waits(decode), Counter[str]()
    for what, n in found.items():
        asked[what.partition(" ")[0]] += n
    # the host brings numbers of rows, each kind once; two reads come before the first tick
    assert asked.pop("tolist") <= len(ticks) + 2
    asked.pop("lift_fresh", None)
    assert not asked, found
    plain = dllm.generate(model, PROMPTS, **call)
    with standing_in():
        captured = dllm.generate(model, PROMPTS, graphs=True, **call)
    for a, b in zip(plain, captured, strict=True):
        assert (a.sequences, a.nfe, a.positions, a.calls) == (b.sequences, b.nfe, b.positions, b.calls)
    assert captured[0].stats["graphs"]["replays"] > 0


@pytest.mark.parametrize(("sampler", "cache"), dealt(SPECS, POLICIES))
def test_samplers_and_caches(sampler: str, cache: str) -> None:
    agrees(sampler, cache)


@pytest.mark.parametrize("block_size", [None, 4])
def test_forwards_of_as_many_copies_as_a_step_wants_are_not_kept_in_one_place(block_size: int | None) -> None:
    """LoPA tries as many branches as there are sure columns, and Prophet may ask for a fill by any of its forwards."""
    model = tiny(block_size=block_size)
    call: dict[str, Any] = {"max_new_tokens": 24, "block_length": 4, "sampler": "lopa+prophet", "early_stop": False}
    plain = dllm.generate(model, PROMPTS, **call)
    with standing_in():
        captured = dllm.generate(model, PROMPTS, graphs=True, **call)
    assert [(o.sequences, o.nfe, o.positions) for o in captured] == [(o.sequences, o.nfe, o.positions) for o in plain]
