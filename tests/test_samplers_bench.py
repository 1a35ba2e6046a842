"""The sampler bench on a small model: it resumes, chooses on validation, and refuses another model's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dllm.errors import DllmError
from dllm.eval import bench_samplers
from dllm.training import tasks


class Fake:
    """Answers the first half of the problems right; `localleap` takes half the forwards of the others."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def fingerprint(self) -> str:
        return "fake"

    def generate(self, model: Any, chats: list[Any], *, sampler: str, **_: Any) -> list[Any]:
        self.asked.append((sampler, len(chats)))
        right = {e.prompt: e.answer for split in ("validation", "test") for e in tasks.generate("sudoku", split, 8)[:4]}
        nfe = 5 if sampler.startswith("localleap") else 10
        nfe += 40 * sampler.endswith("tau=0.7")
        output = type("Output", (), {})
        outputs = []
        for [message] in chats:
            out = output()
            out.text, out.nfe, out.tokens = right.get(message["content"], "?"), nfe, [1] * 20
            outputs.append(out)
        return outputs


def run(fake: Fake, monkeypatch: pytest.MonkeyPatch, path: Path, n: int) -> str:
    monkeypatch.setattr(bench_samplers.dllm, "generate", fake.generate)
    names, problems = ["localleap"], ["sudoku"]
    return bench_samplers.run(fake, out=path, n=n, validation=4, names=names, task_names=problems, batch_size=3)


def test_resumes_chooses_and_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, fake = tmp_path / "answers.jsonl", Fake()
    report = run(fake, monkeypatch, path, 8)
    assert "| localleap | published: `localleap` | 50.0" in report
    assert "| 2.00× | 4.00 |" in report  # half the forwards, 20 tokens in 5
    assert "chosen: `threshold:tau=0.7`" not in report  # as accurate, but slower
    asked = len(fake.asked)
    with path.open("a") as file:
        file.write('{"task": "sud')  # stopped while it wrote
    assert run(fake, monkeypatch, path, 8) == report
    assert len(fake.asked) == asked  # nothing was decoded twice
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-3], '{"task": "sud']))  # two answers and half a line are lost
    run(fake, monkeypatch, path, 8)
    assert sum(count for _, count in fake.asked[asked:]) == 2
    run(fake, monkeypatch, path, 8)
    assert sum(count for _, count in fake.asked[asked:]) == 2  # and both were kept


def test_another_models_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"model": "another", "cache": "default"}) + "\n")
    with pytest.raises(DllmError, match="answers of another model"):
        run(Fake(), monkeypatch, path, 4)
