"""The comparison of a filter with the threshold: swept on validation, matched in accuracy, resumed, refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dllm.bench import answers
from dllm.bench import filters as bench_filters
from dllm.errors import DllmError
from dllm.samplers.learn2pd import Filter
from dllm.tasks import registry as tasks
from dllm.training import filters


class Fake:
    """Both rules lose answers below 0.8 and take more forwards the higher tau is; the filter takes one fewer."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def fingerprint(self) -> str:
        return "fake"

    def generate(self, model: Any, chats: list[Any], *, sampler: str, **_: Any) -> list[Any]:
        self.asked += [sampler] * len(chats)
        tau = float(sampler.rpartition("=")[2])
        problems = [e for split in ("validation", "test") for e in tasks.generate("sudoku", split, 8)]
        right = {e.prompt: e.answer for e in problems[: None if tau >= 0.8 else 0]}
        nfe = round(20 * tau) - sampler.startswith("learn2pd")
        texts = [right.get(message["content"], "?") for [message] in chats]
        return [SimpleNamespace(text=text, nfe=nfe, tokens=[1] * 30) for text in texts]


def run(path: Path, monkeypatch: pytest.MonkeyPatch, tau: float = 0.97) -> tuple[str, Fake]:
    fake = Fake()
    monkeypatch.setattr(answers.dllm, "generate", fake.generate)
    Filter(filters.fresh(filters.Recipe(kind="block"), 4), 4, tau=tau).save(path / "f.safetensors")
    call = {"out": path / "answers.jsonl", "n": 8, "validation": 4, "task_names": ["sudoku"]}
    return bench_filters.run(path / "f.safetensors", fake, **call), fake


def test_each_rule_takes_its_fastest_accurate_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report, fake = run(tmp_path, monkeypatch)
    assert "| sudoku | `threshold:tau=0.8` | 100.0 [63.1, 100.0] | 16.00 | 1.88 |  |  |" in report
    assert "tau=0.8` | 100.0 [63.1, 100.0] | 15.00 | 2.00 | +0.0 [+0.0, +0.0] | 1.067× [1.067, 1.067] |" in report
    assert f"`learn2pd:filter={tmp_path / 'f.safetensors'},tau=0.97` | 100.0 | 18.00" in report  # its own tau
    assert fake.asked.count("threshold:tau=0.8") == 4 + 8
    again, silent = run(tmp_path, monkeypatch)
    assert (again, silent.asked) == (report, [])


def test_answers_of_another_filter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(tmp_path, monkeypatch)
    with pytest.raises(DllmError, match="another model or setting"):
        run(tmp_path, monkeypatch, tau=0.5)
