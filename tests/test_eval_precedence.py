"""One order of precedence: call > task > setting > task's default > model's default, from every place where lengths,
stops, temperature and sampler may be given, on every route. What reaches `dllm.generate` is what counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import dllm
from dllm.errors import DllmError
from dllm.eval import run
from dllm.eval.arguments import layered
from dllm.eval.config import load

MODEL = str(Path(__file__).parent / "golden" / "checkpoints" / "tiny-llada-trained")
LENGTH, STOP, HEAT, SAMPLER = "max_new_tokens", "stop", "temperature", "sampler"


@pytest.fixture
def used(monkeypatch):
    """The arguments of every call of `dllm.generate`."""
    honest, calls = dllm.generate, []

    def watched(model, prompts, **arguments):
        calls.append(arguments)
        return honest(model, prompts, **arguments)

    monkeypatch.setattr(dllm, "generate", watched, raising=False)
    return calls


def last(calls, *names):
    return tuple(calls[-1].get(name) for name in names)


@pytest.mark.parametrize("kind", ["embedded", "jsonl"])
def test_embedded_tasks_and_files(kind, used, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"question": "Tom has 3 apples.", "answer": "3"}\n')
    entry = {"name": "word_problems"}
    if kind == "jsonl":
        entry = {"name": "jsonl", "path": str(data), "prompt": "{question}"}
    base = {"model": {"name": MODEL, "device": "cpu"}, "limit": 1, "warmup": 0, "sampler": "confidence"}
    own = {"max_new_tokens": 6, "stop": ["t"], "temperature": 0.2}
    ours = {"max_new_tokens": 5, "stop": ["s"], "temperature": 0.3}
    names = (LENGTH, STOP, HEAT, SAMPLER)

    def decoded(number, tasks, sets=(), **more):
        results = run({**base, "tasks": tasks, **more}, sets, out=tmp_path / str(number), progress=False)
        shown = results.cells[0]["decoding"][0]
        assert {k: v for k, v in used[-1].items() if k in shown} == shown  # the report says what was used
        return last(used, *names)

    default = 96 if kind == "embedded" else 256  # of the task
    assert decoded(0, [entry]) == (default, None, None, "confidence")
    assert decoded(1, [entry], generate=ours) == (5, ["s"], 0.3, "confidence")
    task = [{**entry, "generate": own, "sampler": "margin"}]
    assert decoded(2, task, generate=ours) == (6, ["t"], 0.2, "margin")
    call = ["generate.max_new_tokens=4", "generate.stop=[c]", "generate.temperature=0.4", "sampler=entropy"]
    assert decoded(3, task, call, generate=ours) == (4, ["c"], 0.4, "entropy")
    assert "new tokens" in (tmp_path / "3" / "report.md").read_text(encoding="utf-8")
    assert decoded(4, task, ["generate.temperature=0.4"], generate=ours) == (6, ["t"], 0.4, "margin")  # key by key
    assert decoded(5, task, ["tasks.0.generate.max_new_tokens=3"], generate=ours)[0] == 3


def test_a_call_reaches_every_point_of_a_sweep_and_the_samplers_of_tasks():
    text = {
        "tasks": [{"name": "sudoku", "sampler": {"name": "threshold", "tau": 0.5}, "generate": {"max_new_tokens": 7}}],
        "matrix": [{"label": "a", "sampler": "threshold", "generate": {"max_new_tokens": 9, "steps": 3}}],
    }
    config = load(text, ["sampler.tau=0.8", "generate.max_new_tokens=5"])
    assert config.tasks[0].sampler == {"name": "threshold", "tau": 0.8} == config.settings[0].sampler
    assert config.tasks[0].generate.max_new_tokens is None
    assert (config.settings[0].generate.max_new_tokens, config.settings[0].generate.steps) == (5, 3)
    with pytest.raises(DllmError, match=r"tasks\.0\.sampler: unknown sampler 'confidance'"):
        run({**text, "tasks": [{"name": "sudoku", "sampler": "confidance"}]}, progress=False)


def test_a_task_may_ask_for_the_models_own_settings(tmp_path):
    text = {"tasks": [{"name": "sudoku", "sampler": "prophet:tuned", "limit": 1}], "warmup": 0}
    assert run(text, out=tmp_path, progress=False).rows[0]["sampler"].startswith("prophet:tuned")


lm_eval = pytest.importorskip("lm_eval")
from dllm.eval.harness import DiffusionLM  # noqa: E402

TASK = """\
task: FILE
dataset_path: json
dataset_kwargs: {data_files: {test: PATH}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {SAYS}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
SAYS = 'until: ["f"], max_gen_toks: 7, do_sample: true, temperature: 0.1, sampler: margin'


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two tasks of lm-eval: one whose file says everything, one whose file leaves the length open."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    data = tmp_path / "tasks" / "d.jsonl"
    data.parent.mkdir()
    data.write_text(json.dumps({"question": "Tom has 3 apples.", "answer": "3"}) + "\n")
    for name, says in (("says", SAYS), ("open", 'until: ["f"]')):
        text = TASK.replace("FILE", f"file_{name}").replace("PATH", str(data)).replace("SAYS", says)
        (data.parent / f"{name}.yaml").write_text(text)
    return data.parent


@pytest.fixture(scope="module")
def model():
    return dllm.load(MODEL, device="cpu")


def test_lm_eval_tasks_in_a_configuration(folder, used, tmp_path):
    base = {"model": {"name": MODEL, "device": "cpu"}, "warmup": 0}
    options = {"include_path": str(folder), "include_defaults": False}
    says, silent = ({"name": f"lm-eval:file_{name}", "options": options} for name in ("says", "open"))
    ours = {"generate": {"max_new_tokens": 5, "stop": ["s"], "temperature": 0.3}, "sampler": "confidence"}
    names = (LENGTH, STOP, HEAT, SAMPLER)

    def decoded(number, task, sets=(), **more):
        results = run({**base, "tasks": [task], **more}, sets, out=tmp_path / str(number), progress=False)
        shown = results.cells[0]["decoding"]
        assert [{k: v for k, v in used[-1].items() if k in shown[0]}] == shown
        return last(used, *names)

    assert decoded(0, silent) == (128, ["f"], None, None)  # lm-eval's 256, or half a small model
    assert decoded(1, silent, **ours)[0] == 5
    assert decoded(2, says) == (7, ["f"], 0.1, "margin")
    assert decoded(3, says, **ours) == (5, ["s"], 0.3, "confidence")
    entry = {**says, "generate": {"max_new_tokens": 6, "temperature": 0.2}, "sampler": "entropy"}
    assert decoded(4, entry, **ours) == (6, ["s"], 0.2, "entropy")
    theirs = {"max_gen_toks": 6, "until": ["t"], "do_sample": False, "sampler": "entropy"}
    entry = {**says, "options": {**options, "gen_kwargs": theirs}}
    assert decoded(5, entry, **ours) == (6, ["t"], 0.0, "entropy")
    call = ["generate.max_new_tokens=4", "generate.stop=[c]", "generate.temperature=0.4", "sampler=random"]
    assert decoded(6, entry, call, **ours) == (4, ["c"], 0.4, "random")


@pytest.mark.parametrize("call", [None, "max_gen_toks=4,until=c,temperature=0.4,sampler=random", {"max_new_tokens": 4}])
def test_lm_evals_own_evaluation(call, folder, used, model):
    """`simple_evaluate`, and so lm-eval's command line: `gen_kwargs` > `model_args` > the task's file > 256."""
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    names = (LENGTH, STOP, HEAT, SAMPLER)

    def decoded(task, **own):
        lm = DiffusionLM(MODEL, model, **own)
        found = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, gen_kwargs=call, bootstrap_iters=0)
        (shown,) = found["config"]["decoding"][task]
        assert {k: v for k, v in used[-1].items() if k in shown} == shown
        return last(used, *names)

    own = {"max_new_tokens": 5, "stop": ["s"], "temperature": 0.3, "sampler": "confidence"}
    if call is None:
        assert decoded("file_open") == (128, ["f"], None, None)
        assert decoded("file_open", max_new_tokens=5)[0] == 5
        assert decoded("file_says") == (7, ["f"], 0.1, "margin")
        assert decoded("file_says", **own) == (5, ["s"], 0.3, "confidence")
        assert decoded("file_says", temperature=0.3) == (7, ["f"], 0.3, "margin")
    elif isinstance(call, str):
        assert decoded("file_says", **own) == (4, ["c"], 0.4, "random")
    else:
        assert decoded("file_says", **own) == (4, ["s"], 0.3, "confidence")  # the file's max_gen_toks is below it


def test_a_constraint_takes_the_place_of_later_stops_and_constraints():
    assert layered({"regex": "a"}, {STOP: ["x"], HEAT: 0.5}) == {"regex": "a", HEAT: 0.5}
    assert layered({"choices": ["a"]}, {"regex": "b"}, {STOP: ["x"]}) == {"choices": ["a"]}
    assert layered({STOP: ["x"]}, {"regex": "b"}) == {STOP: ["x"], "regex": "b"}  # which is refused


def test_a_constrained_task(used, tmp_path):
    base = {"model": {"name": "tiny", "device": "cpu"}, "limit": 2, "warmup": 0, "sampler": "threshold"}
    constrained = {"generate": {"regex": "[0-9]{1,3}", LENGTH: 8}, "tasks": [{"name": "word_problems"}]}
    results = run({**base, **constrained}, out=tmp_path, progress=False)
    assert last(used, "regex", LENGTH) == ("[0-9]{1,3}", 8) and not results.errors
    assert len(results.rows) == 2 and all(re.fullmatch("[0-9]{1,3}", row["text"]) for row in results.rows)
