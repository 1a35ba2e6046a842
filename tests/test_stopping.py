"""Where an answer ends: text, tokens, sequences and reason are one contract, and a stream says the same in pieces."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scripted import Scripted, peaks
from tokenizers import Tokenizer, decoders, models

import dllm
from dllm.decoding.stopping import Stops, special_tokens
from dllm.errors import DllmError
from dllm.models.tokenizer import NEAR, Detokenizer, is_byte

PROBLEM = "Tom has 12 apples. He buys 7 more. How many apples does Tom have?"


@pytest.fixture(scope="module")
def tiny() -> Any:
    return dllm.load("tiny")


def words(*pieces: str, special: tuple[str, ...] = (), decoder: Any = None) -> Any:
    """A tokenizer with these tokens."""
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token=pieces[0]))
    inner.decoder = decoder or decoders.Fuse()
    inner.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


SIGNS = words("a", "b", "c", "ab", "bc", "abc", "é", "<e>", "<s>", special=("<e>", "<s>"))
E, S = 7, 8


def stops(*strings: str, eos: tuple[int, ...] = (), tokenizer: Any = SIGNS) -> Stops:
    return Stops.of(eos, strings, tokenizer)


def test_an_answer_ends_before_its_first_stop() -> None:
    assert stops(eos=(E,)).cut([0, 1, E, 2]) == ("ab", [0, 1], 3, True)
    assert stops("b", eos=(E,)).cut([0, 1, E, 2]) == ("a", [0], 2, True)
    assert stops("c", eos=(E,)).cut([0, 1, E, 2]) == ("ab", [0, 1], 3, True)
    assert stops("x").cut([0, 1]) == ("ab", [0, 1], 2, False)
    assert stops("bca").cut([3, 2, 0, 1]) == (
        "a",
        [3],
        3,
        True,
    )  # it begins inside a token: the text is cut, not the id


def test_of_several_stop_strings_the_first_that_is_complete_counts() -> None:
    """However many tokens arrive at a time, the answer is the same."""
    for ids in ([0, 1, 2, 0], [3, 2, 0], [5, 0]):
        assert stops("abca", "b").cut(ids).text == "a"
        assert stops("b", "ab").cut(ids).text == ""  # complete at the same sign: the longest


def test_a_special_token_is_a_stop_string_like_any_other() -> None:
    assert stops("<e>").cut([0, 1, E, 2]) == ("ab", [0, 1], 3, True)
    assert stops("b<e>").cut([0, 3, E, 2]) == ("aa", [0, 3], 3, True)
    assert stops("ab").cut([0, S, 1, 2]) == ("", [], 3, True)  # others are sought in the text as it is returned
    assert not stops("e", "<").cut([0, E, S]).stopped


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert stops("bca").settled([0, 1]) == "a"
    assert stops("bca").settled([0, 1, 2]) == "a"
    assert stops("bca").settled([0, 1, 2, 1]) == "abc"
    assert stops("b<e>").settled([0, 1]) == "a"
    assert stops("b<e>").settled([0, 1, S]) == "ab"
    assert stops("x").settled([0, 1]) == "ab"


BYTES = words(
    "?",
    *(f"<0x{b:02X}>" for b in range(256)),
    "hi",
    decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
)
PIECES = words("?", "I", "do", "n", "'", "t", ".", "##s", decoder=decoders.WordPiece())


@pytest.mark.parametrize(
    ("tokenizer", "vocabulary"),
    [(SIGNS, range(9)), (BYTES, [1 + b for b in "é€h".encode()] + [257]), (PIECES, range(1, 8)), (None, range(3))],
    ids=["plain", "byte runs", "words joined", "no tokenizer"],
)
@pytest.mark.parametrize("strings", [(), ("bc", "é"), ("b<s>", "do n't", "h")])
def test_settled_text_only_grows_into_the_answer(tokenizer: Any, vocabulary: Any, strings: tuple[str, ...]) -> None:
    rules = Stops(frozenset({E}), strings if tokenizer is not None else (), tokenizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        ids = [vocabulary[i] for i in torch.randint(0, len(vocabulary), (9,), generator=generator)]
        cut = rules.cut(ids)
        parts = [rules.settled(ids[:i]) for i in range(10)]
        assert all(b.startswith(a) for a, b in itertools.pairwise([*parts, cut.text]))
        assert rules.ended(ids) == cut.stopped
        assert rules.cut(ids[: cut.through]) == cut
        for i in range(9):  # what is asked while decoding, from the end of the text, agrees
            if not rules.ended(ids[:i]):
                assert rules.ended(ids[: i + 1], seen=i) == rules.cut(ids[: i + 1]).stopped


RUNS = [1 + b for b in "é€😀h".encode()] + [257, 257]
BYTE = [f"<0x{b:02X}>" for b in "é€ ".encode()]
SPACED = words(
    "?", "▁", "▁a", "b", "▁b", ".", "<s>", *BYTE, special=("<s>",),
    decoder=decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ]),
)  # fmt: skip

TURNS = words("?", "I", "do", "n", "'", "t", ".", "##s", "[A]", special=("[A]",), decoder=decoders.WordPiece())
TURNS.clean_up_tokenization_spaces = True


@pytest.mark.parametrize(
    ("tokenizer", "vocabulary"),
    [(SIGNS, range(9)), (BYTES, RUNS), (PIECES, range(1, 8)), (TURNS, range(1, 9)), (SPACED, range(13)),
     ("tiny", range(280))],
    ids=["plain", "byte runs", "words joined", "special tokens between words", "spaces", "characters of several ids"],
)  # fmt: skip
@pytest.mark.parametrize("special", [False, True])
@settings(max_examples=15, phases=[Phase.generate])
@given(seed=st.integers(0, 999), cut=st.sampled_from([1, 3, 40, 99]))
def test_text_of_pieces_is_that_of_all_ids(tokenizer: Any, vocabulary: Any, special: bool, seed: int, cut: int) -> None:
    """However they are cut; and an id is decoded a bounded number of times."""
    tokenizer = dllm.load("tiny").tokenizer if tokenizer == "tiny" else tokenizer
    drawn = random.Random(seed)
    names = special_tokens(tokenizer)
    hidden = {i for i in vocabulary if tokenizer.convert_ids_to_tokens(i) in names}
    several = [[i] * drawn.choice([1, 1, 40] if i in hidden else [1]) for i in drawn.choices(vocabulary, k=400)]
    ids = list(itertools.chain(*several))[:400]
    counted = Counted(tokenizer)
    text = Detokenizer(counted, special)
    for i in range(0, len(ids), cut):
        assert text.feed(ids[i : i + cut]) == tokenizer.decode(ids[: i + cut], skip_special_tokens=not special)
    written = [i for i in ids if special or i not in hidden]
    runs = itertools.groupby(tokenizer.convert_ids_to_tokens(written), is_byte)
    longest = max((len(list(run)) for byte, run in runs if byte), default=0)  # a run of bytes is decoded as a whole
    assert counted.most <= longest + 5 * NEAR + cut


def test_a_byte_that_is_none_breaks_its_whole_run_in_pieces_too() -> None:
    text, ids = Detokenizer(BYTES), [1 + b for b in "é".encode()] * 60
    assert text.feed(ids) == "é" * 60
    assert text.feed([256, 257]) == BYTES.decode([*ids, 256, 257]) == "\ufffd" * 121 + "hi"


class Counted:
    """A tokenizer that notes the longest text it was asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self.convert_ids_to_tokens, self.tokenizer, self.most = tokenizer.convert_ids_to_tokens, tokenizer, 0

    def decode(self, ids: list[int], **how: Any) -> Any:
        self.most = max(self.most, len(ids))
        return self.tokenizer.decode(ids, **how)


CALLS = [
    {},
    {"early_stop": False, "eos": [272]},
    {"early_stop": False, "sampler": "wino"},
    {"stop": "####"},
    {"stop": "####", "early_stop": False},
    {"stop": [" apples.\n", "\n#"], "sampler": "threshold:tau=0.6"},
    {"stop": "<|eos|>", "eos": []},
    {"stop": "s.\n####", "sampler": "remdm"},
    {"eos": [], "temperature": 4.0},
    {"eos": [], "temperature": 4.0, "stop": "é", "sampler": "editing"},
    {"max_nfe": 3},
    {"max_nfe": 3, "early_stop": False, "sampler": "saber"},
    {"sampler": "daedal", "temperature": 1.0},
    {"sampler": "prophet", "stop": "#"},
    {"sampler": "adablock+credit", "cache": "dual", "lookahead": 2},
    {"infill": True, "max_new_tokens": 0},
    {"infill": True, "max_new_tokens": 12, "sampler": "random"},
]


@pytest.mark.parametrize("given", CALLS, ids=str)
def test_the_pieces_of_a_stream_join_to_the_text(tiny: Any, given: dict[str, Any]) -> None:
    infill = "infill" in given
    prompts = [
        f"{PROBLEM[:10]}<|mask|>{PROBLEM[12:40]}<|mask|>" if infill else PROBLEM,
        "é€😀<|mask|>" if infill else "é€😀 1 + 1",
    ]
    arguments = {"max_new_tokens": 32, "block_length": 4, **given, **({"chat": False} if infill else {})}
    outputs = dllm.generate(tiny, prompts, **arguments)
    events = list(dllm.stream(tiny, prompts, drafts=infill, **arguments))
    for i, output in enumerate(outputs):
        mine = [e for e in events if e.request == i]
        assert "".join(e.text for e in mine) == output.text
        assert (mine[-1].output.tokens, mine[-1].output.sequences) == (output.tokens, output.sequences)
        shown = "".join(e.text for e in mine[:-1])
        stopping = [given["stop"]] if isinstance(given.get("stop"), str) else given.get("stop", [])
        assert not any(s in output.text for s in stopping)
        assert output.text.startswith(shown)
        assert tiny.mask_id not in output.sequences
        if not infill:
            assert tiny.tokenizer.decode(output.tokens, skip_special_tokens=True).startswith(output.text)


def test_a_stream_holds_back_half_a_stop_string(tiny: Any) -> None:
    """What was sent cannot be taken back: '#' may be sent once it is known not to begin '####'."""
    call = {"max_new_tokens": 32, "block_length": 1, "eos": []}
    sent = [e.text for e in dllm.stream(tiny, PROBLEM, stop="####", **call)]
    assert not any("#" in piece for piece in sent)
    assert len([piece for piece in sent if piece]) > 5
    held = [e.text for e in dllm.stream(tiny, PROBLEM, stop="#### no", **call)]
    assert "#### 19" in "".join(held)


def test_stop_strings_end_generate_in_the_token_that_completes_them(tiny: Any) -> None:
    call = {"max_new_tokens": 32, "block_length": 8}
    plain = dllm.generate(tiny, PROBLEM, **call)
    for early_stop in (True, False):
        out = dllm.generate(tiny, PROBLEM, stop="####", early_stop=early_stop, **call)
        assert (out.text, out.finish_reason) == ("Tom has 12 + 7 = 19 apples.\n", "stop")
        assert tiny.tokenizer.decode(out.tokens) == out.text
        assert out.sequences == (plain.sequences if early_stop else out.sequences)[: len(out.sequences)]
        prompt = len(plain.sequences) - len(plain.tokens) - 1
        text = tiny.tokenizer.decode(out.sequences[prompt:])
        assert text == out.text + "####" if early_stop else len(out.sequences) == prompt + 32


def test_infilling_never_cuts_what_was_given(tiny: Any) -> None:
    prompt = "Tom has 12 apples. He buys <|mask|><|mask|> more."
    with pytest.raises(DllmError, match="stop strings do not apply"):
        dllm.generate(tiny, prompt, infill=True, chat=False, stop="apples")
    out = dllm.generate(tiny, prompt, infill=True, chat=False)
    assert out.text.startswith("Tom has 12 apples. He buys ")
    assert out.text.endswith(" more.")
    assert len(out.tokens) == 2  # what was decoded; the text given is not the model's work
    pieces = [e.text for e in dllm.stream(tiny, prompt, infill=True, chat=False)]
    assert pieces[0].startswith("Tom has 12 apples. He buys ")


def test_the_cap_on_forwards_is_the_reason_even_where_the_filled_text_holds_a_stop() -> None:
    scripted = Scripted(peaks([(1, 0.6), (1, 0.5), (3, 0.9), (1, 0.5)], 5), eos=3)
    out = dllm.generate(scripted, [0], max_new_tokens=4, block_length=4, max_nfe=2, steps=4)
    assert (out.finish_reason, out.tokens, out.nfe) == ("cap", [1, 1], 2)
    assert dllm.generate(scripted, [0], max_new_tokens=4, block_length=4).finish_reason == "stop"
    never = Scripted(peaks([(1, 0.6), (1, 0.5)], 5), eos=3)
    assert dllm.generate(never, [0], max_new_tokens=2).finish_reason == "length"
