"""`dllm bench stress`: where parallel commits break, as curves of accuracy against tokens per forward.

The stress tasks (`dllm.tasks.stress`), decoded by the planted model, whose conditionals are exact, and by a trained
one. Every sampler runs at settings from careful to bold; nothing is chosen, the curve is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from dllm.bench.answers import CHUNK, Answers, Frame, Score, Series
from dllm.bench.planted import Planted
from dllm.bench.samplers import BOUND, REFERENCE, Comparison, tried
from dllm.eval import plots
from dllm.eval.report import number, table
from dllm.models.arguments import Checkpoint
from dllm.models.hub import ASSETS
from dllm.models.native import NativeModel
from dllm.models.tokenizer import load_tokenizer
from dllm.tasks.registry import STRESS_TASKS, generate

SPLIT = "test"
PLANTED, TRAINED = "planted", "trained"
CAREFUL = "confidence"  # its first setting: one token a forward
STEPS = {"confidence": (16, 8, 4, 2, 1)}  # of the quota, instead of settings: it commits 16 columns in so many steps
# sampler -> its curve; the published setting is the bare name, and the first one
SETTINGS: dict[str, tuple[str, ...]] = {
    "confidence": ("confidence",),
    "threshold": tried("threshold{}", "tau=0.99", "tau=0.8", "tau=0.6", "tau=0.4"),
    "factor": tried("factor{}", "f=0.5", "f=2"),
    "eb": tried("eb{}", "gamma=0.5", "gamma=1"),
    "klass": tried("klass{}", "kappa=0.6"),
    "localleap": tried("localleap{}", "tau=0.5"),
    "credit": tried("credit{}", "tau=0.6"),
    "saber": ("saber",),
    "clad": tried("clad{}", "tau=0.5", "tau=0.3"),
    # with prompts this short every column is a sink at the published tau_sink, and no edge is left: 2 leaves them all
    "dawn": tried(
        "dawn{}", "tau_sink=2", "tau_sink=2,tau_edge=0.05,tau_low=0.4", "tau_sink=2,tau_edge=0.02,tau_low=0.1"
    ),
    "dapd": tried("dapd{}", "variant=staged", "tau_min=0.1,tau_max=0.3", "tau_min=0.4,tau_max=0.8"),
}


def run(
    model: NativeModel | str | Checkpoint | None = "tiny-stress",
    *,
    out: str | Path = "bench-stress",
    n: int = 200,
    names: Sequence[str] = tuple(SETTINGS),
    task_names: Sequence[str] = STRESS_TASKS,
    batch_size: int = CHUNK,
    workers: int = 1,
) -> str:
    """Decode what is still missing and return the report (markdown).

    model: beside the planted one; None: that one alone. out: the folder of the answers so far and of the picture. n:
    problems a task. names: keys of `SETTINGS`, or any sampler specification. workers: processes for `model`.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    exact = planted(n, task_names)
    kept = {PLANTED: Answers(folder / "planted.jsonl", exact, batch_size=batch_size, trace=True)}
    if model is not None:
        kept[TRAINED] = Answers(folder / "trained.jsonl", model, batch_size=batch_size, workers=workers, trace=True)
    found = {name: curves(answers, names, task_names, n) for name, answers in kept.items()}
    picture = folder / "curves.png"
    drawn = plots.possible() and draw(found, picture)
    law = {task: fmean(exact.joint_of(e).product() for e in generate(task, SPLIT, n)) for task in task_names}
    return report(found, law, n) + (f"\n![accuracy against tokens per forward]({picture.name})\n" if drawn else "")


def planted(n: int, task_names: Sequence[str] = STRESS_TASKS) -> Planted:
    """The planted model of the first n test problems of each task."""
    tokenizer = load_tokenizer(ASSETS / "tiny")
    assert tokenizer is not None
    return Planted(tokenizer, ((name, e) for name in task_names for e in generate(name, SPLIT, n)))


@dataclass(frozen=True)
class Point:
    """One setting on one task."""

    name: str  # of the sampler
    series: Series
    score: Score
    arness: float
    against: Comparison  # with the reference at its defaults
    careful: Comparison  # with one token a forward


Curves = dict[str, list[Point]]  # by task


def series_of(name: str, task: str, n: int) -> list[Series]:
    """The settings of a sampler on a task."""
    return [
        Series(task, SPLIT, setting, n, Frame(cache="none", steps=steps))
        for setting in SETTINGS.get(name, (name,))
        for steps in STEPS.get(name, (None,))
    ]


def curves(answers: Answers, names: Sequence[str], task_names: Sequence[str], n: int) -> Curves:
    """Every named sampler, and the two that all are compared with, at all of their settings."""
    names = list(dict.fromkeys([REFERENCE, CAREFUL, *names]))
    answers.want(series for task in task_names for name in names for series in series_of(name, task, n))
    return {task: [point(answers, name, s) for name in names for s in series_of(name, task, n)] for task in task_names}


def point(answers: Answers, name: str, series: Series) -> Point:
    """The figures of one setting."""
    orders = [a.arness for a in answers.of(series) if a.arness is not None]
    reference = series_of(REFERENCE, series.task, series.n)[0]
    careful = series_of(CAREFUL, series.task, series.n)[0]
    return Point(
        name,
        series,
        answers.score(series),
        fmean(orders) if orders else math.nan,
        Comparison.of(answers, series, reference),
        Comparison.of(answers, series, careful),
    )


def report(found: Mapping[str, Curves], law: Mapping[str, float], n: int) -> str:
    """A table for each model and task."""
    parts = [
        f"n = {n} test problems a task, windows of 16 tokens, greedy. Loss: points of accuracy against `{REFERENCE}`\n"
        "at its defaults on the same problems, more is worse, with the 95 % interval of a paired bootstrap. Verdict:\n"
        f"`loses` where all of it is above 0, `within {BOUND:g} points` where its upper end is, `open` where neither.\n"
        "AR-ness: 1 is as left to right as it can be. A list names the fastest setting of each sampler that is within\n"
        f"{BOUND:g} points of one token a forward; it is read off these same problems."
    ]
    head = ["sampler", "setting", "accuracy %", "loss", "verdict", "NFE", "tokens/forward", "AR-ness"]
    for model, curves in found.items():
        for task, points in curves.items():
            notes = [f"- within {BOUND:g} points of one token a forward: {fastest(points)}"]
            if model == PLANTED:
                notes.append(f"- all columns drawn at once, each from its marginal: right in {100 * law[task]:.2f} %")
            parts += [f"### {task}, {model}", table(head, map(cells, points)), "\n".join(notes)]
    return "\n\n".join(parts) + "\n"


def cells(x: Point) -> list[str]:
    """One row of the table."""
    setting = f"`{x.series.sampler}`" + (f", {x.series.frame.steps} steps" if x.series.frame.steps else "")
    same = x.series == series_of(REFERENCE, x.series.task, x.series.n)[0]
    loss = ("—", "—") if same else (str(x.against), x.against.verdict)
    work = (f"{x.score.nfe:.2f}", f"{x.score.tokens_per_forward:.2f}", number(x.arness))
    return [x.name, setting, str(x.score), *loss, *work]


def fastest(points: Sequence[Point]) -> str:
    """The most tokens a forward of each sampler near the careful decode, the best sampler first."""
    speeds: dict[str, float] = {}
    for x in points:
        if x.careful.high <= BOUND:
            speeds[x.name] = max(speeds.get(x.name, 0.0), x.score.tokens_per_forward)
    order = sorted(speeds, key=lambda name: -speeds[name])
    none = [name for name in dict.fromkeys(x.name for x in points) if name not in speeds]
    told = ", ".join(f"`{name}` {speeds[name]:.2f}" for name in order) or "none"
    return told + (f"; no setting of {', '.join(f'`{name}`' for name in none)}" if none and order else "")


def draw(found: Mapping[str, Curves], path: Path) -> Path:
    """Accuracy against tokens per forward: a row of panels for each model, one for each task."""
    panels = {
        f"{task}, {model}": {
            name: sorted((x.score.tokens_per_forward, 100 * x.score.accuracy) for x in points if x.name == name)
            for name in dict.fromkeys(x.name for x in points)
        }
        for model, curves in found.items()
        for task, points in curves.items()
    }
    return plots.panels(panels, path, columns=max(map(len, found.values())))
