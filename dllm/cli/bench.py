"""`dllm bench`: measured ratios, as a table and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dllm.errors import unknown


def bench(
    name: Annotated[str, typer.Argument(help="step, generate, ...; `all` runs every one.")] = "step",
    repeats: Annotated[int, typer.Option(help="Repeats of each measurement; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the runtime on this machine, ratios side by side in one run."""
    import torch

    from dllm.eval.bench import BENCHES, machine
    from dllm.eval.bench import as_json as dump

    if name != "all" and name not in BENCHES:
        raise unknown("bench", name, [*BENCHES, "all"])
    torch.set_num_threads(threads)
    rows = [row for key in (BENCHES if name == "all" else [name]) for row in BENCHES[key](repeats=repeats)]
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
