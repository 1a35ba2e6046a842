"""Prompts that are measured on, by hash: whoever makes training data refuses them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dllm import spec
from dllm.drafting.front import encode
from dllm.drafting.verifier import Verifier
from dllm.errors import DllmError


@dataclass(frozen=True)
class Holdout:
    """The hashes of the texts of some files. Texts are compared without case and with single spaces."""

    homes: dict[bytes, str] = field(default_factory=dict)  # of a text, the file that holds it

    @classmethod
    def of(cls, files: Sequence[str]) -> Holdout:
        """Every text in these files: the strings of .json and .jsonl, the lines of others. Errors: no such file."""
        return cls({key(text): name for name in files for text in _texts(Path(name))})

    def __contains__(self, text: str) -> bool:
        return key(text) in self.homes

    def __bool__(self) -> bool:
        return bool(self.homes)

    def check(self, source: object, prompts: Iterable[str]) -> None:
        """Errors: one of the prompts is held out."""
        for number, prompt in enumerate(prompts, 1):
            if home := self.homes.get(key(prompt)):
                shown = " ".join(prompt.split())[:60]
                raise DllmError(
                    f"prompt {number} of {source} ({shown!r}) is held out by {home}: what is measured on is never "
                    "learned from; take it out"
                )


def key(text: str) -> bytes:
    """The hash of a text as it is compared."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()


def user_reader(verifier: Verifier) -> Callable[[Sequence[int]], str]:
    """What the user says in an encoded prompt: what stands where the chat template puts it, or else all of it."""
    tokenizer = verifier.tokenizer
    if tokenizer is None:
        return lambda ids: ""
    (opened,), _ = encode(verifier, ["X"])
    head, _, tail = tokenizer.decode(opened).rpartition("X")

    def read(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids))
        around = text.startswith(head) and text.endswith(tail)
        return text[len(head) : len(text) - len(tail)] if around else text

    return read


def _texts(path: Path) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            yield from _strings(json.loads(content))
        for line in spec.lines(content) if path.suffix != ".json" else ():
            if line.strip():
                yield from _strings(json.loads(line)) if path.suffix == ".jsonl" else [line]
    except (OSError, ValueError) as error:
        raise DllmError(f"holdout: cannot read {path}: {error}") from None


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
