"""The sampler bench on a small model: it resumes, chooses on validation, and refuses another model's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dllm.bench import answers
from dllm.bench import samplers as bench_samplers
from dllm.bench.answers import Answers, Cell
from dllm.errors import DllmError
from dllm.tasks import registry as tasks


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
    monkeypatch.setattr(answers.dllm, "generate", fake.generate)
    names, problems = ["localleap"], ["sudoku"]
    return bench_samplers.run(fake, out=path, n=n, validation=4, names=names, task_names=problems, batch_size=3)


def test_resumes_chooses_and_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, fake = tmp_path / "answers.jsonl", Fake()
    report = run(fake, monkeypatch, path, 8)
    assert "| threshold | published: `threshold` | 50.0" in report and "| — | — | 10.00 | 2.00 | 1.00× |" in report
    assert "| +0.0 [+0.0, +0.0] | within 2 points | 5.00 | 4.00 | 2.00× |" in report  # half the forwards
    assert "- most tokens a forward within 2 points: method `localleap` with 4.00, composition none" in report
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


def test_an_exit_is_compared_with_what_it_cuts_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Losing(Fake):
        def generate(self, model: Any, chats: list[Any], *, sampler: str, **_: Any) -> list[Any]:
            outputs = super().generate(model, chats, sampler=sampler)
            for out in outputs:
                out.nfe = {"confidence:published": 20, "prophet:published": 1}.get(sampler, 10)
                out.text = "?" if sampler == "prophet:published" else out.text
            return outputs

    fake = Losing()
    monkeypatch.setattr(answers.dllm, "generate", fake.generate)
    call = {"names": ["prophet"], "task_names": ["sudoku"], "n": 8, "validation": 4}
    report = bench_samplers.run(fake, out=tmp_path / "answers.jsonl", **call)
    assert "`prophet` against `confidence`: saves 20.00×, loss +50.0" in report and "], loses\n" in report
    assert "chosen: `prophet:high=12,mid=10,low=8`" in report  # the published one loses on validation
    assert "against `confidence`: saves 2.00×, loss +0.0 [+0.0, +0.0], within 2 points" in report


def test_two_processes_give_the_same_answers(tmp_path: Path) -> None:
    cells = [Cell("sudoku", "test", sampler, 3) for sampler in ("threshold", "localleap")]
    found = []
    for workers in (1, 2):
        kept = Answers(tmp_path / f"{workers}.jsonl", "tiny", batch_size=2, workers=workers)
        kept.want(cells)
        kept.want(cells)  # nothing is missing any more
        found.append([kept.column(cell, key).tolist() for cell in cells for key in ("correct", "nfe", "tokens")])
        assert len((tmp_path / f"{workers}.jsonl").read_text().splitlines()) == 1 + 6
    assert found[0] == found[1]
    with pytest.raises(DllmError, match="load the model themselves"):
        Answers(tmp_path / "1.jsonl", Fake(), workers=2)


def test_another_models_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"model": "another", "cache": "default"}) + "\n")
    with pytest.raises(DllmError, match="answers of another model"):
        run(Fake(), monkeypatch, path, 4)
