"""Two runs side by side: what was configured otherwise, and what that changed, document by document."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dllm.errors import DllmError
from dllm.eval.config import Config
from dllm.eval.metrics import verdicts
from dllm.eval.records import Sample, Stored
from dllm.eval.report import PAIR, number, pair, table
from dllm.eval.results import read
from dllm.spec import flat

Groups = dict[tuple[str, str], dict[str, Sample]]  # (task, setting) -> document -> sample


def compare(first: str | Path, second: str | Path) -> str:
    """Markdown. Settings of one name are paired; where each run has a single setting, these two are.

    Errors: a folder without a finished run, no task in common, one name for different documents.
    """
    (results_a, rows_a, config_a), (results_b, rows_b, config_b) = read(first), read(second)
    groups_a, groups_b = _groups(rows_a), _groups(rows_b)
    tasks = [t for t in dict.fromkeys(task for task, _ in groups_a) if t in {task for task, _ in groups_b}]
    if not tasks:
        have = ", ".join(sorted({task for task, _ in [*groups_a, *groups_b]})) or "none"
        raise DllmError(f"{first} and {second} have no task in common (tasks: {have})")
    pairs = _pairs(config_a, config_b)
    if not pairs:
        raise DllmError(
            f"{first} and {second} have no setting in common; compare runs of one setting each, or of equal names"
        )
    differences = _differences(_identity(config_a, results_a), _identity(config_b, results_b))
    parts = [f"# {config_a.name} against {config_b.name}", differences]
    for task in tasks:
        lines = []
        for a, b in pairs:
            one, two = groups_a.get((task, a), {}), groups_b.get((task, b), {})
            shared = [doc for doc in one if doc in two]
            if not shared:
                continue
            _same_documents(task, one, two, shared)
            accuracies = [_accuracy(rows, shared) for rows in (one, two)]
            paired = pair(one, two, config_a.confidence, config_a.seed)
            lines.append([a if a == b else f"{a} → {b}", len(shared), *accuracies, *paired])
        if lines:
            parts.append(f"## {task}\n\n" + table(["setting", "n", "first %", "second %", *PAIR], lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def _groups(rows: list[Sample]) -> Groups:
    out: Groups = {}
    for row in rows:
        if row["correct"] is not None:
            out.setdefault((row["task"], row["setting"]), {})[row["doc"]] = row
    return out


def _pairs(a: Config, b: Config) -> list[tuple[str, str]]:
    labels_a, labels_b = ([s.label for s in config.settings] for config in (a, b))
    if len(labels_a) == len(labels_b) == 1:
        return [(labels_a[0], labels_b[0])]
    return [(label, label) for label in labels_a if label in labels_b]


def _accuracy(rows: Mapping[str, Sample], docs: list[str]) -> str:
    return number(sum(verdicts(rows[d] for d in docs)) / len(docs), 1, 100)


def _same_documents(task: str, a: Mapping[str, Sample], b: Mapping[str, Sample], docs: list[str]) -> None:
    other = [doc for doc in docs if a[doc].get("target") != b[doc].get("target")]
    if other:
        raise DllmError(f"task {task!r}: document {other[0]!r} has another answer in the second run: not the same data")


def _identity(config: Config, results: Stored) -> dict[str, object]:
    """What was configured, and the marks of the weights that were found under the models' names."""
    return {**config.identity(), "weights": results["env"].get("weights", {})}


def _differences(a: Mapping[str, object], b: Mapping[str, object]) -> str:
    """The keys that differ, with both values."""
    flat_a, flat_b = (dict(flat(values, Mapping | list)) for values in (a, b))
    keys = [k for k in dict.fromkeys([*flat_a, *flat_b]) if flat_a.get(k) != flat_b.get(k)]
    if not keys:
        return "The configurations are equal."
    lines = [[key, flat_a.get(key, "–"), flat_b.get(key, "–")] for key in keys]
    return "Configured otherwise:\n\n" + table(["key", "first", "second"], lines)
