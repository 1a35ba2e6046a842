"""The stress tasks: every right answer passes, every other one fails, and a word is a token."""

from __future__ import annotations

from itertools import islice
from math import factorial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.tasks.registry import STRESS_TASKS, grade, task
from dllm.tasks.stress import LINE, NAMES, PAIRS, QUEUE, right_answers
from dllm.training.tokenizer import embedded_tokenizer

seeds = st.integers(0, 2**32)
names = st.sampled_from(STRESS_TASKS)


def problem(name: str, seed: int):  # type: ignore[no-untyped-def]
    return next(task(name).stream("test", seed))


@settings(max_examples=60)
@given(names, seeds)
def test_every_right_answer_passes(name: str, seed: int) -> None:
    example = problem(name, seed)
    answers = list(islice(right_answers(name, example), 2000))
    assert all(grade(name, example, " ".join(words)) for words in answers)
    assert len(set(answers)) == len(answers)
    assert name == "waiting_line" or tuple(example.answer.split()) in answers


@settings(max_examples=200)
@given(names, seeds, st.data())
def test_a_text_passes_where_and_only_where_it_is_a_right_answer(name: str, seed: int, data: st.DataObject) -> None:
    """One word of a right answer is another one of the problem or of the names, or two words change places."""
    example = problem(name, seed)
    words = example.answer.split()
    i, j = (data.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    told = example.prompt.replace(",", "").split(": ")[1].split()
    if data.draw(st.booleans()):
        words[i], words[j] = words[j], words[i]
    else:
        words[i] = data.draw(st.sampled_from([*told, *NAMES]))
    right = tuple(words) in right_answers(name, example) if name != "waiting_line" else sorted(words) == sorted(told)
    assert grade(name, example, " ".join(words)) == right


@settings(max_examples=60)
@given(names, seeds)
def test_a_text_that_is_too_short_or_too_long_fails(name: str, seed: int) -> None:
    example = problem(name, seed)
    words = example.answer.split()
    assert not grade(name, example, " ".join(words[:-1]))
    assert not grade(name, example, " ".join([*words, words[0]]))
    assert not grade(name, example, "")


def test_hand_examples() -> None:
    replacing, waiting, pairs = (problem(name, 0) for name in ("replacing", "waiting_line", "pairs"))
    line, new = replacing.meta["line"], replacing.meta["new"]
    assert not grade("replacing", replacing, " ".join(line)), "nobody was replaced"
    assert not grade("replacing", replacing, " ".join([new, new, *line[2:]])), "two were"
    queue = waiting.meta["line"]
    assert grade("waiting_line", waiting, " ".join(queue[::-1]))
    assert not grade("waiting_line", waiting, " ".join([queue[1], *queue[1:]])), "one stands there twice"
    (a, b), *rest = pairs.meta["choices"]
    others = [word for options in rest for word in options[0]]
    assert grade("pairs", pairs, " ".join([*b, *others]))
    assert not grade("pairs", pairs, " ".join([a[0], b[1], *others])), "one of each couple"
    for kind in ("Copy", "Reverse"):
        example = next(e for e in task("copying").stream("test") if e.prompt.startswith(kind))
        line = example.prompt.split(": ")[1].split()
        assert grade("copying", example, " ".join(line)) == (kind == "Copy")
        assert grade("copying", example, " ".join(line[::-1])) == (kind == "Reverse")


@pytest.mark.parametrize("name", STRESS_TASKS)
def test_there_are_as_many_right_answers_as_the_kind_has(name: str) -> None:
    for example in task(name).generate("test", 20):
        if name == "waiting_line" and len(example.meta["line"]) > 7:
            continue
        n = len(example.answer.split())
        count = {"copying": 1, "replacing": n, "waiting_line": factorial(n), "pairs": 2 ** (n // 2)}[name]
        assert sum(1 for _ in right_answers(name, example)) == count


@pytest.mark.parametrize("name", STRESS_TASKS)
def test_words_of_answers_are_tokens_and_lengths_are_as_told(name: str) -> None:
    tokenizer = embedded_tokenizer()
    least, most = {"waiting_line": QUEUE, "pairs": (2 * PAIRS[0], 2 * PAIRS[1])}.get(name, LINE)
    for example in task(name).generate("train", 100):
        words = example.answer.split()
        assert len(tokenizer(example.answer)["input_ids"]) == len(words)
        assert least <= len(words) <= most < task(name).window


@pytest.mark.parametrize("name", ["replacing", "waiting_line", "pairs"])
def test_training_answers_are_drawn_evenly(name: str) -> None:
    """The first word of a line: how often it is the new name, the first of the line, the first of the two options."""
    examples = task(name).generate("train", 3000)

    def hit(e) -> float:  # type: ignore[no-untyped-def]
        first = e.answer.split()[0]
        if name == "replacing":
            return (first == e.meta["new"]) - 1 / len(e.meta["line"])
        if name == "waiting_line":
            return (first == e.meta["line"][0]) - 1 / len(e.meta["line"])
        return (first == e.meta["choices"][0][0][0]) - 1 / 2

    assert abs(sum(map(hit, examples)) / len(examples)) < 0.03  # over three standard errors
