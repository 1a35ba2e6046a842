"""The schedulers that read attention: worked examples of CLAD, DAPD and DAWN, settings at which they are other methods,
and what holds whatever the weights are."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from golden_cases import cases, groups
from golden_cases import decode as golden_decode
from golden_cases import model as golden
from hypothesis import given
from hypothesis import strategies as st
from replay import standing_in
from scripted import peaks, tiny
from sweeps import dealt, some
from test_samplers_identities import PROMPTS, decode, model
from torch import Tensor

import dllm
from dllm.call.job import prepare
from dllm.decoding.canvas import Canvas, Span, State
from dllm.decoding.prediction import Prediction
from dllm.decoding.slots import Sampler
from dllm.decoding.step import opened, step
from dllm.errors import DllmError
from dllm.lookahead.guard import doubtful
from dllm.models.transformer import Weights
from dllm.samplers.dapd import DAPD
from dllm.samplers.dawn import Archive
from dllm.samplers.independent import independent

MODEL = tiny(layers=2)


class First(NamedTuple):
    """A first step, with all that it took."""

    sampler: Sampler
    state: State
    window: Span
    pred: Prediction
    after: State


def first(sampler: Any, conf: list[float], attention: Tensor, prompt: int = 0, **more: Any) -> First:
    """The step on a prediction with `conf` in every column and `attention` (L, L) of every query.

    Without a prompt there is a given column in front that has neither."""
    arguments = {"max_new_tokens": len(conf) - prompt, "early_stop": False, "cache": "none", **more}
    begin = [5] * (prompt or 1)
    job = prepare(MODEL, begin, {**arguments, "sampler": sampler})
    if not prompt:
        conf, attention = [0.0, *conf], torch.nn.functional.pad(attention, (1, 0, 1, 0))
    state, window = opened(job.sampler, job.policy, job.queue)
    cols = window.reads[:, : int((window.reads >= 0).sum())]
    logits = peaks([(1, max(c, 1 / 40)) for c in conf], 40)[cols[0]][None]
    weights = Weights(torch.arange(len(conf))[None], attention.double()[None])
    window, pred = window.cut(cols.shape[1]), Prediction(logits, cols, weights=lambda: weights)
    return First(job.sampler, state, window, pred, step(job.sampler, state, window, pred))


def committed(sampler: Any, conf: list[float], attention: Tensor, prompt: int = 0, **more: Any) -> set[int]:
    """The columns that this step commits, counted from the first one of `conf`."""
    _, state, _, _, after = first(sampler, conf, attention, prompt, **more)
    begin = 0 if prompt else 1
    return {c - begin for c in (state.canvas.masked & ~after.canvas.masked)[0].nonzero()[:, 0].tolist()}


def table(size: int, flat: float, raised: dict[tuple[int, int], float]) -> Tensor:
    weights = torch.full((size, size), flat)
    for (i, j), value in raised.items():
        weights[i, j] = value
    return weights


# -- CLAD -----------------------------------------------------------------------------------------------------------

LINKS = {
    "C1": ([0, 1, 3, 4, 6], {(1, 3): 0.4, (4, 6): 0.1}, {0, 1, 6}),
    "C2": ([0, 2, 3], {(0, 2): 0.4, (0, 3): 0.4}, {2, 3}),
    "C3": ([0, 2, 3], {(0, 2): 0.1, (0, 3): 0.1}, {0, 2, 3}),
    "C4": ([0, 2, 4, 6], {(0, 2): 0.3, (2, 4): 0.2, (4, 6): 0.25}, {0, 4}),
    "C5": ([0, 2, 4, 6], {(0, 2): 0.3, (2, 4): 0.35, (4, 6): 0.25}, {0, 2, 6}),
    "C6": ([2, 3, 4], {}, {2, 3, 4}),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", LINKS)
def test_clad(name: str, turned: bool) -> None:
    """The examples of the specification; a link counts in either direction."""
    candidates, raised, expected = LINKS[name]
    conf = [0.8 if i in candidates else 0.3 for i in range(8)]
    weights = table(8, 0.02, raised)
    assert committed("clad:tau=0.7", conf, weights.T if turned else weights) == expected


def test_clad_of_two_spans_alone_goes_by_the_width() -> None:
    conf = [0.8, 0.3, 0.8, 0.8, 0.3, 0.3, 0.3, 0.3]
    weights = table(40, 0.02, {(32, 34): 0.1, (32, 35): 0.1})
    given_ = [0.1] * 32
    assert committed("clad:tau=0.7", given_ + conf, weights, 32) == {32, 34, 35}
    assert committed("clad:dream_compat,tau=0.7", given_ + conf, weights, 32) == {34, 35}


def test_clad_prefers_the_lowest_of_equal_links() -> None:
    assert committed("clad:tau=0.7", [0.8, 0.3] * 4, table(8, 0.02, {})) == {0, 4, 6}


def test_clad_without_links_still_parts_the_strongest_of_three_spans() -> None:
    assert committed("clad:tau=0.7", [0.8, 0.3] * 3 + [0.3] * 2, table(8, 0.0, {})) == {0, 4}


@given(st.lists(st.sampled_from([0.3, 0.6, 0.8, 0.95]), min_size=8, max_size=8), st.integers(0, 2**16))
def test_clad_commits_half_of_a_threshold_and_nothing_else(conf: list[float], seed: int) -> None:
    weights = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)).softmax(1)
    over = {i for i, c in enumerate(conf) if c >= 0.7}
    found = committed("clad:tau=0.7", conf, weights)
    assert (found <= over and 2 * len(found) >= len(over)) if over else len(found) == 1


# -- DAPD -----------------------------------------------------------------------------------------------------------

GRAPH = table(4, 0.0, {(0, 1): 0.1, (0, 2): 0.02, (0, 3): 0.01, (1, 2): 0.05, (1, 3): 0.02, (2, 3): 0.04})
BOTH = GRAPH + GRAPH.T


@pytest.mark.parametrize(
    ("conf", "tau", "expected"),
    [
        ([0.9, 0.6, 0.8, 0.5], 0.2, {0}),
        ([0.9, 0.6, 0.8, 0.5], 0.3, {0, 3}),
        ([0.9, 0.6, 0.8, 0.5], 0.5, {0, 2}),
        ([0.9, 0.6, 0.8, 0.5], 1.0, {0, 1, 2, 3}),
        ([0.2, 0.9, 0.8, 0.5], 0.3, {1}),
    ],
)
@pytest.mark.parametrize("weights", [BOTH, 2 * GRAPH, BOTH + 0.7 * torch.eye(4)], ids=["both", "one way", "diagonal"])
@pytest.mark.parametrize("variant", ["direct", "staged"])
def test_dapd(conf: list[float], tau: float, expected: set[int], weights: Tensor, variant: str) -> None:
    spec = {"name": "dapd", "variant": variant, "tau_min": tau, "tau_max": tau}
    assert committed(spec, conf, weights) == expected


def test_dapd_commits_what_is_sure_outside_of_the_graph() -> None:
    """The third one would be refused, and does not count as taken: the fourth commits beside it."""
    conf, low = [0.9, 0.6, 0.9985, 0.5], {"name": "dapd", "tau_min": 0.3, "tau_max": 0.3}
    assert committed(low, conf, BOTH) == {0, 2, 3}
    assert committed({**low, "preset": "compat"}, conf, BOTH) == {0, 3}


@pytest.mark.parametrize(("left", "tau"), [(256, 0.01), (128, 0.08), (64, 0.115), (1, 0.149453125)])
def test_dapd_raises_tau_with_the_share_that_is_written(left: int, tau: float) -> None:
    cols = torch.arange(300)[None]
    masked = (cols >= 40) & (cols < 40 + left)
    given_ = (cols < 20) | (cols >= 20 + 256)
    canvas = Canvas(cols, masked, given_ & ~masked, torch.tensor([20]), torch.tensor([276]), 39)
    if left == 256:
        canvas = canvas._replace(masked=~given_)
    assert float(DAPD().tau(canvas._replace(frozen=given_))) == pytest.approx(tau)


# -- DAWN -----------------------------------------------------------------------------------------------------------

FIRST = [0.95, 0.95, 0.60, 0.95]
DAWN = "dawn:tau_sink=0.3,tau_edge=0.2,tau_induce=0.7,tau_low={low},anchors=current"
EDGES: dict[str, tuple[list[float], dict[tuple[int, int], float], set[int]]] = {
    "D1": ([*FIRST, 0.92, 0.75, 0.80, 0.40], {(5, 1): 0.3, (6, 2): 0.3}, {4, 5, 6}),
    "D2": ([*FIRST, 0.92, 0.75, 0.80, 0.40], {(5, 1): 0.3, (6, 2): 0.3, (6, 5): 0.3}, {4, 5, 6}),
    "D3": ([*FIRST, 0.92, 0.93, 0.80, 0.40], {(5, 1): 0.3, (6, 2): 0.3, (6, 5): 0.3}, {4, 5}),
    "D4": ([*FIRST, 0.85, 0.80, 0.75, 0.40], {(5, 4): 0.3}, {4, 6}),
    "D6": ([*FIRST, 0.60, 0.50, 0.40, 0.30], {}, {4}),
    "D8": ([0.5, 0.5, 0.5, 0.5, 0.80, 0.85, 0.82, 0.30], {(4, 5): 0.3, (6, 5): 0.3}, {5}),
}


@pytest.mark.parametrize("name", EDGES)
def test_dawn(name: str) -> None:
    conf, edges, expected = EDGES[name]
    assert committed(DAWN.format(low=0.7), conf, table(8, 0.02, edges), 4) == expected


def test_dawn_takes_no_sink_for_an_anchor() -> None:
    """D5: column 0 gets .60 of the attention on average."""
    weights = table(8, 0.02, {(i, 0): 0.5 for i in range(8)} | {(5, 0): 0.9, (6, 0): 0.9})
    conf, spec = [*FIRST, 0.5, 0.75, 0.8, 0.4], DAWN.format(low=0.85)
    assert committed(spec, conf, weights, 4) == {6}
    assert committed(spec.replace("tau_sink=0.3", "tau_sink=0.99"), conf, weights, 4) == {5, 6}


@pytest.mark.parametrize("sink", [0.01, 0.2])
def test_dawn_on_even_weights(sink: float) -> None:
    """D7: all sinks, a threshold at tau_low; no sinks, all three by induction."""
    spec = f"dawn:tau_sink={sink},tau_edge=0.07,tau_induce=0.7,tau_low=0.7,anchors=current"
    conf = [*FIRST, 0.85, 0.80, 0.75, 0.40]
    assert committed(spec, conf, table(8, 1 / 8, {}), 4) == {4, 5, 6}
    assert committed(spec.replace("tau_low=0.7", "tau_low=0.8"), conf, table(8, 1 / 8, {}), 4) == (
        {4, 5} if sink == 0.01 else {4, 5, 6}
    )


def test_dawn_archives_how_sure_a_commit_was() -> None:
    """A given token is certain whatever this forward thinks of it; a committed one is as sure as it was."""
    conf, edges = [0.1, 0.1, 0.1, 0.1, 0.5, 0.75, 0.4, 0.4], {(5, 1): 0.3}
    spec = DAWN.format(low=0.85)
    assert committed(spec.replace("current", "archived"), conf, table(8, 0.02, edges), 4) == {5}
    assert committed(spec, conf, table(8, 0.02, edges), 4) == {5}  # the best, by force
    net = model()
    seen = []

    def check(s: Any, state: State, window: Any, pred: Prediction) -> State:
        after = step(s, state, window, pred)
        old, new = state.columns[Archive], after.columns[Archive]
        for row, i in (state.canvas.masked & ~after.canvas.masked).gather(1, pred.cols.clamp(min=0)).nonzero().tolist():
            if pred.cols[row, i] >= 0:
                seen.append(float(new.table[row, pred.cols[row, i]]))
                assert abs(seen[-1] - float(pred.confidence[row, i])) < 1e-6
        same = ~(state.canvas.masked & ~after.canvas.masked)
        assert torch.equal(old.table[same], new.table[same])
        return after

    out = dllm.generate(net, PROMPTS, sampler="dawn:layers=1", max_new_tokens=16, block_length=8, check=check)
    assert len(seen) >= sum(len(o.tokens) for o in out) and min(seen) < 0.9 < max(seen)


def test_dawn_with_current_anchors_refuses_what_it_cannot_read() -> None:
    with pytest.raises(DllmError, match=r"cannot use cache 'dual'.*anchors=archived goes with all"):
        dllm.generate(model(), [1, 2], sampler="dawn:anchors=current", cache="dual", max_new_tokens=4)
    with pytest.raises(DllmError, match="use anchors=archived"):
        dllm.generate(tiny(block_size=4), [1, 2], sampler="dawn:anchors=current", max_new_tokens=4)


# -- settings at which they are other methods -----------------------------------------------------------------------

IDENTITIES = [
    ("dawn:tau_edge=2,tau_low=0.9", "threshold:tau=0.9"),
    ("dawn:tau_sink=-1,tau_low=0.95", "threshold:tau=0.9"),
    ("dawn:tau_edge=2,tau_low=0.6", "threshold:tau=0.6"),
    ("dawn:tau_sink=-1,tau_low=0.6", "threshold:tau=0.6"),
    ("dawn:tau_sink=1,tau_edge=0.001,tau_induce=0.9,tau_low=0.9", "threshold:tau=0.9"),
    ("dapd:tau_min=1,tau_max=1", "threshold:tau=0"),
    ("dapd:variant=staged,tau_min=1,tau_max=2", "threshold:tau=0"),
    ("clad:tau=1.5", "confidence"),
]


@pytest.mark.parametrize(("left", "right"), IDENTITIES)
@pytest.mark.parametrize("cache_", ["none", "dual"])
def test_identity(left: str, right: str, cache_: str) -> None:
    assert decode(left, cache=cache_) == decode(right, cache=cache_)


@pytest.mark.parametrize("anchors", ["archived", "current"])
def test_at_other_settings_they_differ(anchors: str) -> None:
    dawn = f"dawn:layers=1,anchors={anchors},tau_sink=0.1"
    assert decode(f"{dawn},tau_edge=0.05,tau_low=0.6") != decode("threshold:tau=0.6")
    assert decode(f"{dawn},tau_edge=0.05,tau_low=0.9,tau_induce=0.5") != decode("threshold:tau=0.9")
    assert decode("clad:tau=0.5,layers=1") != decode("threshold:tau=0.5")


def test_dawn_of_columns_that_see_themselves_alone_is_a_threshold() -> None:
    conf = [0.95] * 4 + [0.95, 0.92, 0.75, 0.4]
    assert committed(DAWN.format(low=0.7), conf, torch.eye(8), 4) == {4, 5, 6}
    assert committed(DAWN.format(low=0.95), conf, torch.eye(8), 4) == {4, 5}


def test_dapd_at_zero_commits_one_a_forward_by_degree_and_confidence() -> None:
    for _, nfe, commits in decode("dapd:tau_min=0,tau_max=0,sure=2"):
        assert nfe == 16 and all(len(pairs) == 1 for pairs in commits)
    order, conf = [], [0.9, 0.6, 0.8, 0.5]
    for _ in range(4):
        gone = set(order)
        weights = BOTH.clone()
        left = [i for i in range(4) if i not in gone]
        scores = {i: sum(float(weights[i, j]) for j in left) * conf[i] for i in left}
        sub = weights[left][:, left]
        (best,) = committed("dapd:tau_min=0,tau_max=0,sure=2", [conf[i] for i in left], sub)
        order.append(left[best])
        assert order[-1] == max(left, key=scores.__getitem__)


@pytest.mark.parametrize(("link", "doubt"), [(0.15 + 1e-7, True), (0.15 - 1e-7, True), (0.16, False), (0.14, False)])
def test_a_decision_that_hangs_on_a_weight_is_in_doubt(link: float, doubt: bool) -> None:
    """Two spans alone conflict from 1.2 / 8 on."""
    conf = [0.8, 0.3, 0.8, 0.8, 0.3, 0.3, 0.3, 0.3]
    taken = first("clad:tau=0.7", conf, table(8, 0.02, {(0, 2): link, (0, 3): link}).double())
    assert bool(doubtful(*taken, delta=1e-5)) == doubt


SHIFTED = ["dawn:layers=1,tau_sink=0.1,tau_edge=0.05,tau_low=0.6", "dapd", "clad:layers=1"]


@pytest.mark.parametrize(
    ("sampler", "cache_", "window"), dealt(SHIFTED, ["none", "block", "block_dual"], ["", "fast_dllm_v2+"])
)
def test_shifted_block_causal_models(sampler: str, cache_: str, window: str) -> None:
    """Rows alone, in a ragged batch, and under both forms of the lookahead."""
    net, call = golden("tiny-fast-dllm-v2-random", mask_id=158), {"max_new_tokens": 12, "trace": True, "cache": cache_}
    decode_ = partial(dllm.generate, net, sampler=window + sampler, early_stop=False, **call)
    expected = [decode_(prompt).trace.commits for prompt in PROMPTS]
    for more in ({}, {"lookahead": 4}, {"lookahead": {"rows": 4, "form": "chain"}}):
        assert [o.trace.commits for o in decode_(PROMPTS, **more)] == expected


SHOWN = ["dawn:layers=1,tau_sink=0.1,tau_edge=0.05,tau_low=0.6", "dapd:tau_max=0.3", "clad:layers=1"]


@pytest.mark.parametrize(("sampler", "cache_"), dealt(SHOWN, ["none", "dual", "dllm_cache"]))
def test_captured_rounds_hold_the_weights(sampler: str, cache_: str) -> None:
    call = {"sampler": sampler, "cache": cache_, "max_new_tokens": 24, "block_length": 12, "batch_size": 2}
    plain = dllm.generate(model(), PROMPTS, **call)
    with standing_in():
        ahead = dllm.generate(model(), PROMPTS, lookahead={"rows": 4, "form": "chain"}, graphs=True, **call)
    assert [o.sequences for o in ahead] == [o.sequences for o in plain]
    assert ahead[0].stats["graphs"]["replays"] > 0


@pytest.mark.parametrize("form", ["memo", "chain"])
@pytest.mark.parametrize(
    ("checkpoint", "method"), some(cases("clad", "dawn", "dapd_staged", "dapd_direct"), lambda c: "trained" not in c[0])
)
def test_golden_decodes_under_lookahead(checkpoint: str, method: str, form: str) -> None:
    group = groups(checkpoint, method)[0]
    for case, out in zip(
        group, golden_decode(checkpoint, method, group, 3, lookahead={"rows": 4, "form": form}), strict=True
    ):
        assert out.sequences == case["output_ids"] and out.nfe <= case["nfe"]
        assert [sorted(pairs) for pairs in out.trace.commits] == [sorted(pairs) for pairs in case["commits"]]


@given(st.integers(0, 2**16), st.integers(1, 12))
def test_the_greedy_set_is_what_a_loop_takes(seed: int, width: int) -> None:
    g = torch.Generator().manual_seed(seed)
    bars, among = (torch.rand(2, width, width, generator=g) < 0.3), torch.rand(2, width, generator=g) < 0.8
    order = torch.stack([torch.randperm(width, generator=g) for _ in range(2)])
    for row in range(2):
        taken: list[int] = []
        for i in sorted(range(width), key=lambda i: int(order[row, i])):
            if among[row, i] and not any(bars[row, i, j] for j in taken):
                taken.append(i)
        assert set(independent(order, among, bars)[row].nonzero()[:, 0].tolist()) == set(taken)


READERS = ["dawn:layers=1,tau_sink=0.1", "dapd", "clad:layers=1,tau=0.5"]
OTHERS = ["adablock:delimiters=[3, 40]", "credit", "prophet", "dsb", "saber", "eotp"]


@pytest.mark.parametrize(("sampler", "other"), dealt(READERS, OTHERS))
def test_they_compose(sampler: str, other: str) -> None:
    arguments: dict[str, Any] = {"eos": 124, "early_stop": True}
    if other == "saber":
        with pytest.raises(DllmError, match="both decide the select, which columns commit"):
            decode(f"{sampler}+{other}", **arguments)
        return
    for cache_ in ("none", "dual"):
        together = decode(f"{sampler}+{other}", cache=cache_, **arguments)
        alone = [decode(f"{sampler}+{other}", [p], cache=cache_, **arguments)[0] for p in PROMPTS]
        assert together == alone
