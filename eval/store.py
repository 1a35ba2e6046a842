"""The run folder: a line for each finished sample, flushed at once, so that a killed run goes on where it stopped.

`{config.yaml, env.json, samples.jsonl, results.json, report.md, plots/, trace/}`. Several processes may append at
once (a lock around each append); a line that a kill or a full disk cut short is taken back at the next start.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import yaml
from filelock import FileLock, Timeout

from dllm.errors import DllmError, first_line
from dllm.eval.config import HOW, Config, Setting, load
from dllm.eval.records import Decoding, Environment, Sample
from dllm.models.files import replaced
from dllm.models.lines import append, as_lines, disk_errors, mend, read_lines
from dllm.spec import flat


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


def write(path: Path, text: str) -> None:
    """A whole file or none: written beside and renamed."""
    with disk_errors(path), replaced(path) as draft:
        draft.write_text(text, encoding="utf-8")
