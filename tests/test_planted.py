"""The planted model: exact conditionals, and what parallel commits lose on it in closed form."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm
from dllm.bench.planted import Joint, Planted
from dllm.bench.stress import planted
from dllm.errors import DllmError
from dllm.models.hub import ASSETS
from dllm.models.tokenizer import load_tokenizer
from dllm.models.transformer import Rows
from dllm.tasks.base import Example
from dllm.tasks.registry import STRESS_TASKS, generate, grade

N = 24  # problems a task


@pytest.fixture(scope="module")
def model() -> Planted:
    return planted(N)


def solve(model: Planted, examples: list[Example], **call):  # type: ignore[no-untyped-def]
    chats = [[{"role": "user", "content": e.prompt}] for e in examples]
    return dllm.generate(model, chats, max_new_tokens=16, batch_size=len(chats), **call)


@st.composite
def tables(draw: st.DrawFn) -> tuple[Joint, torch.Tensor, torch.Tensor]:
    """A joint over at most 9 answers of 3 columns with uneven masses, and a possible state of the columns."""
    rows = draw(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=9, unique=True))
    mass = torch.tensor([draw(st.integers(1, 9)) for _ in rows], dtype=torch.float64)
    masked = torch.tensor([draw(st.booleans()) for _ in range(3)])
    tokens = torch.tensor(draw(st.sampled_from(rows)))
    return Joint(torch.tensor(rows, dtype=torch.int16), mass / mass.sum()), tokens, masked


@settings(max_examples=100)
@given(tables())
def test_conditionals_are_bayes_rule_by_enumeration(case: tuple[Joint, torch.Tensor, torch.Tensor]) -> None:
    joint, tokens, masked = case
    found = joint.given(tokens, masked).marginals(3)
    rows = list(zip(joint.answers.tolist(), joint.mass.tolist(), strict=True))
    fits = [(a, p) for a, p in rows if all(m or x == t for x, t, m in zip(a, tokens.tolist(), masked, strict=True))]
    for column, token in product(range(3), range(3)):
        expected = sum(p for a, p in fits if a[column] == token) / sum(p for _, p in fits)
        assert found[column, token].item() == pytest.approx(expected)


@settings(max_examples=100)
@given(tables())
def test_information_and_product_by_enumeration(case: tuple[Joint, torch.Tensor, torch.Tensor]) -> None:
    joint, *_ = case
    rows = list(zip(joint.answers.tolist(), joint.mass.tolist(), strict=True))
    alone = joint.marginals(3)
    for i, j in product(range(3), range(3)):
        nats = 0.0
        for x, y in product(range(3), range(3)):
            both = sum(p for a, p in rows if (a[i], a[j]) == (x, y))
            if both and i != j:
                nats += both * math.log(both / float(alone[i, x] * alone[j, y]))
        assert joint.information()[i, j].item() == pytest.approx(nats, abs=1e-12)
    expected = sum(math.prod(float(alone[c, t]) for c, t in enumerate(a)) for a, _ in rows)
    assert joint.product() == pytest.approx(expected)


def test_what_stands_and_is_part_of_no_answer_is_read_as_its_nearest_ones() -> None:
    joint = Joint(torch.tensor([[0, 1, 2], [2, 1, 0], [3, 3, 3]], dtype=torch.int16))
    stands, masked = torch.tensor([0, 3, 0]), torch.tensor([False, False, True])
    assert joint.given(stands, masked).answers.tolist() == [[0, 1, 2], [3, 3, 3]]


@pytest.mark.parametrize("name", STRESS_TASKS)
def test_one_token_a_forward_is_always_right(name: str, model: Planted) -> None:
    examples = generate(name, "test", N)
    for call in (
        {"sampler": "confidence"},
        {"sampler": "random", "seed": 1},
        {"sampler": "random", "temperature": 1.0},
    ):
        assert all(grade(name, e, o.text) for e, o in zip(examples, solve(model, examples, **call), strict=True))


@pytest.mark.parametrize("name", STRESS_TASKS)
def test_the_mass_of_the_product_in_closed_form(name: str, model: Planted) -> None:
    for example in generate(name, "test", N):
        n = len(example.answer.split())
        law = {
            "copying": 1.0,
            "replacing": (1 - 1 / n) ** (n - 1),
            "waiting_line": math.factorial(n) / n**n,
            "pairs": 0.5 ** (n / 2),
        }
        assert model.joint_of(example).product() == pytest.approx(law[name])


@pytest.mark.parametrize("name", STRESS_TASKS)
def test_drawing_all_columns_at_once_is_right_as_often_as_the_product_says(name: str, model: Planted) -> None:
    """One forward at temperature 1, 40 draws of each problem: within four standard errors of the computed number."""
    examples = generate(name, "test", N)
    repeats = 40
    outputs = solve(model, examples * repeats, sampler="confidence", steps=1, temperature=1.0)
    assert all(o.nfe == 1 for o in outputs)
    right = sum(grade(name, e, o.text) for e, o in zip(examples * repeats, outputs, strict=True))
    chances = [model.joint_of(e).product() for e in examples]
    spread = math.sqrt(repeats * sum(p * (1 - p) for p in chances))
    assert abs(right - repeats * sum(chances)) <= 4 * spread + 1e-9


def test_the_published_threshold_breaks_where_a_line_has_more_than_ten_names(model: Planted) -> None:
    """A name stays with probability 1 - 1/n, which passes 0.9 beyond ten names: then all of them stay at once."""
    examples = [e for e in generate("replacing", "test", N) if len(e.meta["line"]) != 10]  # 0.9, but for rounding
    for example, output in zip(examples, solve(model, examples, sampler="threshold"), strict=True):
        assert grade("replacing", example, output.text) == (len(example.meta["line"]) < 10)


def test_pairs_are_half_in_parallel_by_entropy(model: Planted) -> None:
    """A pair is one bit: the bounded entropy commits its second column beside the next pair's first."""
    examples = generate("pairs", "test", N)
    for example, output in zip(examples, solve(model, examples, sampler="eb"), strict=True):
        assert grade("pairs", example, output.text) and output.nfe == len(example.meta["choices"]) + 1


def test_rows_are_the_same_alone_and_in_a_batch(model: Planted) -> None:
    examples = [e for name in STRESS_TASKS for e in generate(name, "test", 2)]
    together = solve(model, examples, sampler="threshold:tau=0.6")
    for example, output in zip(examples, together, strict=True):
        (alone,) = solve(model, [example], sampler="threshold:tau=0.6")
        assert (alone.text, alone.nfe) == (output.text, output.nfe)


def test_errors(model: Planted) -> None:
    with pytest.raises(DllmError, match="only the problems"):
        dllm.generate(model, [[{"role": "user", "content": "Copy: Ana"}]], max_new_tokens=8)
    with pytest.raises(DllmError, match="plain rows"):
        solve(model, generate("copying", "test", 1), sampler="wino")


def test_another_window_is_decoded_too(model: Planted) -> None:
    examples = generate("copying", "test", 3)
    chats = [[{"role": "user", "content": e.prompt}] for e in examples]
    short, long = (dllm.generate(model, chats, max_new_tokens=n, sampler="threshold") for n in (4, 24))
    assert all(o.text.split() == e.answer.split()[:4] for e, o in zip(examples, short, strict=True))
    assert all(o.text == e.answer for e, o in zip(examples, long, strict=True))


def test_the_tokenizer_is_the_embedded_one(model: Planted) -> None:
    tokenizer = load_tokenizer(ASSETS / "tiny")
    assert tokenizer is not None and model.vocab_size == len(tokenizer.get_vocab())


def test_attention_is_the_information_between_open_columns(model: Planted) -> None:
    """Of a pair, each column attends to the other one alone; once one stands, both attend to themselves."""
    example = generate("pairs", "test", 1)[0]
    prompt = model.chat([{"role": "user", "content": example.prompt}])
    n, start = len(example.answer.split()), len(prompt)
    answer = model.joint_of(example).answers[0].tolist()
    rows = Rows(frozenset({0}), torch.arange(start - 1, start + n)[None], start + n)
    opened = model.forward_with(torch.tensor([[*prompt, *[model.mask_id] * n]]), rows=rows).said.weights
    assert opened is not None
    partner = [start + (i ^ 1) for i in range(n)]
    assert opened.table.shape == (1, n + 1, start + n) and opened.table.argmax(2).tolist() == [[start - 1, *partner]]
    assert torch.allclose(opened.table.max(2).values, torch.ones(1, n + 1, dtype=torch.float64))
    half = model.forward_with(torch.tensor([[*prompt, answer[0], *[model.mask_id] * (n - 1)]]), rows=rows).said.weights
    assert half is not None
    assert half.table.argmax(2).tolist() == [[start - 1, start, start + 1, *partner[2:]]]
    queue = generate("waiting_line", "test", 1)[0]
    prompt, n = model.chat([{"role": "user", "content": queue.prompt}]), len(queue.answer.split())
    rows = Rows(frozenset({0}), torch.arange(len(prompt), len(prompt) + n)[None], len(prompt) + n)
    dense = model.forward_with(torch.tensor([[*prompt, *[model.mask_id] * n]]), rows=rows).said.weights
    assert dense is not None
    even = (1 - torch.eye(n, dtype=torch.float64)) / (n - 1)
    assert torch.allclose(dense.table[0, :, len(prompt) :], even)


def test_an_independent_set_of_the_true_graph_is_never_wrong_and_takes_pairs_in_two_forwards(model: Planted) -> None:
    for name in STRESS_TASKS:
        examples = generate(name, "test", N)
        for example, output in zip(examples, solve(model, examples, sampler="dapd"), strict=True):
            assert grade(name, example, output.text)
            words = len(example.answer.split())
            assert output.nfe == {"copying": 1, "pairs": 2}.get(name, words)
