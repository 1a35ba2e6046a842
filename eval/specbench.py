"""Answer files in the format of Spec-Bench (hemingkx/Spec-Bench), which its own scripts for speed and equality read.

Its question file needs no import: it is what the task `spec_bench` reads.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from dllm.errors import DllmError
from dllm.eval.records import Environment, Sample
from dllm.eval.report import slug
from dllm.eval.results import read
from dllm.eval.store import read_mapping, write
from dllm.models.lines import as_lines, disk_errors


def export(run: str | Path, to: str | Path) -> list[Path]:
    """Write a file for every task and setting whose answers have rounds: `TASK-SETTING.jsonl`, by question.

    Errors: a folder without a finished run, a run in which no verifier decoded.
    """
    _, rows, _ = read(run)
    answers = [row for row in rows if "turns" in row and all("emitted" in turn for turn in row["turns"])]
    if not answers:
        raise DllmError(f"{run} holds no drafting run: Spec-Bench's format is for settings with `speculate:`")
    began = cast("Environment", read_mapping(Path(run) / "env.json")).get("date")
    stamp = datetime.datetime.fromisoformat(began).timestamp() if began else 0.0
    folder, written = Path(to), []
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for task, setting in dict.fromkeys((row["task"], row["setting"]) for row in answers):
        mine = [row for row in answers if (row["task"], row["setting"]) == (task, setting)]
        path = folder / f"{slug(task)}-{slug(setting)}.jsonl"
        write(path, as_lines(_answer(row, stamp) for row in sorted(mine, key=_number)))
        written.append(path)
    return written


def _number(row: Sample) -> tuple[bool, int, str]:
    """Numbers in their order, then names."""
    name = row["doc"]
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)


def _answer(row: Sample, stamp: float) -> Mapping[str, object]:
    turns = row["turns"]
    choice = {
        "index": 0,
        "turns": [turn["text"] for turn in turns],
        "decoding_steps": [turn["nfe"] for turn in turns],
        "new_tokens": [len(turn["ids"]) for turn in turns],
        "wall_time": [turn["seconds"] for turn in turns],
        "accept_lengths": [n for turn in turns for n in turn["emitted"]],
    }
    return {
        "question_id": int(row["doc"]) if row["doc"].isdecimal() else row["doc"],
        "category": row.get("category", ""),
        "answer_id": row["key"],
        "model_id": row["setting"],
        "choices": [choice],
        "tstamp": stamp,
    }
