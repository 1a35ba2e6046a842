"""The benches of the masked tail: positions by the closed form, a planted EOS, tails beside their bases."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from bench_kit import Played

import dllm
from dllm.bench import tail, windows
from dllm.bench.answers import Series
from dllm.bench.runtime import random_model
from dllm.cli import main
from dllm.models.native import NativeModel


@pytest.fixture(scope="module")
def model() -> NativeModel:
    return random_model(width=64, layers=1, vocabulary=600, positions=512)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_an_answer_ends_where_its_eos_was_planted(model: NativeModel, cache: str) -> None:
    ends = tail.Ending(model, tail.SMALL.prompt + tail.SMALL.answer)
    prompts = [[1 + i for i in range(tail.SMALL.prompt)], [9] * (tail.SMALL.prompt + 3)]  # the second one is longer
    outs = dllm.generate(ends, prompts, cache=cache, **tail.SMALL.call(stops=True))
    assert [(len(o.tokens), o.finish_reason) for o in outs] == [
        (tail.SMALL.answer, "stop"),
        (tail.SMALL.answer - 3, "stop"),
    ]


def test_all_other_columns_are_the_models_own(model: NativeModel) -> None:
    ids, column = torch.arange(12)[None], 7
    ours, plain = tail.Ending(model, column).forward(ids), model.forward(ids)
    assert (ours != plain).any(-1)[0].nonzero().flatten().tolist() == [column]
    assert model.logits(ours)[0, column].softmax(-1)[model.eos_ids[0]] > 0.99


def fed(shape: tail.Shape, cache: str, stops: bool) -> int:
    """Positions of a decode, by the closed form: what opens each block, then steps of the block alone. A row that stops
    does so in the forward that opens the block of its EOS."""
    whole = (shape.answer if stops else shape.new) // shape.block
    openings = [shape.prompt + shape.new] * (whole + stops)
    if cache != tail.BASE:
        for b in range(len(openings)):
            before = shape.prompt + b * shape.block
            kept = min(shape.new - (b + 1) * shape.block, shape.near + 1)
            openings[b] = (shape.block if cache == tail.RECENT and b else before) + shape.block + kept
    return sum(openings) + whole * (shape.forwards - 1) * shape.block


CASES = [(cache, stops) for stops in (True, False) for cache in (tail.NEAR, tail.RECENT)]


def test_positions_are_those_of_the_closed_form(model: NativeModel) -> None:
    rows = list(tail.run(1, tail.SMALL, model))
    assert [row.bound for row in rows] == [None] * 8
    assert all(row.name.endswith("seconds a token") and row.value for row in rows[1::2])
    for (cache, stops), row in zip(CASES, rows[::2], strict=True):
        assert row.name.endswith("positions a token")
        assert row.value == pytest.approx(fed(tail.SMALL, cache, stops) / fed(tail.SMALL, tail.BASE, stops)), row


def test_the_command_prints_the_rows_of_tiny_shapes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dllm", "bench", "tail", "--small", "--repeats", "1", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["value"] is not None and row["met"] is None for row in rows] == [True] * 8


@pytest.mark.parametrize("case", CASES)
def test_what_is_asked_of_the_full_shape_can_be_had(case: tuple[str, bool]) -> None:
    assert fed(tail.FULL, *case) / fed(tail.FULL, tail.BASE, case[1]) <= tail.BARS[case]


def test_a_tail_meets_its_base_on_the_same_problems(tmp_path: Path) -> None:
    """The tail solves the second half, its base the first six; of every base's positions it needs half."""

    def rule(series: Series, index: int) -> tuple[bool, int]:
        full = series.frame.cache in ("none", "dual")
        return (index < 6) if full else (index >= 4), 4 if full else 2

    answers = Played(tmp_path / "answers.jsonl", rule)
    caches = {"none": ("{}:near=8",), "dual": ("{}:near=8", "{}:near=4")}
    text = windows.report(answers, 8, ["sudoku"], [64, 128], caches)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == 2 * ["`none`", "`none:near=8`", "`dual`", "`dual:near=8`", "`dual:near=4`"]
    assert [row[2][:5] for row in rows] == 2 * ["—", "-25.0", "—", "-25.0", "-25.0"]
    assert [row[3:6] for row in rows[:2]] == [["4.00", "40", "1.00"], ["2.00", "20", "0.50"]]
    assert answers.asked.count(("threshold", 2)) == 10  # each series once: batches of 3, 3 and 2


def test_the_report_of_the_embedded_model(tmp_path: Path) -> None:
    text = windows.run(
        out=tmp_path / "a.jsonl", n=2, task_names=["sudoku"], windows=[48], caches={"dual": ("{}:near=8,tail=1",)}
    )
    assert "### sudoku, window 48" in text
    shares = [float(line.split("|")[6]) for line in text.splitlines() if line.startswith("| `")]
    assert shares[0] == 1.0 and shares[1] < 1.0
