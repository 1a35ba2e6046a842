"""`dllm serve`: an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated

import typer

from dllm.cli.options import arguments, configured, located, needing, serving, takes


@takes(arguments)
@takes(serving)
def serve(
    model: Annotated[str, typer.Argument(help="tiny (embedded), a folder, or a Hugging Face id.")],
    host: Annotated[str | None, typer.Option(help="Address to listen at; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Default 8000; 0 takes a free one.")] = None,
    speculate: Annotated[
        str | None, typer.Option(metavar="DRAFTER", help="MODEL is an autoregressive verifier, and this drafts for it.")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="So many of it behind one address (Ray Serve).")] = None,
    autoscale: Annotated[
        str | None, typer.Option(metavar="MIN:MAX", help="The same, as many as the requests need.")
    ] = None,
    **common: object,
) -> None:
    """Serve a model: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics, /canvas.

    The API key comes from DLLM_API_KEY or a file (--set key_file=...); SIGTERM lets running answers end.
    """
    with needing("serve"):
        from dllm.serve.replicas import Scale, replicated
        from dllm.serve.server import listen
    made = configured(common, host=host, port=port, speculate=speculate)
    checkpoint, scale = located({"model": model, **common})[0], Scale.read(replicas, autoscale)
    if scale is None:
        listen(checkpoint, made)
    else:
        replicated(checkpoint, made, scale)
