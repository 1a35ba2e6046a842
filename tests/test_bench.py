"""The runtime's benches on a small random model and clocks made by hand: what they count, and how they divide."""

from __future__ import annotations

import re
from itertools import count

import pytest
from golden_cases import GOLDEN

from dllm.bench import attention
from dllm.bench import runtime as bench
from dllm.models.arguments import Checkpoint
from dllm.models.native import NativeModel


@pytest.fixture(scope="module")
def model() -> NativeModel:
    return bench.random_model(width=64, layers=1, vocabulary=100, positions=512)


def test_a_block_is_one_refresh_and_its_steps(model: NativeModel) -> None:
    recorder = bench.Recorder(model)
    parts = bench.first_block(recorder, given=8, new=96, timer=count(step=2.0).__next__)
    assert recorder.fed == [104] + [32] * 31
    assert parts == (2.0, 2.0)


def test_growth_divides_the_costs_of_a_token(model: NativeModel) -> None:
    row = bench.growth(model, 3, short=32, long=64, given=4, timer=count(step=0.032).__next__)
    assert row.value == pytest.approx(1.0)  # either window took as long
    parts = "refresh 1.00 + steps 1.00 ms a token"
    assert row.note == f"32: {parts}; 64: {parts}"


def test_side_by_side_takes_turns_and_medians() -> None:
    turns, clock = [], iter([0, 9, 9, 18, 0, 3, 3, 4, 4, 9, 9, 13, 13, 14, 14, 16])  # of a, then of b, four times
    times = bench.side_by_side(lambda: turns.append("a"), lambda: turns.append("b"), 3, timer=lambda: next(clock))
    assert times == (3, 2) and "".join(turns) == "abababab"  # of 3, 5, 1 and of 1, 4, 2: the warm-up does not count


def test_a_decode_is_measured_against_its_own_forwards(model: NativeModel) -> None:
    row = bench.overhead(model, [1, 2, 3], 1.02, "small", 1, max_new_tokens=8, steps=4, early_stop=False, cache="dual")
    assert row.note.startswith("4 forwards")


def test_the_whole_bench_of_the_loop_runs() -> None:
    small = bench.random_model(width=64, layers=1, vocabulary=600, positions=1200)
    embedded = Checkpoint(str(GOLDEN / "checkpoints" / "tiny-llada-trained"), device="cpu")
    rows = list(bench.generate(1, 96, embedded, small))
    assert [r.bound for r in rows] == [1.02, 1.12, 1.3, 5.0, 3.5, 2.2, 1.0]
    assert rows[-1].value == 1.0
    assert rows[1].note.startswith("16 forwards")


def test_forwards_with_attention_weights_are_measured_beside_the_same_without(model: NativeModel) -> None:
    rows = {row.name.partition(", length 48")[0]: row for row in attention.run(None, 1, model=model, prompt=16, new=32)}
    assert list(rows) == [f"{name}, {cache}" for cache in attention.CACHES for name in attention.SAMPLERS]
    refused = rows.pop("dawn:anchors=current, dual")
    assert refused.value is None and "cannot use cache 'dual'" in refused.note
    assert all(row.value for row in rows.values())
    read = {name: int(row.note.rpartition(", ")[2].split()[0]) for name, row in rows.items()}
    assert read.pop("dawn:anchors=current, none") == 48  # every column of the canvas
    assert max(read.values()) <= 32  # those of the window


def test_rows_become_json_with_what_they_were_asked() -> None:
    text = bench.as_json(
        [bench.Figure("a", 2.0, 3.0), bench.Figure("b", 2.0, 3.0, higher_is_better=True), bench.Figure("c", 1)]
    )
    assert re.findall(r'"met": (\w+)', text) == ["true", "false", "null"]
