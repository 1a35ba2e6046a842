"""What a task is: documents with prompts and targets, and one rule that says whether a text is right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dllm import spec as plain
from dllm.errors import DllmError, first_line
from dllm.eval.config import GenerateSpec, TaskSpec
from dllm.eval.data import Fields
from dllm.eval.records import Prompt

NOTHING = GenerateSpec()


class Unavailable(DllmError):
    """A task that cannot run here: what it needs is missing. The other tasks of the file go on without it."""


@dataclass(frozen=True)
class Document:
    """One question. `prompt` is a text or chat messages, `target` what the scorer compares with."""

    id: str
    prompt: Prompt
    target: str
    meta: Fields = field(default_factory=dict)  # what its scorer needs besides
    turns: tuple[str, ...] = ()  # what the user says behind the model's answers, one after the other
    category: str = ""


@dataclass(frozen=True)
class Graded:
    """The verdict on one text. `correct` lies in 0 … 1, `answer` is what was read out of the text (None: nothing
    found)."""

    correct: float
    answer: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Task:
    """Documents, their scorer, and the decoding arguments that the task asks for unless the user says otherwise."""

    name: str
    version: str
    documents: tuple[Document, ...]
    score: Callable[[Document, str], Graded]
    generate: GenerateSpec = NOTHING
    skipped: tuple[str, ...] = ()  # broken lines of the user's file, each with its reason
    notes: tuple[str, ...] = ()  # what a reader of the figures has to know
    runs_code: bool = False
    graded: bool = True  # else answers are decoded and not judged


def takes(spec: TaskSpec, *keys: str) -> None:
    """Refuse what a kind of task has no use for: a key that is ignored would say what is not so."""
    bare = vars(TaskSpec(spec.name))
    for key, value in vars(spec).items():
        if key in ("name", "label", "limit", "generate", "sampler", *keys) or value == bare[key]:
            continue
        if key == "options" and set(spec.options) == {"rehearse"}:
            continue
        raise DllmError(f"task {spec.name!r} has no use for {key!r}; it takes {', '.join(keys)}")


def read_jsonl(path: str | Path, broken: str = "refuse") -> tuple[list[Fields], tuple[str, ...]]:
    """The objects of a JSON-lines (or JSON list) file, each with its `_line`, and a sentence for each line that is
    none.

    A broken line is an error that names it, unless `broken="skip"`; then it is left out, counted and reported.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DllmError(f"there is no data file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DllmError(f"cannot read {path}: {error}") from None
    rows, bad = [], []
    for number, raw in _lines(text, path):
        try:
            row = json.loads(raw, parse_constant=_no_number) if isinstance(raw, str) else raw
        except (ValueError, RecursionError) as error:
            what = (
                f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else first_line(error)
            )
            bad.append(f"line {number} (not JSON: {what})")
            continue
        if isinstance(row, dict):
            rows.append({**row, "_line": number})
        else:
            bad.append(f"line {number} (a {type(row).__name__}, not an object)")
    refuse(path, bad, len(rows) + len(bad), broken)
    return rows, tuple(bad)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON's")


def _lines(text: str, path: Path) -> list[tuple[int, object]]:
    if path.suffix == ".json":
        try:
            return list(enumerate(json.loads(text), 1))
        except (ValueError, TypeError, RecursionError) as error:
            raise DllmError(f"{path}: not a JSON list: {error}") from None
    return [(i, line) for i, line in enumerate(plain.lines(text), 1) if line.strip()]


def refuse(path: str | Path, bad: Sequence[str], total: int, broken: str) -> None:
    """Raise for broken lines unless they are to be skipped."""
    if bad and broken != "skip":
        shown = ", ".join(bad[:5]) + (", …" if len(bad) > 5 else "")
        raise DllmError(
            f"{path}: {len(bad)} of {total} lines are broken: {shown}; mend them, or set options: {{broken: skip}}"
        )


_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def fill(template: str, row: Mapping[str, object]) -> str:
    """`{field}` replaced by the document's field, `{{` and `}}` by braces. A null or absent field is an error; of an
    absent one it lists those present."""

    def value(match: re.Match[str]) -> str:
        if match.group(1) is None:
            return match.group(0)[0]
        if match.group(1) not in row:
            have = ", ".join(k for k in row if k != "_line")
            raise DllmError(f"no field {match.group(1)!r} (the document has: {have})")
        found = row[match.group(1)]
        if found is None:
            raise DllmError(f"field {match.group(1)!r} is null")
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return _FIELD.sub(value, template)


def named(template: str) -> list[str]:
    """The fields that a template names."""
    return [name for name in _FIELD.findall(template) if name]
