"""A tick asks the device nothing but its flags: every sampler under every cache, as shapes without values, by a count of
the questions, and as captured work. docs/gpu.md names the exceptions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from replay import standing_in, waits
from scripted import tiny
from torch._subclasses.fake_tensor import FakeTensorMode

import dllm
from dllm.call.job import Job, prepare
from dllm.decoding.cache.registry import POLICIES
from dllm.decoding.canvas import mapped
from dllm.decoding.engine import Waiting
from dllm.decoding.facts import Shape
from dllm.decoding.meter import Meter
from dllm.decoding.runner import Batch, Runner
from dllm.errors import DllmError
from dllm.samplers import registry

PROMPTS = [[5, 6], [1, 2, 3, 30, 31, 32, 33], [7, 8, 9, 10]]
CALL: dict[str, Any] = {"max_new_tokens": 12, "block_length": 4, "early_stop": False}
EAGER = {
    "daedal": "it edits lengths",
    "eotp": "it edits lengths",
    "lopa": "its branches are as many as columns are left to try",
}
SETTINGS: dict[str, dict[str, object]] = {  # what a method needs here
    "adablock": {"delimiters": [3, 8]},
    "learn2pd": {},
    "lookahead": {},
}
COMPOSED = ["adablock:delimiters=3+credit+prophet", "localleap+credit", "editing+klass", "prophet:region=all+dsb"]
LAWS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    {"temperature": 0.7, "gumbel": True},
    {"cfg_scale": 0.5, "suppress_tokens": [3, 4], "min_new_tokens": 3, "eos": [2], "early_stop": True},
    {"logits_eos_inf": True, "eos": [2]},
    {"confidence_eos_eot_inf": True, "eos": [2]},
]


def job(sampler: str, cache: str, **changes: Any) -> Job:
    """The call made ready. Skips what the library refuses."""
    name = sampler.partition(":")[0].partition("+")[0]
    spec = {"name": sampler, **SETTINGS[sampler]} if SETTINGS.get(sampler) else sampler
    blockwise = POLICIES[cache].blockwise or name == "fast_dllm_v2"
    model = tiny(block_size=4 if blockwise else None, shift=int(name == "fast_dllm_v2"))
    try:
        return prepare(model, PROMPTS, {**CALL, "sampler": spec, "cache": cache, **changes})
    except DllmError as reason:
        pytest.skip(str(reason))


def states(j: Job, ticks: int = 2) -> Iterator[tuple[Runner, Batch]]:
    """A runner and its batch, before each of the first ticks."""
    run = Runner(j.model, j.sampler, j.policy, j.options, Meter(len(PROMPTS)))
    batch = Waiting.of(j.sampler, j.policy, j.queue).first(len(PROMPTS))
    run.begin(batch)
    for _ in range(ticks):
        yield run, batch
        run.tick(batch)
        batch.facts = dllm.decoding.facts.fetch(batch.flags)
        if any(f.done or f.closing for f in batch.facts):
            return


def asks_nothing(j: Job) -> None:
    """Whole ticks, of rows that refresh and of others, on tensors without values."""
    with torch.inference_mode():
        for run, batch in states(j):
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            for stale in (0, 1):
                part = batch.part(list(range(len(PROMPTS))))
                facts = [f._replace(stale=stale) for f in part.facts]
                shape = Shape.of(facts, part.window.feeds(bool(stale))).static(batch.state.canvas.ids.shape[1])
                state, window = (mapped(fake.from_tensor, x) for x in (part.state, part.window))
                part = part._replace(facts=facts, state=state, window=window, at=fake.from_tensor(part.at))
                with fake:
                    run.work(part, shape)


@pytest.mark.parametrize("cache", POLICIES)
@pytest.mark.parametrize("sampler", sorted(set(registry.names()) - set(EAGER)))
def test_a_tick_of_every_sampler_asks_nothing(sampler: str, cache: str) -> None:
    asks_nothing(job(sampler, cache))


@pytest.mark.parametrize("cache", ["none", "dual", "block"])
@pytest.mark.parametrize("sampler", COMPOSED)
def test_nor_does_one_of_a_composition(sampler: str, cache: str) -> None:
    asks_nothing(job(sampler, cache))


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: "-".join(law))
def test_nor_does_a_law(law: dict[str, Any], cache: str) -> None:
    asks_nothing(job("confidence", cache, **law))


@pytest.mark.parametrize("cache", POLICIES)
@pytest.mark.parametrize("sampler", sorted(set(registry.names()) - set(EAGER)))
def test_a_tick_waits_once(sampler: str, cache: str) -> None:
    j = job(sampler, cache, batch_size=2)
    ticks = 0

    def decode() -> None:
        nonlocal ticks
        for _ in j.ticks(meter):
            ticks += 1

    meter = Meter(len(PROMPTS))
    found = waits(decode)
    read = sum(n for what, n in found.items() if what.startswith("tolist"))
    assert read <= meter.calls + 2, found  # the windows of the call, and how long they may take
    rest = {what: n for what, n in found.items() if not what.startswith("tolist") and "lift_fresh" not in what}
    assert not rest


@pytest.mark.parametrize("cache", POLICIES)
@pytest.mark.parametrize("sampler", sorted(set(registry.names()) - {"daedal", "eotp"}))
def test_captured_ticks_decode_the_same(sampler: str, cache: str) -> None:
    """In ragged batches, where rows refresh at different ticks and rows take the place of others."""
    j = job(sampler, cache)
    spec = {"name": sampler, **SETTINGS[sampler]} if SETTINGS.get(sampler) else sampler
    call = {**CALL, "sampler": spec, "cache": cache, "batch_size": 2}
    plain = dllm.generate(j.model, [*PROMPTS, [4]], **call)
    with standing_in():
        captured = dllm.generate(j.model, [*PROMPTS, [4]], graphs=True, **call)
    for a, b in zip(plain, captured, strict=True):
        assert (a.sequences, a.nfe, a.positions, a.calls) == (b.sequences, b.nfe, b.positions, b.calls)
    if sampler not in EAGER:
        assert captured[0].stats["graphs"]["replays"] > 0
