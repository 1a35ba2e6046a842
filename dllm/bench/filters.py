"""`dllm filter compare`: Learn2PD against the plain threshold at equal accuracy, on the embedded model's tasks.

Both rules are swept on the validation split. Each then takes its setting with the fewest forwards among those that lose
at most one point against the best accuracy that either rule reaches there, and the two meet on the test split, problem
by problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from dllm.bench.answers import CHUNK, LENGTH, Answers, Cell
from dllm.eval.metrics import interval, paired_difference, paired_ratio, ratio
from dllm.samplers.learn2pd import EMBEDDED, Filter

TAUS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # of either rule; the filter's own comes on top
LOSS = 0.01  # accuracy that a setting may lose against the best of the sweep
RULES = ("threshold", "learn2pd")


def run(
    filter_path: str | Path | None = None,
    model: Any = "tiny",
    *,
    out: str | Path = "filter-compare.jsonl",
    n: int = 1500,
    validation: int = 200,
    task_names: Sequence[str] = tuple(LENGTH),
    batch_size: int = CHUNK,
    workers: int = 1,
) -> str:
    """Decode what is still missing and return the report (markdown).

    filter_path: None for the embedded filter. n, validation: problems of the test and the validation split, a task.
    Errors: an `out` file of another model or filter.
    """
    made = Filter.load(filter_path or str(files("dllm.assets").joinpath(EMBEDDED)))
    answers = Answers(out, model, about={"filter": made.fingerprint()}, batch_size=batch_size, workers=workers)
    source = f"filter={filter_path}," if filter_path else ""
    sweeps = {
        "threshold": [f"threshold:tau={tau:g}" for tau in TAUS],
        "learn2pd": [f"learn2pd:{source}tau={tau:.4g}" for tau in sorted({*TAUS, made.tau})],
    }

    settings = [setting for rule in RULES for setting in sweeps[rule]]
    answers.want(Cell(task, "validation", setting, validation) for task in task_names for setting in settings)
    chosen = {
        (task, rule): setting
        for task in task_names
        for rule, setting in choose(answers, task, sweeps, validation).items()
    }
    answers.want(Cell(task, "test", setting, n) for (task, _), setting in chosen.items())
    return report(answers, sweeps, chosen, task_names, n, validation)


def choose(answers: Answers, task: str, sweeps: dict[str, list[str]], n: int) -> dict[str, str]:
    """For each rule the setting with the fewest forwards that is accurate enough; where none is, the most accurate."""

    def mean(setting: str, key: str) -> float:
        return float(answers.column(Cell(task, "validation", setting, n), key).mean())

    right = {setting: mean(setting, "correct") for settings in sweeps.values() for setting in settings}
    enough = max(right.values()) - LOSS
    chosen = {}
    for rule, settings in sweeps.items():
        good = [s for s in settings if right[s] >= enough - 1e-9]
        chosen[rule] = min(good, key=lambda s: mean(s, "nfe")) if good else max(settings, key=lambda s: right[s])
    return chosen


def report(
    answers: Answers,
    sweeps: dict[str, list[str]],
    chosen: dict[tuple[str, str], str],
    task_names: Sequence[str],
    n: int,
    validation: int,
) -> str:
    """The comparison on the test split, then the sweep that the settings were chosen from."""
    lines = [
        f"n = {n} test problems a task. Settings: on {validation} validation problems, the fewest forwards within",
        f"{100 * LOSS:g} point of the best accuracy of the sweep. Intervals: 95 %, (paired) bootstrap.",
        "",
        "| task | setting | accuracy % | NFE | tokens/forward | against the threshold: accuracy | tokens/forward |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in task_names:
        test = {rule: [asdict(answers.done[task, "test", chosen[task, rule]][i]) for i in range(n)] for rule in RULES}
        for rule, rows in test.items():
            right = [row["correct"] for row in rows]
            low, high = interval(right)
            cells = [task, f"`{chosen[task, rule]}`", f"{100 * sum(right) / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]
            cells += [f"{sum(row['nfe'] for row in rows) / n:.2f}", f"{ratio(rows, 'tokens', 'nfe'):.2f}"]
            if rule == "threshold":
                cells += ["", ""]
            else:
                change, worst, best = paired_difference([r["correct"] for r in test["threshold"]], right)
                cells.append(f"{100 * change:+.1f} [{100 * worst:+.1f}, {100 * best:+.1f}]")
                speed, slow, fast = paired_ratio(test["threshold"], rows, "tokens", "nfe")
                cells.append(f"{speed:.3f}× [{slow:.3f}, {fast:.3f}]")
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Validation:", "", "| task | setting | accuracy % | NFE | tokens/forward |", "|---|---|---|---|---|"]
    for task in task_names:
        for setting in (s for rule in RULES for s in sweeps[rule]):
            correct, nfe, tokens = (
                answers.column(Cell(task, "validation", setting, validation), key)
                for key in ("correct", "nfe", "tokens")
            )
            figures = f"{100 * correct.mean():.1f} | {nfe.mean():.2f} | {tokens.sum() / nfe.sum():.2f}"
            lines.append(f"| {task} | `{setting}` | {figures} |")
    return "\n".join(lines) + "\n"
