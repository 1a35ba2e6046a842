"""`dllm data get NAME --to FOLDER`: the benchmarks' documents as local files. `dllm data make RECIPE`: a verifier's own
answers, from which a recipe of `dllm align` learns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(no_args_is_help=True, help="Documents of benchmarks and a verifier's answers, as local files.")


@data_app.command("get")
def get_command(
    names: list[str] = typer.Argument(..., metavar="NAME…", help="gsm8k, math500, humaneval, mbpp."),
    to: Path = typer.Option(..., "--to", metavar="FOLDER", help="Where NAME/test.jsonl is written."),
) -> None:
    """Fetch benchmarks and write them as FOLDER/NAME/SPLIT.jsonl, for `dllm eval … --data FOLDER`."""
    from dllm.eval.data import get

    for name in names:
        for file, count in get(name, to).items():
            typer.echo(f"{file}  {count} documents")


@data_app.command("make")
def make_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as configs/align/tiny.yaml.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key.")] = None,
) -> None:
    """Make the answers that a recipe learns from; those that are there already are kept."""
    from dllm.training.answers import make
    from dllm.training.config import load_recipe

    config = load_recipe(recipe, overrides or ())
    found = make(config)
    typer.echo(f"{config.answers}  {len(found)} answers, {sum(len(c.answer) for c in found)} tokens")
