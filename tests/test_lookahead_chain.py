"""Lookahead without a memo: the plain call's tokens and store, no question to the device, FreeDave's counts."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from golden_cases import cases, groups, model, read
from replay import standing_in, waits
from sweeps import dealt
from test_lookahead import CALL, DREAM, PROMPTS, RANDOM, SDAR, SHOWING, agrees, decode, half, plain, usable
from test_lookahead_golden import WHOLE, drafting_forwards
from torch import Tensor

import dllm
from dllm.call.job import prepare
from dllm.decoding.canvas import State
from dllm.decoding.facts import Facts
from dllm.decoding.meter import Meter
from dllm.decoding.runner import Part, Runner, Tick
from dllm.errors import DllmError
from dllm.lookahead import form
from dllm.lookahead.chain import ChainRunner
from dllm.lookahead.pace import Pace
from dllm.lookahead.round import Outcome, Round
from dllm.lookahead.setting import Lookahead
from dllm.lookahead.walk import LookaheadRunner
from dllm.samplers import registry

CHAIN: dict[str, Any] = {"rows": 4, "form": "chain"}
SETTINGS = [CHAIN, {**CHAIN, "rows": 2}, {**CHAIN, "rows": 8}, {**CHAIN, "rows": 3, "cross_blocks": False}]
STORED = ["prefix", "dual", "dual:left=2,right=3", "interval:warmup=1,every=3", "delayed:every=3", "dllm_cache"]
EDITS = ("eotp", "daedal")  # the length: a round has no room for that
RANDOM_V2 = "tiny-fast-dllm-v2-random"


@pytest.mark.parametrize(("name", "i"), half([n for n in registry.names() if n not in EDITS], SETTINGS))
def test_every_sampler(name: str, i: int) -> None:
    """The caches are dealt out among the widths."""
    sampler = SHOWING.get(name, name)
    checkpoint, caches = next(
        (checkpoint, caches)
        for checkpoint in (RANDOM, SDAR, RANDOM_V2)
        if (caches := [c for c in ("none", "prefix", "dual", "block") if usable(sampler, c, checkpoint)])
    )
    agrees(checkpoint, sampler, caches[i % len(caches)], SETTINGS[i])


@pytest.mark.parametrize(("cache_", "sampler"), dealt(["none", *STORED], ["confidence", "credit:tau=0.5", "dsb"]))
def test_every_cache(cache_: str, sampler: str) -> None:
    agrees(RANDOM, sampler, cache_, CHAIN)


BLOCKWISE = ["confidence", "threshold:tau=0.4", "wino:tau_draft=0.4,tau_verify=0.6,least=2"]


@pytest.mark.parametrize(("cache_", "sampler"), dealt(["none", "block", "block_dual"], BLOCKWISE))
def test_block_causal_models(cache_: str, sampler: str) -> None:
    agrees(SDAR, sampler, cache_, CHAIN, early_stop=False)


@pytest.mark.parametrize("sampler", ["confidence", "threshold:tau=0.3,lone_opening=true"])
def test_shifted_models(sampler: str) -> None:
    for cache_ in ("none", "prefix", "dual"):
        agrees(DREAM, sampler, cache_, CHAIN, max_new_tokens=8)


@pytest.mark.parametrize(
    ("sampler", "cache_", "extra"),
    [
        ("confidence", "none", {"temperature": 0.7}),
        ("random", "dual", {"temperature": 0.7, "top_p": 0.9}),
        ("threshold:tau=0.4", "dual", {"cfg_scale": 1.0}),
        ("confidence", "none", {"cfg_scale": 1.0, "temperature": 0.5}),
    ],
)
def test_sampling_and_guidance(sampler: str, cache_: str, extra: dict[str, Any]) -> None:
    agrees(RANDOM, sampler, cache_, CHAIN, **extra)


REFILLED = ["confidence", "threshold:tau=0.3", "wino:least=2", "prophet"]


@pytest.mark.parametrize(("sampler", "cache_"), dealt(REFILLED, ["none", "dual", "delayed:every=3"]))
def test_refills(sampler: str, cache_: str) -> None:
    """Without a trace every level of a round steps at once, where the sampler remembers nothing of the model."""
    prompts = [*PROMPTS, [30, 31], [40, 41, 42]]
    call = partial(dllm.generate, model(RANDOM), prompts, sampler=sampler, cache=cache_, batch_size=2, **CALL)
    base, outs = call(), call(lookahead=CHAIN)
    assert [o.sequences for o in outs] == [o.sequences for o in base]
    assert all(o.nfe <= b.nfe for o, b in zip(outs, base, strict=True))
    assert outs[0].calls <= base[0].calls
    assert all(o.stats["steps"] == b.nfe for o, b in zip(outs, base, strict=True))
    for i, prompt in enumerate(prompts):
        alone = dllm.generate(model(RANDOM), prompt, seed=i, sampler=sampler, cache=cache_, lookahead=CHAIN, **CALL)
        assert alone.sequences == base[i].sequences


def test_no_row_steps_beyond_its_cap() -> None:
    call = partial(dllm.generate, model(RANDOM), PROMPTS, cache="dual", max_nfe=7, **CALL)
    for o, b in zip(call(lookahead=CHAIN), call(), strict=True):
        assert (o.sequences, o.finish_reason, o.stats["steps"]) == (b.sequences, "cap", 6)
        assert o.nfe <= b.nfe == 7


def test_stop_strings_end_a_row() -> None:
    tiny = dllm.load("tiny", dtype="float64")
    call = partial(dllm.generate, tiny, "What is 2+3?", max_new_tokens=32, stop=["\n"])
    base, out = call(), call(lookahead=CHAIN)
    assert (out.text, out.tokens, out.finish_reason) == (base.text, base.tokens, base.finish_reason)
    assert out.nfe <= base.nfe


# -- what is the same beside the tokens -------------------------------------------------------------------------------


class Spied:
    """A runner whose store is copied after each tick: `seen` by lane and steps."""

    def __init__(self, kind: Any, **settings: Any) -> None:
        self.kind, self.settings, self.seen = kind, settings, dict[tuple[int, int], list[Tensor]]()

    def __call__(self, *arguments: Any) -> Runner:
        run = self.kind(*arguments, **self.settings)
        shown = run.ticks

        def ticks(part: Part, facts: list[Facts], state: State) -> list[Tick]:
            for lane, f in zip(part.rows, facts, strict=True):
                self.seen[lane, f.step] = [t[lane, :, :-1].clone() for side in run.store for t in side]
            return shown(part, facts, state)

        run.ticks = ticks
        return run


WRITES = ["confidence", "threshold:tau=0.2", "wino:tau_draft=0.1,tau_verify=0.2,least=2"]


@pytest.mark.parametrize(("cache_", "sampler"), dealt(STORED, WRITES))
def test_the_store_is_that_of_the_plain_call(cache_: str, sampler: str) -> None:
    stores_agree(RANDOM, cache_, sampler)


@pytest.mark.parametrize("cache_", ["block", "block_dual"])
@pytest.mark.parametrize("sampler", ["confidence", "threshold:tau=0.2"])
def test_blocks_that_hits_finished_are_stored(cache_: str, sampler: str) -> None:
    stores_agree(SDAR, cache_, sampler)


def stores_agree(checkpoint: str, cache_: str, sampler: str) -> None:
    job = prepare(model(checkpoint), PROMPTS, {**CALL, "sampler": sampler, "cache": cache_, "early_stop": False})
    one, several = Spied(Runner), Spied(ChainRunner, setting=Lookahead(4, mode="exact", form="chain"))
    for spied in (one, several):
        for _ in job.ticks(Meter(len(PROMPTS)), spied):
            pass
    assert several.seen.keys() <= one.seen.keys()
    for key, tables in several.seen.items():
        for ours, theirs in zip(tables, one.seen[key], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


MODES = [{"mode": "exact"}, {"mode": "guarded", "delta": 1e-6}]


@pytest.mark.parametrize(
    ("cache_", "mode", "sampler"), dealt(["none", *STORED], MODES, ["confidence", "threshold:tau=0.9", "saber"])
)
def test_a_round_asks_nothing(cache_: str, mode: Any, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, play = list[Counter[str]](), Round.__call__

    def watched(self: Round, *arguments: Any) -> Outcome:
        out = list[Outcome]()
        asked.append(waits(lambda: out.append(play(self, *arguments))))
        return out[0]

    monkeypatch.setattr(Round, "__call__", watched)
    call = {**CALL, "max_new_tokens": 24, "early_stop": False}
    dllm.generate(model(RANDOM), PROMPTS, sampler=sampler, cache=cache_, lookahead={**CHAIN, **mode}, **call)
    assert asked
    assert sum(asked, Counter()) == Counter()


# -- rounds as graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "cache_", "extra"),
    [
        (RANDOM, "none", {}),
        (RANDOM, "dual", {"temperature": 0.7}),
        (RANDOM, "dual", {"cfg_scale": 1.0}),
        (RANDOM, "delayed:every=3", {"sampler": "saber"}),
        (RANDOM, "dllm_cache", {"sampler": "threshold:tau=0.4"}),
        (RANDOM, "dual", {"lookahead": {**CHAIN, "mode": "guarded", "delta": 0.05}}),
        (SDAR, "block", {"sampler": "threshold:tau=0.4"}),
    ],
)
def test_a_round_that_is_replayed(checkpoint: str, cache_: str, extra: dict[str, Any]) -> None:
    """Counts, too, but for sizes that are rounded up: these leave more room for drafts."""
    call: dict[str, Any] = {**CALL, "cache": cache_, "lookahead": CHAIN, "batch_size": 2, **extra}
    eager = dllm.generate(model(checkpoint), PROMPTS, graphs=False, **call)
    base = dllm.generate(model(checkpoint), PROMPTS, graphs=False, **{**call, "lookahead": None})
    with standing_in():
        for _ in range(2):
            outs = dllm.generate(model(checkpoint), PROMPTS, graphs=True, **call)
    assert [o.sequences for o in outs] == [o.sequences for o in eager] == [o.sequences for o in base]
    assert sum(o.nfe for o in outs) <= sum(o.nfe for o in eager)
    assert all(o.stats["steps"] == e.stats["steps"] for o, e in zip(outs, eager, strict=True))
    assert max(o.stats["graphs"]["replays"] for o in outs) > 0


def test_inputs_with_queries_of_their_own_run_eagerly() -> None:
    call: dict[str, Any] = {**CALL, "cache": "dual", "sampler": "wino:least=2", "lookahead": CHAIN}
    with standing_in():
        outs = dllm.generate(model(RANDOM), PROMPTS, graphs=True, **call)
    assert [o.sequences for o in outs] == [o.sequences for o in dllm.generate(model(RANDOM), PROMPTS, **call)]


# -- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize(("checkpoint", "method"), cases("freedave_dual", "freedave_prefix", "freedave_block"))
def test_without_crossing_blocks_the_counts_are_freedave_s(checkpoint: str, method: str, whole: bool) -> None:
    blocks, found = "block" in method, groups(checkpoint, method)
    for group in found if whole else found[-1:]:
        p = group[0]["params"]
        cache_ = "block" if blocks else "dual" if p["dual_cache"] else "prefix"
        outs = dllm.generate(
            model(checkpoint, **({"block_size": p["block_length"]} if blocks else {})),
            [c["prompt_ids"] for c in group],
            sampler={"name": "freedave", "lone_opening": "dream" in checkpoint},
            lookahead={"rows": p["draft_steps"], "form": "chain", "cross_blocks": False},
            block_length=p["block_length"],
            max_new_tokens=p["max_gen_length"],
            cache=cache_,
            early_stop=False,
            batch_size=len(group),
        )
        for case, out in zip(group, outs, strict=True):
            assert out.sequences == case["output_ids"][: len(out.sequences)], case["id"]
            assert out.nfe == (drafting_forwards(case) if blocks else case["nfe"]), case["id"]


def test_blocks_are_crossed_where_masks_are_read_ahead() -> None:
    prompts = [case["prompt_ids"] for case in read(SDAR, "freedave_block_eager")[:3]]
    call = {"sampler": "threshold:tau=0.4", "cache": "block", "max_new_tokens": 16, "early_stop": False}
    near, far = (dllm.generate(model(SDAR), prompts, **call, lookahead={**CHAIN, "ahead": n}) for n in (0, 1))
    assert [o.sequences for o in near] == [o.sequences for o in far]
    assert sum(o.nfe for o in far) < sum(o.nfe for o in near)


# -- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_", ["none", "dual", "dllm_cache"])
def test_a_wide_guard_takes_every_decision_again(cache_: str) -> None:
    setting = {**CHAIN, "mode": "guarded", "delta": 50.0}
    for prompts in (PROMPTS[:1], PROMPTS):
        call = partial(dllm.generate, model(RANDOM), prompts, cache=cache_, **CALL)
        for o, b in zip(call(lookahead=setting), call(), strict=True):
            assert o.sequences == b.sequences
            assert o.stats["hits"] == 0
            assert o.stats["reruns"] >= o.stats["steps"] / 2  # what a row decided by itself is no cause for doubt


def test_a_narrow_guard_finds_nothing_to_take_again() -> None:
    half = model(RANDOM, dtype="float32")
    call = partial(dllm.generate, half, PROMPTS, cache="dual", **CALL)
    for o, b in zip(call(lookahead=CHAIN), call(), strict=True):
        assert o.sequences == b.sequences
        assert (o.stats["mode"], o.stats["form"], o.stats["reruns"]) == ("guarded", "chain", 0)
        assert o.nfe < b.nfe


def test_fast_audits_some_rounds() -> None:
    call = partial(dllm.generate, model(RANDOM), PROMPTS, cache="dual", **CALL)
    for o, b in zip(call(lookahead={**CHAIN, "mode": "fast", "audit": 2}), call(), strict=True):
        assert o.sequences == b.sequences
        assert 0 < o.stats["audits"] <= o.stats["hits"] // 2
        assert o.stats["divergences"] == 0


# -- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDITS)
def test_samplers_that_edit_the_length_keep_the_memo(name: str) -> None:
    with pytest.raises(DllmError, match="edits the length: use form 'memo'"):
        dllm.generate(model(RANDOM), PROMPTS, sampler=name, cache="none", lookahead=CHAIN, **CALL)


@pytest.mark.parametrize(
    ("more", "says"), [({"drafter": "ladder"}, "drafter='ladder'"), ({"relax": "subset"}, "relax='subset'")]
)
def test_what_the_memo_alone_can_do(more: dict[str, Any], says: str) -> None:
    with pytest.raises(DllmError, match=says):
        dllm.generate(model(RANDOM), PROMPTS, lookahead={**CHAIN, **more}, **CALL)


def test_a_plain_step_is_the_plain_runner_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Round, "__call__", lambda *_: pytest.fail("a round, where rows cost what they cost"))
    setting = {"rows": "auto", "form": "chain", "costs": {1: 1.0, 8: 8.0}}
    base = plain(RANDOM, "confidence", "dual")
    outs = decode(RANDOM, "confidence", "dual", lookahead=setting)
    assert [o.nfe for o in outs] == [b.nfe for b in base]


def test_auto_tries_the_memo_once_chains_pay() -> None:
    job = prepare(model(RANDOM), PROMPTS, {**CALL, "cache": "dual"})
    known = model(RANDOM), job.sampler, job.policy
    Pace.known.pop(model(RANDOM), None)
    setting = Lookahead("auto", mode="exact")
    assert form.runner(setting, *known, checked=False) is ChainRunner
    chain, memo = (Pace.of(*known, setting, kind) for kind in ("chain", "memo"))
    for size in (1, 2, 4) * 20:
        chain.note(size, 1.0, 1)
    assert form.runner(setting, *known, checked=False) is LookaheadRunner
    for size in (1, 2, 4) * 20:
        memo.note(size, 0.5 + size, 1)
    assert form.runner(setting, *known, checked=False) is ChainRunner
    assert form.runner(setting, *known, checked=True) is LookaheadRunner
    assert form.runner(Lookahead(4, mode="exact"), *known, checked=False) is LookaheadRunner
    Pace.known.pop(model(RANDOM), None)
