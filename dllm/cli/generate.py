"""`dllm generate`, `dllm chat`, `dllm trace`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from dllm.errors import DllmError

Sampler = Annotated[
    str | None, typer.Option("--sampler", "-s", help="Name, name:param=value, or a+b; see `dllm samplers`.")
]
Cache = Annotated[str | None, typer.Option("--cache", "-c", help="none, prefix, dual, dual:left=16,right=16, ...")]
ModelName = Annotated[str, typer.Option("--model", "-m", help="tiny (embedded), a folder, or a Hugging Face id.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16, float64 or auto.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
NewTokens = Annotated[int | None, typer.Option("--max-new-tokens", "-n", help="Width of the generation window.")]
BlockLength = Annotated[int | None, typer.Option("--block-length", "-b", help="Columns of a block.")]
Steps = Annotated[
    int | None, typer.Option(help="Forwards over the whole window (quota samplers); default one a token.")
]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Request i uses seed + i.")]


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="One or more prompts; - reads standard input.")] = None,
    model: ModelName = "tiny",
    sampler: Sampler = None,
    cache: Cache = None,
    max_new_tokens: NewTokens = None,
    block_length: BlockLength = None,
    steps: Steps = None,
    temperature: Temperature = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Nucleus, in (0, 1].")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k best tokens.")] = None,
    cfg_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 0 is off.")] = 0.0,
    seed: Seed = 0,
    n: Annotated[int, typer.Option("--num", help="Answers per prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be repeated.")] = None,
    lookahead: Annotated[str | None, typer.Option(help="Rows of exact verification: an integer or auto.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows decoded at a time.")] = 8,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template (default: where there is one).")
    ] = None,
    infill: Annotated[bool, typer.Option(help="Fill the mask tokens inside the prompt.")] = False,
    early_stop: Annotated[
        bool, typer.Option("--early-stop/--no-early-stop", help="Stop behind a closed prefix with EOS.")
    ] = True,
    dtype: Dtype = None,
    device: Device = "auto",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Watch the canvas fill.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write the trace of the first answer to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of text.")] = False,
) -> None:
    """Decode one or more prompts with a masked-diffusion model."""
    from dllm.models.hub import load

    prompts = [sys.stdin.read().rstrip("\n") if p == "-" else p for p in prompt or []]
    arguments: dict[str, Any] = {
        "sampler": sampler, "cache": cache, "max_new_tokens": max_new_tokens, "block_length": block_length,
        "steps": steps, "temperature": temperature, "top_p": top_p, "top_k": top_k, "cfg_scale": cfg_scale,
        "seed": seed, "n": n, "stop": stop or None, "batch_size": batch_size, "chat": chat, "infill": infill,
        "early_stop": early_stop,
        "lookahead": int(lookahead) if lookahead and lookahead.isdigit() else lookahead, "trace": trace is not None,
    }  # fmt: skip
    loaded = load(model, dtype=dtype, device=device)
    given = None if not prompts else prompts[0] if len(prompts) == 1 else prompts
    console = Console(highlight=False)

    def show(output: Any) -> None:
        if as_json:
            row = {k: v for k, v in asdict(output).items() if k != "trace"}
            typer.echo(json.dumps({**row, "tokens_per_forward": output.tokens_per_forward}))
            return
        if not watch:
            console.print(Text(output.text))
        console.print(Text(_summary(output), style="dim"))

    waiting: dict[int, Any] = {}
    following = 0
    try:
        for index, output in _finished(loaded, given, arguments, watch, len(prompts) * n):
            waiting[index] = output
            if trace is not None and index == 0:
                output.trace.save(trace)
            while following in waiting:  # in the order of the prompts
                show(waiting.pop(following))
                following += 1
    finally:  # interrupted or not: what is finished is printed
        for index in sorted(waiting):
            show(waiting[index])


def _finished(model: Any, prompt: Any, arguments: dict[str, Any], watch: bool, total: int) -> Iterator[tuple[int, Any]]:
    """Outputs as they finish, with the index of their prompt; a progress bar on standard error for several prompts."""
    if watch:
        yield from _watch(model, prompt, arguments).items()
        return
    from tqdm import tqdm

    from dllm.generation import stream

    with tqdm(total=total, unit="prompt", leave=False, disable=None if total > 1 else True) as bar:
        for event in stream(model, prompt, **arguments):
            if event.output is not None:
                bar.update()
                yield event.request, event.output


def _summary(output: Any) -> str:
    parts = [
        f"{len(output.tokens)} tokens in {output.nfe} forwards ({output.tokens_per_forward:.2f} a forward)",
        f"{output.seconds:.2f} s",
        f"sampler {output.sampler}, cache {output.cache}",
        f"finished: {output.finish_reason}",
    ]
    if output.lossless is not None:
        parts.append("lossless" if output.lossless else "not guaranteed lossless")
    return " · ".join(parts)


def _watch(model: Any, prompt: Any, arguments: dict[str, Any]) -> dict[int, Any]:
    """Show the canvas while it fills: in place on a terminal, one line a forward elsewhere."""
    from dllm.generation import stream

    final: dict[int, str] = {}
    outputs: dict[int, Any] = {}
    console = Console(highlight=False)
    live = Live(console=console, refresh_per_second=30, transient=False) if console.is_terminal else None
    with live or _Nothing():
        for event in stream(model, prompt, drafts=True, **arguments):
            final[event.request] = final.get(event.request, "") + event.text
            text = Text()
            for index in sorted(final):
                text.append(final[index], style="bold")
                if index == event.request and event.draft:
                    text.append(event.draft, style="cyan")
                text.append("\n")
            if live:
                live.update(text)
            else:
                shown = (final[event.request] + (event.draft or "")).replace("\n", "⏎")
                console.print(Text(f"{event.nfe:4d}  {shown}"), soft_wrap=True)
            if event.output is not None:
                outputs[event.request] = event.output
                final[event.request] = event.output.text
    return outputs


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def chat(
    model: ModelName = "tiny",
    sampler: Sampler = None,
    cache: Cache = None,
    max_new_tokens: NewTokens = None,
    block_length: BlockLength = None,
    steps: Steps = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = "auto",
) -> None:
    """Talk with the model. /clear forgets the conversation, /quit (or Ctrl-D) leaves."""
    from dllm.generation import stream
    from dllm.models.hub import load

    loaded = load(model, dtype=dtype, device=device)
    console = Console(highlight=False)
    console.print(f"{loaded} · /clear forgets, /quit leaves", style="dim")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = console.input("[bold green]> [/]").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/clear":
            messages = []
            continue
        if not line:
            continue
        asked = [*messages, {"role": "user", "content": line}]
        arguments: dict[str, Any] = {
            "sampler": sampler, "cache": cache, "max_new_tokens": max_new_tokens, "block_length": block_length,
            "steps": steps, "temperature": temperature, "seed": seed,
        }  # fmt: skip
        try:
            output = None
            for event in stream(loaded, asked, **arguments):
                console.print(event.text, end="", markup=False)
                output = event.output or output
            console.print()
        except DllmError as error:  # the conversation goes on
            console.print(f"dllm: {error}", style="red", markup=False)
            continue
        except KeyboardInterrupt:
            console.print("\ninterrupted; the question was dropped", style="dim")
            continue
        assert output is not None
        console.print(_summary(output), style="dim")
        messages = [*asked, {"role": "assistant", "content": output.text}]


def trace(
    source: Annotated[Path, typer.Argument(help="A trace written by `dllm generate --trace run.json`.")],
    target: Annotated[
        Path | None, typer.Argument(help="Write an HTML page here; without it, show in the terminal.")
    ] = None,
) -> None:
    """Show which forward committed which token: in the terminal, or as an .html page or an .svg picture."""
    from dllm.trace import Trace

    loaded = Trace.load(source)
    if target is not None and target.suffix not in (".html", ".svg"):
        raise DllmError(f"{target}: a trace is written as .html or .svg")
    if target is not None and target.suffix == ".html":
        target.write_text(loaded.to_html(), encoding="utf-8")
    elif target is not None:
        console = Console(record=True, width=100, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
        _show(loaded, console)
        console.save_svg(str(target), title=f"dllm trace · {loaded.sampler}")
    else:
        _show(loaded, Console(highlight=False))
        return
    typer.echo(f"wrote {target}: {len(loaded.commits)} forwards")


def _show(loaded: Any, console: Console) -> None:
    """The text coloured by commit order, then what each forward wrote."""
    steps = max(len(loaded.commits), 1)
    text = Text()
    for piece, k in loaded.cells():
        shade = 0 if k is None else k / max(steps - 1, 1)
        colour = f"white on #{int(50 + 150 * shade):02x}46{int(200 - 150 * shade):02x}"
        text.append(piece, style="dim" if k is None else colour)
    console.print(text)
    console.print(f"\n{loaded.sampler}: {steps} forwards; blue first, red last", style="dim", highlight=False)
    for k, pairs in enumerate(loaded.commits):
        shown = "  ".join(f"{c}:{loaded.piece(t)!r}" if t != loaded.mask_id else f"{c}:re-masked" for c, t in pairs)
        console.print(Text(f"{k + 1:4d}  {shown}", style="dim"))
