"""The options that commands share which load a masked-diffusion model, or decode with one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from dllm.call.arguments import DecodingArguments
    from dllm.models.arguments import Checkpoint
    from dllm.models.native import NativeModel
    from dllm.serve.config import ServeConfig

Command = Callable[..., None]


def takes(shared: Command) -> Callable[[Command], Command]:
    """A command (or a set of options) that also takes the options of `shared`, and gets them as further keywords."""

    def widened(command: Command) -> Command:
        theirs, own = (inspect.signature(f, eval_str=True).parameters.values() for f in (shared, command))
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*theirs, *own) if p.kind is not p.VAR_KEYWORD]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return widened


def arguments(
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64 or auto.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, mps.")] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--model-arg",
            metavar="KEY=VALUE",
            help="Any other argument of dllm.load, such as mask_id=5, eos_ids=[1,2], block_size=8, shift=1, "
            "backend=transformers, revision=v2, quantization=int8, local_files_only=true; may be repeated.",
        ),
    ] = None,
) -> None:
    """The arguments of `dllm.load` beside the model."""


@takes(arguments)
def loading(
    model: Annotated[
        str, typer.Option("--model", "-m", help="tiny (embedded), a folder, or a Hugging Face id.")
    ] = "tiny",
) -> None:
    """A model, and the arguments of `dllm.load`."""


def serving(
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings (docs/serve.md).")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One of them, such as max_rows=16; may be repeated."),
    ] = None,
) -> None:
    """The settings of a server."""


@takes(loading)
def decoding(
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
    top_p: Annotated[float | None, typer.Option(help="Nucleus, in (0, 1].")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k best tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Request i uses seed + i.")] = 0,
    graphs: Annotated[
        bool | None, typer.Option("--graphs/--no-graphs", help="Decode by CUDA graphs (default: where they can be).")
    ] = None,
) -> None:
    """A model, and the arguments of `dllm.generate` that decide how it answers."""


def loaded(common: Mapping[str, object]) -> tuple[NativeModel, DecodingArguments]:
    """The model of these options, and the other ones: arguments of `dllm.generate`."""
    from dllm.models.hub import load

    where, arguments = located(common)
    return load(where), arguments


def located(common: Mapping[str, object]) -> tuple[Checkpoint, DecodingArguments]:
    """The checkpoint that these options name, not yet loaded, and the other options."""
    others = dict(common)
    model, texts = str(others.pop("model")), cast("list[str] | None", others.pop("model_arg"))
    given = {name: value for name in ("dtype", "device") if (value := others.pop(name)) is not None}
    return named(model, texts, given=given), cast("DecodingArguments", others)


def configured(common: Mapping[str, object], **own: object) -> ServeConfig:
    """The settings that the options of `serving` say, with a command's own ones over them."""
    from dllm.serve.server import settings

    path, sets = cast("Path | None", common["config"]), cast("list[str] | None", common["sets"])
    return settings(path, sets or (), {name: value for name, value in own.items() if value is not None})


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Imports of what an extra brings. Errors: one line that names it."""
    try:
        yield
    except ModuleNotFoundError as error:
        from dllm.errors import DllmError

        raise DllmError(f"{error.name} is missing: pip install 'dllm-toolkit[{extra}]'") from None


def named(
    name: str, texts: list[str] | None, option: str = "--model-arg", given: Mapping[str, object] | None = None
) -> Checkpoint:
    """A checkpoint with arguments given as KEY=VALUE texts, and others beside them."""
    from dllm.errors import DllmError
    from dllm.models.arguments import Checkpoint, LoadArguments, pairs

    read, given = pairs(texts or (), option), given or {}
    if twice := sorted(read.keys() & given.keys()):
        raise DllmError(f"{twice[0]} is given twice: as --{twice[0]} and as {option}")
    return Checkpoint(name, **LoadArguments.read({**read, **given}).given())
