"""Tokenizers: what is asked of one, those of checkpoint folders, which are read from data files alone, and the text of
ids that come piece by piece."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from dllm.errors import DllmError, first_line

log = logging.getLogger(__name__)
NO_TOKENIZER = "there is no tokenizer.json, tokenizer.model, vocab.txt, or vocab.json with merges.txt"
CLASSES = {  # the files that each class of transformers reads; the first that are all there
    "PreTrainedTokenizerFast": ("tokenizer.json",),
    "Qwen2Tokenizer": ("vocab.json", "merges.txt"),  # Dream ships only Qwen2's BPE files
    "LlamaTokenizer": ("tokenizer.model",),
    "BertTokenizer": ("vocab.txt",),
}
Message = Mapping[str, str]  # "role" and "content"
NEAR = 16  # ids before an id, and behind it, that may change its text: spaces, characters of several ids, clean-ups


class Tokenizer(Protocol):
    """What the toolkit asks of a tokenizer; those of transformers have it. Generation by ids needs `decode` alone."""

    @property
    def chat_template(self) -> object:
        """None: there is none."""

    def __call__(self, text: str, /, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """The ids of a text under "input_ids"."""

    def __len__(self) -> int:
        """How many ids it has."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool = False) -> Any:
        """The text of ids."""

    def convert_ids_to_tokens(self, ids: int | list[int], /) -> Any:
        """The name of an id, or those of a list."""

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""

    def apply_chat_template(
        self, chat: list[dict[str, str]], /, *, tokenize: bool, return_dict: bool, add_generation_prompt: bool = False
    ) -> Any:
        """Ids or text of a conversation."""

    def save_pretrained(self, folder: Path, /) -> object:
        """Write its files."""


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder from its data files alone; None when it has none. A log line says what an
    incomplete one lacks."""
    absent = {name: [f for f in files if not (folder / f).is_file()] for name, files in CLASSES.items()}
    found = next((name for name, lacks in absent.items() if not lacks), None)
    if found is None:
        for name, lacks in absent.items():
            if len(lacks) < len(CLASSES[name]):
                log.warning("%s has part of a tokenizer, but lacks %s", folder, ", ".join(lacks))
        return None
    if found == "LlamaTokenizer" and not all(map(find_spec, ("sentencepiece", "google"))):
        raise DllmError(f"{folder / 'tokenizer.model'} is read with two packages: pip install sentencepiece protobuf")
    import transformers

    try:
        made: Tokenizer = getattr(transformers, found).from_pretrained(folder, trust_remote_code=False)  # foreign
        return made
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise DllmError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error


def by_template(tokenizer: Tokenizer, messages: Sequence[Message], *, tokenize: bool = True, **how: Any) -> Any:
    """Ids (or text) of a conversation by the tokenizer's own template. Errors: whatever the template objects to."""
    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=tokenize, return_dict=False, **how)
    except Exception as error:  # a template can raise whatever it likes
        raise DllmError(f"the tokenizer's chat template cannot write this: {first_line(error)}") from error


@dataclass
class Detokenizer:
    """The text of ids that come piece by piece. It is that of `decode` for all of them, and only the last ones are
    decoded again."""

    tokenizer: Tokenizer
    special: bool = False  # whether special tokens show
    ids: list[int] = field(default_factory=list)  # the last ones
    settled: str = ""  # text of the others, and of some of these
    known: int = 0  # characters of the last ones' text that are settled

    def feed(self, ids: Iterable[int]) -> str:
        """The text, with these ids behind the others."""
        self.ids += self._written(list(ids))
        text = self._decode(self.ids)
        whole = self.settled + text[self.known :]
        if len(self.ids) >= 4 * NEAR:
            self._settle(text)
        return whole

    def _settle(self, text: str) -> None:
        """Let ids go, at a place where the text shows that those behind it are written alike without them."""
        byte = [is_byte(name) for name in self.tokenizer.convert_ids_to_tokens(self.ids)]
        places = (i for i in range(len(byte) - NEAR, NEAR, -1) if not (byte[i - 1] and byte[i]))
        for cut in islice(places, 4):  # a character is of four ids at most
            rest = self.ids[cut - NEAR :]
            head, near, end = self._decode(self.ids[:cut]), self._decode(rest[:NEAR]), self._decode(rest)
            if near and text == head + end[len(near) :] and end.startswith(near):
                self.settled += head[self.known :]
                self.ids, self.known = rest, len(near)
                return

    def _written(self, ids: list[int]) -> list[int]:
        """Those that the text has: special tokens between them, as many as there may be, would only part them."""
        if self.special or self._decode(ids) == self.tokenizer.decode(ids):
            return ids
        return [i for i in ids if self._decode([i]) or not self.tokenizer.decode([i])]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=not self.special))


def is_byte(name: object) -> bool:
    """Whether this token is a byte of SentencePiece: a run of them is decoded as a whole."""
    return isinstance(name, str) and len(name) == 6 and name.startswith("<0x") and name.endswith(">")
