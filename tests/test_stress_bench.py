"""`dllm bench stress`: it resumes, pairs with the threshold and with one token a forward, and draws its curves."""

from __future__ import annotations

from pathlib import Path

import pytest

from dllm.bench import stress
from dllm.bench.answers import Answers
from dllm.errors import DllmError


def test_report_of_the_planted_model_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"model": None, "out": tmp_path, "n": 6, "names": ["threshold", "eb"], "task_names": ["replacing", "pairs"]}
    text = stress.run(**call)
    assert "### replacing, planted" in text and "### pairs, planted" in text and "trained" not in text
    assert (tmp_path / "curves.png").stat().st_size > 5000
    monkeypatch.setattr(Answers, "solve", lambda *_: pytest.fail("decoded twice"))
    assert stress.run(**call) == text


def test_a_sampler_that_there_is_not_is_named_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "solve", lambda *_: pytest.fail("decoded before"))
    with pytest.raises(DllmError, match="unknown sampler 'treshold'; did you mean 'threshold'"):
        stress.run(model=None, out=tmp_path, n=6, names=["threshold", "treshold"], task_names=["pairs"])


def test_points_say_who_breaks(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "a.jsonl", stress.planted(12), trace=True)
    found = stress.curves(answers, ["threshold", "eb"], ["pairs", "copying"], 12)
    by_setting = {(x.series.sampler, x.series.frame.steps): x for x in found["pairs"]}
    careful, plain, bold, eb = (
        by_setting[key] for key in [("confidence", 16), ("threshold", None), ("threshold:tau=0.4", None), ("eb", None)]
    )
    assert careful.score.accuracy == plain.score.accuracy == eb.score.accuracy == 1
    assert str(plain.against) == "+0.0 [+0.0, +0.0]" and careful.careful.saved == 1
    assert bold.score.accuracy < 0.5 and bold.against.verdict == "loses" and bold.score.nfe == 1
    assert eb.score.tokens_per_forward > 1.5 * plain.score.tokens_per_forward
    assert stress.fastest(found["pairs"]).startswith("`eb` ")
    assert all(x.score.accuracy == 1 for x in found["copying"])
    assert all(0 < x.arness <= 1 for points in found.values() for x in points)
    assert "| eb |" in stress.report({stress.PLANTED: found}, {"pairs": 0.1, "copying": 1.0}, 12)
