"""Answers of a verifier in a file, which grows as they come and survives a kill at any moment.

Its first line is an object that says what they were made with; then a line `[prompt ids, answer ids]` each. With the
ending .gz what is added at once is a gzip member.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dllm import spec
from dllm.errors import DllmError, first_line
from dllm.training.data import Pair

log = logging.getLogger(__name__)
NAMED = "verifier"  # what the object of a first line holds at least
Prompt = tuple[int, ...]


class AnswerFile:
    """The answers in a file, or of this process alone without one.

    settings   what they are made with, as it is written into a new file.
    compared   what of it the file must agree with, where it says so.
    Errors: a line that is no prompt and answer, a damaged file, answers that were made with something else.
    """

    def __init__(
        self, path: Path | None = None, settings: Mapping[str, object] | None = None, compared: Iterable[str] = ()
    ) -> None:
        self.path, self.settings = path, settings
        lines, self.torn = ([], None) if path is None else _lines(path)
        first = _read(lines[0], f"{path}, line 1") if lines and lines[0].strip() else None
        said = first if isinstance(first, dict) and NAMED in first else None
        pairs = [(line, i) for i, line in enumerate(lines, 1) if line.strip() and (i > 1 or said is None)]
        self.pairs: dict[Prompt, list[int]] = dict(_pair(line, f"{path}, line {i}") for line, i in pairs)
        self.empty = not lines
        if said is None and pairs and settings is not None:
            log.warning("%s does not say what its answers were made with: they are taken as this recipe's", path)
        mine = {} if said is None or settings is None else {k: settings[k] for k in compared if k in said}
        differ = [f"{k} {said[k]!r}, not {value!r}" for k, value in mine.items() if said and said[k] != value]
        if differ:
            raise DllmError(
                f"the answers in {path} were made with {'; '.join(differ)}: set that, or name another file (data)"
            )

    def add(self, pairs: Iterable[tuple[Prompt, list[int]]]) -> None:
        """Keep answers, on the disk as well."""
        new = dict(pairs)
        if self.path is None or not new:
            self.pairs |= new
            return
        lines: list[object] = [self.settings] if self.empty and self.settings is not None else []
        lines += [[list(prompt), answer] for prompt, answer in new.items()]
        text = "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines).encode()
        with self.path.open("ab") as file:
            whole, between = self.torn or (file.tell(), b"")
            try:
                if self.torn is not None:
                    file.truncate(whole)
                file.write(between + (gzip.compress(text) if self.path.suffix == ".gz" else text))
                file.flush()
            except OSError as error:
                file.truncate(whole)
                raise DllmError(f"could not write {self.path}: {error}; what is in it stays, run again") from error
        self.pairs |= new
        self.empty, self.torn = False, None

    def of(self, prompts: Iterable[Sequence[int]] | None = None) -> list[Pair]:
        """The answers to some prompts, or all; those without a token are left out."""
        asked = self.pairs if prompts is None else map(tuple, prompts)
        return [Pair(list(prompt), self.pairs[prompt]) for prompt in asked if self.pairs[prompt]]


def read_answers(path: Path, settings: Mapping[str, object] | None = None, compared: Iterable[str] = ()) -> list[Pair]:
    """All answers of a file that must be there."""
    if not path.exists():
        raise DllmError(f"there are no answers in {path}: name tasks or prompts to make them from, or another file")
    return AnswerFile(path, settings, compared).of()


class Torn(NamedTuple):
    """The end of a file whose last line was cut off, or has no line break."""

    whole: int  # bytes in front of it, which stay
    between: bytes  # goes between them and what is added


def _lines(path: Path) -> tuple[list[str], Torn | None]:
    """The whole lines of a file, and its end where that is torn: it is mended by what is added, as a file that is only
    read may be another's, or be copied still."""
    if not path.exists():
        return [], None
    content, torn = path.read_bytes(), None
    try:
        text, whole = _members(content) if path.suffix == ".gz" else (content, content.rfind(b"\n") + 1)
        rest = content[whole:]
        if rest and path.suffix != ".gz" and _ends(rest):
            text, torn = content + b"\n", Torn(len(content), b"\n")
        elif rest:
            torn = Torn(whole, b"")
            log.warning("%s was cut off: the last %d bytes are no whole answer and left out", path, len(rest))
        return spec.lines(text[: text.rfind(b"\n") + 1].decode()), torn
    except (UnicodeDecodeError, zlib.error) as error:
        raise DllmError(f"{path} is damaged ({first_line(error)}); delete it and run again") from None


def _ends(rest: bytes) -> bool:
    """Whether what follows the last line break is a whole line all the same."""
    try:
        json.loads(rest)
    except ValueError:
        return False
    return True


def _members(content: bytes) -> tuple[bytes, int]:
    """The text of all whole gzip members, and where the last of them ends."""
    text, whole = list[bytes](), 0
    while whole < len(content):
        member = zlib.decompressobj(wbits=31)
        more = member.decompress(content[whole:])
        if not member.eof:
            break
        text.append(more)
        whole = len(content) - len(member.unused_data)
    return b"".join(text), whole


def _read(line: str, where: str) -> object:
    try:
        found: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DllmError(f"{where}: not JSON: {first_line(error)}") from None
    return found


def _pair(line: str, where: str) -> tuple[Prompt, list[int]]:
    match _read(line, where):
        case [list(prompt), list(answer)] if prompt and all(type(t) is int and t >= 0 for t in (*prompt, *answer)):
            return tuple(prompt), answer
    raise DllmError(f"{where}: expected [prompt ids, answer ids], ids from 0 on and at least one in the prompt")
