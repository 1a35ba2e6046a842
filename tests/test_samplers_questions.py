"""A tick asks the device nothing: every sampler and cache, on fake tensors of a device that is not there."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from sweeps import dealt
from test_lookahead import HALF

from dllm.decoding.cache import registry as caches
from dllm.decoding.guidance import Guidance
from dllm.decoding.prediction import Law
from dllm.decoding.runner import Options
from dllm.decoding.slots import Context, Sampler
from dllm.decoding.stopping import Stop, Stops
from dllm.samplers import Bundle, Constant, Method, registry
from dllm.samplers.eos_last import EosLast
from dllm.samplers.questions import questions

ASK = {
    "daedal": "its length edits are lists of the host",
    "eotp": "its length edits are lists of the host",
    "lopa": "it feeds as many copies as the row that tries most",
}
BIDIRECTIONAL = Context(8, None, (24, 32), 59, (2,), 60, 512)
BLOCKS = replace(BIDIRECTIONAL, shift=1, block_size=8)
GIVEN: dict[str, dict[str, Any]] = {"adablock": {"delimiters": [3, 5]}, "learn2pd": {"filter": HALF}}
CACHES = [name for name in caches.POLICIES if not name.startswith("block")]


def built(name: str, context: Context, extra: Bundle = Bundle()) -> Sampler:
    spec = {"name": name, **registry.method(name).example, **GIVEN[name]} if name in GIVEN else name
    return registry.build(spec, context, extra)


@cache
def context(name: str) -> Context:
    """The kind of call that it serves."""
    return BLOCKS if name == "fast_dllm_v2" else BIDIRECTIONAL


@pytest.mark.parametrize(("name", "turn"), dealt(registry.names(), range(3)))
def test_a_tick_of_every_sampler_asks_nothing(name: str, turn: int) -> None:
    """Under one of the caches that it serves."""
    call = context(name)
    sampler = built(name, call)
    fits = [c for c in (["none", "prefix", "dual"] if call is BIDIRECTIONAL else ["none", "block", "block_dual"])
            if sampler.needs.caches is None or c in sampler.needs.caches]  # fmt: skip
    asked = questions(sampler, call, caches.policy(fits[turn % len(fits)]))
    assert bool(asked) == (name in ASK), asked


@pytest.mark.parametrize("cache_", [*CACHES, "block", "block_dual"])
@pytest.mark.parametrize("name", ["threshold", "prophet", "wino"])
def test_a_tick_of_every_cache_asks_nothing(name: str, cache_: str) -> None:
    call = replace(BLOCKS, shift=0) if cache_.startswith("block") else BIDIRECTIONAL
    assert questions(built(name, call), call, caches.policy(cache_)) == []


VARIANTS = [
    "threshold:tie=0.01", "threshold:fastdllm_dream", "factor:compat", "eb:proxy=margin", "dream:alg=origin",
    "dream:alg_temp=0.5", "klass:paper", "ccd:paper", "ccd:seek=false", "credit:tuning-free", "credit:beta=1",
    "hierarchy:tau_remask=0.3", "dsb:max_length=4", "saber:backtrack=false", "remdm:schedule=cap",
    "remdm:schedule=conf", "remdm:schedule=loop", "slowfast:truncate=false", "prophet:released",
    "prophet:region=text", "prophet:region=last_k",
    "prophet:smooth=true", "sched:shape=cosine", "ass:blocks=2", "eoser:whole=false", "sdar:sequential",
    "sdar:entropy_bounded", "sdar:low_confidence_static", "wino:tau_verify=0",
    "multiblock:max_open=2", "d2f:max_open=2,tau_act=0.5", "d3llm:llada_gsm8k",
    {"name": "adablock", "delimiters": [3], "window": "progress"}, {"name": "pc", "frequencies": [1.0] * 60},
    {"name": "prophet", "region": lambda canvas: canvas.frozen}, {"name": "sched", "region": (2, 4)},
]  # fmt: skip


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec if isinstance(spec, str) else None)
def test_no_parameter_makes_it_ask(spec: Any) -> None:
    assert questions(registry.build(spec, BIDIRECTIONAL), BIDIRECTIONAL, caches.policy("none")) == []


COMPOSITIONS = [
    "adablock:delimiters=[3]+credit+prophet", "localleap+credit", "klass+prophet", "klass:paper+sched+dsb",
    "credit+slowfast", "wino+dsb", "ccd:paper+credit", "dream+margin+adablock:delimiters=[3]", "editing+localleap",
    "saber+prophet", "hierarchy+credit+dsb", "eoser+ass", "pc+factor", "freedave+credit",
    "multiblock+eb", "d2f+margin+credit", "multiblock+wino", "d3llm+prophet",
]  # fmt: skip


@pytest.mark.parametrize("spec", COMPOSITIONS)
def test_no_composition_asks(spec: str) -> None:
    assert questions(registry.build(spec, BIDIRECTIONAL), BIDIRECTIONAL, caches.policy("none")) == []


LAWS = [
    Law(0.7), Law(0.7, 0.9), Law(0.7, None, 5), Law(0.7, gumbel=True), Law(0.7, 0.9, 5), Law(0.0, 0.9),
    Law(0.7, 0.9, 5, filtered=True), Law(0.0, 0.9, filtered=True), Law(0.7, gumbel=True, filtered=True),
]  # fmt: skip


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_no_law_asks(law: Law) -> None:
    for name in ("margin", "credit"):
        assert questions(built(name, BIDIRECTIONAL), BIDIRECTIONAL, options=Options(law)) == []


@pytest.mark.parametrize("cache_", ["none", "dual"])
def test_what_a_call_adds_asks_nothing(cache_: str) -> None:
    extra = Bundle(inputs=Guidance(1.5, 59), adjust=(EosLast((2, 4)),))
    for name in ("threshold", "adablock", "saber"):
        sampler = built(name, BIDIRECTIONAL, extra)
        sampler = sampler._replace(stop=Stop(Stops(frozenset({2, 4})), sampler.needs.revises))
        options = Options(suppress=(3, 7), min_new_tokens=2, eos_ids=(2, 4), blank=True)
        assert questions(sampler, BIDIRECTIONAL, caches.policy(cache_), options) == []


def asking(how: Any) -> list[str]:
    """What is found of a selection that computes `how(score)`."""

    class Asks(Method):
        name = "asks"

        def bundle(self, context: Context) -> Bundle:
            return Bundle(select=lambda view, soft, score: how(score))

    return questions(registry.build(Asks(), BIDIRECTIONAL), BIDIRECTIONAL)


TABLE = torch.arange(8)
WAITS = {
    "item": lambda score: score > score.sum().item(),
    "int": lambda score: score > int(score.sum()),
    "an if": lambda score: score > 0 if score.any() else score < 0,
    "a list": lambda score: score > score.tolist()[0][0],
    "equal": lambda score: (score > 0) & torch.equal(score, score),
    "nonzero": lambda score: score > score.nonzero().sum(),
    "a mask": lambda score: score > score[score > 0].sum(),
    "a list as an index": lambda score: score > score[:, [0]],
    "a new tensor": lambda score: score > score.new_tensor([0.5]),
    "a tensor there": lambda score: score > torch.tensor([0.5], device=score.device),
    "a constant moved": lambda score: score > TABLE[:1].to(score.device),
    "a constant left": lambda score: score > TABLE[:1],
    "a copy back": lambda score: (score > 0) & bool(score.cpu().sum() > 0),
}


@pytest.mark.parametrize("how", WAITS)
def test_a_question_is_found_with_its_place(how: str) -> None:
    found = asking(WAITS[how])
    assert found and all("test_samplers_questions.py:" in q for q in found), found


def test_a_constant_is_no_question() -> None:
    table = Constant(TABLE.to)
    assert asking(lambda score: score > table.on(score.device)[:1]) == []
    assert asking(lambda score: score > table.on(score.device)[:1]) == []
    assert table.on(torch.device("cpu")) is TABLE


def test_a_leaf_that_grows_is_found() -> None:
    class Grown(NamedTuple):
        table: torch.Tensor

    class Grows(Method):
        name = "grows"

        def bundle(self, context: Context) -> Bundle:
            def select(view: Any, soft: Any, score: Any) -> Any:
                old = view.memory[Grown].table
                view.memory[Grown] = Grown(torch.cat([old, old], 1))
                return score > 0

            return Bundle(select=select, memory=lambda canvas: Grown(canvas.ids[:, :1]))

    found = questions(registry.build(Grows(), BIDIRECTIONAL), BIDIRECTIONAL)
    assert found[0] == "Grown.table changed from (2, 1) torch.int64 to (2, 2) torch.int64"
