"""`dllm bench samplers`: forwards, speed and exact answers of the samplers on the embedded pair's tasks.

Every sampler runs at its published defaults and at the setting chosen on the validation split: the one with the fewest
forwards among those that lose at most one point against their base there, else the most accurate one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm.bench.answers import CHUNK, LENGTH, Answers, Cell
from dllm.eval.metrics import interval, paired_difference

TASKS = ("word_problems", "sudoku")
REFERENCE = "threshold"
LOSS = 0.01  # accuracy that a setting may lose on the validation split
BOUND = 2.0  # points: what the upper end of a loss's interval should stay under
# sampler -> the settings that are tried, the published one first
SETTINGS: dict[str, tuple[str, ...]] = {
    "confidence": ("confidence",),
    "threshold": ("threshold", "threshold:tau=0.95", "threshold:tau=0.8", "threshold:tau=0.7"),
    "localleap": (
        "localleap",
        "localleap:tau=0.6",
        "localleap:tau=0.85",
        "localleap:kappa=0.95,tau=0.75",
        "localleap:kappa=0.95,tau=0.85",
    ),
    "credit": ("credit", "credit:dinfer", "credit:tau=0.8", "credit:tau=0.93", "credit:tau=0.95"),
    # logit gaps of a small model are larger than those that the published thresholds were made for
    "prophet": (
        "prophet",
        "prophet:high=12,mid=10,low=8",
        "prophet:high=11,mid=11,low=11",
        "prophet:high=12,mid=12,low=12",
        "prophet:high=12.5,mid=12.5,low=12.5",
    ),
    "prophet+threshold": (
        "prophet+threshold",
        "prophet:high=12,mid=10,low=8+threshold",
        "prophet:high=12,mid=12,low=12+threshold",
    ),
    "adablock": ("adablock", "adablock:tau_delimiter=0.5", "adablock:tau=0.8"),
    "localleap+credit": (
        "localleap+credit",
        "localleap:tau=0.85+credit",
        "localleap:kappa=0.95,tau=0.75+credit",
        "localleap:kappa=0.95,tau=0.85+credit",
    ),
    "localleap+credit+prophet": (
        "localleap+credit+prophet",
        "localleap:tau=0.85+credit+prophet:high=12,mid=12,low=12",
        "localleap:kappa=0.95,tau=0.85+credit+prophet:high=12,mid=12,low=12",
    ),
    "adablock+credit": ("adablock+credit", "adablock+credit:tau=0.8"),
    "adablock+localleap+credit": ("adablock+localleap+credit", "adablock+localleap:tau=0.85+credit"),
    "adablock+credit+prophet": (
        "adablock+credit+prophet",
        "adablock+credit+prophet:high=12,mid=10,low=8",
        "adablock+credit+prophet:high=12,mid=12,low=12",
    ),
}
# what an exit is compared with besides: the decoding that it cuts short
BASE = {
    "prophet": "confidence",
    "localleap+credit+prophet": "localleap+credit",
    "adablock+credit+prophet": "adablock+credit",
}


def run(
    model: Any = "tiny",
    *,
    out: str | Path = "bench-samplers.jsonl",
    n: int = 1500,
    validation: int = 200,
    names: Sequence[str] = tuple(SETTINGS),
    task_names: Sequence[str] = TASKS,
    batch_size: int = CHUNK,
    cache: str | None = None,
    workers: int = 1,
) -> str:
    """Decode what is still missing and return the report (markdown).

    out: the answers so far. n, validation: problems of the test and the validation split. names: keys of `SETTINGS`,
    or any sampler specification, which then runs as it is given. Errors: an `out` file of another model or setting.
    """
    answers = Answers(out, model, batch_size=batch_size, cache=cache, workers=workers)
    names = list(dict.fromkeys([REFERENCE, *(BASE[name] for name in names if name in BASE), *names]))
    pairs = [(task, name) for task in task_names for name in names]
    tried = {base_of(name) for name in names} | {name for name in names if len(settings_of(name)) > 1}
    answers.want(
        Cell(task, "validation", s, validation) for task, name in pairs if name in tried for s in settings_of(name)
    )
    chosen = {(task, name): choose(answers, task, name, validation) for task, name in pairs}
    answers.want(Cell(task, "test", s, n) for task, name in pairs for s in (settings_of(name)[0], chosen[task, name]))
    return report(answers, chosen, n, validation)


def settings_of(name: str) -> tuple[str, ...]:
    return SETTINGS.get(name, (name,))


def base_of(name: str) -> str:
    return BASE.get(name, REFERENCE)


def choose(answers: Answers, task: str, name: str, n: int) -> str:
    """The setting with the fewest forwards among those within `LOSS` of the base; where none is, the most accurate."""
    settings = settings_of(name)
    if len(settings) == 1:
        return settings[0]

    def mean(setting: str, key: str) -> float:
        return float(answers.column(Cell(task, "validation", setting, n), key).mean())

    enough = mean(base_of(name), "correct") - LOSS
    good = [s for s in settings if mean(s, "correct") >= enough - 1e-9]
    return min(good, key=lambda s: mean(s, "nfe")) if good else max(settings, key=lambda s: mean(s, "correct"))


@dataclass(frozen=True)
class Comparison:
    """What a setting costs against another one on the same problems. Losses in points of accuracy, more is worse."""

    loss: float
    low: float
    high: float  # 95 %, paired bootstrap
    saved: float  # forwards of the other one for each of its own

    @classmethod
    def of(cls, answers: Answers, cell: Cell, against: Cell) -> Comparison:
        ours, theirs = (answers.column(c, "correct").tolist() for c in (cell, against))
        change, worst, best = (100 * x for x in paired_difference(theirs, ours))
        saved = answers.column(against, "nfe").sum() / answers.column(cell, "nfe").sum()
        return cls(0 - change, 0 - best, 0 - worst, float(saved))  # no minus zero

    @property
    def verdict(self) -> str:
        within = f"within {BOUND:g} points" if self.high <= BOUND else ""
        return ", ".join(filter(None, ["loses" if self.low > 0 else "", within])) or "open"

    def __str__(self) -> str:
        return f"{self.loss:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def report(answers: Answers, chosen: dict[tuple[str, str], str], n: int, validation: int) -> str:
    """A table for each task: published defaults, then the setting chosen on validation where it is another one."""
    by_task = {task: [name for t, name in chosen if t == task] for task, _ in chosen}
    lengths = ", ".join(f"{LENGTH[task]} ({task})" for task in by_task)
    lines = [
        f"n = {n} test problems; settings chosen on {validation} validation problems. New tokens: {lengths}. Loss:",
        f"points of accuracy against `{REFERENCE}` at its defaults on the same problems, more is worse, with the 95 %",
        f"interval of a paired bootstrap. Verdict: `loses` where all of it is above 0, `within {BOUND:g} points` where",
        "its upper end is, `open` where neither. s: wall-clock of a batch divided by its answers.",
    ]
    for task, names in by_task.items():
        lines += ["", f"### {task}", ""]
        lines += ["| sampler | setting | accuracy % | loss | verdict | NFE | tokens/forward | forwards saved | s |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        notes, fastest = [], {"method": (0.0, "none"), "composition": (0.0, "none")}
        for name in names:
            published = settings_of(name)[0]
            for setting in dict.fromkeys((published, chosen[task, name])):
                cell = Cell(task, "test", setting, n)
                loss = Comparison.of(answers, cell, Cell(task, "test", REFERENCE, n))
                rate = float(answers.column(cell, "tokens").sum() / answers.column(cell, "nfe").sum())
                kind = "published" if setting == published else "chosen"
                lines.append(f"| {name} | {kind}: `{setting}` | {figures(answers, cell, loss, rate)} |")
                if loss.high <= BOUND:
                    form = "composition" if "+" in name else "method"
                    fastest[form] = max(fastest[form], (rate, f"`{setting}` with {rate:.2f}"))
                if name in BASE:
                    own = Comparison.of(answers, cell, Cell(task, "test", BASE[name], n))
                    notes.append(
                        f"- `{setting}` against `{BASE[name]}`: saves {own.saved:.2f}×, loss {own}, {own.verdict}"
                    )
        best = ", ".join(f"{form} {what}" for form, (_, what) in fastest.items())
        lines += ["", *notes, f"- most tokens a forward within {BOUND:g} points: {best}"]
    return "\n".join(lines) + "\n"


def figures(answers: Answers, cell: Cell, loss: Comparison, rate: float) -> str:
    """The figures of one row of the table."""
    correct = answers.column(cell, "correct")
    low, high = interval(correct.tolist())
    cells = [
        f"{100 * correct.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]",
        *(("—", "—") if cell.sampler == REFERENCE else (str(loss), loss.verdict)),
        f"{answers.column(cell, 'nfe').mean():.2f}",
        f"{rate:.2f}",
        f"{loss.saved:.2f}×",
        f"{answers.column(cell, 'seconds').mean():.3f}",
    ]
    return " | ".join(cells)
