"""`dllm bench`: measured ratios, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dllm.cli.options import loading, located, needing, takes
from dllm.errors import DllmError, unknown
from dllm.models.arguments import Checkpoint

if TYPE_CHECKING:
    from dllm.bench.runtime import Figure

LONG = ("samplers", "windows", "stress")  # they go on where they were stopped, and print a report
WITH_MODEL = ("generate", "lookahead", "constraints", "reads", *LONG)
OPTIONS = {  # those that only some benches have
    "drafter": ("drafting", "retrieval", "pairs", "paths", "siblings", "drafting-vocabularies"),
    "pair_head": ("pairs", "paths"),
    "steps": ("objectives", "drafting-heads"),
    "small": ("gpu", "tail"),
    "against": ("gpu",),
    "task": LONG,
    "new": ("samplers", "windows"),
    "block_length": ("samplers",),
}


@takes(loading)
def bench(
    name: Annotated[
        str, typer.Argument(help="step, generate, own-work, attention, tail, gpu, ...; `all`: the short ones.")
    ] = "step",
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each measurement; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the JSON here too; samplers, windows: the answers so far; pairs: those beside it."),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(min=2, help="Test problems a task; 1500 for samplers, 300 for windows, drafting and constraints."),
    ] = None,
    validation: Annotated[int, typer.Option(min=2, help="samplers: problems on which settings are chosen.")] = 200,
    workers: Annotated[int, typer.Option(min=1, help="samplers, windows: processes, one torch thread each.")] = 1,
    task: Annotated[list[str] | None, typer.Option(help="samplers, windows: of these tasks; may be repeated.")] = None,
    new: Annotated[
        list[int] | None,
        typer.Option(min=1, help="samplers, windows: columns of the window; windows: may be repeated."),
    ] = None,
    block_length: Annotated[int | None, typer.Option(min=1, help="samplers: columns of a block.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="These samplers, objectives, settings of drafting, parts of gpu, constraints; may be repeated."
        ),
    ] = None,
    drafter: Annotated[
        str, typer.Option(help="drafting, retrieval, pairs, paths, siblings: tiny, or the folder of an aligned one.")
    ] = "tiny",
    pair_head: Annotated[str, typer.Option(help="pairs, paths: the folder of a pair head for it.")] = "",
    steps: Annotated[
        int | None, typer.Option(min=1, help="objectives, drafting-heads: of training, each; 300.")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="gpu, tail: tiny shapes, decoded in seconds; no figure is judged.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            help="gpu: the folder `llada` of a Fast-dLLM checkout, whose loop and network run beside ours. It needs "
            "generate.py (generate, generate_with_prefix_cache, generate_with_dual_cache) and model/modeling_llada.py "
            "(LLaDAModelLM). Its code is run, and what it imports must be installed."
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="gpu: what does not fit in is left out.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    **common: object,
) -> None:
    """Measure the runtime on this machine, ratios side by side in one run.

    --model and its arguments are for generate, lookahead, constraints, reads, samplers, windows and stress; other
    benches have models of their own.
    """
    import torch
    from tqdm import tqdm

    from dllm.bench import (
        attention,
        batches,
        bounds,
        cache,
        constraint_cost,
        constraints,
        drafting,
        gpu,
        heads,
        lookahead,
        objectives,
        pairs,
        paths,
        reads,
        retrieval,
        runtime,
        samplers,
        siblings,
        step,
        stress,
        tail,
        vocabularies,
        windows,
    )  # fmt: skip
    from dllm.bench.answers import Frame
    from dllm.tasks.registry import STRESS_TASKS

    model, _ = located(common)
    if name in OPTIONS["pair_head"] and not pair_head:
        raise DllmError(f"the bench {name!r} is of pair scores: give --pair-head, and its --drafter")
    short: dict[str, Callable[[], Iterable[Figure]]] = {
        "step": lambda: runtime.step(repeats),
        "generate": lambda: runtime.generate(repeats, embedded=model),
        "cache": lambda: cache.cache(repeats),
        "own-work": lambda: step.run(only or None, repeats),
    }
    benches: dict[str, Callable[[], Iterable[Figure]]] = {
        **short,
        "lookahead": lambda: lookahead.run(only or None, repeats, model=model),
        "attention": lambda: attention.run(only or None, repeats),
        "constraint-cost": lambda: constraint_cost.run(only or None, repeats),
        "tail": lambda: tail.run(repeats, tail.SMALL if small else tail.FULL),
        "reads": lambda: reads.run(repeats, model=model),
        "constraints": lambda: constraints.run(only, n=n or 300, model=model),
        "drafting": lambda: drafting.run(only, repeats, n=n or 300, drafter=drafter),
        "drafting-batches": lambda: batches.run(repeats),
        "pairs": lambda: pairs.run(
            drafter, pair_head, n=n or 300, out=(out or Path("bench-pairs")).with_suffix(".jsonl")
        ),
        "paths": lambda: paths.run(drafter, pair_head, n=n or 300),
        "siblings": lambda: siblings.run(n or 20, drafter=drafter),
        "drafting-context": lambda: bounds.run_context(repeats, n=n or 40),
        "drafting-heads": lambda: heads.run(repeats, n=n or 100, steps=steps or 300),
        "drafting-vocabularies": lambda: vocabularies.run(n or 100, drafter=drafter),
        "drafting-smollm": lambda: drafting.run_smollm(only, repeats),
        "objectives": lambda: objectives.run(only, n=n or 300, steps=steps or 300),
        "retrieval": lambda: retrieval.run(out=Path("bench-retrieval.jsonl"), n=n or 300, drafter=drafter),
        "gpu": lambda: gpu.run(only, repeats, small=small, against=against, minutes=minutes),
    }
    if name == "serve":  # of an extra
        with needing("serve"):
            from dllm.bench import serve
        benches["serve"] = lambda: serve.run(repeats, requests=n or serve.REQUESTS)
    if name not in (*benches, *LONG, "all"):
        raise unknown("bench", name, [*benches, "serve", *LONG, "all"])
    if model != Checkpoint() and name not in WITH_MODEL:
        hint = "; what drafts is --drafter" if name.startswith("drafting") else ""
        raise DllmError(f"--model is for the benches {', '.join(WITH_MODEL)}, not for {name!r}{hint}")
    given = {
        "drafter": drafter != "tiny", "pair_head": pair_head, "steps": steps, "small": small, "against": against,
        "task": task, "new": new, "block_length": block_length,
    }  # fmt: skip
    for option, theirs in OPTIONS.items():
        if given[option] and name not in theirs:
            whose = " and ".join(map(repr, theirs))
            raise DllmError(f"--{option.replace('_', '-')} belongs to the bench {whose}, not to {name!r}")
    torch.set_num_threads(threads)
    file = out or f"bench-{name}.jsonl"
    if name == "windows":
        tasks, widths = task or windows.TASKS, new or windows.WINDOWS
        typer.echo(windows.run(model, out=file, n=n or 300, task_names=tasks, windows=widths, workers=workers))
        return
    if name == "samplers":
        if new and len(new) > 1:
            raise DllmError(f"--new: the bench 'samplers' decodes in one window, not in {len(new)}; run it for each")
        frame = Frame(new=new[0] if new else None, block=block_length)
        size: dict[str, int] = {"n": n or 1500, "validation": validation, "workers": workers}
        names, tasks = only or list(samplers.SETTINGS), task or samplers.TASKS
        typer.echo(samplers.run(model, out=file, names=names, task_names=tasks, frame=frame, **size))
        return
    if name == "stress":
        trained = Checkpoint("tiny-stress") if model == Checkpoint() else model
        known, kinds = only or [*stress.SETTINGS], task or [*STRESS_TASKS]
        folder = out or "bench-stress"
        typer.echo(stress.run(trained, out=folder, n=n or 200, names=known, task_names=kinds, workers=workers))
        return
    rows: list[Figure] = []
    try:
        for key in short if name == "all" else [name]:
            for row in tqdm(benches[key](), desc=key, unit="row", leave=False):
                rows.append(row)
    finally:  # interrupted or not: what was measured is shown
        if rows:
            _show(rows, out, as_json)
    if any(row.failed for row in rows):
        raise typer.Exit(1)


def _show(rows: list[Figure], out: Path | None, as_json: bool) -> None:
    from dllm.bench import runtime

    if out is not None:
        out.write_text(runtime.as_json(rows) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(runtime.as_json(rows))
        return
    table = Table("measured", "value", "asked", "met", "note", title=runtime.machine())
    for row in rows:
        asked = "" if row.bound is None else f"{'≥' if row.higher_is_better else '≤'} {row.bound:g}"
        met = "error" if row.failed else {True: "yes", False: "no", None: ""}[row.met]
        table.add_row(row.name, "" if row.value is None else f"{row.value:.2f}", asked, met, row.note)
    Console().print(table)
