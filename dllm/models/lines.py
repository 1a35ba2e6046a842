"""JSON lines that survive a kill: a file that grows by whole lines, and takes back one that was cut short."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from dllm.errors import DllmError
from dllm.spec import Json

log = logging.getLogger(__name__)

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file may not grow further",
}


def append(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Add lines to a file. They are on disk when this returns; after an error none of them is."""
    text = as_lines(rows).encode()
    with open(path, "ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            written = file.write(text)
            if written is None or written < len(text):  # a full disk takes a part first and complains next time
                file.write(text[written or 0 :])
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(start)
            raise


def mend(path: Path) -> None:
    """Take back a last line that was cut short."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            log.warning("%s ended in the middle of a line; what it was to say is decoded again", path)
            file.truncate(end)


def as_lines(rows: Iterable[Mapping[str, object]]) -> str:
    """A line of JSON for each row."""
    return "".join(_line(row) + "\n" for row in rows)


def _line(row: Mapping[str, object]) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if text.isascii() or not _HALF.search(text) else json.dumps(row, default=str)


_HALF = re.compile("[\ud800-\udfff]")  # half of a character, which JSON may hold and UTF-8 may not


def read_lines(path: Path, kinds: Mapping[str, type] = types.MappingProxyType({})) -> list[Json]:
    """The objects of all complete lines; none where there is no file. Errors: a line that is none, or whose keys are
    not of these `kinds`: no kill leaves one."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DllmError(f"cannot read {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and all(isinstance(row[key], kind) for key, kind in kinds.items())):
                raise TypeError
        except (ValueError, TypeError, LookupError, RecursionError):
            raise DllmError(f"{path}, line {number}: not a sample; delete that line and run again") from None
        rows.append(row)
    return rows


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Disk errors in one line that says what is safe."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            advice = "the samples so far are safe, make room and run again to go on"
            raise DllmError(f"{_FULL[error.errno]}: cannot write {path}; {advice}") from None
        raise DllmError(f"cannot write {path}: {error.strerror or error}") from None
