"""What a run found: its cells, the samples behind them, and the areas under their curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from dllm.errors import DllmError, unknown
from dllm.eval import metrics
from dllm.eval.config import Config, load
from dllm.eval.drafting import by_category, plain_settings
from dllm.eval.records import Cell, Environment, Sample, Stored
from dllm.eval.store import read_mapping, read_rows
from dllm.eval.tasks import Task
from dllm.eval.worker import arguments


@dataclass(frozen=True)
class Results:
    """What a run found. `cells` has one entry per task and setting; `errors` counts the samples that failed."""

    folder: Path
    config: Config
    cells: tuple[Cell, ...]
    rows: tuple[Sample, ...] = ()  # the samples behind the cells
    aup: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # task -> method -> area
    env: Environment = field(default_factory=Environment)
    notices: tuple[str, ...] = ()
    lead: bool = True  # of several ranks, the one that keeps the folder

    @property
    def errors(self) -> int:
        """Prompts that the model failed on."""
        return sum(cell["errors"] for cell in self.cells)

    @property
    def exit_code(self) -> int:
        """0, or 3 where some prompt failed: everything else was decoded all the same."""
        return 3 if self.errors else 0

    def cell(self, task: str, setting: str) -> Cell:
        """The numbers of one task under one setting. Errors: there is no such cell."""
        cells = {(c["task"], c["setting"]): c for c in self.cells}
        if (task, setting) not in cells:
            raise unknown("cell", f"{task}, {setting}", [", ".join(key) for key in cells])
        return cells[task, setting]

    def plain(self) -> Stored:
        """What `results.json` holds."""
        return {
            "name": self.config.name,
            "seed": self.config.seed,
            "errors": self.errors,
            "notices": list(self.notices),
            "cells": list(self.cells),
            "aup": {task: dict(areas) for task, areas in self.aup.items()},
            "env": self.env,
            "samples": [row["key"] for row in self.rows],
        }


@dataclass
class Found:
    """What lm-eval's tasks gave: cells of the report and samples, and why some tasks were left out."""

    cells: list[Cell] = field(default_factory=list)
    rows: list[Sample] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def results_of(
    config: Config, rows: Sequence[Sample], tasks: Sequence[Task], folder: Path, env: Environment
) -> Results:
    """The figures of every task under every setting from the samples of this configuration."""
    cells: list[Cell] = []
    for spec, task in zip(config.tasks, tasks, strict=True):
        label = spec.title
        for setting in config.settings:
            mine = [r for r in rows if r["task"] == label and r["setting"] == setting.label]
            mine.sort(key=lambda r: r["index"])
            if not mine:
                continue
            cell: Cell = {"task": label, "setting": setting.label, "version": task.version}
            figures = metrics.summarize(mine, config.confidence, config.seed)
            if setting.speculate is not None and all("turns" in r or r.get("error") for r in mine):
                plain = {s.label: [r for r in rows if (r["task"], r["setting"]) == (label, s.label)]
                         for s in plain_settings(config, setting)}  # fmt: skip
                figures["drafting"] = by_category(mine, plain, config.confidence, config.seed)
            cells.append({**cell, **figures, "decoding": [arguments(setting, spec, task.generate.given())]})
    notices = [
        f"{spec.title}: {len(task.skipped)} broken lines left out: {', '.join(task.skipped[:5])}"
        for spec, task in zip(config.tasks, tasks, strict=True)
        if task.skipped
    ]
    notices += [f"{spec.title}: {note}" for spec, task in zip(config.tasks, tasks, strict=True) for note in task.notes]
    return Results(folder, config, tuple(cells), tuple(rows), areas(config, cells), env, tuple(notices))


def areas(config: Config, cells: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """AUP of every method (the settings that share a sampler) on every task."""
    out: dict[str, dict[str, float]] = {}
    methods = config.methods()
    for task in dict.fromkeys(c["task"] for c in cells):
        curves: dict[str, list[tuple[float, float]]] = {}
        for cell in cells:
            if cell["task"] == task and not math.isnan(cell.get("tpf", math.nan) + cell["accuracy"]):
                curves.setdefault(methods[cell["setting"]], []).append((cell["tpf"], 100 * cell["accuracy"]))
        out[task] = metrics.areas(curves)
    return out


def read(folder: str | Path) -> tuple[Stored, list[Sample], Config]:
    """Results, samples and configuration of a finished run. Errors: no such run, or one that has not finished."""
    folder = Path(folder)
    path = folder / "samples.jsonl"
    if not (folder / "results.json").is_file():
        if path.is_file():
            raise DllmError(f"the run in {folder} has not finished; start it again to go on")
        raise DllmError(f"there is no evaluation run in {folder}")
    results = cast(Stored, read_mapping(folder / "results.json", cells=list, env=dict, samples=list))
    found = read_rows(path)
    return results, [found[key] for key in results["samples"] if key in found], load(folder / "config.yaml")
