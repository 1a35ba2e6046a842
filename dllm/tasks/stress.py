"""Tasks on which parallel commits go wrong: lines of names and pairs, each with all its right answers known.

A step that commits several columns takes each from its own marginal, so what it writes follows the product of the
marginals. Where the columns of the right answers depend on each other, that product has mass on wrong answers, however
good the model is (ParallelBench, arXiv 2510.04767). The four tasks differ in how their columns depend:

    copying       one right answer: nothing depends on anything, any number of commits is right
    replacing     exactly one column differs from the line, any one: each pair of columns depends a little
    waiting_line  every order of the line: all columns depend on all others
    pairs         a choice for each pair: two columns depend wholly on each other and on nothing else

Every right answer is as likely as any other in the training data. A word is one token of the embedded tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import permutations, product

from dllm.tasks.base import Example, Task, hash_split
from dllm.tasks.word_problems import HE, SHE

NAMES = (*HE[:16], *SHE[:16])
LINE = (8, 14)  # names of a line, at least and at most
QUEUE = (6, 8)  # of one that is put in another order
PAIRS = (4, 7)  # choices, each between two couples
Words = tuple[str, ...]


def _line(rng: random.Random, size: tuple[int, int]) -> list[str]:
    return rng.sample(NAMES, rng.randint(*size))


def _example(ask: str, given: str, answer: Sequence[str], **meta: object) -> Example:
    return Example(f"{ask}: {given}", " ".join(answer), {"key": f"{ask}: {given}", **meta})


def draw_copying(rng: random.Random) -> Example:
    """A line of 8 to 14 names, to be copied or reversed."""
    line, ask = _line(rng, LINE), rng.choice(("Copy", "Reverse"))
    return _example(ask, " ".join(line), line if ask == "Copy" else line[::-1])


def copies(example: Example) -> Iterator[Words]:
    """The one right answer."""
    yield tuple(example.answer.split())


def draw_replacing(rng: random.Random) -> Example:
    """A line of 8 to 14 names, any one of which is replaced by a new one."""
    new, *line = _line(rng, (LINE[0] + 1, LINE[1] + 1))
    at = rng.randrange(len(line))
    return _example(f"Replace one with {new}", " ".join(line), [*line[:at], new, *line[at + 1 :]], line=line, new=new)


def replacements(example: Example) -> Iterator[Words]:
    """The new name in each place."""
    line, new = example.meta["line"], example.meta["new"]
    yield from ((*line[:at], new, *line[at + 1 :]) for at in range(len(line)))


def draw_waiting_line(rng: random.Random) -> Example:
    """A line of 6 to 8 names, to be put in any order."""
    line = _line(rng, QUEUE)
    return _example("Shuffle", " ".join(line), rng.sample(line, len(line)), line=line)


def orders(example: Example) -> Iterator[Words]:
    """Every order of the line: n! of them."""
    return permutations(example.meta["line"])


def draw_pairs(rng: random.Random) -> Example:
    """4 to 7 choices between two couples of names; the answer says one couple of each."""
    n = rng.randint(*PAIRS)
    names = rng.sample(NAMES, 4 * n)
    couples = list(zip(names[::2], names[1::2], strict=True))
    choices = list(zip(couples[::2], couples[1::2], strict=True))
    given = ", ".join(" / ".join(" ".join(option) for option in choice) for choice in choices)
    answer = [word for choice in choices for word in rng.choice(choice)]
    return _example("Choose", given, answer, choices=choices)


def choices(example: Example) -> Iterator[Words]:
    """One option of every choice: 2^m answers."""
    return (sum(chosen, ()) for chosen in product(*example.meta["choices"]))


def grade_waiting_line(example: Example, text: str) -> bool:
    """True where the words are those of the line, in any order."""
    return sorted(text.split()) == sorted(example.meta["line"])


def grade_pairs(example: Example, text: str) -> bool:
    """True where each pair of words is one of the two that its place offers."""
    words, offered = text.split(), example.meta["choices"]
    if len(words) != 2 * len(offered):
        return False
    return all(pair in offer for pair, offer in zip(zip(words[::2], words[1::2], strict=True), offered, strict=True))


STRESS = (
    Task("copying", draw_copying, lambda e, text: tuple(text.split()) in copies(e), hash_split, 16),
    Task("replacing", draw_replacing, lambda e, text: tuple(text.split()) in replacements(e), hash_split, 16),
    Task("waiting_line", draw_waiting_line, grade_waiting_line, hash_split, 16),
    Task("pairs", draw_pairs, grade_pairs, hash_split, 16),
)
ANSWERS = {"copying": copies, "replacing": replacements, "waiting_line": orders, "pairs": choices}


def right_answers(name: str, example: Example) -> Iterator[Words]:
    """The words of every right answer of one problem of a stress task; all are equally likely."""
    return ANSWERS[name](example)
