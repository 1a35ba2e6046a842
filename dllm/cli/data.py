"""`dllm data get NAME --to FOLDER`: the benchmarks' documents as local files."""

from __future__ import annotations

from pathlib import Path

import typer

data_app = typer.Typer(no_args_is_help=True, help="Documents of benchmarks as local files.")


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
