"""The tasks by name: those of the embedded pair, and the stress tests of parallel commits."""

from __future__ import annotations

from dllm.errors import unknown
from dllm.tasks.base import Example, Task, hash_split
from dllm.tasks.functions import draw_function, grade_function
from dllm.tasks.stress import STRESS
from dllm.tasks.sudoku import draw_sudoku, grade_sudoku, split_of_grids
from dllm.tasks.word_problems import draw_word_problem, grade_word_problem

_PAIR = (
    Task("word_problems", draw_word_problem, grade_word_problem, hash_split, 48),
    Task("sudoku", draw_sudoku, grade_sudoku, lambda key: split_of_grids()[key], 24),
    Task("functions", draw_function, grade_function, hash_split, 32),
)
TASKS: dict[str, Task] = {t.name: t for t in (*_PAIR, *STRESS)}
PAIR_TASKS = tuple(t.name for t in _PAIR)  # what the embedded pair was trained on
STRESS_TASKS = tuple(t.name for t in STRESS)


def task(name: str) -> Task:
    """The task called `name`; a DllmError with the nearest name otherwise."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def generate(name: str, split: str, n: int, seed: int = 0) -> list[Example]:
    """`n` distinct problems of one task and split."""
    return task(name).generate(split, n, seed)


def grade(name: str, example: Example, text: str) -> bool:
    """Whether `text` solves `example`."""
    return task(name).grade(example, text)
