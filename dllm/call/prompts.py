"""Prompts as users have them: text, token ids, chat messages, and what a tokenizer returns, padding and all.

One reader for every front door (`generate`, `stream`, `score`, `speculate`). Padding never reaches a model: a prompt is
the ids that its attention mask keeps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

from dllm.decoding.stopping import valid_text
from dllm.errors import DllmError
from dllm.models.config import is_id
from dllm.models.model import Model
from dllm.models.tokenizer import NO_TOKENIZER, Message, Tokenizer

log = logging.getLogger(__name__)

# what a tokenizer may return beside ids and mask; none of it says more about a text
IGNORED = {"token_type_ids", "position_ids", "special_tokens_mask", "offset_mapping", "length"}


@runtime_checkable
class Array(Protocol):
    """A tensor or an array."""

    def tolist(self) -> Any:
        """As nested lists."""


Text: TypeAlias = str | Sequence[Message]
One: TypeAlias = Text | Sequence[int]  # a prompt: text, chat messages or token ids
Several: TypeAlias = (
    list[str] | tuple[str, ...] | Sequence[Sequence[Message]] | Sequence[Sequence[int]] | Sequence[Array]
)
Encoding: TypeAlias = Mapping[str, object]  # what a tokenizer returns: "input_ids", "attention_mask"
Ids: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | Array
Prompt: TypeAlias = One | Several | Sequence[str] | Array | Encoding | Sequence[Encoding]
Encode: TypeAlias = Callable[[Text], list[int]]


@dataclass(frozen=True)
class Padding:
    """The padding id of a tokenizer, and the ids that also mean something in a text (ends, beginning)."""

    id: int | None = None
    meaningful: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, pad: int | None, meaningful: Iterable[int | None]) -> Padding:
        """The tokenizer's own padding id comes before the checkpoint's (`pad`): it is what users pad with."""
        named = [getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos", "bos", "unk")]  # foreign
        return cls(
            pad if named[0] is None else named[0], frozenset(i for i in (*meaningful, *named[1:]) if i is not None)
        )


def joined(prompt: Prompt | None, input_ids: Ids | None, attention_mask: Ids | None) -> Prompt | None:
    """The prompt of a call that may name `input_ids=` and `attention_mask=`, as transformers' `generate` does."""
    if input_ids is not None:
        if prompt is not None:
            raise DllmError("the prompt is given twice: as prompt and as input_ids=")
        prompt = input_ids
    if attention_mask is None:
        return prompt
    if prompt is None:
        raise DllmError("attention_mask= says which ids of a prompt are padding: pass the prompt too")
    return {"input_ids": prompt["input_ids"] if _encoded(prompt) else prompt, "attention_mask": attention_mask}


def read(prompt: object, encode: Encode, padding: Padding = Padding()) -> tuple[list[list[int]], bool]:
    """Token ids of the prompts of a call, without padding, and whether it was a single prompt.

    prompt: text, ids, chat messages, a list of any one of these, or a tokenizer's output ({"input_ids": (L,) or (B, L),
    "attention_mask": the same shape}). Errors: an empty batch, mixed types, padding that cannot be told from text.
    """
    if _encoded(prompt):
        if other := sorted(set(prompt) - {"input_ids", "attention_mask"} - IGNORED):
            raise DllmError(f"only text can be decoded; the tokenizer's output also holds {', '.join(other)}")
        return _read_ids(prompt["input_ids"], prompt.get("attention_mask"), padding)
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt and all(map(_encoded, prompt)):
        batches = [read(p, encode, padding)[0] for p in prompt]
        if any(len(rows) != 1 for rows in batches):
            raise DllmError("each tokenizer output in a list of them holds one prompt; got several")
        return [rows[0] for rows in batches], False
    listed, single = as_list(prompt)
    if all(_is_ids(p) for p in listed):
        return _read_ids(prompt, None, padding)
    for text in _texts(listed):
        valid_text(text)
    return [encode(p) for p in listed], single


def read_one(prompt: object, encode: Encode, padding: Padding, what: str) -> list[int]:
    """Token ids of exactly one prompt, which may be a batch of one or have no ids at all."""
    if not isinstance(prompt, str | Mapping) and isinstance(prompt, Sized) and not len(prompt):
        return []
    rows, _ = read(prompt, encode, padding)
    if len(rows) != 1:
        raise DllmError(f"{what} is one text; got {len(rows)}")
    return rows[0]


def as_list(prompt: object) -> tuple[list[Any], bool]:
    """The prompts of a call, and whether it was a single one. Errors: empty batch, mixed types."""
    kind = _kind(prompt)
    if kind in ("text", "ids", "chat"):
        return [prompt], True
    if kind != "list":
        raise _odd(f"one {kind}")
    prompts = list(prompt)  # type: ignore[call-overload]  # a sequence, or an array of rows
    if not prompts:
        raise DllmError("the list of prompts is empty")
    kinds = {"ids" if _is_ids(p) else _kind(p) for p in prompts}
    if len(kinds) > 1:
        raise DllmError(f"the prompts of one call must be of one type; got {', '.join(sorted(kinds))}")
    if kinds == {"list"}:
        raise _odd("a list of lists")
    return prompts, False


def check_ids(ids: list[int], vocabulary: int, what: str) -> None:
    """Errors: ids outside the vocabulary."""
    bad = next((i for i in ids if not 0 <= i < vocabulary), None)
    if bad is not None:
        raise DllmError(f"{what} holds the id {bad}, outside the vocabulary")


def listed_ids(name: str, value: object, vocabulary: int) -> tuple[int, ...]:
    """The token ids of an argument: one, or several. Errors: anything else, ids outside the vocabulary."""
    listed = (value,) if is_id(value) else value
    if not isinstance(listed, Collection) or isinstance(listed, bytes) or not all(map(is_id, listed)):
        raise DllmError(f"{name}={value!r} must be a token id, or several")
    ids = tuple(map(int, listed))
    if bad := [i for i in ids if not 0 <= i < vocabulary]:
        raise DllmError(f"{name} holds {bad[0]}, outside the vocabulary of {vocabulary}")
    return ids


def _kind(prompt: object) -> str:
    if isinstance(prompt, str):
        return "text"
    if is_id(prompt):
        return "id"
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray | memoryview):
        kinds = {_kind(p) for p in prompt}
        if kinds == {"id"}:
            return "ids"
        if kinds == {"message"}:
            return "chat"
        return "list"
    if isinstance(prompt, Mapping):
        return "message"
    if isinstance(prompt, Array):  # the last one: a protocol is slow to tell
        return _kind(prompt.tolist())
    raise _odd(type(prompt).__name__)


def _is_ids(prompt: object) -> bool:
    """Whether a prompt is ids; an empty sequence is."""
    return not isinstance(prompt, str) and (_kind(prompt) == "ids" or (isinstance(prompt, Sized) and not len(prompt)))


def _odd(what: str) -> DllmError:
    return DllmError(
        f"a prompt is text, a list of token ids or a list of chat messages (or a tokenizer's output), not {what}"
    )


def _encoded(prompt: object) -> TypeGuard[Encoding]:
    """Whether a prompt is what a tokenizer returns: a mapping with input_ids."""
    return isinstance(prompt, Mapping) and "input_ids" in prompt


def _texts(prompt: object) -> Iterable[str]:
    """Every string of a prompt."""
    if isinstance(prompt, str):
        yield prompt
    elif isinstance(prompt, Mapping):
        for value in prompt.values():
            yield from _texts(value)
    elif isinstance(prompt, Sequence):
        for value in prompt:
            yield from _texts(value)


# -- of a dLLM: templates, padding, unconditional starts -------------------------------------------------------------


def prompt_ids(model: Model, prompt: object, chat: bool | None, n: int) -> tuple[list[list[int]], bool]:
    """Token ids for each of the `n` answers to every prompt, and whether it is one answer; None starts from nothing."""
    if prompt is None:
        prompts, single = [unprompted(model)], True
    else:
        prompts, single = read(prompt, partial(encode, model, chat=chat), padding(model))
    return [ids for ids in prompts for _ in range(n)], single and n == 1


def encode(model: Model, prompt: Text, chat: bool | None) -> list[int]:
    """Token ids of text or chat messages. Text goes through the chat template where there is one (chat=None)."""
    if model.tokenizer is None:
        raise DllmError(f"this model has no tokenizer ({NO_TOKENIZER}): pass ids, or load it with tokenizer=")
    if not isinstance(prompt, str):
        return model.chat(prompt)
    if chat or (chat is None and getattr(model.tokenizer, "chat_template", None)):  # foreign
        return model.chat([{"role": "user", "content": prompt}])
    return list(model.tokenizer(prompt, add_special_tokens=False)["input_ids"])


def padding(model: Model) -> Padding:
    """What ids of this model may be padding."""
    return Padding.of(model.tokenizer, model.pad_id, (*model.eos_ids, model.bos_id, model.mask_id))


def unprompted(model: Model) -> list[int]:
    """Unconditional generation starts from bos where the model is shifted, else from nothing."""
    if not model.shift:
        return []
    if model.bos_id is None:
        raise DllmError("this model predicts the next token and has no bos id: pass a prompt")
    return [model.bos_id]


# -- padding --------------------------------------------------------------------------------------------------------


def _read_ids(given: object, mask: object, padding: Padding) -> tuple[list[list[int]], bool]:
    listed, single = as_list(given)
    if not all(_is_ids(p) for p in listed):
        raise DllmError("input_ids and attention_mask are token ids and their mask, not text")
    rows = [[int(i) for i in p] for p in listed]
    if mask is None:
        return _without_padding(rows, isinstance(given, Array), padding), single
    masks = [mask] if single else _items(mask)
    if len(masks) != len(rows):
        raise DllmError(f"attention_mask has {len(masks)} rows for {len(rows)} prompts: it has the shape of input_ids")
    return [_kept(i, *pair) for i, pair in enumerate(zip(rows, masks, strict=True))], single


def _items(given: object) -> list[Any]:
    """The items of a sequence or an array, and one value as a list."""
    given = given.tolist() if isinstance(given, Array) else given
    return list(given) if isinstance(given, Sequence) else [given]


def _kept(index: int, ids: list[int], given: object) -> list[int]:
    """The ids that a mask keeps. Errors: another length, values beside 0 and 1, a hole inside the text."""
    mask = _items(given)
    if len(mask) != len(ids):
        raise DllmError(f"attention_mask of prompt {index} has {len(mask)} values for {len(ids)} ids")
    if any(isinstance(v, Sequence) or v not in (0, 1) for v in mask):
        raise DllmError(f"attention_mask of prompt {index} must hold 1 (text) and 0 (padding)")
    kept = [i for i, v in enumerate(mask) if v]
    if kept and kept[-1] - kept[0] + 1 != len(kept):
        raise DllmError(f"attention_mask hides ids inside prompt {index}: only padding at its ends can be left out")
    return [ids[i] for i in kept]


def _without_padding(rows: list[list[int]], rectangular: bool, padding: Padding) -> list[list[int]]:
    """Rows that came without a mask. An id that is nothing but padding is taken off both ends, as transformers does;
    where padding shares its id with an end token, what looks like padding is an error."""
    if padding.id is None:
        return rows
    edges = [_edges(ids, padding.id) for ids in rows]
    if padding.id not in padding.meaningful:
        return [ids[left : len(ids) - right] for ids, (left, right) in zip(rows, edges, strict=True)]
    even = len({len(ids) for ids in rows}) == 1
    for index, runs in enumerate(edges):
        for side, run in zip(("begins", "ends"), runs, strict=True):
            others = {e[side == "ends"] for e in edges}
            if run < 2 and not (run and even and 0 in others):
                continue
            message = (
                f"prompt {index} {side} with id {padding.id}, which is padding and an end of text: "
                "pass attention_mask= (1 text, 0 padding)"
            )
            if run > 1 or rectangular:
                raise DllmError(message)
            log.warning("%s; it is read as text", message)
    return rows


def _edges(ids: list[int], pad: int) -> tuple[int, int]:
    """How many padding ids a row begins and ends with."""
    text = [i for i, token in enumerate(ids) if token != pad]
    return (text[0], len(ids) - 1 - text[-1]) if text else (len(ids), 0)
