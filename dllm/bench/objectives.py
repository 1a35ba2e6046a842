"""`dllm bench objectives`: what the objectives of alignment are worth, from one start and for one number of steps.

The start is the drafter of the embedded pair after shortened stages of DEER. Every objective trains a copy of it; then
each drafter decodes the same held-out prompts greedily, 12 slots a draft, no carry-over; all have to give one text. tau
counts the bonus token; its differences to the start have a bootstrap interval over the prompts. Weights and texts are
kept in a folder as they come: a run that is started again goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
from tqdm import tqdm

import dllm
from dllm.bench.drafting import K12, TASKS, Options, held_out
from dllm.bench.runtime import Figure
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.errors import DllmError, unknown
from dllm.eval.metrics import paired_gain
from dllm.models.arguments import Checkpoint
from dllm.models.lines import append, mend, read_lines
from dllm.training.alignment.recipe import run as align
from dllm.training.checkpoint import CHECKPOINT
from dllm.training.config import AlignConfig, Stage

NEW, BATCH, RATE, SUFFIX = 96, 25, 1e-3, "max_suffix=24"
TRAIN = {"word_problems": 3000, "functions": 1500}  # problems whose answers are learned, as of configs/align/tiny.yaml
START = (Stage("continuation", 150, 3e-3), Stage(f"refinement:{SUFFIX}", 250, 3e-3))
OBJECTIVES = {  # {} is the folder of the bench
    "refinement": f"refinement:{SUFFIX}",
    "forward-kl": f"distillation:{SUFFIX}",
    "length": f"length:{SUFFIX}",
    "tvd": f"distillation:{SUFFIX},divergence=tvd",
    "selective": f"selective:{SUFFIX},reference={{}}/forward-kl/model",
    "policy": f"policy:{SUFFIX}",
    "replay": "replay",
    "jsd": f"distillation:{SUFFIX},divergence=jsd",
    "forward-kl-on-policy": f"distillation:{SUFFIX},on_policy=true",
    "length-tree": f"length:{SUFFIX},draws=4",
    "reverse-kl": f"distillation:{SUFFIX},divergence=reverse-kl",
    "tvd-on-policy": f"distillation:{SUFFIX},divergence=tvd,on_policy=true",
}
Counts = dict[int, tuple[int, int, int]]  # prompt -> tokens, calls, crc


def run(
    names: Sequence[str] | None = None, *, n: int = 300, steps: int = 300, out: str | Path = "runs/objectives"
) -> Iterator[Figure]:
    """Train and decode what `out` lacks; then tau of every drafter, and what it gained over the start.

    Errors: an unknown objective, a folder of another number of steps.
    """
    folder, chosen = Path(out), list(names or OBJECTIVES)
    for name in chosen:
        if name not in OBJECTIVES:
            raise unknown("objective", name, OBJECTIVES)
    if "selective" in chosen and "forward-kl" not in chosen[: chosen.index("selective")]:
        chosen.insert(0, "forward-kl")  # its reference
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "texts.jsonl"
    if not file.exists():
        append(file, [{"steps": steps, "new": NEW}])
    mend(file)
    if next(iter(read_lines(file))) != {"steps": steps, "new": NEW}:
        raise DllmError(f"{folder} holds drafters of another number of steps: choose another --out")
    start = _counts(folder, "start", _config(folder, "start", START, layers=3), n)
    yield from _taus("start", start)
    for name in chosen:
        stage = Stage(OBJECTIVES[name].format(folder), steps, RATE)
        config = _config(folder, name, (stage,), drafter=Checkpoint(str(folder / "start" / "model")))
        found = _counts(folder, name, config, n)
        yield from _taus(name, found)
        for task in TASKS:
            first, second = ([of[task][i][:2] for i in range(n)] for of in (start, found))
            value, low, high = paired_gain(first, second)
            divergent = sum(found[task][i][2] != start[task][i][2] for i in range(n))
            note = f"95 %: {low:+.3f} to {high:+.3f}, {divergent} texts differ"
            yield Figure(f"{task}: tau of {name} above the start's", value, note=note)


def _config(
    folder: Path, name: str, stages: tuple[Stage, ...], layers: int = 0, drafter: Checkpoint = Checkpoint("tiny")
) -> AlignConfig:
    data = str(folder / "answers.jsonl")
    return AlignConfig(
        str(folder / name), drafter=drafter, tasks=TRAIN, data=data, max_new_tokens=NEW, block=16, layers=layers,
        stages=stages,
    )  # fmt: skip


def _counts(folder: Path, name: str, config: AlignConfig, n: int) -> Mapping[str, Counts]:
    """What the texts of a drafter took, by task; the drafter is trained first where it is missing."""
    output, file = Path(config.output), folder / "texts.jsonl"
    if not (output / "model").exists():
        align(config, resume=(output / CHECKPOINT).exists())
    found: dict[str, Counts] = {task: {} for task in TASKS}
    for row in read_lines(file):
        if row.get("setting") == name and row["prompt"] < n:
            tokens, calls, crc = row["counts"]
            found[row["task"]][row["prompt"]] = tokens, calls, crc
    verifier, source, settings = as_verifier("tiny-ar"), as_drafter(str(output / "model")), Options(K12)
    assert isinstance(source, DiffusionDrafter)
    for task in TASKS:
        prompts = held_out(source.model, task, n)
        missing = [i for i in range(n) if i not in found[task]]
        for at in tqdm(range(0, len(missing), BATCH), f"{name}, {task}", unit="batch", leave=False):
            some = missing[at : at + BATCH]
            outs = dllm.speculate(verifier, source, [prompts[i] for i in some], max_new_tokens=NEW, **settings)
            for i, got in zip(some, outs, strict=True):
                counts = sum(r.emitted for r in got.rounds), got.n_verify, crc32(repr(got.sequences).encode())
                append(file, [{"setting": name, "task": task, "prompt": i, "counts": counts}])
                found[task][i] = counts
    return found


def _taus(name: str, found: Mapping[str, Counts]) -> Iterator[Figure]:
    for task, counts in found.items():
        tokens, calls, _ = np.array([*counts.values()]).sum(0)
        yield Figure(f"{task}, {name}: tau", tokens / calls, note=f"{calls} verify calls")
