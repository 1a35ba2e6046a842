"""The comparison of a filter with the threshold: swept on validation, matched in accuracy, resumed, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_kit import FAKE, Played

from dllm.bench import filters as bench_filters
from dllm.bench.answers import Score, Series
from dllm.bench.filters import Duel
from dllm.errors import DllmError
from dllm.samplers.learn2pd import Filter
from dllm.training import filters


def rule(series: Series, index: int) -> tuple[bool, int]:
    """Below 0.8 either rule loses every answer; both take more forwards the higher tau is, the filter one fewer."""
    tau = float(series.sampler.rpartition("=")[2])
    return tau >= 0.8, round(20 * tau) - series.sampler.startswith("learn2pd")


def made(folder: Path, tau: float) -> Path:
    Filter(filters.fresh(filters.Recipe(kind="block"), 4), 4, tau=tau).save(folder / "f.safetensors")
    return folder / "f.safetensors"


def compared(folder: Path) -> tuple[list[Duel], list[Score], Played]:
    path = made(folder, 0.97)
    answers = Played(folder / "answers.jsonl", rule, tokens=30)
    sweeps = bench_filters.sweeps_of(Filter.load(path), "f")
    return *bench_filters.compare(answers, sweeps, ["sudoku"], n=8, validation=4), answers


def test_each_rule_takes_its_fastest_accurate_setting(tmp_path: Path) -> None:
    [duel], sweep, answers = compared(tmp_path)
    plain, ours = duel.plain, duel.ours
    assert (plain.setting, plain.accuracy, plain.nfe, plain.tokens_per_forward) == ("threshold:tau=0.8", 1, 16, 1.875)
    assert plain.interval == pytest.approx((0.631, 1.0), abs=1e-3)
    assert (ours.setting, ours.accuracy, ours.nfe, ours.tokens_per_forward) == ("learn2pd:filter=f,tau=0.8", 1, 15, 2)
    assert duel.gain == (0.0, 0.0, 0.0)
    assert duel.speedup == pytest.approx((1.067, 1.067, 1.067), abs=1e-3)
    [own] = [score for score in sweep if score.setting == "learn2pd:filter=f,tau=0.97"]  # the filter's own tau
    assert (own.accuracy, own.nfe) == (1.0, 18.0)
    assert sum(count for setting, count in answers.asked if setting == "threshold:tau=0.8") == 4 + 8
    again = compared(tmp_path)
    assert again[:2] == ([duel], sweep)
    assert not again[2].asked
    rows = [line for line in bench_filters.report([duel], sweep, 8, 4).splitlines() if line.startswith("| sudoku")]
    assert len(rows) == 2 + len(sweep) and "1.067× [1.067, 1.067]" in rows[1]


def test_answers_of_another_filter(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    bench_filters.run(made(tmp_path, 0.97), FAKE, out=out, task_names=[])  # type: ignore[arg-type]
    with pytest.raises(DllmError, match="another model or setting"):
        bench_filters.run(made(tmp_path, 0.5), FAKE, out=out, task_names=[])  # type: ignore[arg-type]
