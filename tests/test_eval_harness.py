"""lm-evaluation-harness: the contract of its model class, and runs with local tasks from end to end.

The same file passes with lm-eval 0.4.13 and 0.4.10.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval.models  # noqa: F401  # lists its own, which ours alone would stand for
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import dllm
from dllm.errors import DllmError
from dllm.eval import run
from dllm.eval.harness import DiffusionLM
from dllm.eval.lm_tasks import CodeEval
from dllm.eval.tasks import confined
from dllm.tasks.registry import generate

MODEL = str(Path(__file__).parent / "golden" / "checkpoints" / "tiny-llada-trained")

WORDS = """\
task: tiny_words
dataset_path: json
dataset_kwargs: {data_files: {test: PATH}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: PATH}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [" 1", " 2"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def model():
    return dllm.load(MODEL, device="cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, model) -> Path:
    """A folder of tasks; the answer of document 0 is what the model says, the others are not."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [f"Tom has {i} apples and eats 1." for i in range(2, 7)]
    said = dllm.generate(model, questions[0], max_new_tokens=6, chat=False, stop=["\n\n"]).text
    rows = [{"question": q, "answer": said if i == 0 else "no answer"} for i, q in enumerate(questions)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "words.yaml").write_text(WORDS.replace("PATH", str(folder / "words.jsonl")))
    (folder / "choice.yaml").write_text(CHOICE.replace("PATH", str(folder / "words.jsonl")))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def asked(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def test_ragged_requests_come_back_in_order_and_each_honours_its_own_arguments(model):
    lm = DiffusionLM(MODEL, model, batch_size=2, sampler="threshold:tau=0.8", block_length=4)
    short, long = {"until": [], "max_gen_toks": 3}, {"until": ["."], "max_gen_toks": 8}
    requests = asked(
        ("Tom has 3 apples", short), ("Ana", long), ("Ben has 4 pens and buys 2 more", short), ("2+2", long)
    )
    texts = lm.generate_until(requests, disable_tqdm=True)
    for request, text in zip(requests, texts, strict=True):
        context, given = request.args
        alone = dllm.generate(
            model, context, sampler="threshold:tau=0.8", block_length=4, max_new_tokens=given["max_gen_toks"],
            stop=given["until"], chat=False,
        )  # fmt: skip
        assert text == alone.text and "." not in (text if given is long else "")


def test_every_batch_is_cached_when_it_is_there(model, monkeypatch):
    lm, seen = DiffusionLM(MODEL, model, batch_size=2), []
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda *entry: seen.append(entry)))
    given = {"until": ["\n"], "max_gen_toks": 2}
    honest, calls = dllm.generate, []

    def third_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(*args, **kwargs)

    monkeypatch.setattr(dllm, "generate", third_fails, raising=False)
    with pytest.raises(KeyboardInterrupt):
        lm.generate_until(asked(*((f"{'x' * i}", given) for i in range(1, 7))), disable_tqdm=True)
    assert len(seen) == 4 and all(name == "generate_until" and args[1] == given for name, args, _ in seen)


def test_likelihood_is_the_seeded_bound(model):
    lm = DiffusionLM(MODEL, model, mc_num=8, seed=3)
    (value, greedy), (again, _) = lm.loglikelihood(asked(("Tom has 3", " apples"), ("Tom has 3 ", "apples")), True)
    ids = [dllm.call.prompts.encode(model, text, False) for text in ("Tom has 3", "Tom has 3 apples")]
    tail = ids[1][len(ids[0]) :]
    assert value == dllm.score(model, ids[0], tail, samples=8, seed=3) and value < 0 and greedy is False
    assert again == value  # the space at the border belongs to the continuation
    long = asked(("Tom has 3", " apples and then he buys 24 of them"))
    seeds = [DiffusionLM(MODEL, model, mc_num=4, seed=seed).loglikelihood(long, True)[0][0] for seed in (3, 3, 4)]
    assert seeds[0] == seeds[1] != seeds[2]
    text = " ".join(["apples"] * 200)  # longer than the model
    assert DiffusionLM(MODEL, model, mc_num=2).loglikelihood_rolling(asked((text,)), True)[0] < -100


def test_greedy_continuations_are_recognised_on_request(model):
    lm = DiffusionLM(MODEL, model, mc_num=1, check_greedy=True)
    head = dllm.call.prompts.encode(model, "Tom has 3 apples.", False)
    text = model.tokenizer.decode(lm.greedy(head, 3))
    if dllm.call.prompts.encode(model, "Tom has 3 apples." + text, False)[: len(head)] == head:
        assert lm.loglikelihood(asked(("Tom has 3 apples.", text)), True)[0][1] is True
    assert lm.loglikelihood(asked(("Tom has 3 apples.", " zzz qqq")), True)[0][1] is False


def test_likelihoods_by_the_chain_of_a_read(model):
    lm = DiffusionLM(MODEL, model, likelihood="chain")
    (value, greedy), (again, _) = lm.loglikelihood(asked(("Tom has 3", " apples"), ("Tom has 3 ", "apples")), True)
    head, tail = lm._pair("Tom has 3", " apples")
    expected = 0.0
    for j, token in enumerate(tail):
        ids = torch.tensor([[*head, *tail[:j], *[model.mask_id] * (len(tail) - j)]])
        with torch.inference_mode():
            expected += float(model.logits(model.forward(ids, None))[0, len(head) + j].log_softmax(-1)[token])
    assert (value, greedy) == (pytest.approx(expected, abs=1e-4), False)
    assert again == value
    with pytest.raises(DllmError, match="likelihood='best' must be bound or chain"):
        DiffusionLM(MODEL, model, likelihood="best")


def test_arguments(model, caplog):
    lm = DiffusionLM(MODEL, model, temperature=0.3)
    assert lm.arguments({"until": "x"})["temperature"] == 0.3  # a request that says nothing leaves the model's
    assert lm.arguments({"do_sample": False, "temperature": 0.9})["temperature"] == 0.3  # the model's is above a file's
    assert lm.arguments({}, {"do_sample": False, "temperature": 0.9})["temperature"] == 0.0
    assert lm.arguments({}, {"temperature": None})["temperature"] == 0.3
    assert lm.arguments({"do_sample": True, "temperature": 0.9, "top_p": 0.8})["top_p"] == 0.8
    assert "top_k" not in lm.arguments({"top_k": 0}) and lm.arguments({"top_k": 3})["top_k"] == 3
    assert lm.arguments({"max_new_tokens": 7})["max_new_tokens"] == 7
    lm.arguments({"num_beams": 3})
    assert "num_beams" in caplog.text
    with pytest.raises(DllmError, match="unknown argument 'smapler'; did you mean 'sampler'"):
        DiffusionLM(MODEL, model, smapler="threshold")


def test_too_long_prompts_are_cut_on_the_left(model, caplog):
    lm = DiffusionLM(MODEL, model)
    long, given = "word " * 400, {"until": [], "max_gen_toks": 10}
    count = len(dllm.call.prompts.encode(model, long, False))
    cut = lm.generate_until(asked((long, given), ("Tom has 3", given)), disable_tqdm=True)
    ids = dllm.call.prompts.encode(model, long, False)[10 - model.max_positions :]
    assert cut[0] == dllm.generate(model, ids, max_new_tokens=10).text
    said = f"1 requests had prompts that were cut on the left to fit the model; the first: {count - len(ids)} tokens"
    assert said in caplog.text and list(lm.get_model_info()["remarks"].values()) == [1]
    caplog.clear()
    full = {"until": [], "max_gen_toks": model.max_positions}
    assert lm.generate_until(asked(("a", full), (long, given)), disable_tqdm=True) == ["", cut[0]]
    assert "1 requests failed and count as wrong; the first: DllmError: max_gen_toks=" in caplog.text
    assert "no room" in caplog.text


@pytest.mark.parametrize(
    ("context", "given", "reason"),
    [
        ("Tom has <mask> apples", {}, "contains the mask token"),
        ("Tom has 3", {"n": 2}, "one continuation a request"),
        ("Tom has 3", {"top_p": 3.0}, "top_p=3.0"),
        ("Tom has 3", {"temperature": "warm"}, "temperature='warm'"),
        ("Tom has 3", {"max_gen_toks": "many"}, "many"),
        ("Tom has 3", {"sampler": "treshold"}, "did you mean 'threshold'"),
    ],
)
def test_one_bad_request_is_answered_with_nothing_and_the_others_as_ever(model, caplog, context, given, reason):
    lm, good = DiffusionLM(MODEL, model, batch_size=3), {"until": ["\n"], "max_gen_toks": 4}
    context = context.replace("<mask>", model.tokenizer.convert_ids_to_tokens(model.mask_id))
    pair = ("Tom has 4 apples", good)
    alone = lm.generate_until(asked(pair), disable_tqdm=True)[0]
    texts = lm.generate_until(asked(pair, (context, {**good, **given}), pair), disable_tqdm=True)
    assert texts == [alone, "", alone] and reason in caplog.text


def test_arguments_of_the_model_itself_are_refused_at_once(model):
    assert model.bos_id is None
    for wrong in ({"n": 2}, {"infill": True}, {"top_p": 3.0}, {"add_bos_token": True}):
        with pytest.raises(DllmError):
            DiffusionLM(MODEL, model, **wrong)


def test_a_likelihood_that_cannot_be_had_is_the_worst_one(model, caplog):
    mask = model.tokenizer.convert_ids_to_tokens(model.mask_id)
    lm = DiffusionLM(MODEL, model, mc_num=2)
    (bad, _), (good, _) = lm.loglikelihood(asked(("Tom", f" {mask}"), ("Tom", " has")), True)
    assert bad == -float("inf") < good and "1 requests failed" in caplog.text


def test_prompts_begin_with_bos_on_request(model, monkeypatch):
    seen, honest = [], dllm.generate

    def watched(model, ids, **arguments):
        seen.extend(ids)
        return honest(model, ids, **arguments)

    monkeypatch.setattr(dllm, "generate", watched, raising=False)
    monkeypatch.setattr(model, "bos_id", 5)
    given = {"until": [], "max_gen_toks": 2}
    for asks in ({"add_bos_token": True}, {}):
        DiffusionLM(MODEL, model, **asks).generate_until(asked(("Tom has 3", given)), disable_tqdm=True)
    assert seen[0] == [5, *seen[1]]


def test_a_document_draws_the_same_whatever_stands_beside_it(model):
    """Seeds follow the document: batches of any size, a limit, another rank's share."""
    given = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    all_of_them = [SimpleNamespace(args=(f"Tom has {i}", given), doc_id=i) for i in range(5)]
    sizes = (1, 2, 5, "auto")
    texts = [DiffusionLM(MODEL, model, batch_size=n).generate_until(all_of_them, True) for n in sizes]
    assert texts == [texts[0]] * 4 and len(set(texts[0])) > 1
    assert DiffusionLM(MODEL, model, batch_size=4).generate_until(all_of_them[1::2], True) == texts[0][1::2]


def test_what_both_versions_ask_of_a_model(model):
    lm = DiffusionLM(MODEL, model)
    assert (lm.rank, lm.world_size, lm.accelerator) == (0, 1, None)
    assert lm.device == model.device and lm.gather_object({"a": 1}) == [{"a": 1}] and lm.barrier() is None
    assert lm.tokenizer_name and "/" not in lm.tokenizer_name and lm.chat_template(False) is None
    messages = [{"role": "user", "content": "Hello"}]
    if getattr(model.tokenizer, "chat_template", None) is None:
        with pytest.raises(DllmError, match="no chat template"):
            lm.apply_chat_template(messages)
    templated = DiffusionLM("tiny", dllm.load("tiny"))
    assert "Hello" in templated.apply_chat_template(messages) and templated.chat_template(True)


def config(folder: Path, **changes):
    return {
        "name": "t",
        "model": {"name": MODEL, "device": "cpu"},
        "tasks": [{"name": "lm-eval:tiny_words", "options": {"include_path": str(folder), "include_defaults": False}}],
        "matrix": {"sampler": ["confidence", "threshold"]},
        "batch_size": 2,
        **changes,
    }


def test_a_task_in_a_configuration_counts_and_resumes(tasks, tmp_path, monkeypatch):
    results = run(config(tasks), out=tmp_path / "r", progress=False)
    first, second = results.cells
    label = "lm-eval:tiny_words"
    assert (first["task"], first["setting"], first["n"], first["accuracy"]) == (label, "confidence", 5, 0.2)
    assert (second["setting"], second["n"]) == ("threshold", 5)
    assert all(c["tpf"] > 0 and c["lm_eval"] for c in results.cells)
    assert "lm-eval's own figures" in (tmp_path / "r" / "report.md").read_text(encoding="utf-8")

    def forbidden(*args, **kwargs):
        raise AssertionError("decoded again")

    monkeypatch.setattr(dllm, "generate", forbidden, raising=False)
    again = run(config(tasks), out=tmp_path / "r", progress=False)
    assert [c["accuracy"] for c in again.cells] == [c["accuracy"] for c in results.cells]


def test_a_group_has_a_line_of_its_own_under_its_name(tasks, tmp_path):
    """Its figure is over all documents of its tasks, whose lines stand below."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text((tasks / "words.yaml").read_text().replace("tiny_words", name))
    group = "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: exact_match, weight_by_size: true}]\n"
    (folder / "both.yaml").write_text(group + "metadata: {version: 1.0}\n")
    spec = {"name": "lm-eval:both", "label": "b", "options": {"include_path": str(folder), "include_defaults": False}}
    results = run(config(tasks, tasks=[spec], matrix={"sampler": ["confidence"]}), out=tmp_path / "r", progress=False)
    assert {c["task"]: (c["n"], c["accuracy"]) for c in results.cells} == {
        "b:one": (5, 0.2),
        "b:two": (5, 0.2),
        "b": (10, 0.2),
    }
    assert len(results.rows) == 10 and results.cell("b", "confidence")["tpf"] > 0


def test_a_prompt_that_fails_is_an_error_row(tasks, tmp_path, monkeypatch):
    """The other requests of its batch are answered, the exit code says so, --retry-errors mends it."""
    honest = dllm.generate

    def fails(model, ids, **arguments):
        if any("Tom has 3" in model.tokenizer.decode(one) for one in ids):
            raise RuntimeError("the model does not like this one")
        return honest(model, ids, **arguments)

    monkeypatch.setattr(dllm, "generate", fails, raising=False)
    one = config(tasks, matrix={"sampler": ["confidence"]})
    results = run(one, out=tmp_path, progress=False)
    assert (results.exit_code, results.errors, results.cells[0]["accuracy"]) == (3, 1, 0.2)
    assert "document 1: RuntimeError: the model does not like this one" in results.notices[-1]
    monkeypatch.undo()
    assert run(one, out=tmp_path, progress=False, retry_errors=True).exit_code == 0


def test_likelihood_tasks_and_unknown_tasks(tasks, tmp_path):
    one = {
        "name": "lm-eval:tiny_choice",
        "limit": 2,
        "options": {"include_path": str(tasks), "include_defaults": False},
    }
    results = run(config(tasks, tasks=[one], matrix={"sampler": ["confidence"]}), out=tmp_path / "r", progress=False)
    assert results.cells[0]["n"] == 2 and 0 <= results.cells[0]["accuracy"] <= 1
    for change, message in (
        ({"name": "lm-eval:tiny_choise"}, r"tasks\.0: unknown lm-eval task 'tiny_choise'; did you mean 'tiny_choice'"),
        ({"options": {**one["options"], "num_fewshots": 1}}, "did you mean 'num_fewshot'"),
        ({"metric": "acc"}, "has no use for 'metric'"),
    ):
        with pytest.raises(DllmError, match=message):
            run(config(tasks, tasks=[{**one, **change}]), out=tmp_path / "q", progress=False)
    assert not (tmp_path / "q").exists()
    with pytest.raises(DllmError, match="unknown metric 'f1'"):
        bad = {**one, "options": {**one["options"], "metric": "f1"}}
        run(config(tasks, tasks=[bad], matrix={"sampler": ["confidence"]}), out=tmp_path / "q", progress=False)


def test_choices_by_the_chain_are_those_of_a_read(tasks, tmp_path, model):
    """Multiple choice through reads: `options: {likelihood: chain}`."""
    one = {"name": "lm-eval:tiny_choice", "options": {"include_path": str(tasks), "include_defaults": False}}
    one["options"]["likelihood"] = "chain"
    results = run(config(tasks, tasks=[one], matrix={"sampler": ["confidence"]}), out=tmp_path / "r", progress=False)
    questions = [json.loads(line)["question"] for line in (tasks / "words.jsonl").read_text().splitlines()]
    slots = {"x": ["  1", "  2"]}  # lm-eval puts a space before each choice
    said = dllm.read(model, questions, "{x}", slots=slots, chat=False)
    right = [r["x"].logp["  1"] > r["x"].logp["  2"] for r in said]
    assert results.cells[0]["accuracy"] == pytest.approx(sum(right) / 5) and results.cells[0]["n"] == 5
    lm = DiffusionLM(MODEL, model, likelihood="chain")
    for question, r in zip(questions, said, strict=True):
        values = [v for v, _ in lm.loglikelihood(asked(*((question, label) for label in slots["x"])), True)]
        assert values == pytest.approx([*r["x"].logp.values()], abs=1e-4)
    one["options"]["likelihood"] = "best"
    with pytest.raises(DllmError, match="likelihood='best' must be bound or chain"):
        run(config(tasks, tasks=[one]), out=tmp_path / "q", progress=False)


@pytest.mark.parametrize(
    ("asked_for", "holds"),
    [
        ({"regex": "[0-9]{1,2}"}, lambda text: text.isdigit() and len(text) <= 2),
        ({"choices": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"json_schema": {"type": "integer"}}, lambda text: isinstance(json.loads(text), int)),
    ],
    ids=["regex", "choices", "json_schema"],
)
def test_answers_of_a_task_have_the_form_that_gen_kwargs_ask_for(tasks, tmp_path, asked_for, holds):
    """In place of the task's stop strings."""
    options = {"include_path": str(tasks), "include_defaults": False, "gen_kwargs": {"max_gen_toks": 12, **asked_for}}
    one = {"name": "lm-eval:tiny_words", "options": options}
    results = run(config(tasks, tasks=[one], matrix={"sampler": ["threshold"]}), out=tmp_path / "r", progress=False)
    assert results.exit_code == 0 and len(results.rows) == 5
    assert all(holds(row["text"]) for row in results.rows), [row["text"] for row in results.rows]


def command(tasks: Path, out: Path, *launch: str) -> subprocess.CompletedProcess:
    model = f"pretrained={MODEL},sampler=threshold,mc_num=2"
    arguments = ["--model_args", model, "--tasks", "tiny_words,tiny_choice", "--include_path", str(tasks)]
    arguments += ["--batch_size", "2", "--log_samples", "--output_path", str(out), "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *launch, "-m", "dllm.eval.harness", *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def figures(out: Path) -> dict:
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    wanted = ("exact_match,none", "acc,none")
    return {task: {k: v for k, v in values.items() if k in wanted} for task, values in results.items()}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.sweep)])
def test_command_line_on_one_rank_and_on_two(ranks, tasks, tmp_path):
    one = command(tasks, tmp_path / "one")
    assert one.returncode == 0, one.stderr[-2000:]
    assert "tiny_words" in one.stdout and len(list((tmp_path / "one").rglob("samples_*.jsonl"))) == 2
    if ranks == 1:
        return
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port)  # fmt: skip
    two = command(tasks, tmp_path / "two", *launch)
    assert two.returncode == 0, two.stderr[-2000:]
    assert figures(tmp_path / "two") == figures(tmp_path / "one")


CODE_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{test}}}}"
unsafe_code: true
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{metric}]
filter_list: [{{name: build, filter: [{{function: custom, filter_fn: !function utils.build}}]}}]
"""
CODE_UTILS = """
import evaluate
checker = evaluate.load("code_eval")
def passed(**given): return checker.compute(**given, k=[1])[0]["pass@1"]
def build(resps, docs): return [[PROGRAM] for _ in resps]
"""


def test_programs_that_lm_eval_checks_run_confined(tmp_path):
    """By its own interface too: what they write stays inside, and a task that runs programs itself needs leave."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if confined.refusal():
        pytest.skip("programs cannot be confined here")
    mark, data = tmp_path / "mark", tmp_path / "data.jsonl"
    program = f"try: open({str(mark)!r}, 'w').write('x')\nexcept OSError: pass\ndef f(x): return x + 1\n"
    data.write_text(json.dumps({"prompt": "Tom has 2 apples.", "test": "assert f(1) == 2"}) + "\n")
    (tmp_path / "utils.py").write_text(f"PROGRAM = {program!r}\n{CODE_UTILS}")
    ours = "{metric: !function utils.passed, aggregation: mean, higher_is_better: true}"
    for name, metric in (("ours", ours), ("theirs", "{metric: exact_match}")):
        (tmp_path / f"{name}.yaml").write_text(CODE_TASK.format(name=name, data=data, metric=metric))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = DiffusionLM("tiny", device="cpu")
    found = simple_evaluate(model=lm, tasks=["ours"], task_manager=manager, bootstrap_iters=0)
    assert found["results"]["ours"]["passed,build"] == 1.0 and not mark.exists()
    with pytest.raises(DllmError, match="theirs runs generated programs itself, unconfined; --allow-unconfined-code"):
        simple_evaluate(model=lm, tasks=["theirs"], task_manager=manager, confirm_run_unsafe_code=True)


def test_helpers_of_a_benchmarks_head_are_its_own():
    head = (
        "def poly(xs: list, x: float):\n    return sum(c * x**i for i, c in enumerate(xs))\n\n\ndef root(xs: list):\n"
    )
    check = "def check(candidate):\n    assert abs(poly([1, 2], candidate([1, 2]))) < 1e-3\n\ncheck(root)"
    programs = [head + "    return -0.5\n", head + "    return 0.0\n\ndef poly(xs, x): return 0.0\n"]
    CodeEval.learn({"prompt": head, "entry_point": "root"})
    if confined.refusal():
        pytest.skip("programs cannot be confined here")
    assert CodeEval().compute([check], [programs]) == ({"pass@1": 0.5}, {0: [True, False]})
    assert CodeEval().compute([check], [programs], k=[2, 10])[0] == {
        "pass@2": 1.0
    }  # of two programs there is no best of 10


SERVED = """
task: tiny_served
dataset_path: json
dataset_kwargs: {data_files: {test: PATH}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 48, do_sample: false}
filter_list: [{name: number, filter: [{function: regex, regex_pattern: "#### (-?[0-9]+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def test_a_server_has_the_accuracy_of_an_evaluation(tmp_path):
    """lm-eval's own client, `local-chat-completions`, against the embedded model, and `dllm eval` of the same."""
    pytest.importorskip("tenacity")
    serve = pytest.importorskip("dllm.bench.serve")
    problems = generate("word_problems", "test", 10)
    rows = [{"question": e.prompt, "answer": e.answer.split("####")[-1].strip()} for e in problems]
    (tmp_path / "served.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "served.yaml").write_text(SERVED.replace("PATH", str(tmp_path / "served.jsonl")))
    options = {"include_path": str(tmp_path), "include_defaults": False}
    ours = run(
        {
            "name": "served", "tasks": [{"name": "lm-eval:tiny_served", "options": options}], "warmup": 0,
            "model": {"name": "tiny", "device": "cpu"}, "generate": {"chat": True},
        },
        out=tmp_path / "r",
        progress=False,
    )  # fmt: skip
    with serve.serving(dllm.load("tiny", device="cpu")) as port:
        theirs = simple_evaluate(
            model="local-chat-completions",
            model_args={"base_url": f"http://127.0.0.1:{port}/v1/chat/completions", "model": "dllm"},
            tasks=["tiny_served"],
            task_manager=TaskManager(**options),
            apply_chat_template=True,
            bootstrap_iters=0,
        )
    accuracy = theirs["results"]["tiny_served"]["exact_match,number"]
    assert accuracy == ours.cells[0]["accuracy"] > 0
    said = [row["text"] for row in sorted(ours.rows, key=lambda row: row["index"])]
    assert [sample["resps"][0][0] for sample in theirs["samples"]["tiny_served"]] == said
