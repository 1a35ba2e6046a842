"""`dllm run-batch`: a file of requests, a file of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dllm.cli.options import configured, loading, located, needing, serving, takes


@takes(loading)
@takes(serving)
def run_batch(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Requests, a JSON object a line (docs/deployment.md).")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Their answers, in the same order.")],
    prune: Annotated[
        bool, typer.Option("--prune", help="Let answers go that OUT has to requests which are no longer in IN.")
    ] = False,
    **common: object,
) -> None:
    """Answer a file of requests: OpenAI batch lines, or lines with a prompt or messages.

    A run that was killed goes on where it stopped. Requests that fail get an error line, the exit code is 1 then, and
    the next run tries them again.
    """
    with needing("serve"):
        from dllm.serve.batch import Batch
        from dllm.serve.server import hosted
    made, checkpoint = configured(common), located(common)[0]
    batch = Batch(source, target, made, Path(checkpoint.name).name)
    backend = hosted(checkpoint, made)
    try:
        answered, failed = batch.run(backend, prune=prune)
    finally:
        backend.close(drain=False)
    typer.echo(f"{answered} answers and {failed} errors in {target}", err=True)
    if failed:
        raise typer.Exit(1)
