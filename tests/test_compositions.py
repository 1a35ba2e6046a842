"""Every legal pair of samplers under the caches, as one ragged batch with the invariants asserted inside the engine."""

from __future__ import annotations

import dataclasses
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from golden_cases import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import size
from test_lookahead import HALF

import dllm
from dllm.call.job import prepare
from dllm.decoding.cache import registry as caches
from dllm.decoding.invariants import Broken, Checked
from dllm.errors import DllmError
from dllm.models.hub import load
from dllm.samplers import registry

DELIMITERS = list(range(0, 156, 5))
# what a sampler must be told on a checkpoint without tokenizer, and settings at which the small window shows it
GIVEN: dict[str, dict[str, Any]] = {
    "adablock": {"delimiters": DELIMITERS},
    "daedal": {"initial": 4, "factor": 2, "tail": 2, "tau_low": 0.4},
    "prophet": {"high": 3.0, "mid": 2.0, "low": 1.5},
    "sched": {"high": 3.0, "low": 1.5},
    "threshold": {"tau": 0.8},
    "localleap": {"kappa": 0.8, "tau": 0.6, "radius": 2},
    "learn2pd": {"filter": HALF},
    "remdm": {"fill": 0.5, "loops": 3},
    "pc": {"frequencies": [1.0 / (1 + i) for i in range(160)]},
}
PROMPTS = [[3, 14, 15, 92, 65], [35, 89], [79, 32, 38, 46, 26, 43, 38, 32]]
SCORES = ("entropy", "margin", "confidence")
EOS = 124  # a token that this checkpoint predicts often
ARGUMENTS: dict[str, Any] = {"max_new_tokens": 12, "block_length": 4, "eos": EOS, "trace": True}
CACHES = ["none", "prefix", "dual"]  # those that cut the forward in different ways; the others in the sweep
EVERY_CACHE = [name for name in caches.POLICIES if not name.startswith("block")]


@cache
def model() -> Any:
    return load(GOLDEN / "checkpoints" / "tiny-llada-random", dtype="float64", device="cpu")


def spec(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, **registry.method(name).example, **GIVEN.get(name, {})} for name in names]


def run(names: tuple[str, ...], cache_: str, **more: Any) -> list[Any]:
    arguments = {**ARGUMENTS, "sampler": spec(*names), **more}
    checked = Checked()
    out = dllm.generate(model(), PROMPTS, cache=cache_, batch_size=2, check=checked, **arguments)
    assert checked.steps > 0
    return out


def works(names: tuple[str, ...], cache_: str) -> bool:
    """Run it; False where the composition is refused, with a sentence that names what clashes."""
    try:
        outputs = run(names, cache_)
    except DllmError as refusal:
        assert any(name in str(refusal) for name in names) and "\n" not in str(refusal)
        return False
    for out in outputs:
        assert out.finish_reason in ("stop", "length"), (names, cache_, out.finish_reason)
        assert model().mask_id not in out.tokens
        # I8: a forward for each candidate, for each token taken back, and what growing costs
        written = sum(len(pairs) for pairs in out.trace.commits)
        assert out.nfe <= written + 12 + 2, (names, cache_, out.nfe, written)
    return True


def names() -> list[str]:
    """The samplers for any masked model; those of one block-causal family have their own tests."""
    return [n for n in registry.names() if n not in ("sdar", "fast_dllm_v2", "editing", "freedave")]


@pytest.mark.parametrize("served", [CACHES, pytest.param(EVERY_CACHE, marks=pytest.mark.sweep)], ids=["some", "every"])
@pytest.mark.parametrize("name", names())
def test_alone(name: str, served: list[str]) -> None:
    assert any([works((name,), c) for c in served])


PAIRS = list(combinations(names(), 2))


@pytest.mark.parametrize("turn", range(len(CACHES)))
def test_pairs(turn: int) -> None:
    """The caches are dealt out among the pairs."""
    legal = [pair for i, pair in enumerate(PAIRS[turn :: len(CACHES)]) if works(pair, CACHES[i % len(CACHES)])]
    assert len(legal) > 40 / len(CACHES)


def test_which_pairs_are_legal() -> None:
    def serves(pair: tuple[str, ...]) -> bool:
        try:
            prepare(model(), PROMPTS, {**ARGUMENTS, "sampler": spec(*pair), "cache": "none"})
        except DllmError:
            return False
        return True

    legal = [pair for pair in PAIRS if serves(pair)]
    assert len(legal) > 40
    assert ("credit", "prophet") in legal
    both = {frozenset(pair) for pair in legal}
    assert frozenset(("threshold", "localleap")) not in both


@pytest.mark.sweep
@pytest.mark.parametrize("cache_", CACHES)
def test_all_pairs(cache_: str) -> None:
    legal = [pair for pair in PAIRS if works(pair, cache_)]
    assert len(legal) > 40 and ("credit", "prophet") in legal


MASK = 158
HOLES = [[5, 9, *[MASK] * 4, 7], [3, 14, 15, *[MASK] * 13, 7, MASK, MASK], [79, *[MASK] * 6, 11, 12]]
ANYWHERE = [*names(), "sdar", "editing", "freedave"]


def seen(out: Any) -> tuple[Any, ...]:
    return out.sequences, out.nfe, out.positions, out.finish_reason, out.trace.commits


CALLS = {
    "behind": (PROMPTS, {}),
    "holes": (HOLES, {"infill": True}),
    "sampled": (HOLES[:2], {"infill": True, "temperature": 0.7, "n": 2}),
}
SAMPLED = ["dream", "ccd", "eoser", "sdar", "lopa", "daedal"]


@pytest.mark.parametrize(("name", "kind"), [(n, k) for k in CALLS for n in (SAMPLED if k == "sampled" else ANYWHERE)])
def test_rows_are_independent(name: str, kind: str) -> None:
    """I5: a row of a ragged batch equals the same request alone, its window, ceiling and budget too."""
    prompts, call = CALLS[kind]
    arguments = {**ARGUMENTS, "sampler": spec(name), **call}
    arguments |= {"max_new_tokens": None} if "infill" in call else {}
    together = dllm.generate(model(), prompts, batch_size=2, **arguments)
    n = call.get("n", 1)
    for i, prompt in enumerate(prompts):
        alone = dllm.generate(model(), prompt, seed=i * n, **arguments)
        for one, out in zip(alone if n > 1 else [alone], together[i * n :], strict=False):
            assert seen(one) == seen(out), i


def test_the_default_length_is_the_rows_own() -> None:
    """What a neighbour's long prompt leaves of the positions is nobody else's limit."""
    small = dllm.load(GOLDEN / "checkpoints" / "tiny-llada-random", dtype="float64")
    small.max_positions = 40
    outs = dllm.generate(small, [[5, 9], [3] * 34], eos=[])
    assert [len(out.sequences) for out in outs] == [40, 40]


@pytest.mark.parametrize("window", ["dsb", "slowfast", "daedal", "adablock"])
def test_a_block_rule_in_a_window_without_blocks(window: str) -> None:
    """SDAR's share of a block is the plain one where no block was opened."""
    for rule in ("sdar:steps=2", "sdar:low_confidence_static,steps=2", "learn2pd", "confidence"):
        method = registry.parse(rule) if ":" in rule else registry.parse(spec(rule))
        outs = run((window,), "none", sampler=[*method, *spec(window)], steps=6)
        assert all(MASK not in out.tokens for out in outs)


def test_a_default_score_yields() -> None:
    """CCD, EB, Dream and FreeDave rank as the sampler composed with them does; a proxy that was asked for clashes."""

    def commits(sampler: str) -> list[Any]:
        return [out.trace.commits for out in run((), "none", sampler=sampler, max_new_tokens=16, eos=[])]

    for name in ("ccd", "eb", "dream", "freedave"):
        ranked = {score: commits(f"{name}+{score}") for score in SCORES}
        assert len({str(found) for found in ranked.values()}) > 1, name
        assert ranked["confidence" if name == "freedave" else "entropy"] == commits(name)
    for clash in ("eb:proxy=margin+entropy", "dream:alg=entropy+margin"):
        with pytest.raises(DllmError, match="both decide the score"):
            run((), "none", sampler=clash)


def test_adablock_credit_and_prophet_under_every_cache() -> None:
    for cache_ in EVERY_CACHE:
        assert works(("adablock", "credit", "prophet"), cache_)


def test_greedy_decoding_uses_no_random_numbers() -> None:
    """I6: also at the end of a whole call; a keyed sampler repeats itself."""
    before = torch.get_rng_state()
    first = run(("random",), "none")
    assert torch.equal(before, torch.get_rng_state())
    assert [o.trace.commits for o in first] == [o.trace.commits for o in run(("random",), "none")]


def test_a_broken_sampler_is_caught() -> None:
    """The checks themselves: a selection that draws global random numbers, and one that writes into its state."""

    class Loud(registry.method("threshold")):  # type: ignore[misc]
        def select(self, view: Any, soft: Any, score: Any) -> Any:
            torch.rand(1)
            return score > 0

    class Writing(registry.method("threshold")):  # type: ignore[misc]
        def select(self, view: Any, soft: Any, score: Any) -> Any:
            view.canvas.ids[:, 0] += 1
            return score > 0

    for broken, message in ((Loud(), "random numbers"), (Writing(), "wrote into the state")):
        with pytest.raises(Broken, match=message):
            dllm.generate(model(), PROMPTS[0], sampler=broken, check=Checked(), **ARGUMENTS)


@st.composite
def specified(draw: st.DrawFn) -> list[dict[str, Any]]:
    """One to three samplers, each with some of its parameters drawn from their ranges."""
    chosen = []
    for name in draw(st.lists(st.sampled_from(names()), min_size=1, max_size=3, unique=True)):
        params = spec(name)[0]
        for f in dataclasses.fields(registry.method(name)):
            if f.name in params or not f.metadata or draw(st.booleans()):
                continue
            low, high, kind = f.metadata["low"], f.metadata["high"], str(f.type).split(" | ")[0]
            if f.metadata["choices"]:
                params[f.name] = draw(st.sampled_from(f.metadata["choices"]))
            elif kind == "bool":
                params[f.name] = draw(st.booleans())
            elif kind == "int" and low is not None:
                params[f.name] = draw(st.integers(low, low + 6))
            elif kind == "float" and low is not None:
                params[f.name] = draw(st.floats(low, 1.2 if high is None else high))
        chosen.append(params)
    return chosen


@pytest.mark.sweep
@settings(max_examples=size(3000, 60))
@given(
    specified(),
    st.sampled_from(EVERY_CACHE),
    st.lists(st.lists(st.integers(0, 155), min_size=1, max_size=24), min_size=1, max_size=4),
    st.fixed_dictionaries(
        {
            "max_new_tokens": st.integers(1, 24),
            "block_length": st.integers(1, 12),
            "steps": st.none() | st.integers(1, 12),
            "temperature": st.sampled_from([0.0, 0.7]),
            "seed": st.integers(0, 1000),
            "early_stop": st.booleans(),
        }
    ),
)
def test_any_composition_with_any_parameters(
    samplers: list[dict[str, Any]], cache_: str, prompts: list[list[int]], call: dict[str, Any]
) -> None:
    try:
        arguments = {**ARGUMENTS, **call, "batch_size": 2, "check": Checked()}
        dllm.generate(model(), prompts, sampler=samplers, cache=cache_, **arguments)
    except DllmError as refusal:
        assert any(s["name"] in str(refusal) for s in samplers) and "\n" not in str(refusal)


@pytest.mark.parametrize("checkpoint", ["tiny-llada-random", "tiny-sdar-random"])
@pytest.mark.parametrize("sampler", ["confidence", "margin", "entropy", "saber", "threshold:tau=0.5"])
def test_a_row_of_masks_alone_is_no_matter_of_rounding(checkpoint: str, sampler: str) -> None:
    """All its columns tie, so the first one goes first, whatever the shape of the forward."""
    blank = dllm.load(GOLDEN / "checkpoints" / checkpoint, dtype="float32")
    call = {"sampler": sampler, "max_new_tokens": 5, "block_length": 8, "eos": [], "trace": True}
    alone = dllm.generate(blank, None, **call)
    assert alone.trace.commits[0][0][0] == (1 if sampler == "saber" else 0)  # two commits, of which it takes one back
    for other in ([7] * 9, [3] * 20):
        assert dllm.generate(blank, [[], other], **call)[0].trace.commits == alone.trace.commits
    assert dllm.generate(blank, [[MASK] * 5, [7, MASK]], infill=True, **call | {"max_new_tokens": 0})[
        0
    ].trace.commits == (alone.trace.commits)


def test_lopa_tries_no_more_columns_than_are_masked() -> None:
    call = {"max_new_tokens": 4, "block_length": 4, "eos": []}
    many, few = (dllm.generate(model(), [5], sampler=f"lopa:b={b},tau=2", **call) for b in (10_000, 5))
    assert many.sequences == few.sequences and many.positions == few.positions <= 5 * (1 + 4 + 3 + 2)


@pytest.mark.parametrize("cache_", ["none", "dual"])
@pytest.mark.parametrize("sampler", ["lopa:b=3,tau=0.5", "confidence", "klass"])
def test_fixed_rows_of_a_lookahead_make_no_row_depend_on_its_neighbours(sampler: str, cache_: str) -> None:
    call = {**ARGUMENTS, "sampler": sampler, "cache": cache_, "lookahead": 3}
    for i, out in enumerate(dllm.generate(model(), PROMPTS, **call)):
        alone, plain = (dllm.generate(model(), PROMPTS[i], seed=i, **call | more) for more in ({}, {"lookahead": None}))
        assert (alone.sequences, alone.nfe) == (out.sequences, out.nfe)
        assert alone.sequences == plain.sequences and alone.nfe <= plain.nfe
