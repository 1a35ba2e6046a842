"""`dllm bench samplers`: forwards, speed and exact answers of the samplers on the embedded pair's tasks.

Every sampler runs at its published defaults and at the setting chosen on the validation split: the one with the fewest
forwards among those that lose at most one point against the reference there, else the most accurate one. Answers are
appended to a JSON-lines file as they come; a run that is started again goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import dllm
from dllm.errors import DllmError
from dllm.eval.metrics import interval, paired_difference
from dllm.training import tasks

log = logging.getLogger(__name__)

TASKS = ("word_problems", "sudoku")
LENGTH = {"word_problems": 64, "sudoku": 32, "functions": 32}  # new tokens: the longest answers fit
REFERENCE = "threshold"
# sampler -> the settings that are tried, the published one first
SETTINGS: dict[str, tuple[str, ...]] = {
    "confidence": ("confidence",),
    "threshold": ("threshold", "threshold:tau=0.95", "threshold:tau=0.8", "threshold:tau=0.7"),
    "localleap": ("localleap", "localleap:tau=0.85", "localleap:tau=0.6", "localleap:kappa=0.8,tau=0.6"),
    "credit": ("credit", "credit:dinfer", "credit:tau=0.95", "credit:tau=0.8"),
    "prophet": (
        "prophet",
        "prophet:high=10,mid=8,low=6",
        "prophet:high=14,mid=11,low=8",
        "prophet:high=9,mid=9,low=9,region=all",
    ),
    "prophet+threshold": (
        "prophet+threshold",
        "prophet:high=10,mid=8,low=6+threshold",
        "prophet:high=14,mid=11,low=8+threshold",
    ),
    "adablock": ("adablock", "adablock:tau_delimiter=0.5", "adablock:tau=0.8"),
    "localleap+credit": ("localleap+credit", "localleap:tau=0.6+credit", "localleap:kappa=0.8,tau=0.6+credit"),
    "adablock+credit": ("adablock+credit", "adablock+credit:tau=0.8"),
    "adablock+localleap+credit": ("adablock+localleap+credit", "adablock+localleap:kappa=0.8,tau=0.6+credit"),
    "adablock+credit+prophet": (
        "adablock+credit+prophet",
        "adablock+credit+prophet:high=10,mid=8,low=6",
        "adablock+credit+prophet:high=14,mid=11,low=8",
    ),
}
# what a composition is compared with where that is not the reference
BASE = {"prophet": "confidence", "adablock+credit+prophet": "adablock+credit", "confidence": "confidence"}
CHUNK = 64  # answers decoded together


@dataclass(frozen=True)
class Answer:
    """One decoded problem."""

    task: str
    split: str
    sampler: str
    index: int
    correct: bool
    nfe: int
    tokens: int
    seconds: float  # its share of the batch it was decoded in


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
) -> str:
    """Decode what is still missing and return the report (markdown).

    out: the answers so far. n, validation: problems of the test and the validation split. names: keys of `SETTINGS`,
    or any sampler specification, which then runs as it is given. Errors: an `out` file of another model or setting.
    """
    model = dllm.load(model) if isinstance(model, str) else model
    path = Path(out)
    header = {"model": model.fingerprint(), "cache": cache or "default"}
    done = read(path, header)
    names = list(dict.fromkeys([REFERENCE, *(BASE[name] for name in names if name in BASE), *names]))
    chosen: dict[tuple[str, str], str] = {}
    for task in task_names:
        for name in names:
            settings = SETTINGS.get(name, (name,))
            if len(settings) > 1:
                for setting in settings:
                    decode(model, task, "validation", setting, validation, batch_size, cache, path, done)
            chosen[task, name] = _choose(done, task, settings, validation)
            for setting in dict.fromkeys((settings[0], chosen[task, name])):
                decode(model, task, "test", setting, n, batch_size, cache, path, done)
    return report(done, names, task_names, chosen, n, validation)


Answers = dict[tuple[str, str, str], dict[int, Answer]]  # (task, split, sampler) -> index -> answer


def read(path: Path, header: dict[str, Any]) -> Answers:
    """The answers so far, behind a line that says what they are answers of. Errors: that line says something else."""
    done: Answers = {}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return done
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):  # stopped in the middle of a line
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    first, *rest = text.splitlines()
    if json.loads(first) != header:
        raise DllmError(f"{path} holds answers of another model or setting: choose another file for this run")
    for line in rest:
        try:
            answer = Answer(**json.loads(line))
        except (ValueError, TypeError):  # a line that was cut off
            continue
        done.setdefault((answer.task, answer.split, answer.sampler), {})[answer.index] = answer
    return done


def decode(
    model: Any, task: str, split: str, sampler: str, n: int, batch: int, cache: str | None, path: Path, done: Answers
) -> None:
    """Decode the problems of a split that have no answer yet, a batch at a time."""
    have = done.setdefault((task, split, sampler), {})
    missing = [i for i in range(n) if i not in have]
    if not missing:
        return
    problems = tasks.generate(task, split, n)
    bar = tqdm(total=n, initial=n - len(missing), desc=f"{task} {split} {sampler}", leave=False)
    for first in range(0, len(missing), batch):
        indices = missing[first : first + batch]
        chats = [[{"role": "user", "content": problems[i].prompt}] for i in indices]
        arguments = {"sampler": sampler, "max_new_tokens": LENGTH[task], "batch_size": batch, "cache": cache}
        began = time.perf_counter()
        outputs = dllm.generate(model, chats, **arguments)
        each = (time.perf_counter() - began) / len(indices)
        answers = [
            Answer(task, split, sampler, i, tasks.grade(task, problems[i], o.text), o.nfe, len(o.tokens), each)
            for i, o in zip(indices, outputs, strict=True)
        ]
        have.update({a.index: a for a in answers})
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(a)) + "\n" for a in answers)
        bar.update(len(indices))
    bar.close()


def _choose(done: Answers, task: str, settings: Sequence[str], n: int, loss: float = 0.01) -> str:
    """The setting with the fewest forwards among those within `loss` of the reference on the validation split; where
    none is, the most accurate one."""
    if len(settings) == 1:
        return settings[0]
    reference = column(done, task, "validation", REFERENCE, n, "correct")
    good = []
    for setting in settings:
        correct = column(done, task, "validation", setting, n, "correct")
        nfe = column(done, task, "validation", setting, n, "nfe")
        lost = correct.mean() < reference.mean() - loss
        good.append((lost, -correct.mean() if lost else nfe.mean(), settings.index(setting), setting))
    return min(good)[-1]


def column(done: Answers, task: str, split: str, sampler: str, n: int, key: str) -> Any:
    """One figure of the first n answers, as an array of floats."""
    answers = done[task, split, sampler]
    return np.array([float(getattr(answers[i], key)) for i in range(n)])


def report(
    done: Answers,
    names: Iterable[str],
    task_names: Iterable[str],
    chosen: dict[tuple[str, str], str],
    n: int,
    validation: int,
) -> str:
    """A table for each task: published defaults, then the setting chosen on validation where it is another one."""
    lines = [
        f"n = {n} test problems, settings chosen on {validation} validation problems. Loss (points of accuracy) and",
        f"saved forwards are against `{REFERENCE}` at its defaults, or the base that is named, on the same problems,",
        "with the 95 % interval of a paired bootstrap. Seconds: wall-clock of a batch divided by its answers.",
    ]
    for task in task_names:
        lines += ["", f"### {task}", ""]
        lines += ["| sampler | setting | accuracy % | against | loss | NFE | forwards saved | tokens/forward | s |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for name in names:
            first, against = SETTINGS.get(name, (name,))[0], BASE.get(name, REFERENCE)
            for setting in dict.fromkeys((first, chosen[task, name])):
                kind = "published" if setting == first else "chosen"
                lines.append(f"| {name} | {kind}: `{setting}` | " + _line(done, task, setting, against, n) + " |")
    return "\n".join(lines) + "\n"


def _line(done: Answers, task: str, setting: str, against: str, n: int) -> str:
    """The figures of one row of the table."""
    correct, nfe, tokens, seconds = (
        column(done, task, "test", setting, n, key) for key in ("correct", "nfe", "tokens", "seconds")
    )
    base = {key: column(done, task, "test", against, n, key) for key in ("correct", "nfe")}
    low, high = interval(correct.tolist())
    change, worst, best = paired_difference(base["correct"].tolist(), correct.tolist())
    cells = [
        f"{100 * correct.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]",
        against,
        "—" if setting == against else f"{-100 * change:+.1f} [{-100 * best:+.1f}, {-100 * worst:+.1f}]",
        f"{nfe.mean():.2f}",
        f"{base['nfe'].sum() / nfe.sum():.2f}×",
        f"{tokens.sum() / nfe.sum():.2f}",
        f"{seconds.mean():.3f}",
    ]
    return " | ".join(cells)
