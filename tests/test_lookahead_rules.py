"""The rules behind the lookahead: hand examples on a scripted model, drafters of every quality, purity, modes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import model
from test_lookahead import SHOWING, SPECS
from torch import Tensor

import dllm
from dllm.call.job import prepare
from dllm.cli.generate import promise
from dllm.decoding.canvas import Plan, State
from dllm.decoding.engine import Part, Runner, decode, opened, step
from dllm.decoding.meter import Meter
from dllm.errors import DllmError
from dllm.lookahead import walk as lookahead
from dllm.lookahead.branches import Query, name, queries
from dllm.lookahead.guard import alike
from dllm.lookahead.guesses import Chain, Drafts
from dllm.lookahead.memo import differ, written
from dllm.lookahead.pace import Pace
from dllm.lookahead.setting import Lookahead
from dllm.models.model import Model
from dllm.samplers import registry

LETTERS = "?ABCDXZ"  # id 0 is the mask


class Scripted(Model):
    """A model that looks the canvas up: `{"A__": "1:B .85,2:C .6"}`."""

    supports_cache, shift, block_size, family, tokenizer = False, 0, None, "scripted", None
    bos_id = pad_id = None
    mask_id, eos_ids, vocab_size, max_positions = 0, (), len(LETTERS), 64
    dtype, device, embedding_rows = torch.float64, torch.device("cpu"), len(LETTERS)

    def __init__(self, table: dict[str, str]) -> None:
        self.table = table
        self.calls: list[list[str]] = []

    def forward(self, ids: Tensor, pos: Tensor | None = None, **_: Any) -> Tensor:
        rows = ["".join("_" if i == 0 else LETTERS[i] for i in row[1:].tolist()) for row in ids]
        self.calls.append(rows)
        return torch.stack([self.answer(row) for row in rows])

    def answer(self, canvas: str) -> Tensor:
        probs = torch.full((len(canvas) + 1, self.vocab_size), 1e-9, dtype=torch.float64)
        for item in filter(None, self.table.get(canvas, "").split(",")):
            where, p = item.split()
            at, letter = where.split(":")
            probs[int(at) + 1, LETTERS.index(letter)] = float(p)
        probs[:, 4] = (1 - probs.sum(1)).clamp(min=1e-9)  # the rest goes to a token that nobody asks for
        return probs.log()

    def source(self, pos: Tensor) -> Tensor:
        return pos

    def logits(self, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[..., 0] = -torch.inf
        return hidden


def run(table: dict[str, str], sampler: Any, setting: Any) -> tuple[str, int, Scripted]:
    size = len(next(iter(table)))
    script = Scripted(table)
    out = dllm.generate(script, [5], sampler=sampler, max_new_tokens=size, block_length=size, lookahead=setting)
    return "".join(LETTERS[i] for i in out.tokens), out.nfe, script


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
    text, nfe, script = run(E1, "confidence", rows)
    assert (text, nfe) == ("ABC", 2)
    assert script.calls == [["___"], ["A__", "AB_"]]  # a finished canvas is never a row


def test_rejected_guess_changes_nothing() -> None:
    text, nfe, script = run(E2, "confidence", 2)
    assert (text, nfe) == ("AZC", 3) == run(E2, "confidence", None)[:2]
    assert script.calls == [["___"], ["A__", "AB_"], ["A_C"]]


def test_everything_at_once_needs_no_verification() -> None:
    table = {"___": "0:A .9,1:B .8,2:C .76"}
    assert run(table, "threshold:tau=0.75", 4)[:2] == ("ABC", 1)


def test_subset_of_a_step_is_no_hit() -> None:
    assert run(E4, "threshold:tau=0.75", None)[:2] == ("ABC", 2) == run(E4, "threshold:tau=0.75", 4)[:2]


def test_the_subset_rule_changes_the_output_and_says_so() -> None:
    call = partial(dllm.generate, prompt=[5], sampler="threshold:tau=0.75", max_new_tokens=3, block_length=3)
    base, out = call(Scripted(E4)), call(Scripted(E4), lookahead="4:relax=subset")
    assert "".join(LETTERS[i] for i in base.tokens) == "ABC"
    assert "".join(LETTERS[i] for i in out.tokens) == "ABX"
    assert (out.lossless, out.stats["relax"], out.stats["cuts"]) == (False, "subset", 1)
    assert promise(out.lossless, out.stats) == "not lossless: the subset rule cut 1 of 3 steps"
    exact = call(Scripted(E4), lookahead=4)
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
    out = call(Scripted(table), lookahead="3:relax=subset")
    assert out.tokens == call(Scripted(table)).tokens == [LETTERS.index(x) for x in "ABCXZ"]
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
    text, nfe, script = run(table, "confidence", 3)
    assert (text, nfe) == ("AAA", 2)
    assert script.calls[1] == ["A__", "AA_"]


# -- what equal queries are -------------------------------------------------------------------------------------------


AUTHORS = {0: np.array([1, 2, 3, 4, 5])}  # of the five slots of a lane


def query(authors: Any = AUTHORS, **changes: Any) -> Query:
    """One row that feeds columns 2 and 3, sees slots 0 to 3 and keeps column 2."""
    table = {
        "ids": [[7, 8]], "pos": [[2, 3]], "fresh": [[True, True]], "keep": [[True, False]],
        "visible": [[[True, True, True, True, False]] * 2], "lane": [0], **changes,
    }  # fmt: skip
    tensors = {k: None if v is None else torch.tensor(v) for k, v in table.items()}
    plan = Plan(**tensors, refresh=False, stored=True)
    return name(queries(plan, 1)[0], authors)


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": [[7, 9]]},
        {"pos": [[2, 4]]},
        {"keep": [[False, False]]},
        {"keep": [[True, True]]},
        {"fresh": [[True, False]], "visible": [[[True] * 4 + [False] * 3] * 2]},
        {"visible": [[[True, False, True, True, False]] * 2]},
        {"visible": [[[True, False, True, True, False], [True, True, True, True, False]]]},  # to one of its queries
        {"authors": {0: np.array([1, 9, 3, 4, 5])}},
    ],
    ids=str,
)
def test_queries_that_may_be_answered_differently_have_different_keys(changes: dict[str, Any]) -> None:
    assert query(**changes).key != query().key


def test_private_queries_that_see_each_other_differently_have_different_keys() -> None:
    private = {"fresh": [[True, False]]}
    one, other = [[True] * 4 + [False, False, False], [True] * 4 + [False, False, True]], [[True] * 4 + [False] * 3] * 2
    assert query(**private, visible=[one]).key != query(**private, visible=[other]).key


def test_what_a_query_does_not_see_is_not_in_its_key() -> None:
    """Slots 2 and 3 it writes itself, slot 4 it does not see."""
    assert query({0: np.array([1, 2, 8, 8, 8])}).key == query().key


def test_padding_and_what_is_said_by_default_are_not_in_the_key() -> None:
    padded = query(ids=[[7, 8, 0]], pos=[[2, 3, -1]], fresh=[[True, True, False]], keep=[[True, False, False]],
                   visible=[[[True, True, True, True, False]] * 3])  # fmt: skip
    assert padded.key == query(fresh=None).key == query().key
    assert (
        query(visible=[[[True, True, True, True, False]]]).outside[0].tolist() == query().outside[0].tolist() == [0, 1]
    )


def test_only_kept_slots_change_their_author() -> None:
    assert written(AUTHORS, query(), 7)[0].tolist() == [1, 2, 7, 4, 5]
    assert AUTHORS[0].tolist() == [1, 2, 3, 4, 5]


def test_a_query_is_behind_where_it_sees_a_slot_of_another_history() -> None:
    for slot, behind in enumerate([True, True, False, False, False]):
        other = {0: np.where(np.arange(5) == slot, 9, AUTHORS[0])}
        assert differ(AUTHORS, other, query()) is behind


# -- drafters ---------------------------------------------------------------------------------------------------------


PROMPT = [3, 4, 5, 6, 7]
CALL: dict[str, Any] = {"max_new_tokens": 12, "block_length": 8}


class Garbage(Drafts):
    """Guesses canvases that cannot come up."""

    def roll(self, chains: list[Chain], state: Any, win: Any, stale: Any, limit: int) -> None:
        ids = torch.where(state.canvas.masked, state.canvas.ids, 1)
        wrong = state._replace(canvas=state.canvas._replace(ids=ids))
        guess, win = opened(self.walk.s, wrong)
        self.place(chains, guess, win, 1, limit)


class Oracle(Drafts):
    """Guesses what will happen."""

    future: list[State]

    def roll(self, chains: list[Chain], state: Any, win: Any, stale: Any, limit: int) -> None:
        now = int(state.step[0])
        for depth, later in enumerate(self.future[now : now + limit], 1):
            if not bool(later.done[0]):
                guess, win = opened(self.walk.s, later)
                self.place(chains, guess, win, depth, limit)


def states(sampler: str) -> list[State]:
    job = prepare(model("tiny-llada-random"), PROMPT, {**CALL, "sampler": sampler})
    return [tick.state for tick in job.ticks(Meter(1))]


@pytest.mark.parametrize("sampler", ["confidence", "threshold:tau=0.3"])
def test_bad_drafts_cost_nothing_and_perfect_ones_save_all(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = partial(dllm.generate, model("tiny-llada-random"), PROMPT, sampler=sampler, **CALL)
    base = call()
    monkeypatch.setattr(lookahead, "Drafts", Garbage)
    out = call(lookahead={"rows": 4, "multi_source": False})
    assert (out.sequences, out.nfe, out.stats["hits"]) == (base.sequences, base.nfe, 0)
    monkeypatch.setattr(lookahead, "Drafts", Oracle)
    Oracle.future = states(sampler)
    out = call(lookahead={"rows": 4, "multi_source": False})
    assert out.sequences == base.sequences
    assert out.nfe == 1 + -(-(base.nfe - 1) // 4)  # the first query has nothing to be guessed from


# -- purity -----------------------------------------------------------------------------------------------------------


class Twice(Runner):
    """Takes each step twice and compares."""

    def tick(self, state: State, lane: Tensor, requests: list[int]) -> list[Part]:
        copy = copied(state)
        one, win = opened(self.s, state)
        parts = []
        for rows, plan in self.policy.plan(one, win, lane):
            index = torch.arange(len(requests)) if rows is None else rows
            sub, sub_win = one.take(index), win.take(index)
            pred = self(sub, sub_win, plan, [requests[i] for i in index.tolist()])
            before = copied(sub)
            first, second = step(self.s, sub, sub_win, pred), step(self.s, sub, sub_win, pred)
            assert bool(alike(first, second).all())
            assert all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(second), strict=True))
            assert all(torch.equal(a, b) for a, b in zip(leaves(sub), leaves(before), strict=True))
            parts.append(Part(index, first, sub_win))
        assert all(torch.equal(a, b) for a, b in zip(leaves(state), leaves(copy), strict=True))
        return parts


def copied(state: State) -> State:
    return state.take(torch.arange(state.rows))


def leaves(state: State) -> Iterator[Tensor]:
    for part in (state.canvas, state, *state.memory.values(), *state.columns.values()):
        yield from (x for x in part if isinstance(x, Tensor))


@pytest.mark.parametrize("name", registry.names())
def test_steps_are_pure(name: str) -> None:
    sampler = SPECS.get(name, SHOWING.get(name, name))
    for checkpoint in ("tiny-llada-random", "tiny-sdar-random", "tiny-fast-dllm-v2-random"):
        settled = {"mask_id": 158} if "fast-dllm" in checkpoint else {}
        try:
            job = prepare(
                model(checkpoint, **settled), [PROMPT, PROMPT[:3]], {**CALL, "sampler": sampler, "temperature": 0.5}
            )
        except DllmError:
            continue
        options = {"batch_size": 2, "options": job.options, "meter": Meter(2), "runner": Twice}
        for count, _ in enumerate(decode(job.model, job.sampler, job.policy, job.queue, **options)):
            if count == 5:
                break
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

    for way in ("forward", "forward_kv"):
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
    needs = SimpleNamespace(impure=True)
    sampler = SimpleNamespace(name="dice", needs=needs)
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
        return id(Pace.of(net, job.sampler, job.policy, setting))

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
