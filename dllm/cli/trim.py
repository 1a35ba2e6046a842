"""`dllm trim`: which ids a drafter's head shall compute, by a verifier's own answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def trim(
    answers: Annotated[Path, typer.Argument(help="The verifier's answers, as `dllm data make` keeps them.")],
    out: Annotated[Path, typer.Option("--out", help="The file of kept ids, for trim= and --trim.")] = Path("kept.json"),
    verifier: Annotated[str, typer.Option("--verifier", help="tiny-ar, a folder, or a Hugging Face id.")] = "tiny-ar",
    drafter: Annotated[str, typer.Option("--drafter", help="tiny, or the folder of an aligned drafter.")] = "tiny",
    k: Annotated[int, typer.Option("--k", min=1, help="Slots of a draft.")] = 8,
    acceptance: Annotated[
        float, typer.Option(min=0, max=1, help="Of a slot with the whole head; tau of a run tells.")
    ] = 0.7,
    size: Annotated[int | None, typer.Option(min=1, help="Ids to keep; default: what promises the most.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Drafts of each size; the median counts.")] = 7,
) -> None:
    """Rank ids by a verifier's own ANSWERS, measure a draft by how many are kept, and write those that pay most."""
    import torch

    from dllm.bench.bounds import only_dllm, trims
    from dllm.drafting.registry import as_drafter, as_verifier
    from dllm.training.answer_file import read_answers

    torch.set_num_threads(1)
    v, pairs = as_verifier(verifier), read_answers(answers)
    ranking, found = trims(v, only_dllm(as_drafter(drafter)), pairs, k, acceptance, repeats)
    best = max(found, key=lambda s: s.speedup)
    table = Table("ids", "coverage", "ms a draft", "expected speed-up", "", box=None)
    for s in found:
        mark = "best" if s is best else ""
        table.add_row(str(s.n), f"{s.coverage:.2%}", f"{1e3 * s.seconds:.2f}", f"{s.speedup:.3f}", mark)
    Console().print(table)
    n = best.n if size is None else min(size, len(ranking))
    out.write_text(json.dumps(ranking[:n]), encoding="utf-8")
    typer.echo(f"{out}: {n} of {len(ranking)} ids")
