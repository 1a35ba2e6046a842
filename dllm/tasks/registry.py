"""The tasks of the embedded pair, by name; they are its training data and its evaluation."""

from __future__ import annotations

from dllm.errors import unknown
from dllm.tasks.base import Example, Task, hash_split
from dllm.tasks.functions import draw_function, grade_function
from dllm.tasks.sudoku import draw_sudoku, grade_sudoku, split_of_grids
from dllm.tasks.word_problems import draw_word_problem, grade_word_problem

TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task("word_problems", draw_word_problem, grade_word_problem, hash_split),
        Task("sudoku", draw_sudoku, grade_sudoku, lambda key: split_of_grids()[key]),
        Task("functions", draw_function, grade_function, hash_split),
    )
}


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
