"""The generators: disjoint splits, right references, graders that accept and refuse."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from dllm.errors import DllmError
from dllm.tasks.base import SPLITS, Example
from dllm.tasks.functions import Interpreter
from dllm.tasks.registry import TASKS, generate, grade
from dllm.tasks.sudoku import grids, show
from dllm.tasks.word_problems import MOST


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_problem(name: str) -> None:
    keys = {split: {e.meta["key"] for e in generate(name, split, 200, seed=3)} for split in SPLITS}
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]


@pytest.mark.parametrize("name", TASKS)
def test_same_seed_same_problems_and_distinct_prompts(name: str) -> None:
    first, again, other = generate(name, "test", 60, 1), generate(name, "test", 60, 1), generate(name, "test", 60, 2)
    assert first == again != other
    assert len({e.prompt for e in first}) == 60


@pytest.mark.parametrize("name", TASKS)
def test_reference_answers_pass_and_other_answers_fail(name: str) -> None:
    examples = generate(name, "validation", 150, 5)
    assert all(grade(name, e, e.answer) for e in examples)
    wrong = [grade(name, e, other.answer) for e, other in pairwise(examples)]
    assert sum(wrong) <= 15  # another problem may share its result
    assert not any(grade(name, e, "") for e in examples)


def test_worked_lines_are_true_and_stay_in_range() -> None:
    for example in generate("word_problems", "train", 400, 0):
        lines = re.findall(r" (\d+) ([-+*/]) (\d+) = (\d+) \w+\.\n", example.answer)
        assert 1 <= len(lines) == example.meta["steps"] <= 4
        for a, op, b, result in lines:
            assert int(a) == int(b) * int(result) if op == "/" else eval(f"{a}{op}{b}") == int(result)
            assert 1 <= int(result) <= MOST
        assert int(lines[-1][3]) == example.meta["answer"]


def test_there_are_more_than_a_million_word_problems() -> None:
    """Birthday bound: n draws with c collisions point to about n^2 / 2c different texts."""
    stream = TASKS["word_problems"].stream("train", 0)
    texts = [next(stream).prompt for _ in range(6000)]
    collisions = len(texts) - len(set(texts))
    assert len(texts) ** 2 / (2 * (collisions + 1)) > 1e6


def test_sudoku_grids_and_held_out_counts() -> None:
    assert len(grids()) == len(set(grids())) == 288
    splits = [TASKS["sudoku"].split_of(show(g)) for g in grids()]
    assert (splits.count("train"), splits.count("validation"), splits.count("test")) == (240, 16, 32)
    for example in generate("sudoku", "test", 50, 0):
        puzzle = re.sub(r"\s", "", example.prompt.split(":")[1])
        cells = tuple(0 if c == "_" else int(c) for c in puzzle)
        fits = [g for g in grids() if all(p in (0, c) for p, c in zip(cells, g, strict=True))]
        assert len(fits) == 1
        assert "".join(map(str, fits[0])) == example.answer.replace("\n", "")


def test_interpreter_agrees_with_python() -> None:
    for example in generate("functions", "train", 300, 7):
        space: dict = {}
        exec(example.answer, space)  # our own generator's text
        mine = Interpreter(example.answer)
        for arguments in example.meta["inputs"]:
            assert mine(*arguments) == space["f"](*arguments)


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return __import__('os').getpid()",
        "def f(x):\n    while True: pass",
        "import os",
        "def f(x):\n    return x ** x ** x",
        "def f(x):\n    return [1] * 10 ** 12",
        "def f(x):\n    return x.__class__",
        "def f(x:\n    return x",
        "def f(x):\n    return y",
        "def f(x):\n    return x // 0",
        "\x00",
    ],
)
def test_hostile_or_broken_code_is_wrong_not_run(text: str) -> None:
    example = Example("", "def f(x):\n    return x + 1", {"inputs": [(3,)]})
    assert not grade("functions", example, text)


def test_an_equivalent_function_is_right() -> None:
    example = Example("", "def f(x):\n    return x * 2 + 2", {"inputs": [(n,) for n in range(-5, 6)]})
    assert grade("functions", example, "def f(x):\n    return (x + 1) * 2")
    assert not grade("functions", example, "def f(x):\n    return (x + 1) * 3")


def test_unknown_names() -> None:
    with pytest.raises(DllmError, match="did you mean 'sudoku'"):
        generate("sudoko", "test", 1)
    with pytest.raises(DllmError, match="split"):
        generate("sudoku", "tests", 1)
