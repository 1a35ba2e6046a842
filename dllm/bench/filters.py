"""`dllm filter compare`: Learn2PD against the plain threshold at equal accuracy, on the embedded model's tasks.

Both rules are swept on the validation split. Each then takes its setting with the fewest forwards among those that lose
at most one point against the best accuracy that either rule reaches there, and the two meet on the test split, problem
by problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dllm.bench.answers import CHUNK, LOSS, Answers, Score, Series
from dllm.eval.metrics import paired_difference, paired_ratio, verdicts
from dllm.eval.report import table
from dllm.models.arguments import Checkpoint
from dllm.models.native import NativeModel
from dllm.samplers.learn2pd import EMBEDDED, Filter
from dllm.tasks.registry import PAIR_TASKS

TAUS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # of either rule; the filter's own comes on top
Sweeps = tuple[list[str], list[str]]  # settings of the threshold, and of the filter


def run(
    filter_path: str | Path | None = None,
    model: NativeModel | str | Checkpoint = "tiny",
    *,
    out: str | Path = "filter-compare.jsonl",
    n: int = 1500,
    validation: int = 200,
    task_names: Sequence[str] = PAIR_TASKS,
    batch_size: int = CHUNK,
    workers: int = 1,
) -> str:
    """Decode what is still missing and return the report (markdown).

    filter_path: None for the embedded filter. n, validation: problems of the test and the validation split, a task.
    Errors: an `out` file of another model or filter.
    """
    made = Filter.load(filter_path or str(files("dllm.assets").joinpath(EMBEDDED)))
    answers = Answers(out, model, about={"filter": made.fingerprint()}, batch_size=batch_size, workers=workers)
    return report(*compare(answers, sweeps_of(made, filter_path), task_names, n, validation), n, validation)


Paired = tuple[float, float, float]  # a figure and its paired 95 % interval


@dataclass(frozen=True)
class Duel:
    """Both rules on the test problems of a task, each at the setting that it chose on validation."""

    plain: Score
    ours: Score
    gain: Paired  # of accuracy over the threshold
    speedup: Paired  # of tokens per forward


def sweeps_of(made: Filter, path: str | Path | None = None) -> Sweeps:
    """The settings that are tried; `path` is where a filter lies that is not the embedded one."""
    source = f"filter={path}," if path else ""
    taus = sorted({*TAUS, made.tau})
    return [f"threshold:tau={tau:g}" for tau in TAUS], [f"learn2pd:{source}tau={tau:.4g}" for tau in taus]


def compare(
    answers: Answers, sweeps: Sweeps, task_names: Sequence[str], n: int, validation: int
) -> tuple[list[Duel], list[Score]]:
    """Sweep both rules on validation, and let the settings that they choose there meet on the test split."""
    settings = [setting for rule in sweeps for setting in rule]
    swept = [Series(task, "validation", setting, validation) for task in task_names for setting in settings]
    answers.want(swept)
    scores, duels = [answers.score(series) for series in swept], []
    for task in task_names:
        best = max(score.accuracy for score in scores if score.task == task)
        tried = ([Series(task, "validation", setting, validation) for setting in rule] for rule in sweeps)
        plain, ours = (answers.fastest(rule, best)._replace(split="test", n=n) for rule in tried)
        answers.want([plain, ours])
        duels.append(duel(answers, plain, ours))
    return duels, scores


def duel(answers: Answers, plain: Series, ours: Series) -> Duel:
    """Two series of the same problems."""
    base, rows = answers.samples(plain), answers.samples(ours)
    gain = paired_difference(verdicts(base), verdicts(rows))
    return Duel(answers.score(plain), answers.score(ours), gain, paired_ratio(base, rows, "tokens", "nfe"))


def report(duels: Sequence[Duel], sweep: Sequence[Score], n: int, validation: int) -> str:
    """The comparison on the test split, then the sweep that the settings were chosen from."""
    head = ["task", "setting", "accuracy %", "NFE", "tokens/forward"]
    parts = [
        f"n = {n} test problems a task. Settings: on {validation} validation problems, the fewest forwards within\n"
        f"{100 * LOSS:g} point of the best accuracy of the sweep. Intervals: 95 %, (paired) bootstrap.",
        table([*head, "against the threshold: accuracy", "tokens/forward"], [row for d in duels for row in rows(d)]),
        "Validation:",
        table(head, [cells(score, f"{100 * score.accuracy:.1f}") for score in sweep]),
    ]
    return "\n\n".join(parts) + "\n"


def cells(score: Score, accuracy: str) -> list[str]:
    """The figures of a setting."""
    return [score.task, f"`{score.setting}`", accuracy, f"{score.nfe:.2f}", f"{score.tokens_per_forward:.2f}"]


def rows(d: Duel) -> list[list[str]]:
    """The two rows of a duel."""
    change, worst, best = (100 * points for points in d.gain)
    speed, slow, fast = d.speedup
    against = [f"{change:+.1f} [{worst:+.1f}, {best:+.1f}]", f"{speed:.3f}× [{slow:.3f}, {fast:.3f}]"]
    return [[*cells(d.plain, str(d.plain)), "", ""], [*cells(d.ours, str(d.ours)), *against]]
