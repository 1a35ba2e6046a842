"""The command line. Every command is a thin shell over a library call and imports torch only when it runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from dllm import __version__
from dllm.cli import bench, generate, samplers, speculate
from dllm.cli import eval as evaluation
from dllm.cli import filter as filters
from dllm.cli import train as training
from dllm.errors import DllmError

app = typer.Typer(
    name="dllm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Decode masked-diffusion language models: unmasking schedulers, block caches, exact verification, drafting.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command()(generate.generate)
app.command()(generate.chat)
app.command()(generate.trace)
app.command()(samplers.samplers)
app.command()(bench.bench)
app.add_typer(evaluation.eval_app, name="eval")
app.command()(evaluation.tune)
app.command()(training.train)
app.add_typer(filters.filter_app, name="filter")
app.command()(speculate.speculate)
app.command()(speculate.align)


def main() -> None:
    """Entry point of the console script: 0 success, 1 a user's mistake (one line), 2 usage, 130 interrupted."""
    try:
        app(standalone_mode=True)
    except DllmError as error:
        typer.echo(f"dllm: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("dllm: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:  # `dllm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
