"""`dllm bench`: measured ratios, as a table and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dllm.errors import DllmError, unknown

if TYPE_CHECKING:
    from dllm.eval.bench import Row


def bench(
    name: Annotated[
        str, typer.Argument(help="step, generate, own-work, lookahead, drafting, samplers, ...; `all`: the short ones.")
    ] = "step",
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each measurement; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here too; samplers: the answers so far.")] = None,
    n: Annotated[
        int | None, typer.Option(min=2, help="Test problems a task; 1500 for samplers, 300 for drafting.")
    ] = None,
    validation: Annotated[int, typer.Option(min=2, help="samplers: problems on which settings are chosen.")] = 200,
    workers: Annotated[int, typer.Option(min=1, help="samplers: processes, one torch thread each.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="These samplers, or settings of drafting; may be repeated.")
    ] = None,
    drafter: Annotated[str, typer.Option(help="drafting: tiny, or the folder of an aligned one.")] = "tiny",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the runtime on this machine, ratios side by side in one run."""
    import torch
    from tqdm import tqdm

    from dllm.eval import bench_drafting, bench_lookahead, bench_step
    from dllm.eval.bench import BENCHES

    short = {**BENCHES, "own-work": lambda repeats: bench_step.run(only or None, repeats)}
    benches = {
        **short,
        "lookahead": lambda repeats: bench_lookahead.run(only or None, repeats),
        "drafting": lambda repeats: bench_drafting.run(only, repeats, n=n or 300, drafter=drafter),
        "drafting-smollm": lambda repeats: bench_drafting.run_smollm(only, repeats),
    }
    if name not in (*benches, "samplers", "all"):
        raise unknown("bench", name, [*benches, "samplers", "all"])
    if drafter != "tiny" and name != "drafting":
        raise DllmError(f"--drafter belongs to the bench 'drafting', not to {name!r}")
    torch.set_num_threads(threads)
    if name == "samplers":  # hours: it goes on where it was stopped, and `all` leaves it out
        from dllm.eval import bench_samplers

        names, file = only or list(bench_samplers.SETTINGS), out or "bench-samplers.jsonl"
        typer.echo(bench_samplers.run(out=file, n=n or 1500, validation=validation, names=names, workers=workers))
        return
    rows: list[Row] = []
    try:
        for key in short if name == "all" else [name]:
            for row in tqdm(benches[key](repeats=repeats), desc=key, unit="row", leave=False):
                rows.append(row)
    finally:  # interrupted or not: what was measured is shown
        _show(rows, out, as_json)


def _show(rows: list[Row], out: Path | None, as_json: bool) -> None:
    from dllm.eval.bench import as_json as dump
    from dllm.eval.bench import machine

    if out is not None:
        out.write_text(dump(rows) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(dump(rows))
        return
    table = Table("measured", "value", "asked", "met", "note", title=machine())
    for row in rows:
        asked = "" if row.bound is None else f"{'≥' if row.higher_is_better else '≤'} {row.bound:g}"
        met = {True: "yes", False: "no", None: ""}[row.met]
        table.add_row(row.name, f"{row.value:.2f}", asked, met, row.note)
    Console().print(table)
