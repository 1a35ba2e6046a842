"""`dllm bench windows`: caches and their tails on the embedded pair's tasks, where the window is longer than an answer.

Every cache that leaves a part of the masked tail out meets its base on the same problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dllm.bench.answers import CHUNK, Answers, Frame, Series
from dllm.eval.metrics import paired_difference, verdicts
from dllm.eval.report import table
from dllm.models.arguments import Checkpoint
from dllm.models.native import NativeModel
from dllm.tasks.registry import PAIR_TASKS

TASKS = PAIR_TASKS
SAMPLER = "threshold"
BLOCK = 16  # answers of these tasks fill one or two of them
WINDOWS = (128, 256, 448)  # the longest prompt of the tasks and 448 columns fit into the model's 512 positions
NEAR = ("{}:near=96,tail=1", "{}:near=16,tail=1")
RECENT = ("{}:near=16,tail=1,recent=0",)
CACHES: dict[str, tuple[str, ...]] = {
    "none": NEAR,
    "prefix": (*NEAR, *RECENT),
    "dual": (*NEAR, *RECENT, "{}:dpad"),
}


def run(
    model: NativeModel | str | Checkpoint = "tiny",
    *,
    out: str | Path = "bench-windows.jsonl",
    n: int = 300,
    task_names: Sequence[str] = TASKS,
    windows: Sequence[int] = WINDOWS,
    caches: Mapping[str, Sequence[str]] = CACHES,
    batch_size: int = CHUNK,
    workers: int = 1,
) -> str:
    """Decode what is still missing and return the report (markdown).

    out: the answers so far. n: test problems a task. caches: of each base, the forms that are compared with it; `{}`
    stands for the base's name. Errors: an `out` file of another model.
    """
    return report(Answers(out, model, batch_size=batch_size, workers=workers), n, task_names, windows, caches)


def report(
    answers: Answers, n: int, task_names: Sequence[str], windows: Sequence[int], caches: Mapping[str, Sequence[str]]
) -> str:
    """A table for each task and window."""
    cells = [(task, new) for task in task_names for new in windows]
    groups = [[base, *(form.format(base) for form in forms)] for base, forms in caches.items()]

    def series(task: str, new: int, cache: str) -> Series:
        return Series(task, "test", SAMPLER, n, Frame(cache, new, BLOCK))

    answers.want(series(*cell, cache) for cell in cells for group in groups for cache in group)
    parts = [
        f"n = {n} test problems, `{SAMPLER}`, blocks of {BLOCK}, early stop. Difference: points of accuracy against\n"
        "the same cache with the whole tail, on the same problems, with the 95 % interval of a paired bootstrap."
    ]
    head = ["cache", "accuracy %", "difference", "NFE", "positions", "of the base's", "s"]
    for task, new in cells:
        lines = [
            line(answers, series(task, new, cache), series(task, new, group[0])) for group in groups for cache in group
        ]
        parts += [f"### {task}, window {new}", table(head, lines)]
    return "\n\n".join(parts) + "\n"


def line(answers: Answers, ours: Series, base: Series) -> list[str]:
    """One row of the table."""
    score, theirs = answers.score(ours), answers.score(base)
    right, reference = (verdicts(answers.samples(series)) for series in (ours, base))
    change, low, high = (100 * x for x in paired_difference(reference, right))
    against = "—" if ours == base else f"{change:+.1f} [{low:+.1f}, {high:+.1f}]"
    share = f"{score.positions / theirs.positions:.2f}"
    work = [f"{score.nfe:.2f}", f"{score.positions:.0f}", share, f"{score.seconds:.3f}"]
    return [f"`{ours.frame.cache}`", str(score), against, *work]
