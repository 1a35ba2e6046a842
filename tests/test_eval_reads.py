"""Tasks that read labels: Brier score, calibration error, and a run from end to end."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

import dllm
from dllm.errors import DllmError
from dllm.eval import run
from dllm.eval.config import ReadSpec, TaskSpec
from dllm.eval.metrics import BINS, brier, calibration, ece, recalibration
from dllm.eval.tasks import load

PROBLEMS = [("Tom has 12 apples. He buys 7 more.", "19"), ("Ann has 5 apples. She buys 6 more.", "11"),
            ("Tom has 8 apples. He buys 9 more.", "17")]  # fmt: skip
ASK = "{q} How many apples?"


def test_scores_by_hand() -> None:
    p, correct = np.array([0.9, 0.8, 0.6]), np.array([1.0, 0.0, 1.0])
    assert float(brier(p, correct)) == pytest.approx((0.01 + 0.64 + 0.16) / 3)
    assert float(ece(p, correct)) == pytest.approx((0.1 + 0.8 + 0.4) / 3)  # three samples, a bin each
    said = np.repeat([0.3, 0.6], 15 * 10)  # 300 samples: each of the 15 bins of 20 but one holds one p alone
    came = np.concatenate([np.tile([1, 0, 0, 0, 0, 1, 0, 0, 0, 1], 15), np.tile([1, 1, 0, 0, 1, 1, 0, 1, 0, 1], 15)])
    assert float(ece(said, came)) == pytest.approx(0, abs=1e-12)
    assert float(ece(said, 1 - came)) == pytest.approx((0.4 + 0.2) / 2 - 0.1 / 15, abs=0.02)
    assert BINS == 15


def test_intervals_hold_the_figure() -> None:
    draws = np.random.default_rng(0)
    p = draws.uniform(0.5, 1, 300)
    said = calibration(p.tolist(), (draws.uniform(size=300) < p).astype(float).tolist())
    assert said["brier_low"] < said["brier"] < said["brier_high"]
    assert said["ece_low"] < said["ece_high"]
    alone = calibration([0.7], [1.0])
    assert (alone["brier_low"], alone["brier"], alone["ece"]) == pytest.approx((0.09, 0.09, 0.3))


def rows_of(levels: Any, truth: Any) -> list[Any]:
    """Samples whose labels have these log p, and which of them is right."""
    out = []
    for i, (z, t) in enumerate(zip(levels, truth, strict=True)):
        p = np.exp(z - np.logaddexp.reduce(z))
        labels = {str(j): float(x) for j, x in enumerate(p)}
        best = int(p.argmax())
        out.append({"index": i, "labels": labels, "truth": str(t), "p": float(p.max()), "correct": float(best == t)})
    return out


def test_one_temperature_mends_what_is_too_sure_by_one_factor() -> None:
    """Labels drawn from the law of levels that are then said three times too sharply: the fit finds the 3, and the
    figures at it, each half by the other half's, are those of the true law."""
    draws = np.random.default_rng(1)
    levels = draws.normal(size=(1200, 4)) * 1.5
    truth = (levels + draws.gumbel(size=levels.shape)).argmax(1)
    said, true = recalibration(rows_of(3 * levels, truth)), rows_of(levels, truth)
    before = calibration(*zip(*((r["p"], r["correct"]) for r in rows_of(3 * levels, truth)), strict=True))
    right = calibration(*zip(*((r["p"], r["correct"]) for r in true), strict=True))
    assert said["temperature"] == pytest.approx(3, rel=0.1)
    assert said["brier_fitted"] == pytest.approx(right["brier"], abs=0.005) and said["brier_fitted"] < before["brier"]
    assert said["ece_fitted_low"] < said["ece_fitted_high"] < before["ece_low"]
    by_hand = minimize_scalar(lambda t: -log_softmax(3 * levels / t, axis=1)[np.arange(1200), truth].sum(),
                              bounds=(0.5, 10), method="bounded").x  # fmt: skip
    assert said["temperature"] == pytest.approx(by_hand, rel=1e-3)


def test_a_half_without_a_right_label_has_no_temperature() -> None:
    rows = rows_of(np.zeros((4, 2)), [0, 0, 1, 0])
    assert recalibration(rows)["temperature"] > 0
    for row in rows[::2]:
        row["truth"] = None
    assert recalibration(rows) == {} == recalibration([])


def test_a_task_reads_labels_and_its_report_says_what_they_are_worth(tmp_path: Any) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in PROBLEMS))
    asked = {"name": "jsonl", "path": str(data), "prompt": ASK, "answer": "{a}", "metric": "exact"}
    read = {"labels": ["11", "17", "19"], "template": "#### {answer}"}
    config = {"name": "reads", "model": "tiny", "tasks": [{**asked, "read": read}]}
    results = run(config, out=tmp_path / "out", progress=False)
    (cell,) = results.cells
    template, slots = "#### {answer}", {"answer": ["11", "17", "19"]}
    found = dllm.read("tiny", [ASK.format(q=q) for q, _ in PROBLEMS], template, slots=slots)
    said = [r["answer"] for r in found]
    right = np.array([float(s.best == a) for s, (_, a) in zip(said, PROBLEMS, strict=True)])
    p = np.array([s.p[s.best] for s in said])
    assert cell["accuracy"] == pytest.approx(right.mean())
    assert cell["brier"] == pytest.approx(((p - right) ** 2).mean(), abs=1e-6)
    assert (cell["nfe"], cell["tokens"]) == (1, 0)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| as read |" in text and f"| T = {cell['temperature']:.2f} |" in text
    for row, slot, (_, a) in zip(results.rows, said, PROBLEMS, strict=True):
        assert row["labels"] == pytest.approx(slot.p) and row["truth"] == a and row["p"] == max(row["labels"].values())
    hot = {**config, "tasks": [{**asked, "read": {**read, "temperature": 4}}]}
    flat = run(hot, out=tmp_path / "hot", progress=False)
    for row, old in zip(flat.rows, results.rows, strict=True):
        level = np.log([*old["labels"].values()]) / 4
        assert [*row["labels"].values()] == pytest.approx(np.exp(level - np.logaddexp.reduce(level)).tolist(), rel=1e-4)


def test_mistakes_get_one_clear_line(tmp_path: Any) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"q": "?", "a": "1"}) + "\n")
    for read in (ReadSpec(), ReadSpec(("1", "2"), template="Answer:")):
        with pytest.raises(DllmError, match=r"`read:` needs `labels:`, what an answer may be, and \{answer\}"):
            load(TaskSpec("jsonl", path=str(data), prompt="{q}", read=read))
