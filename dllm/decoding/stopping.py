"""Where an answer ends: the contract of `generate`, `stream`, `speculate` and `eval`, and the rule that stops a row.

An answer ends at the first end token, or where the first stop string is complete, whichever comes first. `text` and
`tokens` hold what stands before it; `sequences` go on to the token that completes it. docs/decoding.md is for users.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.decoding.canvas import Canvas
from dllm.decoding.slots import Closed, View
from dllm.errors import DllmError
from dllm.models.tokenizer import Tokenizer, is_byte

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character, perhaps not yet


class Cut(NamedTuple):
    """An answer up to its stop."""

    text: str
    tokens: list[int]  # before the stop; of a token that a stop string begins in, the text is cut
    through: int  # ids up to the end of the stop, all of them where there is none
    stopped: bool


@dataclass(frozen=True)
class Stops:
    """What ends an answer: end tokens and stop strings.

    A stop string is sought in the text as it is returned, without special tokens; one that names a special token (such
    as "<|eos|>") in the text that shows them. Of several the one that is complete first counts, then the longest.
    """

    eos_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None

    @classmethod
    def of(cls, eos_ids: Iterable[int], stop: str | Iterable[str] | None, tokenizer: Tokenizer | None) -> Stops:
        """Errors: stop strings that are none (see `stop_strings`), or without a tokenizer."""
        strings = stop_strings(stop)
        if strings and tokenizer is None:
            raise DllmError("stop strings need a tokenizer, and this model came without one: stop by ids (eos=)")
        return cls(frozenset(eos_ids), strings, tokenizer)

    def cut(self, ids: list[int]) -> Cut:
        """The answer that these generated ids are."""
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), len(ids))
        body, stopped = ids[:end], end < len(ids)
        found = self._found(body)
        if found is None:
            return Cut(self.decode(body), body, end + stopped, stopped)
        shows, at, through = found
        tokens = body[: self.reach(body, at, shows)]
        return Cut(self._hidden(tokens, at, shows), tokens, through, True)

    def ended(self, ids: list[int], seen: int = 0) -> bool:
        """Whether the answer is over; the first `seen` ids hold no stop. Of a long text the end alone is read."""
        if self.eos_ids.intersection(ids[seen:]):
            return True
        return bool(self.strings and self._found(ids[max(0, seen - self._span) :]) and self._found(ids))

    def settled(self, ids: list[int]) -> str:
        """The part of the answer's text that no further id can change: unfinished characters and what may become a stop
        string are held back."""
        ids = ids[: len(ids) - self._open_bytes(ids)]
        cut = self.cut(ids)
        if cut.stopped or self.tokenizer is None:
            return cut.text
        firm = cut.text.rstrip(UNFINISHED)
        firm = firm[: max(firm.rfind(" "), 0)] if _joins_words(self.tokenizer) else firm
        for shows, strings in self._views:
            text = self.decode(ids, shows).rstrip(UNFINISHED)
            at = len(text) - max(_overlap(text, s) for s in strings)
            firm = min(self._hidden(ids[: self.reach(ids, at, shows)], at, shows), firm, key=len)
        return firm

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Text of ids, without special tokens or with them; empty where there is no tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(ids, skip_special_tokens=not special)

    def reach(self, ids: list[int], at: int, shows: bool = False, text: str | None = None, least: int = 0) -> int:
        """How many ids it takes to write the first `at` characters, where it is known to be `least` or more."""
        wanted = (self.decode(ids, shows) if text is None else text)[:at]
        low, high = least, len(ids)
        while low < high:  # decode(ids[:i]) begins with `wanted` from some i on
            middle = (low + high) // 2
            low, high = (low, middle) if self.decode(ids[:middle], shows).startswith(wanted) else (middle + 1, high)
        return low

    # -- stop strings: positions in the text that hides special tokens, or in the one that shows them ---------------

    @cached_property
    def _views(self) -> tuple[tuple[bool, tuple[str, ...]], ...]:
        """(whether special tokens show, the strings that are sought there)."""
        special = special_tokens(self.tokenizer) if self.strings else ()
        named = tuple(s for s in self.strings if any(token in s for token in special))
        plain = tuple(s for s in self.strings if s not in named)
        return tuple((shows, strings) for shows, strings in ((False, plain), (True, named)) if strings)

    @cached_property
    def _span(self) -> int:
        """Ids that the longest stop string may fill: a token is at least a byte, and some decode to nothing."""
        return max(len(s.encode()) for s in self.strings) + 8

    def _found(self, ids: list[int]) -> tuple[bool, int, int] | None:
        """The stop string that is complete first: the view it was found in, where it begins, and the ids through it."""
        hits = []
        for shows, strings in self._views:
            text = self.decode(ids, shows)
            spots = [(at + len(s), at) for s in strings if (at := text.find(s)) >= 0]
            if spots:
                end, at = min(spots)
                hits.append((self.reach(ids, end, shows, text), at, shows))
        if not hits:
            return None
        through, at, shows = min(hits)
        return shows, at, through

    def _hidden(self, ids: list[int], at: int, shows: bool) -> str:
        """The text without special tokens of the fewest ids that write the first `at` characters of a view."""
        text = self.decode(ids)
        if not shows:
            return text[:at]
        surplus = len(self.decode(ids, shows)) - at
        return text[: len(text) - surplus] if surplus and self.decode(ids[:-1]) != text else text

    def _open_bytes(self, ids: list[int]) -> int:
        """How many byte tokens of SentencePiece stand at the end: a run of them is decoded as a whole."""
        if self.tokenizer is None:
            return 0
        names = map(self.tokenizer.convert_ids_to_tokens, reversed(ids[-64:]))
        return sum(1 for _ in itertools.takewhile(is_byte, names))


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """The stop strings of a call. Errors: an empty one, one that is no text."""
    strings = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(strings, Collection) or not all(isinstance(s, str) and s for s in strings):
        raise DllmError(f"stop={stop!r} must be a string, or several, and none of them empty")
    return tuple(map(valid_text, strings))


def valid_text(text: str) -> str:
    """The text as it is. Errors: lone surrogates, which stand for bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DllmError(
            f"the text {text[:20]!r} holds {text[error.start]!r}, an undecodable byte or lone surrogate: "
            "pass valid Unicode"
        ) from None
    return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that a stop string may begin with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _joins_words(tokenizer: Tokenizer) -> bool:
    """Whether the decoder takes back a space before punctuation that comes later (WordPiece)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # foreign
    decoder, model = (type(getattr(backend, part, None)).__name__ for part in ("decoder", "model"))  # foreign
    cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)  # foreign
    return decoder == "WordPiece" or (bool(cleans) and model != "BPE")


def special_tokens(tokenizer: Tokenizer | None) -> set[str]:
    """The strings of the tokens that `skip_special_tokens` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()  # foreign
    special = {str(t) for t in added if getattr(t, "special", False)}  # foreign
    return special | set(getattr(tokenizer, "all_special_tokens", ()))  # foreign


@dataclass(frozen=True)
class Stop:
    """Finish a row once its *closed* prefix holds a stop.

    A prefix is closed where nothing in it can change any more: up to the first mask for samplers that never revise, up
    to the last block that was left for those that do, and for those that would rather complete it.
    """

    stops: Stops
    revises: bool
    whole_block: bool = False

    def __call__(self, view: View, canvas: Canvas) -> Tensor:
        """(B,) bool: rows with an end token in the closed prefix of this canvas, the one after the step's decision.

        Stop strings are the host's: it gets the end of that prefix, and asks `over`.
        """
        end = self.closed(view, canvas)
        if self.stops.strings:
            view.memory[Closed] = Closed(end)
        return self.by_ids(canvas, end)

    def memory(self, canvas: Canvas) -> Closed | None:
        """Nothing is closed yet; None where nobody asks."""
        return Closed(canvas.start) if self.stops.strings else None

    def closed(self, view: View, canvas: Canvas) -> Tensor:
        """(B,) the end of the closed prefix, with the canvas after the step's decision. It asks the device nothing."""
        end = canvas.first_masked()
        if self.revises or self.whole_block:
            cols = torch.arange(canvas.ids.shape[1], device=end.device)
            block = (cols >= view.window.lo[:, None]) & (cols < view.window.end[:, None])
            left = ~((canvas.masked & block).any(1) | view.held)
            before = canvas.start if self.whole_block else torch.minimum(end, view.window.lo)
            end = torch.where(left, end, before)
        return end

    def by_ids(self, canvas: Canvas, closed: Tensor) -> Tensor:
        """(B,) bool: rows with an end token in their closed prefix. It asks the device nothing."""
        return _holds(canvas.ids, self.stops.eos_ids, canvas.start, closed)

    def over(self, ids: list[int], seen: int) -> bool:
        """Whether an answer holds a stop string, on the host. `ids`: the generated ids of the closed prefix, of which
        the first `seen` were closed before this step: they hold none, unless the sampler may have revised them."""
        return len(ids) > seen and self.stops.ended(ids, 0 if self.revises else seen)


def _holds(ids: Tensor, wanted: Iterable[int], start: Tensor, end: Tensor) -> Tensor:
    """(B,) bool: one of the ids stands in a column of [start, end)."""
    cols = torch.arange(ids.shape[1], device=ids.device)
    hit = torch.zeros_like(ids, dtype=torch.bool)
    for token in wanted:
        hit |= ids == token
    return (hit & (cols >= start[:, None]) & (cols < end[:, None])).any(1)
