"""Tasks that read labels: Brier score, calibration error, and a run from end to end."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import dllm
from dllm.errors import DllmError
from dllm.eval import run
from dllm.eval.config import ReadSpec, TaskSpec
from dllm.eval.metrics import BINS, brier, calibration, ece
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
    assert "ECE" in (tmp_path / "out" / "report.md").read_text()


def test_mistakes_get_one_clear_line(tmp_path: Any) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"q": "?", "a": "1"}) + "\n")
    for read in (ReadSpec(), ReadSpec(("1", "2"), template="Answer:")):
        with pytest.raises(DllmError, match=r"`read:` needs `labels:`, what an answer may be, and \{answer\}"):
            load(TaskSpec("jsonl", path=str(data), prompt="{q}", read=read))
