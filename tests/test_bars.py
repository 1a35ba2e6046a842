"""Exactly at the bar: for every rule that compares something with a parameter, what equality does.

`even(k)` is a column whose k tokens are equally likely: its confidence 1/k and its entropy ln k are exact, so a bar can
lie on them. Each case gives what the first forwards commit with the bar there, and with the nearest number on the side
where the verdict turns.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scripted import Scripted, open_window
from test_samplers_rivals import job
from torch import Tensor

import dllm
from dllm.decoding.prediction import Prediction
from dllm.decoding.step import step
from dllm.samplers import registry
from dllm.samplers.learn2pd import Filter

NEVER = -1e9
VOCAB = 8


def even(*sizes: int) -> Tensor:
    """(L, V) logits: column i is undecided between its first sizes[i] tokens."""
    return torch.stack([torch.where(torch.arange(VOCAB) < k, 0.0, NEVER).double() for k in sizes])


def above(x: float) -> float:
    return math.nextafter(x, math.inf)


def below(x: float) -> float:
    return math.nextafter(x, -math.inf)


def entropy(k: int) -> float:
    """The entropy of `even(k)` as the samplers see it."""
    return -Prediction(even(k)[None], torch.tensor([[0]])).negative_entropy.item()


def decode(script: Any, sampler: Any, n: int, **arguments: Any) -> Any:
    call = {"max_new_tokens": n, "block_length": n, "early_stop": False, "trace": True, **arguments}
    return dllm.generate(Scripted(script), [0], sampler=sampler, **call)


def committed(out: Any, step: int = 0) -> set[int]:
    """Columns that a forward gave a token, counted from the generation."""
    return {c - 1 for c, token in out.trace.commits[step] if token != out.trace.mask_id}


def test_columns_lie_where_they_should() -> None:
    found = Prediction(even(1, 2, 4)[None], torch.tensor([[0, 1, 2]]))
    assert found.confidence.tolist() == [[1.0, 0.5, 0.25]]
    assert -found.negative_entropy[0, 1] == entropy(2) == math.log(2)


# sampler with BAR, the columns, a bar that lies on one of them, the commits there, the other bar, the commits there
BARS = [
    ("threshold:tau=BAR", (1, 2, 4), 0.5, {0, 1}, above(0.5), {0}),
    ("threshold:tau=0.9,tie=BAR", (2, 4), 0.25, {0, 1}, 0.2499, {0}),
    ("factor:f=BAR", (1, 2), 1.5, {0}, above(1.5), {0, 1}),  # (2 + 1) (1 - 1/2)
    ("eb:gamma=BAR", (1, 2, 2, 4), entropy(2), {0, 1, 2}, below(entropy(2)), {0, 1}),
    ("localleap:kappa=BAR,tau=0.25,radius=1", (4, 2, 4, 4), 0.5, {0, 1, 2}, above(0.5), {1}),
    ("localleap:kappa=0.5,tau=BAR,radius=1", (4, 2, 4, 4), 0.25, {0, 1, 2}, above(0.25), {1}),
    ("hierarchy:tau_high=BAR,tau_low=0.9", (1, 2, 4), 0.5, {0}, below(0.5), {0, 1}),
    ("hierarchy:tau_high=1,tau_low=BAR", (2, 4, 4), 0.5, {0}, below(0.5), {0}),
    ("credit:alpha=0,tau=BAR", (1, 2, 4), 0.5, {0, 1}, above(0.5), {0}),
    ("adablock:tau=BAR,delimiters=[7]", (1, 2, 4), 0.5, {0, 1}, above(0.5), {0}),
    ("dsb:tau=BAR", (1, 2, 4), 0.5, {0, 1}, above(0.5), {0}),
    ("lopa:tau=BAR", (1, 2, 4), 0.5, {0, 1}, above(0.5), {0}),
    ("slowfast:tau=BAR", (1, 2, 4), 0.5, {0, 1}, above(0.5), {0}),
    ("editing:tau=BAR", (1, 2, 4), 0.5, {0, 1}, above(0.5), {0}),
    ("sdar:tau=BAR", (1, 2, 4), 0.5, {0}, below(0.5), {0, 1}),
    ("sdar:entropy_bounded,gamma=BAR", (1, 2, 2, 4), entropy(2), {0, 1, 2}, below(entropy(2)), {0, 1}),
    ("sdar:entropy_bounded,steps=2,gamma=BAR", (4, 4, 4, 4), entropy(4), {0, 1}, below(entropy(4)), {0, 1}),
    ("wino:tau_draft=BAR,tau_verify=0", (1, 2, 4), 0.5, {0}, below(0.5), {0, 1}),
]


@pytest.mark.parametrize(("spec", "columns", "bar", "there", "other", "elsewhere"), BARS, ids=lambda x: str(x)[:24])
def test_commits(spec: str, columns: Any, bar: float, there: set[int], other: float, elsewhere: set[int]) -> None:
    table = even(*columns, *columns) if spec.startswith("wino") else even(*columns)  # wino reads a shadow of each
    for value, expected in ((bar, there), (other, elsewhere)):
        out = decode(table, spec.replace("BAR", repr(value)), len(columns))
        assert committed(out) == expected, value


def test_hierarchy_asks_more_than_tau_low_of_an_area() -> None:
    """Columns 0 and 1 beside a given token, 3 behind it: the best of the second area stands at the bar."""
    hole = VOCAB
    for tau, expected in ((0.5, {0}), (below(0.5), {0, 3})):
        model = Scripted(even(1, 4, 1, 2))
        out = dllm.generate(
            model, [0, hole, hole, 3, hole], sampler=f"hierarchy:tau_high=1,tau_low={tau!r}", infill=True,
            max_new_tokens=0, block_length=4, early_stop=False, trace=True,
        )  # fmt: skip
        assert committed(out) == expected


@pytest.mark.parametrize("sampler", ["prophet:high=BAR,region=all", "sched:high=BAR,low=BAR"])
def test_an_exit_at_its_mean_gap(sampler: str) -> None:
    table = torch.full((4, VOCAB), NEVER, dtype=torch.float64)
    table[:, 0], table[:, 1] = 5.0, torch.tensor([1.0, -1.0, 0.0, 0.0])  # gaps 4, 6, 5, 5
    assert decode(table, sampler.replace("BAR", "5.0"), 4).nfe == 1
    assert decode(table, sampler.replace("BAR", "5.00001"), 4).nfe > 1


def test_prophet_changes_its_threshold_from_a_third_on() -> None:
    progress = torch.tensor([below(0.33), 0.33, below(0.67), 0.67], dtype=torch.float64)
    assert registry.method("prophet")(high=3, mid=2, low=1).tau(progress).tolist() == [3, 2, 2, 1]


def test_klass_wants_more_confidence_and_less_movement_than_its_bars() -> None:
    still = even(2, 2, 2, 2)  # moves by a divergence of exactly 0
    for kappa, epsilon, sizes in (
        (0.5, 1.0, [1, 1]),
        (below(0.5), 1.0, [1, 3]),
        (0.4, 0.0, [1, 1]),
        (0.4, 1e-300, [1, 3]),
    ):
        out = decode(still, {"name": "klass", "kappa": kappa, "epsilon": epsilon, "n": 1}, 4)
        assert [len(committed(out, step)) for step in (0, 1)] == sizes, (kappa, epsilon)


def test_saber_wants_more_than_the_mean_of_its_record() -> None:
    """The first step records two commits at 1/2: their mean is the second step's bar."""
    out = decode([even(2, 2, 4, 4, 4, 4), even(2, 2, 2, 2, 2, 4)], "saber:backtrack=false", 6)
    assert (committed(out, 0), committed(out, 1)) == ({0, 1}, {2, 3})  # none is above: the best n
    out = decode([even(2, 2, 4, 4, 4, 4), even(2, 2, 1, 1, 1, 4)], "saber:backtrack=false", 6)
    assert committed(out, 1) == {2, 3, 4}


def test_saber_takes_the_mean_of_a_single_record_too() -> None:
    out = decode([even(2, 4, 4, 4), even(2, 3, 3, 4)], "saber:n=1,backtrack=false", 4)
    assert (committed(out, 0), committed(out, 1)) == ({0}, {1})  # a third is less than a half


@pytest.mark.parametrize(("tau", "again"), [(0.5, set()), (above(0.5), {0})])
def test_wino_takes_back_what_is_below_its_bar(tau: float, again: set[int]) -> None:
    first, shadow = even(1, 1, 4, 4, 4), even(2, 1, 1, 1, 1)
    tables = [torch.cat([first, first]), torch.cat([even(1, 1, 1, 1, 4), shadow])]
    out = decode(tables, {"name": "wino", "tau_draft": 0.6, "tau_verify": tau}, 5)
    assert committed(out, 0) == {0, 1} and committed(out, 1) == {2, 3}
    assert {c - 1 for c, token in out.trace.commits[1] if token == out.trace.mask_id} == again


@pytest.mark.parametrize(("tau", "again"), [(0.5, set()), (above(0.5), {0})])
def test_hierarchy_takes_back_what_is_below_its_bar(tau: float, again: set[int]) -> None:
    tables = [even(1, 1, 4, 4, 4), even(2, 1, 1, 1, 4)]
    out = decode(tables, {"name": "hierarchy", "tau_remask": tau}, 5)
    assert committed(out, 0) == {0, 1} and committed(out, 1) == {2, 3}
    assert {c - 1 for c, token in out.trace.commits[1] if token == out.trace.mask_id} == again


@pytest.mark.parametrize(("edit", "edited"), [(0.5, True), (above(0.5), False)])
def test_editing_at_its_bar(edit: float, edited: bool) -> None:
    """Token 0 is written in the first step; then the column is undecided between tokens 2 and 3."""
    other = even(1, 1)
    other[0] = torch.where((torch.arange(VOCAB) // 2) == 1, 0.0, NEVER)
    out = decode([even(1, 4), other], {"name": "editing", "tau": 0.9, "edit": edit}, 2)
    assert (out.tokens[0] == 2) == edited


@pytest.mark.parametrize(("tau", "commits"), [(0.5, {0}), (above(0.5), {0, 2, 3})])
def test_adablock_ends_a_block_at_a_delimiter_of_its_bar(tau: float, commits: set[int]) -> None:
    """The delimiter in column 1 ends the block there, or the block is 4 columns; column 1 itself is too unsure."""
    table = even(1, 1, 1, 1, 1, 1, 1, 1)
    table[1] = torch.where((torch.arange(VOCAB) == 6) | (torch.arange(VOCAB) == 7), 0.0, NEVER)
    out = decode(table, {"name": "adablock", "delimiters": [6], "tau_delimiter": tau}, 8, block_length=4)
    assert committed(out) == commits


@pytest.mark.parametrize(("tau", "sizes"), [(0.5, [1, 1, 1, 1]), (0.4999, [4])])
def test_learn2pd_wants_more_than_its_bar(tau: float, sizes: list[int]) -> None:
    zero = {"linear1.weight": torch.zeros(4, 4), "linear1.bias": torch.zeros(4),
            "linear2.weight": torch.zeros(4, 4), "linear2.bias": torch.zeros(4)}  # fmt: skip
    out = decode(even(2, 2, 2, 2), {"name": "learn2pd", "filter": Filter(zero, 4, tau=0.9), "tau": tau}, 4)
    assert [len(pairs) for pairs in out.trace.commits] == sizes  # sigmoid(0) = 1/2


def test_a_filter_takes_a_written_column_for_certain() -> None:
    """Accepts all where the block's confidences sum to more than 3/2: not 1/2 and three times 1/4, but 1 and those."""
    rows = {"linear1.weight": torch.ones(4, 4), "linear1.bias": torch.zeros(4),
            "linear2.weight": torch.eye(4), "linear2.bias": torch.full((4,), -1.5)}  # fmt: skip
    out = decode(even(2, 4, 4, 4), {"name": "learn2pd", "filter": Filter(rows, 4, revealed="fill", tau=0.5)}, 4)
    assert [len(pairs) for pairs in out.trace.commits] == [1, 3]


@pytest.mark.parametrize(("second", "epoch"), [(4, 0), (2, 1)])
def test_dsb_refreshes_after_exactly_a_block_of_commits(second: int, epoch: int) -> None:
    """Blocks of 4: two commits, then as many as reach the bar, one or two; four of them are a block."""
    j = job(8, "dsb:tau=0.5", block_length=4)
    state, window = open_window(j.sampler, j.queue)
    for sizes in ((1, 1, 4, 4, 4, 4, 4, 4), (1, 1, 1, second, 4, 4, 4, 4)):
        pred = Prediction(even(*sizes)[None, (window.reads[0] - 1).clamp(min=0)], window.reads)
        state, window = open_window(j.sampler, step(j.sampler, state, window, pred))
    assert window.epoch.tolist() == [epoch]
