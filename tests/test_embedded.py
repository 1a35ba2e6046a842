"""The shipped pair: small, loadable, and good at its tasks (bounds below the figures of docs/embedded-model.md)."""

from __future__ import annotations

import pytest
import torch

from dllm.call.generate import generate
from dllm.models.hub import ASSETS, load, load_verifier
from dllm.models.native import NativeModel
from dllm.tasks.base import Example
from dllm.tasks.registry import TASKS
from dllm.tasks.registry import generate as problems
from dllm.training.evaluate import Accuracy, answers, evaluate

SEED, FEW, MANY = 0, 32, pytest.param(100, marks=pytest.mark.sweep)  # problems a task
BOUNDS = {
    ("tiny", "word_problems"): 0.88,
    ("tiny", "sudoku"): 0.90,
    ("tiny", "functions"): 0.94,
    ("tiny-ar", "word_problems"): 0.94,
    ("tiny-ar", "functions"): 0.94,
}


@pytest.fixture(scope="module")
def dllm_tiny() -> NativeModel:
    return load("tiny", device="cpu")


@pytest.fixture(scope="module")
def twin() -> NativeModel:
    return load("tiny-ar", device="cpu")


def solves(model: NativeModel, name: str, task: str, n: int) -> None:
    (result,) = evaluate(model, [task], n, seed=SEED, label=name)
    assert result.n == n
    assert result.value >= BOUNDS[name, task], str(result)


@pytest.mark.parametrize("n", [FEW, MANY])
@pytest.mark.parametrize("name,task", [key for key in BOUNDS if key[1] != "functions"])
def test_shipped_weights_solve_their_tasks(
    name: str, task: str, n: int, dllm_tiny: NativeModel, twin: NativeModel
) -> None:
    solves(dllm_tiny if name == "tiny" else twin, name, task, n)


@pytest.mark.parametrize("name", ["tiny", "tiny-ar"])
def test_shipped_weights_write_functions(name: str, dllm_tiny: NativeModel, twin: NativeModel) -> None:
    """Short answers, and two mistakes among the first 32: all hundred."""
    solves(dllm_tiny if name == "tiny" else twin, name, "functions", 100)


def test_the_bound_can_fail(dllm_tiny: NativeModel) -> None:
    """One matrix with flipped signs, and the same check is far below its bound."""
    broken = load("tiny", device="cpu")
    fused = broken.transformer.layers[0].self_attn.qkv_proj
    with torch.no_grad():
        fused.apart(fused.weight)["v_proj"].neg_()
    (result,) = evaluate(broken, ["sudoku"], 20, seed=SEED)
    assert result.value < BOUNDS["tiny", "sudoku"]


def test_pair_is_under_25_megabytes_with_one_tokenizer(dllm_tiny: NativeModel, twin: NativeModel) -> None:
    files = [f for name in ("tiny", "tiny-ar") for f in (ASSETS / name).iterdir()]
    assert sum(f.stat().st_size for f in files) < 25e6
    assert {f.suffix for f in files} == {".json", ".safetensors"}
    assert dllm_tiny.tokenizer.get_vocab() == twin.tokenizer.get_vocab()
    assert dllm_tiny.vocab_size == twin.vocab_size == len(dllm_tiny.tokenizer)
    assert dllm_tiny.max_positions >= 512


def test_every_answer_fits_its_window(dllm_tiny: NativeModel) -> None:
    for name in TASKS:
        for example in problems(name, "test", 200, 1):
            assert len(dllm_tiny.tokenizer(example.answer)["input_ids"]) < TASKS[name].window


@pytest.mark.parametrize("question", ["", " How many apples does Tom have now?"])
def test_the_prompt_of_the_readme(question: str, dllm_tiny: NativeModel) -> None:
    output = generate(dllm_tiny, "Tom has 12 apples. He buys 7 more." + question, max_new_tokens=64, block_length=32)
    assert output.text.endswith("#### 19")
    assert "12 + 7 = 19" in output.text
    assert output.finish_reason == "stop"


@pytest.mark.parametrize("window", [32, 64, 128])
def test_other_windows_work_too(window: int, dllm_tiny: NativeModel) -> None:
    examples = [e for e in problems("word_problems", "test", 90, 2) if e.meta["steps"] == 1][:12]
    outputs = generate(dllm_tiny, [e.prompt for e in examples], max_new_tokens=window, block_length=32, batch_size=12)
    right = sum(TASKS["word_problems"].grade(e, o.text) for e, o in zip(examples, outputs, strict=True))
    assert len(examples) == 12 and right >= 10


def test_twin_in_transformers_gives_the_same_answers(twin: NativeModel) -> None:
    examples = problems("word_problems", "test", 6, 3)
    verifier = load_verifier("tiny-ar", device="cpu")
    for example, text in zip(examples, answers(twin, "word_problems", examples), strict=True):
        ids = torch.tensor([twin.chat([{"role": "user", "content": example.prompt}])])
        out = verifier.generate(ids, max_new_tokens=TASKS["word_problems"].window, do_sample=False)
        assert twin.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == text


def test_accuracy_prints_its_interval() -> None:
    assert str(Accuracy("tiny", "sudoku", 90, 100)) == "tiny     sudoku           90.0%  [82.6%, 94.5%]  n=100"


def test_answers_keep_the_order_of_the_examples(twin: NativeModel) -> None:
    examples = problems("functions", "test", 5, 4)
    together = answers(twin, "functions", examples, batch_size=2)
    assert together == [answers(twin, "functions", [e])[0] for e in examples]
    assert isinstance(examples[0], Example)


STRESSED = {"copying": 0.95, "replacing": 0.4, "waiting_line": 0.95}  # below the figures of docs/stress.md


@pytest.fixture(scope="module")
def stressed() -> NativeModel:
    return load("tiny-stress", device="cpu")


@pytest.mark.parametrize("n", [FEW, MANY])
@pytest.mark.parametrize("task", STRESSED)
def test_the_stress_model_solves_its_tasks_one_token_at_a_time(task: str, n: int, stressed: NativeModel) -> None:
    (result,) = evaluate(stressed, [task], n, seed=SEED)
    assert result.value >= STRESSED[task], str(result)


def test_the_stress_model_is_small_and_reads_as_the_pair_does(stressed: NativeModel, dllm_tiny: NativeModel) -> None:
    files = list((ASSETS / "tiny-stress").iterdir())
    assert sum(f.stat().st_size for f in files) < 1.25e6
    assert {f.suffix for f in files} == {".json", ".safetensors"}
    assert stressed.tokenizer.get_vocab() == dllm_tiny.tokenizer.get_vocab()
    assert stressed.dtype == torch.float32  # stored in half of it
