"""Measured figures of drafting: verify calls, tau with and without the bonus token, wall-clock against plain greedy.

    python -m dllm.drafting.bench --drafter tiny-drafter --prompts 300 --repeats 5

Every setting decodes the same held-out prompts greedily and has to give the verifier's own text. A wall-clock figure
is the median of paired runs: plain `generate`, then the setting, on the same prompts, so that a busy machine slows
both.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Drafter
from dllm.drafting.loop import SpecResult
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.drafting.speculation import speculate
from dllm.drafting.verifier import Verifier
from dllm.models.hub import load
from dllm.training.alignment import AlignConfig, separator, task_prompts

TASKS = ("word_problems", "functions")
SETTINGS: dict[str, dict[str, Any]] = {
    "argmax, fixed 12": {"search": "argmax", "length": "fixed:k=12"},
    "cps, fixed 12": {"search": "cps", "length": "fixed:k=12"},
    "viterbi, fixed 12": {"search": "viterbi", "length": "fixed:k=12"},
    "eal, fixed 12": {"search": "eal", "length": "fixed:k=12"},
    "eal, fixed 12, no carry": {"search": "eal", "length": "fixed:k=12", "carry": "off"},
    "tree 32, fixed 12": {"tree": 32, "length": "fixed:k=12"},
    "cps, adl (DiffuSpec)": {"search": "cps", "length": "adl"},
    "eal, cost": {"search": "eal", "length": "cost"},
}


@dataclass(frozen=True)
class Figure:
    """One setting on one set of prompts."""

    drafter: str
    setting: str
    task: str
    prompts: int
    tokens: int
    verify_calls: int
    tau: float  # with the bonus token
    accepted: float  # without
    acceptance: float
    overhead: float  # share of the loop's own work in the time of a round
    speedup: float | None  # plain seconds / seconds, median of paired runs
    divergent: int  # texts that leave the plain one: ties in rounding


def measure(
    verifier: Verifier,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    task: str,
    setting: str,
    options: Mapping[str, Any],
    *,
    max_new_tokens: int = 96,
    repeats: int = 0,
    timed: int = 20,
    reference: Sequence[Sequence[int]] | None = None,
) -> Figure:
    """One setting: acceptance over all prompts, wall-clock over the first `timed` in `repeats` paired runs."""
    results: list[SpecResult] = [
        speculate(verifier, drafter, list(p), max_new_tokens=max_new_tokens, **options)
        for p in tqdm(prompts, desc=f"{task}: {setting}", leave=False)
    ]
    rounds = [r for out in results for r in out.rounds]
    emitted, accepted = sum(r.emitted for r in rounds), sum(r.accepted for r in rounds)
    own = sum(r.t_search + r.t_commit + r.t_other for r in rounds)
    ratios = []
    for _ in range(repeats):
        plain = sum(plain_seconds(verifier, p, max_new_tokens) for p in prompts[:timed])
        start = time.perf_counter()
        for p in prompts[:timed]:
            speculate(verifier, drafter, list(p), max_new_tokens=max_new_tokens, **options)
        ratios.append(plain / (time.perf_counter() - start))
    texts = reference if reference is not None else [out.sequences for out in results]
    return Figure(
        drafter.name if drafter else "none", setting, task, len(prompts), emitted, len(rounds),
        emitted / len(rounds), accepted / len(rounds), accepted / max(1, sum(r.nodes for r in rounds)),
        own / max(1e-9, sum(r.seconds for r in rounds)), statistics.median(ratios) if ratios else None,
        sum(list(t) != out.sequences for t, out in zip(texts, results, strict=True)),
    )  # fmt: skip


def plain_seconds(verifier: Verifier, prompt: Sequence[int], max_new_tokens: int) -> float:
    """Seconds of the model's own greedy `generate`."""
    start = time.perf_counter()
    plain_text(verifier, prompt, max_new_tokens)
    return time.perf_counter() - start


def plain_text(verifier: Verifier, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    ids = torch.tensor([list(prompt)], device=verifier.device)
    mask = torch.ones_like(ids)
    out = verifier.model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
    return out[0].tolist()


def held_out(model: Any, task: str, n: int, seed: int = 1) -> list[list[int]]:
    """Prompt ids of test problems: no key of theirs is in the training data."""
    return task_prompts(model, AlignConfig("", tasks={task: n}, seed=seed), "test")


def tau_of(model: Any, config: AlignConfig, problems: int, length: str = "fixed:k=12") -> float:
    """Tokens per verifier forward of a drafter on held-out problems of a recipe's tasks."""
    verifier = as_verifier(config.verifier)
    drafter = DiffusionDrafter(model, suffix_token_id=separator(model) if config.separator else None)
    tokens = calls = 0
    for task in config.tasks:
        for prompt in tqdm(held_out(model, task, problems), desc=f"tau on {task}", leave=False):
            out = speculate(verifier, drafter, prompt, max_new_tokens=config.max_new_tokens, length=length)
            tokens, calls = tokens + len(out.tokens), calls + out.n_verify
    return tokens / max(1, calls)


def markdown(figures: Sequence[Figure]) -> str:
    """The figures as a table; tau counts the bonus token, accepted / round does not."""
    head = "| drafter | setting | task | tau | accepted / round | acceptance | verify calls | tokens | wall-clock |"
    lines = [head, "|" + "---|" * 9]
    for f in figures:
        wall = "" if f.speedup is None else f"{f.speedup:.2f}x"
        lines.append(
            f"| {f.drafter} | {f.setting} | {f.task} | {f.tau:.2f} | {f.accepted:.2f} | {f.acceptance:.2f} "
            f"| {f.verify_calls} | {f.tokens} | {wall} |"
        )
    return "\n".join(lines)


def main(
    verifier: Annotated[str, typer.Option(help="The verifier.")] = "tiny-ar",
    drafter: Annotated[
        str, typer.Option(help="A dLLM; its separator closes the block where --separator is given.")
    ] = "tiny",
    separated: Annotated[bool, typer.Option("--separator")] = False,
    prompts: Annotated[int, typer.Option(help="Held-out prompts a task.")] = 300,
    repeats: Annotated[int, typer.Option(help="Paired runs for wall-clock; the median counts.")] = 5,
    timed: Annotated[int, typer.Option(help="Prompts of a timed run.")] = 20,
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(TASKS),
    settings: Annotated[str, typer.Option(help="Names separated by semicolons; empty = all.")] = "",
    retrieval: Annotated[bool, typer.Option(help="Also measure the suffix automaton alone.")] = True,
    threads: Annotated[int, typer.Option()] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Acceptance and wall-clock of a drafter on the embedded verifier."""
    torch.set_num_threads(threads)
    v, model = as_verifier(verifier), load(drafter)
    dllm = DiffusionDrafter(model, suffix_token_id=separator(model) if separated else None)
    dllm.name = Path(drafter).name
    wanted = [s for s in settings.split(";") if s]
    figures: list[Figure] = []
    for task in tasks.split(","):
        problems = held_out(model, task, prompts)
        texts = [plain_text(v, p, 96) for p in tqdm(problems, desc=f"{task}: plain", leave=False)]
        runs: list[tuple[Drafter | None, str, Mapping[str, Any]]] = [
            (dllm, name, options) for name, options in SETTINGS.items() if not wanted or name in wanted
        ]
        if retrieval:
            runs += [(as_drafter("suffix"), "fixed 12", {"length": "fixed:k=12"}), (as_drafter("suffix"), "cost", {})]
        runs.append((None, "plain loop", {}))
        for source, name, options in runs:
            figures.append(
                measure(v, source, problems, task, name, options, repeats=repeats, timed=timed, reference=texts)
            )
            if out is not None:
                out.write_text(json.dumps([asdict(f) for f in figures], indent=1) + "\n", encoding="utf-8")
    typer.echo(markdown(figures))


if __name__ == "__main__":
    typer.run(main)
