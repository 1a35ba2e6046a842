"""The command line. Every command is a thin shell over a library call and imports torch only when it runs."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from dllm import __version__
from dllm.cli import bench, data, generate, read, run_batch, samplers, schema, serve, speculate, train, trim
from dllm.cli import eval as evaluation
from dllm.cli import filter as filters
from dllm.errors import DllmError, first_line, out_of_memory

INTERRUPTED = 130  # the exit code that typer makes of Ctrl-C

app = typer.Typer(
    name="dllm",
    no_args_is_help=True,
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


for command in (generate.generate, generate.chat, generate.trace, read.read, samplers.samplers, bench.bench):
    app.command()(command)
for command in (
    evaluation.tune,
    train.train,
    schema.schema,
    serve.serve,
    run_batch.run_batch,
    speculate.speculate,
    speculate.align,
    trim.trim,
):
    app.command()(command)
for name, group in {"eval": evaluation.eval_app, "data": data.data_app, "filter": filters.filter_app}.items():
    app.add_typer(group, name=name)


def main() -> None:
    """Entry point of the console script: 0 success, 1 a user's mistake (one line), 2 usage, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # a console may lack signs that a model writes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except DllmError as error:
        _fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        _fail(f"out of memory ({first_line(error)}): a smaller batch, dtype bfloat16 or another device needs less")
    except OSError as error:  # a file that cannot be read or written
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            typer.echo("dllm: interrupted", err=True)
        raise


def _fail(message: str) -> NoReturn:
    typer.echo(f"dllm: {message}", err=True)
    sys.exit(1)
