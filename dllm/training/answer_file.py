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
from dllm.models.files import replaced
from dllm.training.data import Pair

log = logging.getLogger(__name__)
NAMED = "verifier"  # what the object of a first line holds at least
PIECE = 1 << 14  # bytes that are unpacked at once: what is behind the end of a gzip member is read again with the next
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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.path, text)
        except OSError as error:
            raise DllmError(f"could not write {self.path}: {error}; what is in it stays, run again") from error
        self.pairs |= new
        self.empty, self.torn = False, None

    def _write(self, path: Path, text: bytes) -> None:
        """Behind what is there; a torn end is replaced together with the rest, so that nothing of it can be lost."""
        if self.torn is not None:
            with replaced(path) as draft:
                draft.write_bytes(path.read_bytes()[: self.torn.whole] + self._packed(self.torn.saved + text))
            return
        with path.open("ab") as file:
            whole = file.tell()
            try:
                file.write(self._packed(text))
                file.flush()
            except OSError:
                file.truncate(whole)
                raise

    def _packed(self, text: bytes) -> bytes:
        return gzip.compress(text) if self.path is not None and self.path.suffix == ".gz" else text

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
    saved: bytes  # the whole lines that are read from it


def _lines(path: Path) -> tuple[list[str], Torn | None]:
    """The whole lines of a file, and its end where that is torn: it is mended by what is added, as a file that is only
    read may be another's, or be copied still."""
    if not path.exists():
        return [], None
    content = path.read_bytes()
    try:
        lines = content.rfind(b"\n") + 1
        text, whole, known = _members(content) if path.suffix == ".gz" else (content, lines, lines)
        end = text.rfind(b"\n") + 1
        if _ends(text[end:]):
            text, end = text + b"\n", len(text) + 1
        elif end < len(text):
            log.warning("%s was cut off: the %d bytes behind its last whole answer are left out", path, len(text) - end)
        torn = Torn(whole, text[known:end]) if whole < len(content) else None
        return spec.lines(text[:end].decode()), torn
    except (UnicodeDecodeError, zlib.error) as error:
        raise DllmError(f"{path} is damaged ({first_line(error)}); delete it and run again") from None


def _ends(rest: bytes) -> bool:
    """Whether what follows the last line break is a whole line all the same."""
    try:
        json.loads(rest)
    except ValueError:
        return False
    return True


def _members(content: bytes) -> tuple[bytes, int, int]:
    """The text of all gzip members, of one that is cut what can be read; the end of the last member that is whole and
    ends with a line; and of its text."""
    text, at, whole, known = bytearray(), 0, 0, 0
    member = zlib.decompressobj(wbits=31)
    while at < len(content):
        piece = content[at : at + PIECE]
        text += member.decompress(piece)
        at += len(piece) - len(member.unused_data)
        if member.eof:
            member = zlib.decompressobj(wbits=31)
            if text.endswith(b"\n"):
                whole, known = at, len(text)
    return bytes(text), whole, known


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
