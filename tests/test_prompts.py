"""Prompts as transformers users have them: a tokenizer's output, padding on either side, and what is no prompt."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN, model

import dllm
from dllm.errors import DllmError

TEXTS = ["12+30=", "7+5=", "1+1=2 and 2+2="]
CALL = {"max_new_tokens": 8, "block_length": 8}


@pytest.fixture(scope="module")
def trained() -> Any:
    return dllm.load(GOLDEN / "checkpoints" / "tiny-llada-trained", device="cpu")


@pytest.fixture(scope="module")
def random() -> Any:
    """Its padding shares its id, 157, with the end of text, as LLaDA's and Dream's do."""
    return model("tiny-llada-random")


def sequences(outputs: Any) -> list[list[int]]:
    assert isinstance(outputs, list)
    return [o.sequences for o in outputs]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizers_output_is_a_prompt(trained: Any, side: str) -> None:
    tok = trained.tokenizer
    alone = [dllm.generate(trained, text, chat=False, **CALL).sequences for text in TEXTS]
    padded = tok(TEXTS, padding=True, padding_side=side, return_tensors="pt")
    ids, mask = padded["input_ids"], padded["attention_mask"]
    assert not bool(mask.all())
    for prompt in (
        padded,
        dict(padded),
        tok(TEXTS),
        tok(TEXTS, padding=True, return_tensors="np"),
        list(map(tok, TEXTS)),
    ):
        assert sequences(dllm.generate(trained, prompt, **CALL)) == alone
    assert sequences(dllm.generate(trained, **padded, **CALL)) == alone
    assert sequences(dllm.generate(trained, ids, attention_mask=mask.bool(), **CALL)) == alone
    assert sequences(dllm.generate(trained, ids, **CALL)) == alone  # an id that is nothing but padding
    events = list(dllm.stream(trained, **padded, **CALL))
    assert [e.output.sequences for e in sorted(events, key=lambda e: e.request) if e.output] == alone


def test_one_text_is_one_answer_and_a_batch_of_one_is_a_list(trained: Any) -> None:
    tok = trained.tokenizer
    one = dllm.generate(trained, tok(TEXTS[0]), **CALL)
    assert sequences(dllm.generate(trained, tok(TEXTS[0], return_tensors="pt"), **CALL)) == [one.sequences]
    chat = [{"role": "user", "content": TEXTS[0]}]
    templated = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    encoded = tok.apply_chat_template(chat, chat_template=templated, return_dict=True, return_tensors="pt")
    assert sequences(dllm.generate(trained, encoded, **CALL)) == [one.sequences]


def test_scores_and_drafting_read_the_same_prompts(trained: Any) -> None:
    tok = trained.tokenizer
    head, tail = (tok(t, return_tensors="pt", padding="max_length", max_length=9) for t in (TEXTS[0], "42"))
    expected = dllm.score(trained, tok(TEXTS[0])["input_ids"], tok("42")["input_ids"], samples=4)
    assert dllm.score(trained, head, tail, samples=4) == expected
    assert dllm.score(trained, **head, answer=tail, samples=4) == expected
    with pytest.raises(DllmError, match="the prompt to score is one text; got 3"):
        dllm.score(trained, tok(TEXTS, padding=True), tail)


def test_padding_that_is_an_end_of_text_needs_its_mask(random: Any, caplog: pytest.LogCaptureFixture) -> None:
    ids, mask = torch.tensor([[157, 157, 5, 6], [3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    alone = [dllm.generate(random, p, max_new_tokens=4).sequences for p in ([5, 6], [3, 4, 5, 6])]
    assert sequences(dllm.generate(random, ids, attention_mask=mask, max_new_tokens=4)) == alone
    whole = dllm.generate(random, ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert whole[0].sequences[:4] == [157, 157, 5, 6]
    for given in (ids, ids.tolist(), ids[0], ids.flip(1), ids[:, 1:]):
        with pytest.raises(DllmError, match="id 157, which is padding and an end of text: pass attention_mask="):
            dllm.generate(random, given, max_new_tokens=4)
    # one end token at the edge of a list is text, as it may well be: said, not refused
    with caplog.at_level(logging.WARNING):
        assert dllm.generate(random, [[157, 5, 6], [4, 5, 6]], max_new_tokens=1)[0].sequences[:3] == [157, 5, 6]
    assert "attention_mask" in caplog.text
    caplog.clear()
    assert dllm.generate(random, [[157, 5, 6], [157, 5, 7]], max_new_tokens=1)[0].sequences[:3] == [157, 5, 6]
    assert not caplog.text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"12+30=", "not bytes"),
        (bytearray(b"1"), "not bytearray"),
        ([True, False], "not bool"),
        (torch.tensor([True, False]), "not bool"),
        (np.array([[True]]), "not bool"),
        ({"input_ids": b"12"}, "not bytes"),
        ({"input_ids": "12+30="}, "token ids and their mask, not text"),
        ({"input_ids": [[5, 6]], "attention_mask": [1, 1]}, "it has the shape of input_ids"),
        ({"input_ids": [[5, 6]], "attention_mask": 1}, "has 1 values for 2 ids"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, "attention_mask of prompt 0 has 1 values for 2 ids"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "hides ids inside prompt 0"),
        ({"input_ids": [5, 6], "attention_mask": [2, 1]}, "must hold 1 .* and 0"),
        ({"input_ids": [5], "pixel_values": 3}, "also holds pixel_values"),
        ("12\udcff", "undecodable byte or lone surrogate"),
        (["12", "\ud800"], "undecodable byte or lone surrogate"),
        ([{"role": "user", "content": "\udcff"}], "undecodable byte or lone surrogate"),
    ],
)
def test_what_is_no_prompt_is_one_line(trained: Any, prompt: Any, message: str) -> None:
    for call in (dllm.generate, dllm.stream):
        with pytest.raises(DllmError, match=message) as error:
            call(trained, prompt, max_new_tokens=2)
        assert "\n" not in str(error.value)


def test_a_prompt_is_given_once(trained: Any) -> None:
    with pytest.raises(DllmError, match="given twice"):
        dllm.generate(trained, [5], input_ids=[5])
    with pytest.raises(DllmError, match="pass the prompt too"):
        dllm.generate(trained, attention_mask=[1])
    for name, value in (("eos", True), ("eos", b"ab"), ("suppress_tokens", [True])):
        with pytest.raises(DllmError, match=f"{name}=.* must be a token id, or several"):
            dllm.generate(trained, [5], max_new_tokens=2, **{name: value})


@pytest.mark.parametrize("side", ["left", "right"])
def test_drafting_strips_padding_and_ends_where_generate_ends(side: str) -> None:
    tiny, verifier = dllm.load("tiny"), dllm.load_verifier("tiny-ar")
    tok, problem = tiny.tokenizer, "Tom has 12 apples. He buys 7 more. How many apples does Tom have?"
    texts = [f"{problem}<|sep|>", f"{problem[19:]}<|sep|>"]
    call = {"tokenizer": tok, "max_new_tokens": 24, "length": "fixed:k=8"}
    padded = tok(texts, padding=True, padding_side=side, return_tensors="pt")
    alone = [dllm.speculate(verifier, tiny, text, chat=False, **call).sequences for text in texts]
    for given in (padded, padded["input_ids"], tok(texts)):
        assert sequences(dllm.speculate(verifier, tiny, given, **call)) == alone
    assert sequences(dllm.speculate(verifier, tiny, **padded, **call)) == alone
    assert sequences(dllm.speculate(verifier, tiny, tok(texts[0], return_tensors="pt"), **call)) == alone[:1]
    for stop in (None, "####", "les.\n", "19<|eos|>"):
        ends = {"stop": stop, "eos": [] if stop and "eos" in stop else None}
        for drafted in (tiny, None):
            out = dllm.speculate(verifier, drafted, problem, **call, **ends)
            same = dllm.generate(tiny, problem, max_new_tokens=24, **ends)
            fields = [(o.text, o.tokens, o.sequences, o.finish_reason) for o in (out, same)]
            assert fields[0] == fields[1]
    for name, message in (
        ("gen_length", "here it is max_new_tokens"),
        ("max_new_tokns", "did you mean 'max_new_tokens'"),
    ):
        with pytest.raises(DllmError, match=message):
            dllm.speculate(verifier, None, problem, **{name: 4})
    for bad in (b"12", [True], "\udcff"):
        with pytest.raises(DllmError, match=r"not bytes|not bool|lone surrogate"):
            dllm.speculate(verifier, None, bad, tokenizer=tok)
