"""The tokenizer of the embedded pair: short for the tasks, lossless for everything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.models.hub import ASSETS
from dllm.models.tokenizer import load_tokenizer
from dllm.tasks.registry import TASKS
from dllm.training.tokenizer import SPECIAL, embedded_tokenizer


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return load_tokenizer(ASSETS / "tiny")


def test_shipped_tokenizer_is_the_one_the_generators_give(tokenizer) -> None:  # type: ignore[no-untyped-def]
    fresh = embedded_tokenizer()
    twin = load_tokenizer(ASSETS / "tiny-ar")
    assert tokenizer.get_vocab() == fresh.get_vocab() == twin.get_vocab()
    text = "Tom has 12 apples. Héllo"
    assert tokenizer(text)["input_ids"] == fresh(text)["input_ids"] == twin(text)["input_ids"]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3]


@settings(max_examples=150)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40))
def test_any_text_survives(text: str) -> None:
    tokenizer = load_tokenizer_once()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def load_tokenizer_once():  # type: ignore[no-untyped-def]
    if not hasattr(load_tokenizer_once, "value"):
        load_tokenizer_once.value = load_tokenizer(ASSETS / "tiny")  # type: ignore[attr-defined]
    return load_tokenizer_once.value  # type: ignore[attr-defined]


def test_problems_are_short(tokenizer) -> None:  # type: ignore[no-untyped-def]
    for task in TASKS.values():
        for example in task.generate("test", 100, 0):
            assert len(tokenizer(example.prompt)["input_ids"]) <= 60
            assert len(tokenizer(example.answer)["input_ids"]) <= 45


def test_chat_template_ends_the_turn(tokenizer) -> None:  # type: ignore[no-untyped-def]
    turns = [
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "?"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "Hi<|sep|>Yo<|eos|>?<|sep|>"
