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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from dllm.errors import DllmError, first_line
from dllm.eval.config import Config, Setting

log = logging.getLogger(__name__)
Row = dict[str, Any]

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file may not grow further",
}


def sample_key(
    task: str, version: str, doc_id: str, prompt: Any, target: str, decoding: Mapping[str, Any], weights: str
) -> str:
    """The identity of a sample: a hash of task, document, prompt, sampler configuration and weights."""
    parts = [task, version, doc_id, prompt, target, decoding, weights]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def decoding_identity(setting: Setting, generate: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Everything besides model and document that decides an output, under the setting's name: two names for one thing
    stay two lines of the report.
    """
    drafting = (s := setting.speculate) and [s.verifier.title, s.drafter.title, s.options]
    return {"setting": setting.label, "seed": seed, "generate": generate, "speculate": drafting}


class Store:
    """Reads and appends the samples of one folder. `retry` drops the rows of prompts that failed. Errors: samples that
    would mix with others, a run in progress, a full disk."""

    def __init__(self, folder: str | Path, config: Config, lead: bool = True, retry: bool = False):
        self.folder = Path(folder)
        self.path = self.folder / "samples.jsonl"
        self.rows: dict[str, Row] = {}
        with _clear(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock, self._appending = (FileLock(self.folder / name) for name in (".lock", ".append.lock"))
        self.cells = {key: _mark(depends) for key, depends in config.cells().items()}
        if lead:
            self._claim()
            self._mend()
            if self.path.exists() and self.path.stat().st_size and not (self.folder / "config.yaml").exists():
                raise DllmError(f"{self.folder} holds samples but no config.yaml; choose another folder with --out")
        self.reload()
        if lead:
            self._match(config)
        if retry and any(row.get("error") for row in self.rows.values()):
            self.rows = {key: row for key, row in self.rows.items() if not row.get("error")}
            write(self.path, _lines(self.rows.values()))

    def _claim(self) -> None:
        """One run at a time. The kernel frees the lock when its process dies, however it dies."""
        with _clear(self.folder):
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

    def match_weights(self, env: Mapping[str, Any]) -> None:
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

    def _mend(self) -> None:
        """Take back a last line that was cut short."""
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            data = file.read()
            end = data.rfind(b"\n") + 1
            if end < len(data):
                log.warning("%s ended in the middle of a line; that sample is decoded again", self.path)
                file.truncate(end)

    def reload(self) -> None:
        """Read every sample."""
        self.rows = read_rows(self.path)

    def append(self, rows: Sequence[Row]) -> None:
        """Add finished samples, each with the mark of what it depends on. They are on disk when this returns."""
        for row in rows:
            row.setdefault("cell", self.cells.get((row["task"], row["setting"])))
        text = _lines(rows).encode()
        with _clear(self.path), self._appending, open(self.path, "ab", buffering=0) as file:
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
        for row in rows:
            self.rows[row["key"]] = row

    def close(self) -> None:
        self._lock.release()


def _mark(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _changed(path: Path, config: Config) -> str:
    """What is different about a task and setting of the same names in the configuration of a folder."""
    from dllm.eval.config import load

    old, new = load(path).cells(), config.cells()
    parts = {part for key in new if key in old for part in new[key] if old[key][part] != new[key][part]}
    return ", ".join(sorted(parts)) or "since an earlier file"


def _lines(rows: Iterable[Row]) -> str:
    return "".join(_line(row) + "\n" for row in rows)


def _line(row: Row) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if text.isascii() or not _HALF.search(text) else json.dumps(row, default=str)


_HALF = re.compile("[\ud800-\udfff]")  # half of a character, which JSON may hold and UTF-8 may not
_ROW = {"key": str, "task": str, "setting": str, "index": int, "doc": str, "clock": dict, "tokens": int, "nfe": int}


def read_rows(path: Path) -> dict[str, Row]:
    """The samples of a file by their keys, the last of a key. Errors: a line that is none, which no kill leaves."""
    rows: dict[str, Row] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return rows
    except OSError as error:
        raise DllmError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            if not all(isinstance(row[key], kind) for key, kind in _ROW.items()):
                raise TypeError
        except (ValueError, TypeError, LookupError, RecursionError):
            raise DllmError(f"{path}, line {number}: not a sample; delete that line and run again") from None
        rows[row["key"]] = row
    return rows


def read_mapping(path: Path, **kinds: type) -> dict[str, Any]:
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


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with every column that any row has; nested mappings as `clock.seconds`, lists and chats as JSON."""
    flat = [dict(_flat(row)) for row in rows]
    out = io.StringIO(newline="")
    table = csv.DictWriter(out, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
    write(path, out.getvalue().encode("utf-8", "replace").decode())


def _flat(row: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def _clear(path: Path) -> Iterator[None]:
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
    beside = path.with_name(path.name + f".{os.getpid()}.part")
    with _clear(path):
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
