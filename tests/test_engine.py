"""The engine on scripted models and a tiny checkpoint: commit order, independence of rows, refills, invariants."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from golden_cases import model
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Scripted, peaks

import dllm
from dllm.call.job import prepare
from dllm.decoding import engine
from dllm.decoding.canvas import Canvas, Decision
from dllm.decoding.meter import Meter
from dllm.decoding.runner import Batch, Runner, Stepped
from dllm.errors import DllmError

CACHES = ["none", "prefix", "dual", "dual:left=3,right=2"]
SAMPLERS = ["confidence", "margin", "entropy", "random", "threshold:tau=0.6", "factor", "factor:compat", "eb"]
PROMPTS = [[5, 9, 30, 41], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19]]


def run(checkpoint: str, prompts: Any, dtype: str = "float64", **arguments: Any) -> Any:
    return dllm.generate(model(checkpoint, dtype), prompts, trace=True, **arguments)


def test_columns_commit_in_the_order_of_their_confidence() -> None:
    table = peaks([(1, 0.6), (2, 0.9), (3, 0.7), (4, 0.8)], vocab=6)
    out = dllm.generate(Scripted(table), [0], sampler="confidence", max_new_tokens=4, block_length=4, trace=True)
    assert out.trace.commits == [[[2, 2]], [[4, 4]], [[3, 3]], [[1, 1]]]
    assert (out.tokens, out.nfe, out.finish_reason) == ([1, 2, 3, 4], 4, "length")


def test_ties_go_to_the_lowest_position() -> None:
    table = peaks([(1, 0.8)] * 5, vocab=4)
    out = dllm.generate(Scripted(table), [0], sampler="confidence", max_new_tokens=5, block_length=5, trace=True)
    assert [pairs[0][0] for pairs in out.trace.commits] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("steps", "quota"), [(4, [3, 3, 2, 2]), (3, [4, 3, 3]), (10, [1] * 10), (40, [1] * 10), (1, [10])]
)
def test_the_quota_is_spread_as_llada_spreads_it(steps: int, quota: list[int]) -> None:
    out = dllm.generate(
        Scripted(peaks([(1, 0.5)] * 10, 4)),
        [0],
        sampler="confidence",
        steps=steps,
        max_new_tokens=10,
        block_length=10,
        trace=True,
    )
    assert [len(pairs) for pairs in out.trace.commits] == quota


def test_the_last_block_may_be_short() -> None:
    out = dllm.generate(
        Scripted(peaks([(1, 0.5)] * 7, 4)),
        [0],
        sampler="threshold:tau=0.4",
        max_new_tokens=7,
        block_length=3,
        trace=True,
    )
    assert out.trace.windows == [[1, 4], [4, 7], [7, 8]]
    assert out.nfe == 3


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_gets_in_a_batch_what_it_gets_alone(sampler: str, cache: str) -> None:
    arguments: dict[str, Any] = {
        "sampler": sampler, "cache": cache, "max_new_tokens": 12, "block_length": 5, "steps": 8, "early_stop": False,
    }  # fmt: skip
    together = run("tiny-llada-random", PROMPTS, batch_size=2, seed=3, **arguments)  # the third row refills
    for i, prompt in enumerate(PROMPTS):
        alone = run("tiny-llada-random", prompt, seed=3 + i, **arguments)
        assert together[i].sequences == alone.sequences
        assert together[i].nfe == alone.nfe
        assert together[i].positions == alone.positions
        assert together[i].trace.commits == alone.trace.commits


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.8},
        {"temperature": 1.3, "top_p": 0.9, "top_k": 20},
        {"temperature": 0.7, "gumbel": True},
        {"sampler": "dream:alg=origin"},
        {"sampler": "dream:alg_temp=0.5", "temperature": 0.5, "top_p": 0.95},
        {"cfg_scale": 0.7, "cache": "dual"},
        {"cfg_scale": 0.7, "cache": "prefix", "temperature": 0.4},
    ],
)
def test_sampled_rows_are_the_same_alone_and_in_a_batch(arguments: dict[str, Any]) -> None:
    common: dict[str, Any] = {"max_new_tokens": 10, "block_length": 5, "early_stop": False, **arguments}
    together = run("tiny-llada-random", PROMPTS, seed=11, **common)
    again = run("tiny-llada-random", PROMPTS, seed=11, batch_size=1, **common)
    other = run("tiny-llada-random", PROMPTS, seed=99, **common)
    assert [o.sequences for o in together] == [o.sequences for o in again]
    if "temperature" in arguments:
        assert [o.sequences for o in together] != [o.sequences for o in other]
    alone = run("tiny-llada-random", PROMPTS[1], seed=12, **common)
    assert alone.sequences == together[1].sequences


@pytest.mark.parametrize(
    "sampler",
    ["eotp", "daedal:initial=4,factor=2,tail=2,tau_low=0.4", "daedal:initial=10,factor=6,tail=1,tau_low=0.9,tau_eos=0"],
)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_an_edit_refreshes_its_own_row_alone(sampler: str, cache: str) -> None:
    call: dict[str, Any] = {
        "sampler": sampler, "cache": cache, "max_new_tokens": 12, "block_length": 4, "early_stop": False,
        "eos": [124, 40, 65, 102, 150, 12],
    }  # fmt: skip
    together = run("tiny-llada-random", PROMPTS, **call)
    alone = [run("tiny-llada-random", prompt, seed=i, **call) for i, prompt in enumerate(PROMPTS)]
    assert [(o.sequences, o.nfe, o.positions) for o in together] == [(o.sequences, o.nfe, o.positions) for o in alone]


def test_float32_batches_differ_only_where_the_decision_is_closer_than_the_error() -> None:
    """In float32 a row may part from its single run only at a decision within the measured numeric error: the guard of
    the lookahead, which looks at every decision of a forward for several rows, takes those again."""
    call: dict[str, Any] = {"max_new_tokens": 16, "early_stop": False}
    batch = run("tiny-llada-random", PROMPTS, "float32", **call)
    for prompt, row in zip(PROMPTS, batch, strict=True):
        single = run("tiny-llada-random", prompt, "float32", **call)
        guarded = run("tiny-llada-random", [prompt, prompt], "float32", lookahead=1, **call)
        close = guarded[0].stats["divergences"] + sum(out.stats["reruns"] for out in guarded)
        assert row.sequences == single.sequences or close


def test_caches_are_exact_where_they_must_be() -> None:
    """One forward a block: every forward is a refresh, so the caches change nothing."""
    arguments: dict[str, Any] = {
        "sampler": "threshold:tau=0",
        "max_new_tokens": 12,
        "block_length": 4,
        "early_stop": False,
    }
    plain = run("tiny-llada-random", PROMPTS, **arguments)
    for cache in CACHES[1:]:
        assert [o.sequences for o in run("tiny-llada-random", PROMPTS, cache=cache, **arguments)] == [
            o.sequences for o in plain
        ]


@given(
    st.lists(st.lists(st.integers(0, 150), min_size=1, max_size=9), min_size=1, max_size=4),
    st.sampled_from([*SAMPLERS, "dream"]),
    st.sampled_from(CACHES),
    st.integers(1, 14),
    st.integers(1, 9),
    st.sampled_from([None, 1, 3, 20]),
    st.sampled_from([0.0, 0.9]),
)
@settings(max_examples=25)
def test_invariants(
    prompts: list, sampler: str, cache: str, new: int, block: int, steps: int | None, temperature: float
) -> None:
    tiny = model("tiny-llada-random")
    outputs = dllm.generate(
        tiny, prompts, sampler=sampler, cache=cache, max_new_tokens=new, block_length=block, steps=steps,
        temperature=temperature, early_stop=False, batch_size=2, trace=True,
    )  # fmt: skip
    for prompt, out in zip(prompts, outputs, strict=True):
        written = [c for pairs in out.trace.commits for c, _ in pairs]
        assert out.sequences[: len(prompt)] == prompt
        assert len(out.sequences) == len(prompt) + new
        assert tiny.mask_id not in out.sequences
        assert sorted(written) == list(range(len(prompt), len(prompt) + new))  # each column once, none elsewhere
        assert out.nfe == len(out.trace.commits) <= max(new, steps or 0)
        if sampler != "dream":
            assert all(pairs for pairs in out.trace.commits)
        for pairs, (lo, hi) in zip(out.trace.commits, out.trace.windows, strict=True):
            assert all(lo <= c < hi for c, _ in pairs)


class Uneven(Runner):
    """Steps one lane after the other, so that rows drift apart; notes what the others have done when a row enters."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.steps: Counter[int] = Counter()
        self.entries: dict[int, tuple[int, list[int]]] = {}  # request -> steps of its lane, of the other lanes then

    def clock(self, lane: int) -> int:
        return self.steps[lane]

    def tick(self, batch: Batch) -> list[Stepped]:
        lanes = [i for i, r in enumerate(batch.request) if r is not None]
        for own in lanes:
            others = [self.steps[other] for other in lanes if other != own]
            request = batch.request[own]
            assert request is not None
            self.entries.setdefault(request.index, (self.steps[own], others))
        self.steps[min(lanes)] += 1
        return [batch.took(self.turn(batch.part([min(lanes)])))]


def test_a_row_enters_when_its_lane_is_due() -> None:
    """Also where lanes have drifted apart: a lane that ran ahead waits until the others have taken as many steps, as it
    would if all lanes stepped together. Else the order of requests would follow the drift."""
    made: list[Uneven] = []

    def runner(*args: Any) -> Uneven:
        made.append(Uneven(*args))
        return made[0]

    j = prepare(Scripted(peaks([(1, 0.5)] * 3, 4)), [[0]] * 5, {"sampler": "confidence", "max_new_tokens": 3})
    call: dict[str, Any] = {"batch_size": 2, "options": j.options, "meter": Meter(5), "runner": runner}
    done = [
        [r.index for r in t.request]
        for t in engine.decode(j.model, j.sampler, j.policy, j.queue, **call)
        if t.facts[0].done
    ]
    assert sorted(r for [r] in done) == list(range(5))
    entries = made[0].entries
    assert sorted(entries) == list(range(5))
    assert all(own <= min(others, default=own) for own, others in entries.values())


@pytest.mark.parametrize("cap", [1, 2])
def test_a_row_that_enters_a_batch_is_capped_as_it_is_alone(cap: int) -> None:
    """Also where the tick behind its entry closes another one: the first prompt is done at once."""

    def script(ids: list[int]) -> torch.Tensor:
        return peaks([(1, 0.9 if ids[0] == 0 else 0.5)] * 6, 4)

    call: dict[str, Any] = dict(sampler="threshold:tau=0.6", max_new_tokens=6, max_nfe=cap)
    alone = [dllm.generate(Scripted(script, vocab=5), [p], **call) for p in range(4)]
    outs = dllm.generate(Scripted(script, vocab=5), [[p] for p in range(4)], batch_size=2, **call)
    assert [(o.tokens, o.nfe) for o in outs] == [(o.tokens, o.nfe) for o in alone]


def test_the_cap_fills_what_is_left() -> None:
    out = dllm.generate(Scripted(peaks([(1, 0.5)] * 12, 4)), [0], sampler="confidence", max_new_tokens=12, max_nfe=4)
    assert (out.nfe, out.finish_reason, out.tokens) == (4, "cap", [1] * 12)


def test_an_exit_whose_last_forward_is_the_cap_is_no_cap() -> None:
    """Prophet leaves at the third forward; what that one did not cover takes a fourth, which the cap allows."""
    out = run(
        "tiny-llada-random", PROMPTS[0], max_new_tokens=12, block_length=4, max_nfe=4, cache="dual", early_stop=False,
        sampler="prophet:high=3,mid=3,low=3,region=[0, 2]",
    )  # fmt: skip
    assert (out.nfe, [len(pairs) for pairs in out.trace.commits]) == (4, [1, 1, 0, 10])
    assert out.trace.windows == [[4, 8]] * 3 + [[0, 0]]  # a closing forward has none
    assert out.finish_reason == "length"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_stop_the_decode(bad: float) -> None:
    def script(ids: list[int]) -> torch.Tensor:
        table = peaks([(1, 0.5)] * 6, 4)
        if 1 in ids:  # from the second forward on
            table[3] = bad
        return table

    scripted = Scripted(script, vocab=5)
    with pytest.raises(DllmError, match="NaN"):
        dllm.generate(scripted, [0], sampler="confidence", max_new_tokens=6)


def test_canvas_edits_shift_what_is_right_of_them() -> None:
    ids = torch.tensor([[5, 9, 9, 7, 0, 0]])
    canvas = Canvas(
        ids, ids == 9, torch.tensor([[True, False, False, False, True, True]]), torch.tensor([1]), torch.tensor([4]), 9
    )
    write = torch.tensor([[False, True, False, False, False, False]])
    no = torch.tensor([False])
    after = canvas.apply(Decision(write, torch.full_like(ids, 3), no, edits=((0, 2, 1, (9, 9)),)))
    assert after.ids.tolist() == [[5, 3, 9, 9, 7, 0]]
    assert after.masked.tolist() == [[False, False, True, True, False, False]]
    assert after.length.tolist() == [5]
    assert canvas.ids.tolist() == ids.tolist()


def test_canvas_writes_and_cuts() -> None:
    """The mask id re-masks, frozen columns stay as they are, and what is cut off is padding."""
    ids = torch.tensor([[5, 9, 9, 7, 0], [5, 6, 9, 9, 9]])
    frozen, length = torch.tensor([[True, False, False, False, True], [True] + [False] * 4]), torch.tensor([4, 5])
    canvas = Canvas(ids, ids == 9, frozen, torch.tensor([1, 1]), length, 9)
    every = torch.ones_like(frozen)
    after = canvas.write(every, torch.tensor([[1, 2, 9, 9, 1], [3, 9, 3, 3, 9]]))
    assert after.ids.tolist() == [[5, 2, 9, 9, 0], [5, 9, 3, 3, 9]]
    assert after.masked.long().tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
    short = after.cut(torch.tensor([3, 5]))
    assert short.ids.tolist() == [[5, 2, 9, 0, 0], [5, 9, 3, 3, 9]] and short.length.tolist() == [3, 5]
    assert short.masked.long().tolist() == [[0, 0, 1, 0, 0], [0, 1, 0, 0, 1]]
    assert short.frozen.long().tolist() == [[1, 0, 0, 1, 1], [1, 0, 0, 0, 0]]


def test_tokens_are_counted_to_the_first_stop() -> None:
    table = peaks([(1, 0.9), (2, 0.8), (3, 0.7), (1, 0.6)], 5)
    out = dllm.generate(Scripted(table, eos=3), [0], sampler="confidence", max_new_tokens=4, block_length=4)
    assert (out.tokens, out.nfe, out.finish_reason, out.sequences) == ([1, 2], 3, "stop", [0, 1, 2, 3])
    empty = dllm.generate(Scripted(peaks([(3, 0.9)] * 4, 5), eos=3), [0], sampler="confidence", max_new_tokens=4)
    assert (empty.tokens, empty.tokens_per_forward) == ([], 0.0)


def test_an_early_stop_waits_for_the_prefix_to_close() -> None:
    """EOS at the second column is committed first; the first column is still open then."""
    table = peaks([(1, 0.5), (3, 0.9), (1, 0.8), (1, 0.7)], 5)
    out = dllm.generate(Scripted(table, eos=3), [0], sampler="confidence", max_new_tokens=4, block_length=4, trace=True)
    assert [c for pairs in out.trace.commits for c, _ in pairs] == [2, 3, 4, 1]
    early = dllm.generate(
        Scripted(peaks([(1, 0.8), (3, 0.9), (1, 0.5), (1, 0.4)], 5), eos=3), [0], sampler="confidence", max_new_tokens=4
    )
    assert (early.nfe, early.tokens) == (2, [1])
    full = dllm.generate(
        Scripted(peaks([(1, 0.8), (3, 0.9), (1, 0.5), (1, 0.4)], 5), eos=3),
        [0],
        sampler="confidence",
        max_new_tokens=4,
        early_stop=False,
    )
    assert (full.nfe, full.tokens, full.sequences) == (4, [1], [0, 1, 3, 1, 1])
