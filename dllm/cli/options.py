"""The options that every command shares which decodes with a masked-diffusion model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

Command = Callable[..., None]


def takes(shared: Command) -> Callable[[Command], Command]:
    """A command that also takes the options of `shared`, and gets them as further keywords."""

    def widened(command: Command) -> Command:
        theirs, own = (inspect.signature(f, eval_str=True).parameters.values() for f in (shared, command))
        parameters = [*theirs, *(p for p in own if p.kind is not p.VAR_KEYWORD)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return widened


def decoding(
    model: Annotated[
        str, typer.Option("--model", "-m", help="tiny (embedded), a folder, or a Hugging Face id.")
    ] = "tiny",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64 or auto.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    sampler: Annotated[
        str | None, typer.Option("--sampler", "-s", help="Name, name:param=value, or a+b; see `dllm samplers`.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option("--cache", "-c", help="none, prefix, dual, dual:left=16,right=16, ...")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="Width of the generation window.")
    ] = None,
    block_length: Annotated[int | None, typer.Option("--block-length", "-b", help="Columns of a block.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Forwards over the whole window (quota samplers); default one a token.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Request i uses seed + i.")] = 0,
) -> None:
    """A model, and the arguments of `dllm.generate` that decide how it answers."""


def loaded(common: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model of these options, and the other ones: arguments of `dllm.generate`."""
    from dllm.models.hub import load

    where = {name: common[name] for name in ("model", "dtype", "device")}
    arguments = {name: value for name, value in common.items() if name not in where}
    return load(where.pop("model"), **where), arguments
