"""`dllm bench samplers`: forwards, speed and exact answers of the samplers on the embedded pair's tasks.

Every sampler runs at its published defaults and at the setting chosen on the validation split: the one with the fewest
forwards among those that lose at most one point against their base there, else the most accurate one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dllm.bench.answers import CHUNK, Answers, Frame, Score, Series
from dllm.eval.metrics import paired_difference, verdicts
from dllm.eval.report import table
from dllm.models.arguments import Checkpoint
from dllm.models.native import NativeModel
from dllm.tasks import registry as tasks

TASKS = ("word_problems", "sudoku")
REFERENCE = "threshold"
BOUND = 2.0  # points: what the upper end of a loss's interval should stay under
EXIT = "prophet:high=12,mid=12,low=12"


def tried(pattern: str, *parameters: str) -> tuple[str, ...]:
    """The published setting of a sampler, then those with other parameters in the place of `{}`."""
    return tuple(pattern.format(f":{given}" if given else "") for given in ("", *parameters))


# sampler -> the settings that are tried, the published one first
SETTINGS: dict[str, tuple[str, ...]] = {
    "confidence": ("confidence",),
    "threshold": tried("threshold{}", "tau=0.95", "tau=0.8", "tau=0.7"),
    "localleap": tried("localleap{}", "tau=0.6", "tau=0.85", "kappa=0.95,tau=0.75", "kappa=0.95,tau=0.85"),
    "credit": tried("credit{}", "dinfer", "tau=0.8", "tau=0.93", "tau=0.95"),
    # logit gaps of a small model are larger than those that the published thresholds were made for
    "prophet": (
        *tried("prophet{}", "high=12,mid=10,low=8", "high=11,mid=11,low=11", "high=12,mid=12,low=12"),
        "prophet:high=12.5,mid=12.5,low=12.5",
    ),
    "prophet+threshold": tried("prophet{}+threshold", "high=12,mid=10,low=8", "high=12,mid=12,low=12"),
    # of attention schedulers the published settings, those of a task, and bars of this model
    "clad": tried("clad{}", "tau=0.8", "tau=0.9"),
    "dawn": tried("dawn{}", "tau_low=0.8", "tau_low=0.9,tau_induce=0.8", "tau_sink=0.05,tau_edge=0.03,tau_low=0.8"),
    "dapd": tried("dapd{}", "direct_gsm8k", "staged_gsm8k", "tau_max=0.02"),
    "d2f": ("d2f",),
    "d3llm": ("d3llm",),
    "adablock": tried("adablock{}", "tau_delimiter=0.5", "tau=0.8"),
    "localleap+credit": tried("localleap{}+credit", "tau=0.85", "kappa=0.95,tau=0.75", "kappa=0.95,tau=0.85"),
    "localleap+credit+prophet": (
        "localleap+credit+prophet",
        f"localleap:tau=0.85+credit+{EXIT}",
        f"localleap:kappa=0.95,tau=0.85+credit+{EXIT}",
    ),
    "adablock+credit": tried("adablock+credit{}", "tau=0.8"),
    "adablock+localleap+credit": tried("adablock+localleap{}+credit", "tau=0.85"),
    "adablock+credit+prophet": tried("adablock+credit+prophet{}", "high=12,mid=10,low=8", "high=12,mid=12,low=12"),
}
# what an exit is compared with besides: the decoding that it cuts short
BASE = {
    "prophet": "confidence",
    "localleap+credit+prophet": "localleap+credit",
    "adablock+credit+prophet": "adablock+credit",
}


def run(
    model: NativeModel | str | Checkpoint = "tiny",
    *,
    out: str | Path = "bench-samplers.jsonl",
    n: int = 1500,
    validation: int = 200,
    names: Sequence[str] = tuple(SETTINGS),
    task_names: Sequence[str] = TASKS,
    frame: Frame = Frame(),
    batch_size: int = CHUNK,
    workers: int = 1,
) -> str:
    """Decode what is still missing and return the report (markdown).

    out: the answers so far, of any frames. n, validation: problems of the test and the validation split. names: keys of
    `SETTINGS`, or any sampler specification, which then runs as it is given. frame: window, blocks and cache of all.
    Errors: an `out` file of another model.
    """
    answers = Answers(out, model, batch_size=batch_size, workers=workers)
    return report(compare(answers, names, task_names, n, validation, frame), n, validation, frame)


@dataclass(frozen=True)
class Comparison:
    """What a setting costs against another one on the same problems. Losses in points of accuracy, more is worse."""

    loss: float
    low: float
    high: float  # 95 %, paired bootstrap
    saved: float  # forwards of the other one for each of its own

    @classmethod
    def of(cls, answers: Answers, series: Series, against: Series) -> Comparison:
        """Two settings on the same problems."""
        ours, theirs = answers.samples(series), answers.samples(against)
        change, worst, best = (100 * x for x in paired_difference(verdicts(theirs), verdicts(ours)))
        saved = sum(row["nfe"] for row in theirs) / sum(row["nfe"] for row in ours)
        return cls(0 - change, 0 - best, 0 - worst, saved)  # no minus zero

    @property
    def verdict(self) -> str:
        """What can be said of the loss: `loses`, `within BOUND points`, both, or `open`."""
        within = f"within {BOUND:g} points" if self.high <= BOUND else ""
        return ", ".join(filter(None, ["loses" if self.low > 0 else "", within])) or "open"

    def __str__(self) -> str:
        return f"{self.loss:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


@dataclass(frozen=True)
class Line:
    """One setting of a sampler on the test problems of a task."""

    name: str
    published: bool  # its defaults; else the setting chosen on validation
    score: Score
    against: Comparison  # with the reference at its defaults
    own: Comparison | None  # with what it cuts short


def compare(
    answers: Answers,
    names: Sequence[str],
    task_names: Sequence[str],
    n: int,
    validation: int,
    frame: Frame = Frame(),
) -> list[Line]:
    """Every named sampler, and those that they are compared with, at its published defaults and at the setting that
    validation chooses where it is another one."""
    names = list(dict.fromkeys([REFERENCE, *(BASE[name] for name in names if name in BASE), *names]))
    tried = {base_of(name) for name in names} | {name for name in names if len(settings_of(name)) > 1}

    def swept(task: str, name: str) -> list[Series]:
        return [Series(task, "validation", setting, validation, frame) for setting in settings_of(name)]

    answers.want(series for task in task_names for name in names if name in tried for series in swept(task, name))
    shown: dict[tuple[str, str], list[Series]] = {}  # the published setting, and the chosen one where it is another
    for task in task_names:
        for name in names:
            published, *_ = found = swept(task, name)
            if len(found) > 1:
                bar = answers.score(swept(task, base_of(name))[0]).accuracy
                found = [published, answers.fastest(found, bar)]
            shown[task, name] = [series._replace(split="test", n=n) for series in dict.fromkeys(found)]
    answers.want(series for found in shown.values() for series in found)
    return [line(answers, name, series) for (_, name), found in shown.items() for series in found]


def settings_of(name: str) -> tuple[str, ...]:
    """The settings that are tried of a sampler, the published one first."""
    return SETTINGS.get(name, (name,))


def base_of(name: str) -> str:
    """What a sampler's losses on validation are counted against."""
    return BASE.get(name, REFERENCE)


def line(answers: Answers, name: str, series: Series) -> Line:
    """The figures of one setting on the test split."""
    own = Comparison.of(answers, series, series._replace(sampler=BASE[name])) if name in BASE else None
    against = Comparison.of(answers, series, series._replace(sampler=REFERENCE))
    return Line(name, series.sampler == settings_of(name)[0], answers.score(series), against, own)


def fastest(lines: Sequence[Line], composed: bool) -> Score | None:
    """Of the compositions, or of the single methods, the most tokens a forward within `BOUND` points."""
    within = [x.score for x in lines if x.against.high <= BOUND and ("+" in x.name) == composed]
    return max(within, key=lambda score: (score.tokens_per_forward, score.setting), default=None)


def report(lines: Sequence[Line], n: int, validation: int, frame: Frame = Frame()) -> str:
    """A table for each task."""
    task_names = list(dict.fromkeys(x.score.task for x in lines))
    lengths = ", ".join(f"{frame.new or tasks.task(task).window} ({task})" for task in task_names)
    parts = [
        f"n = {n} test problems; settings chosen on {validation} validation problems. New tokens: {lengths}; blocks\n"
        f"of {frame.block or 'the default length'}, cache: {frame.cache or 'the default'}. Loss: points of accuracy\n"
        f"against `{REFERENCE}` at its defaults on the same problems, more is worse, with the 95 % interval of a\n"
        f"paired bootstrap. Verdict: `loses` where all of it is above 0, `within {BOUND:g} points` where its upper\n"
        "end is, `open` where neither. s: wall-clock of a batch divided by its answers."
    ]
    head = ["sampler", "setting", "accuracy %", "loss", "verdict", "NFE", "tokens/forward", "forwards saved", "s"]
    for task in task_names:
        mine = [x for x in lines if x.score.task == task]
        notes = [
            f"- `{x.score.setting}` against `{BASE[x.name]}`: saves {x.own.saved:.2f}×, loss {x.own}, {x.own.verdict}"
            for x in mine
            if x.own
        ]
        best = {"method": fastest(mine, False), "composition": fastest(mine, True)}
        found = ", ".join(
            f"{form} " + (f"`{x.setting}` with {x.tokens_per_forward:.2f}" if x else "none") for form, x in best.items()
        )
        notes.append(f"- most tokens a forward within {BOUND:g} points: {found}")
        parts += [f"### {task}", table(head, map(cells, mine)), "\n".join(notes)]
    return "\n\n".join(parts) + "\n"


def cells(x: Line) -> list[str]:
    """One row of the table."""
    score, against = x.score, x.against
    kind = f"{'published' if x.published else 'chosen'}: `{score.setting}`"
    loss = ("—", "—") if score.setting == REFERENCE else (str(against), against.verdict)
    work = (f"{score.nfe:.2f}", f"{score.tokens_per_forward:.2f}", f"{against.saved:.2f}×", f"{score.seconds:.3f}")
    return [x.name, kind, str(score), *loss, *work]
