"""The runtime's benches on a small random model: that they run, and that they time what they say."""

from __future__ import annotations

import re

import pytest
from golden_cases import model as load

from dllm.bench import runtime as bench
from dllm.models.native import NativeModel


@pytest.fixture(scope="module")
def model() -> NativeModel:
    return bench.random_model(width=64, layers=1, vocabulary=100, positions=512)


def test_a_block_is_one_refresh_and_its_steps(model: NativeModel) -> None:
    recorder = bench.Recorder(model)
    bench.first_block(recorder, given=8, new=96)
    fed = [call.args[0].shape[1] for name, call in recorder.calls if name == "forward"]
    assert fed == [104] + [32] * 31


def test_the_growth_row_prints_its_parts(model: NativeModel) -> None:
    row = bench.growth(model, 1, short=32, long=64, given=4)
    assert re.search(r"32: refresh [\d.]+ \+ steps [\d.]+ ms a token; 64: refresh", row.note)


def test_a_decode_is_measured_against_its_own_forwards(model: NativeModel) -> None:
    row = bench.overhead(model, [1, 2, 3], 1.02, "small", 1, max_new_tokens=8, steps=4, early_stop=False, cache="dual")
    assert row.note.startswith("4 forwards")


def test_the_whole_bench_of_the_loop_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    small = bench.random_model(width=64, layers=1, vocabulary=600, positions=1200)
    monkeypatch.setattr(bench, "random_model", lambda: small)
    monkeypatch.setattr(bench.dllm, "load", lambda _: load("tiny-llada-trained", "float32"))
    rows = list(bench.generate(repeats=1, length=96))
    assert [r.bound for r in rows] == [1.02, 1.12, 1.3, 5.0, 3.5, 2.2, 1.0]
    assert rows[-1].value == 1.0
    assert rows[1].note.startswith("16 forwards")


def test_rows_become_json_with_what_they_were_asked() -> None:
    text = bench.as_json([bench.Row("a", 2.0, 3.0), bench.Row("b", 2.0, 3.0, higher_is_better=True), bench.Row("c", 1)])
    assert re.findall(r'"met": (\w+)', text) == ["true", "false", "null"]
