"""The command line. Every command is a thin shell over a library call and imports torch only when it runs."""

from __future__ import annotations

import sys

import typer

from dllm import __version__
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
def _main(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version.")) -> None:
    pass


def main() -> None:
    """Entry point of the console script: 0 success, 1 a user's mistake (one line), 130 interrupted."""
    try:
        app()
    except DllmError as error:
        typer.echo(f"dllm: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("dllm: interrupted", err=True)
        sys.exit(130)
