"""The run folder: a line for each finished sample, flushed at once, so that a killed run goes on where it stopped.

`{config.yaml, env.json, samples.jsonl, results.json, report.md, plots/, trace/}`. Several processes may append at
once (a lock around each append); a line that a kill or a full disk cut short is taken back at the next start.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import logging
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from filelock import FileLock, Timeout

from dllm.errors import DllmError, first_line
from dllm.eval.config import HOW, Config, Setting, load
from dllm.eval.records import Decoding, Environment, Sample
from dllm.models.files import replaced
from dllm.spec import flat

log = logging.getLogger(__name__)

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file may not grow further",
}


def sample_key(question: Sequence[object], setting: Setting, generate: Decoding, seed: int, weights: str) -> str:
    """The identity of a sample: a hash of the question (task, version, document, prompt, target), of what else decides
    an output, and of the weights. The setting's name is in it: two names for one thing stay two lines of the report."""
    drafting = (s := setting.speculate) and [s.verifier.title, s.drafter.title, s.options]
    given = {name: value for name, value in generate.items() if name not in HOW}
    decoding = {"setting": setting.label, "seed": seed, "generate": given, "speculate": drafting}
    return _mark([*question, decoding, weights], 24)


class Store:
    """Reads and appends the samples of one folder. `retry` drops the samples that failed. Errors: samples that
    would mix with others, a run in progress, a full disk."""

    def __init__(self, folder: str | Path, config: Config, lead: bool = True, retry: bool = False):
        self.folder = Path(folder)
        self.path = self.folder / "samples.jsonl"
        self.rows: dict[str, Sample] = {}
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock, self._appending = (FileLock(self.folder / name) for name in (".lock", ".append.lock"))
        self.cells = {key: _mark(depends) for key, depends in config.cells().items()}
        if lead:
            self._claim()
            mend(self.path)
            if self.path.exists() and self.path.stat().st_size and not (self.folder / "config.yaml").exists():
                raise DllmError(f"{self.folder} holds samples but no config.yaml; choose another folder with --out")
        self.reload()
        if lead:
            self._match(config)
        if retry and any(row.get("error") for row in self.rows.values()):
            self.rows = {key: row for key, row in self.rows.items() if not row.get("error")}
            write(self.path, as_lines(self.rows.values()))

    def _claim(self) -> None:
        """One run at a time. The kernel frees the lock when its process dies, however it dies."""
        with disk_errors(self.folder):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise DllmError(
                    f"another run is writing to {self.folder}; wait for it, or choose another folder with --out"
                ) from None

    def _match(self, config: Config) -> None:
        """Write the configuration, or refuse one under which a task and setting of the same names would hold samples
        of two kinds. More documents, another task or one more setting mix with nothing."""
        path = self.folder / "config.yaml"
        for row in self.rows.values():
            task = row["task"] if (row["task"], row["setting"]) in self.cells else row["task"].rpartition(":")[0]
            if row.get("cell") != self.cells.get((task, row["setting"]), row.get("cell")):
                raise DllmError(
                    f"{self.folder} holds samples of {task}, {row['setting']!r} of a different configuration "
                    f"(changed: {_changed(path, config)}); choose another folder with --out, or delete this one"
                )
        write(path, yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True))

    def match_weights(self, env: Environment) -> None:
        """Record where and with which weights this runs; refuse weights that have changed under the same name."""
        path = self.folder / "env.json"
        old = read_mapping(path).get("weights") or {} if path.exists() and self.rows else {}
        if not isinstance(old, dict):
            raise DllmError(f"{path}: `weights` are no mapping; delete the file and run again")
        for name, mark in env["weights"].items():
            if old.get(name, mark) != mark:
                raise DllmError(
                    f"{self.folder} holds samples of other weights of {name!r}; choose another folder with --out"
                )
        write(path, json.dumps({**env, "weights": {**old, **env["weights"]}}, indent=2) + "\n")

    def reload(self) -> None:
        """Read every sample."""
        self.rows = read_rows(self.path)

    def append(self, rows: Sequence[Sample]) -> None:
        """Add finished samples, each with the mark of what it depends on. They are on disk when this returns."""
        for row in rows:
            row.setdefault("cell", self.cells.get((row["task"], row["setting"])))
        with disk_errors(self.path), self._appending:
            append(self.path, rows)
        self.rows |= {row["key"]: row for row in rows}

    def close(self) -> None:
        """Let another run write to the folder."""
        self._lock.release()


def _mark(value: object, digits: int = 12) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:digits]


def _changed(path: Path, config: Config) -> str:
    """What is different about a task and setting of the same names in the configuration of a folder."""
    old, new = load(path).cells(), config.cells()
    parts = {part for key in new if key in old for part in new[key] if old[key][part] != new[key][part]}
    return ", ".join(sorted(parts)) or "since an earlier file"


# ---------------------------------------------------------------------------------------------------------- JSON lines


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
            log.warning("%s ended in the middle of a line; that sample is decoded again", path)
            file.truncate(end)


def as_lines(rows: Iterable[Mapping[str, object]]) -> str:
    """A line of JSON for each row."""
    return "".join(_line(row) + "\n" for row in rows)


def _line(row: Mapping[str, object]) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if text.isascii() or not _HALF.search(text) else json.dumps(row, default=str)


_HALF = re.compile("[\ud800-\udfff]")  # half of a character, which JSON may hold and UTF-8 may not


def read_lines(path: Path, kinds: Mapping[str, type] = types.MappingProxyType({})) -> list[dict[str, Any]]:
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


_ROW = {"key": str, "task": str, "setting": str, "index": int, "doc": str, "clock": dict, "tokens": int, "nfe": int}


def read_rows(path: Path) -> dict[str, Sample]:
    """The samples of a file by their keys, the last of a key. Errors: a line that is none."""
    rows = cast("list[Sample]", read_lines(path, _ROW))
    return {row["key"]: row for row in rows}


def read_mapping(path: Path, **kinds: type) -> dict[str, object]:
    """A JSON object that a run has written. Errors: it is damaged, or a key is not of its kind."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("not an object")
        if wrong := [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]:
            raise ValueError(f"{', '.join(wrong)} missing or of another kind")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise DllmError(f"{path} is damaged ({first_line(error)}); delete it and run the evaluation again") from None


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A table with every column that any row has; nested mappings as `clock.seconds`, lists and chats as JSON."""
    lines = [
        {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list | tuple) else v for k, v in flat(row, Mapping)}
        for row in rows
    ]
    out = io.StringIO(newline="")
    table = csv.DictWriter(out, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    write(path, out.getvalue().encode("utf-8", "replace").decode())


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


def write(path: Path, text: str) -> None:
    """A whole file or none: written beside and renamed."""
    with disk_errors(path), replaced(path) as draft:
        draft.write_text(text, encoding="utf-8")
