"""The rules behind the lookahead: hand examples on a scripted model, drafters of every quality, purity, modes."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from golden_cases import model
from scripted import Scripted, peaks
from test_lookahead import SHOWING, SPECS
from torch import Tensor

import dllm
from dllm.call.job import prepare
from dllm.cli.generate import promise
from dllm.decoding.invariants import Checked
from dllm.errors import DllmError
from dllm.lookahead.pace import Pace
from dllm.lookahead.setting import Lookahead
from dllm.samplers import registry

LETTERS = "?ABCDXZ"  # id 0 is the mask


def looked_up(table: dict[str, str]) -> Scripted:
    """A model that looks the canvas up: `{"A__": "1:B .85,2:C .6"}`."""

    def answer(ids: list[int]) -> Tensor:
        canvas = spelled(ids)
        probs = torch.full((len(canvas), len(LETTERS)), 1e-9, dtype=torch.float64)
        for item in filter(None, table.get(canvas, "").split(",")):
            where, p = item.split()
            at, letter = where.split(":")
            probs[int(at), LETTERS.index(letter)] = float(p)
        probs[:, 4] = (1 - probs.sum(1)).clamp(min=1e-9)  # the rest goes to a token that nobody asks for
        return probs.log()

    return Scripted(answer, vocab=len(LETTERS), mask=0)


def spelled(ids: list[int]) -> str:
    return "".join("_" if i == 0 else LETTERS[i] for i in ids[1:])


def run(table: dict[str, str], sampler: Any, setting: Any) -> tuple[str, int, list[list[str]]]:
    """The answer, its forwards, and the canvases that each of these was fed."""
    size = len(next(iter(table)))
    script = looked_up(table)
    out = dllm.generate(script, [5], sampler=sampler, max_new_tokens=size, block_length=size, lookahead=setting)
    return "".join(LETTERS[i] for i in out.tokens), out.nfe, [[spelled(row) for row in rows] for rows in script.seen]


E1 = {"___": "0:A .9,1:B .8,2:C .7", "A__": "1:B .85,2:C .6", "AB_": "2:C .99"}
E2 = {"___": "0:A .9,1:B .8,2:C .7", "A__": "2:C .6,1:B .55", "A_C": "1:Z .9", "AB_": "2:C .9"}
E4 = {"___": "0:A .9,1:B .7,2:C .6", "A__": "1:B .8,2:C .8", "AB_": "2:X .9"}
E5 = {
    "____": "0:A .9,1:B .8,2:C .7,3:X .6",
    "A___": "2:C .9,3:X .8,1:B .55",
    "A_C_": "1:B .9,3:X .55",
    "ABC_": "3:X .9",
    "AB__": "2:C .9,3:X .6",
    "A_CX": "1:B .9",
}


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_chain(rows: int) -> None:
    assert run(E1, "confidence", None)[:2] == ("ABC", 3)
    text, nfe, calls = run(E1, "confidence", rows)
    assert (text, nfe) == ("ABC", 2)
    assert calls == [["___"], ["A__", "AB_"]]  # a finished canvas is never a row


def test_rejected_guess_changes_nothing() -> None:
    text, nfe, calls = run(E2, "confidence", 2)
    assert (text, nfe) == ("AZC", 3) == run(E2, "confidence", None)[:2]
    assert calls == [["___"], ["A__", "AB_"], ["A_C"]]


def test_everything_at_once_needs_no_verification() -> None:
    table = {"___": "0:A .9,1:B .8,2:C .76"}
    assert run(table, "threshold:tau=0.75", 4)[:2] == ("ABC", 1)


def test_subset_of_a_step_is_no_hit() -> None:
    assert run(E4, "threshold:tau=0.75", None)[:2] == ("ABC", 2) == run(E4, "threshold:tau=0.75", 4)[:2]


def test_the_subset_rule_changes_the_output_and_says_so() -> None:
    call = partial(dllm.generate, prompt=[5], sampler="threshold:tau=0.75", max_new_tokens=3, block_length=3)
    base, out = call(looked_up(E4)), call(looked_up(E4), lookahead="4:relax=subset")
    assert "".join(LETTERS[i] for i in base.tokens) == "ABC"
    assert "".join(LETTERS[i] for i in out.tokens) == "ABX"
    assert (out.lossless, out.stats["relax"], out.stats["cuts"]) == (False, "subset", 1)
    assert promise(out.lossless, out.stats) == "not lossless: the subset rule cut 1 of 3 steps"
    exact = call(looked_up(E4), lookahead=4)
    assert (exact.tokens, exact.lossless, exact.stats["cuts"]) == (base.tokens, True, 0)
    assert promise(exact.lossless, exact.stats) == "lossless"


def test_the_subset_rule_looks_at_the_guesses_of_the_last_forward_only() -> None:
    """ABC__ was guessed a forward earlier and lies inside the step A_C__ to ABC_Z; as released it is not taken."""
    table = {
        "_____": "0:A .9,1:B .7,2:C .6,3:X .55,4:Z .52",
        "A____": "2:C .9,3:X .7,1:B .6,4:Z .55",
        "A_C__": "1:B .9,4:Z .9,3:X .6",
        "ABC_Z": "3:X .9",
        "ABC__": "3:X .9,4:X .9",
    }
    call = partial(dllm.generate, prompt=[5], sampler="threshold:tau=0.75", max_new_tokens=5, block_length=5)
    out = call(looked_up(table), lookahead="3:relax=subset")
    assert out.tokens == call(looked_up(table)).tokens == [LETTERS.index(x) for x in "ABCXZ"]
    assert out.stats["cuts"] == 0


def test_retention() -> None:
    kept = {"rows": 3, "multi_source": False}
    assert run(E5, "confidence", None)[:2] == ("ABCX", 4)
    assert run(E5, "confidence", {**kept, "retain": False})[:2] == ("ABCX", 4)
    assert run(E5, "confidence", kept)[:2] == ("ABCX", 3)


def test_states_passed_by_hits_are_drafted_from_too() -> None:
    prompts = [[107, 10, 66, 130], [103, 77, 122, 91], [55, 129, 35, 72, 35], [64]]
    call = partial(dllm.generate, model("tiny-llada-random"), prompts, max_new_tokens=16, block_length=16)
    one, all_of_them = (call(lookahead={"rows": 8, "multi_source": several}) for several in (False, True))
    assert [o.sequences for o in one] == [o.sequences for o in all_of_them]
    assert sum(o.nfe for o in all_of_them) < sum(o.nfe for o in one)


def test_predicted_mask_is_skipped() -> None:
    table = {"_": "0:? .9,0:A .08"}
    assert run(table, "confidence", 4)[:2] == ("A", 1)


def test_ties_go_left_to_right() -> None:
    table = {"___": "0:A .9,1:A .9,2:A .9", "A__": "1:A .9,2:A .9", "AA_": "2:A .9"}
    text, nfe, calls = run(table, "confidence", 3)
    assert (text, nfe) == ("AAA", 2)
    assert calls[1] == ["A__", "AA_"]


# -- drafters ---------------------------------------------------------------------------------------------------------


PROMPT = [3, 4, 5, 6, 7]
CALL: dict[str, Any] = {"max_new_tokens": 12, "block_length": 8}


def turning(size: int) -> Scripted:
    """Each step commits `size` columns, by turns the leftmost and the rightmost: what was predicted before is wrong."""

    def answer(ids: list[int]) -> Tensor:
        masks = [i - 1 for i, token in enumerate(ids) if token == 8]
        order = masks if len(masks) // size % 2 else masks[::-1]
        sure = {column: 0.9 if k < size else 0.25 - 0.01 * k for k, column in enumerate(order)}
        return peaks([(1, sure.get(column, 0.9)) for column in range(len(ids) - 1)], 8)

    return Scripted(answer, vocab=9)


@pytest.mark.parametrize(("sampler", "size"), [("confidence", 1), ("threshold:tau=0.3", 2)])
def test_bad_drafts_cost_nothing(sampler: str, size: int) -> None:
    call = partial(dllm.generate, turning(size), [0], sampler=sampler, max_new_tokens=12, block_length=12)
    base, out = call(), call(lookahead={"rows": 4, "multi_source": False})
    assert base.nfe == 12 // size
    assert (out.sequences, out.nfe, out.stats["hits"]) == (base.sequences, base.nfe, 0)
    assert out.stats["rows"] > 2 * out.nfe


@pytest.mark.parametrize(("sampler", "block"), [("confidence", 12), ("threshold:tau=0.3", 1)])
def test_perfect_drafts_save_all(sampler: str, block: int) -> None:
    """What the model predicts never changes, so what was predicted before is right."""
    script = Scripted(peaks([(1, 0.9)] * 12, 8))
    call = partial(dllm.generate, script, [0], sampler=sampler, max_new_tokens=12, block_length=block)
    base, out = call(), call(lookahead={"rows": 4, "multi_source": False})
    assert base.nfe == 12
    assert out.sequences == base.sequences
    assert out.nfe == 1 + -(-(base.nfe - 1) // 4)  # the first query has nothing to be guessed from


# -- purity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.names())
def test_steps_are_pure(name: str) -> None:
    """A lookahead is exact because of this: a step taken twice gives equal states, and changes neither argument."""
    sampler, checked = SPECS.get(name, SHOWING.get(name, name)), Checked()
    call: dict[str, Any] = {**CALL, "sampler": sampler, "temperature": 0.5, "max_nfe": 6, "check": checked}
    for checkpoint in ("tiny-llada-random", "tiny-sdar-random", "tiny-fast-dllm-v2-random"):
        settled = {"mask_id": 158} if "fast-dllm" in checkpoint else {}
        try:
            dllm.generate(model(checkpoint, **settled), [PROMPT, PROMPT[:3]], **call)
        except DllmError:
            continue
        assert checked.steps > 0
        return
    pytest.fail("no tiny checkpoint serves this sampler")


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What forwards of the random model were given, in order."""
    net, seen = model("tiny-llada-random"), list[dict[str, Any]]()

    def watched(forward: Any) -> Any:
        def watch(ids: Tensor, pos: Tensor | None = None, **plan: Any) -> Any:
            seen.append({"ids": ids, "pos": pos, **plan})
            return forward(ids, pos, **plan)

        return watch

    for way in ("forward", "forward_with"):
        monkeypatch.setattr(net, way, watched(getattr(net, way)))
    return seen


def test_refreshes_follow_the_steps_not_the_forwards(fed: list[dict[str, Any]]) -> None:
    narrow = "interval:left=2,right=2,warmup=1,every=3"  # so that no other forward has the width of the row
    call = partial(dllm.generate, model("tiny-llada-random"), PROMPT, cache=narrow, **CALL)
    canvases = []
    for rows in (None, 2, 8):
        fed.clear()
        out = call(lookahead=rows)
        canvases.append([plan["ids"].tolist() for plan in fed if plan["ids"].shape[1] == len(out.sequences)])
    assert len(canvases[0]) > 2
    assert canvases[0] == canvases[1] == canvases[2]


def test_the_order_of_rows_does_not_matter() -> None:
    prompts = [PROMPT, PROMPT[2:], [9, 10, 11, 12, 13, 14]]
    call = partial(dllm.generate, model("tiny-llada-random"), sampler="threshold:tau=0.4", lookahead=4, **CALL)
    assert [o.sequences for o in call(prompts)] == [o.sequences for o in call(prompts[::-1])][::-1]


# -- modes, refusals, pace --------------------------------------------------------------------------------------------


def test_float32_is_guarded_by_default() -> None:
    half = model("tiny-llada-random", dtype="float32")
    base = dllm.generate(half, PROMPT, **CALL)
    out = dllm.generate(half, PROMPT, **CALL, lookahead=4)
    assert out.sequences == base.sequences
    assert out.stats["mode"] == "guarded"
    assert 0 < out.stats["delta"] < 1e-2
    assert "0 re-runs" in promise(out.lossless, out.stats)
    assert out.nfe - out.stats["reruns"] < base.nfe
    assert out.lossless
    with pytest.raises(DllmError, match="float64"):
        dllm.generate(half, PROMPT, **CALL, lookahead={"rows": 4, "mode": "exact"})


def test_a_wide_guard_takes_every_decision_again() -> None:
    call = partial(dllm.generate, model("tiny-llada-random"), PROMPT, **CALL)
    base, out = call(), call(lookahead={"rows": 4, "mode": "guarded", "delta": 50.0})
    assert out.sequences == base.sequences
    assert out.stats["reruns"] >= out.stats["hits"] > 0
    assert out.stats["divergences"] == 0
    call = partial(dllm.generate, model("tiny-llada-random"), [PROMPT, PROMPT[1:]], **CALL)
    for o, b in zip(call(lookahead={"rows": 4, "mode": "guarded", "delta": 50.0}), call(), strict=True):
        assert o.sequences == b.sequences
        # no forward for two rows has the shape of a prompt by itself; one row may be left for the last step
        assert o.stats["reruns"] >= o.stats["steps"] - 1


@pytest.mark.parametrize("cache_", ["dual", "prefix", "interval:warmup=1,every=3", "dllm_cache"])
def test_a_wide_guard_with_a_cache(cache_: str) -> None:
    """A decision is taken again on the store of the plain call: what hits still owe it is written before."""
    call = partial(dllm.generate, model("tiny-llada-random"), [PROMPT, PROMPT[1:]], cache=cache_, **CALL)
    for mode in ({"mode": "guarded", "delta": 50.0}, {"mode": "fast", "audit": 1}, {"mode": "fast", "audit": 3}):
        outs = call(lookahead={"rows": 4, **mode})
        assert [o.sequences for o in outs] == [o.sequences for o in call()]
        assert all(o.stats["divergences"] == 0 for o in outs) and any(o.stats["hits"] for o in outs)
        if mode["mode"] == "fast":  # nothing that hits owe the store is computed twice
            assert sum(o.stats["reruns"] for o in outs) == 0


def test_a_wide_guard_on_a_block_causal_model() -> None:
    call = partial(dllm.generate, model("tiny-sdar-random"), [PROMPT, PROMPT[1:]], sampler="confidence", cache="block")
    for o, b in zip(call(lookahead="4:mode=guarded,delta=50", max_new_tokens=16), call(max_new_tokens=16), strict=True):
        assert (o.sequences, o.stats["divergences"]) == (b.sequences, 0)


def test_fast_promises_nothing_and_audits() -> None:
    call = partial(dllm.generate, model("tiny-llada-random", dtype="float32"), PROMPT, cache="dual", **CALL)
    base, out = call(), call(lookahead={"rows": 4, "mode": "fast", "audit": 2})
    assert out.lossless is False
    assert promise(out.lossless, out.stats).endswith(f"0 of {out.stats['audits']} checked steps diverged")
    assert out.stats["audits"] == out.stats["hits"] // 2 > 0
    assert out.stats["divergences"] == 0
    assert out.nfe <= base.nfe


@pytest.mark.parametrize(
    ("size", "sampler", "audit"), [(2, "confidence", 3), (2, "threshold:tau=0.1", 3), (4, "threshold:tau=0.1", 2)]
)
def test_an_audit_of_a_hit_that_leaves_a_block_behind_others(size: int, sampler: str, audit: int) -> None:
    """Several blocks pass between two forwards: the audited hit owes the store a block, and so do hits before it."""
    m = model("tiny-sdar-random", block_size=size)
    prompts = [[49], [85, 40, 61, 57, 114, 96], [71, 34, 61, 123, 90], [61, 12, 78, 45, 133, 18], [103, 84, 76]]
    call = partial(dllm.generate, m, prompts, sampler=sampler, cache="block", max_new_tokens=16, early_stop=False)
    for o, b in zip(call(lookahead=f"8:ahead=3,mode=fast,audit={audit}"), call(), strict=True):
        assert (o.sequences, o.stats["divergences"], o.stats["reruns"]) == (b.sequences, 0, 0)


def test_every_sixteenth_hit_is_audited_where_nothing_else_is_said() -> None:
    half = model("tiny-llada-random", dtype="float32")
    out = dllm.generate(half, PROMPT, cache="dual", max_new_tokens=72, block_length=8, lookahead="4:mode=fast")
    assert out.stats["audits"] == out.stats["hits"] // 16 != out.stats["hits"] // 17


def test_an_audit_leaves_the_store_as_the_plain_call_would() -> None:
    """Audits of some hits only: a finished block whose keys and values are still owed is written before them."""
    call = partial(dllm.generate, model("tiny-sdar-random"), [PROMPT, PROMPT[1:]], sampler="confidence", cache="block")
    base = call(max_new_tokens=24)
    for audit in (2, 3):
        for o, b in zip(call(max_new_tokens=24, lookahead=f"4:mode=fast,audit={audit}"), base, strict=True):
            assert o.sequences == b.sequences
            assert o.stats["audits"] > 1
            assert o.stats["divergences"] == 0


def test_settings_as_text() -> None:
    assert Lookahead.parse("8:mode=fast, retain=false") == Lookahead(8, mode="fast", retain=False)
    assert Lookahead.parse("auto") == Lookahead("auto")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (0, "at least 1"),
        ("often", "'auto' or an integer"),
        ({"rows": 4, "mod": "fast"}, "'mode'"),
        ({"mode": "exakt"}, "'exact'"),
        ({"drafter": "rol"}, "'roll'"),
        ({"relax": "subsets"}, "'subset'"),
        ({"ahead": -1}, "ahead=-1 must be at least 0"),
        ({"audit": 0}, "audit=0 must be at least 1"),
        ({"delta": -1.0}, "delta=-1.0 must be at least 0"),
        ({"max_rows": 0}, "must be at least 1"),
        ("4:mode=[", "mode='\\[' is no value"),
    ],
)
def test_bad_settings_say_what_to_do(setting: Any, message: str) -> None:
    with pytest.raises(DllmError, match=message):
        dllm.generate(model("tiny-llada-random"), PROMPT, **CALL, lookahead=setting)


def test_what_depends_on_more_than_its_state_is_refused() -> None:
    sampler = prepare(model("tiny-llada-random"), PROMPT, CALL).sampler
    sampler = sampler._replace(name="dice", needs=replace(sampler.needs, impure=True))
    with pytest.raises(DllmError, match="'dice' depends on more than its state"):
        Lookahead().settle(model("tiny-llada-random"), sampler)


def test_auto_looks_far_where_rows_are_free() -> None:
    call = partial(dllm.generate, model("tiny-llada-random"), [PROMPT, PROMPT[1:]], cache="dual", **CALL)
    base = call()
    out = call(lookahead={"rows": "auto", "costs": {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}})
    assert [o.sequences for o in out] == [o.sequences for o in base]
    assert sum(o.nfe for o in out) <= 0.75 * sum(o.nfe for o in base)
    assert max(o.stats["rows"] / o.stats["forwards"] for o in out) > 2


def test_a_pace_belongs_to_one_setting() -> None:
    """Hits of one threshold or of one cache say nothing of another's."""
    net, setting = model("tiny-llada-random"), Lookahead("auto")

    def paces(sampler: str, cache: str) -> int:
        job = prepare(net, [1], {"sampler": sampler, "cache": cache, "max_new_tokens": 4})
        return id(Pace.of(net, job.sampler, job.policy, setting, "chain"))

    calls = [("threshold:tau=0.5", "dual"), ("threshold:tau=0.6", "dual"), ("threshold:tau=0.5", "dual:left=4")]
    assert len({paces(*call) for call in calls}) == 3
    assert paces(*calls[0]) == paces(*calls[0])


def test_a_pause_of_the_machine_is_no_cost_of_a_forward() -> None:
    pace = Pace()
    for seconds in [1.0] * 50 + [1000.0]:
        pace.note(1, seconds, 1)
    assert pace.cost(1) < 1.1


def test_what_a_forward_costs_is_measured_where_it_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[tuple[int, float]] = []
    monkeypatch.setattr(Pace, "note", lambda self, rows, seconds, sequences: noted.append((rows, seconds)))
    began = time.perf_counter()
    dllm.generate(model("tiny-llada-random"), PROMPT, **CALL, cache="dual", lookahead="auto")
    wall = time.perf_counter() - began
    assert noted and all(rows >= 1 and seconds > 0 for rows, seconds in noted)
    assert sum(seconds for _, seconds in noted) < wall


def test_pace_weighs_cost_against_hits() -> None:
    steep, flat = Pace({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}), Pace({1: 1.0, 8: 1.0})
    assert steep.choose(1, None) == 1
    assert flat.choose(1, None) == 8
    assert flat.choose(1, 4) == 4
    for _ in range(200):
        flat.learn(0, 7)
    assert flat.rate(1) < 0.01
    learned = Pace()
    for _ in range(120):
        learned.note(1, 1.0, 1)
    assert learned.choose(1, None) == 2  # a probe, since there is time to spare
    for _ in range(50):
        learned.note(2, 1.1, 1)
    assert learned.choose(1, None) > 2
    assert learned.cost(4) == pytest.approx(1.3)
    for _ in range(100):
        learned.note_hit(2.0)
    speeds = learned.speeds(1, [1, 8])
    assert speeds[8] < speeds[1]  # steps from the memo that take as long as a forward are no gain


# -- memory -----------------------------------------------------------------------------------------------------------


def test_branches_share_the_stored_prefix(fed: list[dict[str, Any]]) -> None:
    """No forward with branches reads a copied lane, and new keys and values are at most `rows` windows."""
    dllm.generate(
        model("tiny-llada-random"), [PROMPT, PROMPT[2:]], cache="dual", max_new_tokens=16, block_length=8, lookahead=4
    )
    for plan in fed:
        lanes = plan["lane"].tolist()
        assert len(set(lanes)) == len(lanes)
    widths = {plan["pos"].shape[1] for plan in fed}
    assert max(widths - {len(PROMPT) + 16, len(PROMPT[2:]) + 16}) == 4 * 8  # others are refreshes


@pytest.mark.parametrize("most", [1, 3, 5])
def test_no_forward_has_more_rows_than_max_rows(most: int, fed: list[dict[str, Any]]) -> None:
    """Three sequences: at most `most` rows, guesses included, or the true ones alone where these are more."""
    prompts = [PROMPT, PROMPT[1:], PROMPT[2:]]
    dllm.generate(
        model("tiny-llada-random"), prompts, lookahead={"rows": 4, "max_rows": most}, early_stop=False, **CALL
    )
    assert max(len(plan["ids"]) for plan in fed) == max(most, 3)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("4:ahead=x", "ahead='x' must be an integer"),
        ("4:retain=maybe", "retain='maybe' must be true or false"),
        ("4:mode", "not of the form"),
        ({"delta": "x"}, "delta='x' must be a number"),
        ({"rows": "auto", "costs": {}}, "must be a table"),
        ({"rows": "auto", "costs": {1: "a"}}, "must be a table"),
    ],
    ids=str,
)
def test_settings_of_another_kind(spec: Any, says: str) -> None:
    with pytest.raises(DllmError, match=says):
        Lookahead.parse(spec)
