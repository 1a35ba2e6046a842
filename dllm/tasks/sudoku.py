"""Sudoku of four by four."""

from __future__ import annotations

import hashlib
import random
import re
from functools import cache
from itertools import permutations, product

from dllm.tasks.base import Example

Grid = tuple[int, ...]  # 16 digits, row by row
HELD_OUT = {"test": 32, "validation": 16}  # of 288 solution grids


def _valid(grid: Grid) -> bool:
    columns = all(len({grid[c + 4 * r] for r in range(4)}) == 4 for c in range(4))
    corners = (0, 2, 8, 10)
    return columns and all(len({grid[c], grid[c + 1], grid[c + 4], grid[c + 5]}) == 4 for c in corners)


@cache
def grids() -> tuple[Grid, ...]:
    """All 288 solved 4×4 grids, in the order of a hash."""
    rows = list(permutations((1, 2, 3, 4)))
    solved = [g for four in product(rows, repeat=4) if _valid(g := tuple(d for row in four for d in row))]
    return tuple(sorted(solved, key=lambda g: hashlib.blake2b(bytes(g), digest_size=8).digest()))


@cache
def split_of_grids() -> dict[str, str]:
    """The split of every solution grid, by the text of the grid."""
    names = [name for name, n in HELD_OUT.items() for _ in range(n)]
    return {show(g): names[i] if i < len(names) else "train" for i, g in enumerate(grids())}


def show(cells: Grid) -> str:
    """Four lines of four digits; 0 is a blank."""
    text = "".join(str(c) if c else "_" for c in cells)
    return "\n".join(text[i : i + 4] for i in range(0, 16, 4))


@cache
def _agreeing(cell: int, digit: int) -> int:
    """The grids with `digit` in `cell`, as a bit set."""
    return sum(1 << i for i, g in enumerate(grids()) if g[cell] == digit)


def _solutions(puzzle: Grid) -> int:
    left = (1 << len(grids())) - 1
    for cell, digit in enumerate(puzzle):
        if digit:
            left &= _agreeing(cell, digit)
    return left.bit_count()


def draw_sudoku(rng: random.Random) -> Example:
    """A 4×4 grid with 4 to 10 blanks and one solution; the answer is the whole grid."""
    solution = rng.choice(grids())
    while True:
        blanks = set(rng.sample(range(16), rng.randint(4, 10)))
        puzzle = tuple(0 if i in blanks else c for i, c in enumerate(solution))
        if _solutions(puzzle) == 1:
            break
    meta = {"key": show(solution), "blanks": len(blanks)}
    return Example(f"Solve this sudoku:\n{show(puzzle)}", show(solution), meta)


def grade_sudoku(example: Example, text: str) -> bool:
    """True where the sixteen digits are the solution (it is unique)."""
    return re.sub(r"\s", "", text) == re.sub(r"\s", "", example.answer)
