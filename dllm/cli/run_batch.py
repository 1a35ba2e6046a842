"""`dllm run-batch`: a file of requests, a file of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dllm.cli.options import named
from dllm.errors import DllmError


def run_batch(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Requests, a JSON object a line (docs/deployment.md).")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Their answers, in the same order.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="tiny (embedded), a folder, or a Hugging Face id.")
    ] = "tiny",
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings, as `dllm serve` takes it.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One of them, such as max_rows=32; may be repeated."),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Let answers go that OUT has to requests which are no longer in IN.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64 or auto.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, mps.")] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option("--model-arg", metavar="KEY=VALUE", help="Any other argument of dllm.load; may be repeated."),
    ] = None,
) -> None:
    """Answer a file of requests: OpenAI batch lines, or lines with a prompt or messages.

    A run that was killed goes on where it stopped. Requests that fail get an error line, the exit code is 1 then, and
    the next run tries them again.
    """
    try:
        from dllm.serve.batch import Batch
        from dllm.serve.server import hosted, settings
    except ModuleNotFoundError as error:
        raise DllmError(f"{error.name} is missing: pip install 'dllm-toolkit[serve]'") from None
    given = {name: value for name, value in (("dtype", dtype), ("device", device)) if value is not None}
    made, checkpoint = settings(config, sets or (), {}), named(model, model_arg, given=given)
    batch = Batch(source, target, made, Path(checkpoint.name).name)
    backend = hosted(checkpoint, made)
    try:
        answered, failed = batch.run(backend, prune=prune)
    finally:
        backend.close(drain=False)
    typer.echo(f"{answered} answers and {failed} errors in {target}", err=True)
    if failed:
        raise typer.Exit(1)
