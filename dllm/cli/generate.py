"""`dllm generate`, `dllm chat`, `dllm trace`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

import dllm
from dllm.call.output import Output
from dllm.cli.options import decoding, loaded, takes
from dllm.decoding.trace import BLANK, Trace
from dllm.errors import DllmError

if TYPE_CHECKING:
    from dllm.call.arguments import DecodingArguments
    from dllm.models.model import Model
    from dllm.models.tokenizer import Tokenizer


@takes(decoding)
def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="One or more prompts; - reads standard input. Without one, unconditional."),
    ] = None,
    cfg_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 0 is off.")] = 0.0,
    n: Annotated[int, typer.Option("--num", help="Answers per prompt.")] = 1,
    lookahead: Annotated[
        str | None, typer.Option(help="Rows of exact verification: an integer, auto, or 8:mode=fast,...")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows decoded at a time.")] = 8,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template (default: where there is one).")
    ] = None,
    infill: Annotated[bool, typer.Option(help="Fill the mask tokens inside the prompt.")] = False,
    early_stop: Annotated[
        bool, typer.Option("--early-stop/--no-early-stop", help="Stop behind a closed prefix with EOS.")
    ] = True,
    regex: Annotated[str | None, typer.Option(help="The answer matches this pattern fully.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="A string that the answer may be; may be repeated.")] = None,
    json_schema: Annotated[
        str | None, typer.Option(help="The answer is a document of this JSON schema: a file, or the schema itself.")
    ] = None,
    grammar: Annotated[
        str | None, typer.Option(help="The answer is a text of this grammar (lark's notation): a file, or the grammar.")
    ] = None,
    max_depth: Annotated[int | None, typer.Option(help="How deep the schema or the grammar may nest.")] = None,
    where: Annotated[str | None, typer.Option(help="holes: with --infill, each hole is constrained by itself.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Log-probabilities of the tokens, with so many alternatives (0 to 20).")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Watch the canvas fill.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write the trace of the first answer to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of text.")] = False,
    **common: object,
) -> None:
    """Decode one or more prompts with a masked-diffusion model.

    Answers go to standard output, what they cost to standard error.
    """
    prompts = [_standard_input() if p == "-" else p for p in prompt or []]
    model, arguments = loaded(common)
    arguments |= {
        "cfg_scale": cfg_scale, "batch_size": batch_size, "chat": chat, "infill": infill, "early_stop": early_stop,
        "trace": trace is not None, "lookahead": lookahead, "logprobs": logprobs,
    }  # fmt: skip
    asked: DecodingArguments = {
        "regex": regex,
        "choices": choice or None,
        "json_schema": None if json_schema is None else _text("--json-schema", json_schema, "{"),
        "grammar": None if grammar is None else _text("--grammar", grammar, ":"),
    }
    more = {k: v for k, v in (("max_depth", max_depth), ("where", where)) if v is not None}
    if more:
        asked = {"constraint": {**{k: v for k, v in asked.items() if v is not None}, **more}}
    arguments |= asked
    given = None if not prompts else prompts[0] if len(prompts) == 1 else prompts

    def show(output: Output) -> None:
        if as_json:
            row = {k: v for k, v in asdict(output).items() if k != "trace"}
            typer.echo(json.dumps({**row, "tokens_per_forward": output.tokens_per_forward}))
            return
        if not watch:
            typer.echo(output.text)
        console = Console(stderr=True)
        if output.logprobs is not None:
            console.print(table(output, model.tokenizer), highlight=False, soft_wrap=True)
        summarise(output, console)

    waiting: dict[int, Output] = {}
    following = 0
    try:
        for index, output in (_watched if watch else _finished)(model, given, n, arguments):
            waiting[index] = output
            if trace is not None and output.trace is not None and index == 0:
                output.trace.save(trace)
            while following in waiting:  # in the order of the prompts
                show(waiting.pop(following))
                following += 1
    finally:  # interrupted or not: what is finished is printed
        for index in sorted(waiting):
            show(waiting[index])


def _text(option: str, given: str, sign: str) -> str:
    """The text of a schema or a grammar, which has this sign in it, or the name of its file."""
    if sign in given and not given.endswith((".json", ".lark")):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DllmError(f"{option} {given}: {getattr(error, 'strerror', None) or error}") from None


def _standard_input() -> str:
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise DllmError(f"standard input is no {error.encoding} text: {error.reason} at byte {error.start}") from None


def _finished(
    model: Model, prompt: str | list[str] | None, n: int, arguments: DecodingArguments
) -> Iterator[tuple[int, Output]]:
    """Outputs as they finish, with the index of their prompt; a progress bar on standard error for several prompts."""
    from tqdm import tqdm

    total = n * (len(prompt) if isinstance(prompt, list) else 1)
    with tqdm(total=total, unit="prompt", leave=False, disable=None if total > 1 else True) as bar:
        for event in dllm.stream(model, prompt, n=n, **arguments):
            if event.output is not None:
                bar.update()
                yield event.request, event.output


def table(output: Output, tokenizer: Tokenizer | None) -> Table:
    """A line for each token: its log-probability, and its alternatives with theirs."""
    rows = Table.grid(padding=(0, 2))
    for token, said in zip(output.tokens, output.logprobs or (), strict=True):
        shown = [(token, said and said.logprob), *(said.top if said else ())]
        pieces = [repr(tokenizer.decode([t])) if tokenizer is not None else str(t) for t, _ in shown]
        values = ["given" if p is None else f"{p:.4f}" for _, p in shown]
        first, *others = zip(pieces, values, strict=True)
        rows.add_row(*map(Text, (*first, "  ".join(" ".join(pair) for pair in others))), style="dim")
    return rows


def summarise(output: Output, console: Console) -> None:
    """One line: what the answer cost, and why it ended."""
    parts = [
        f"{len(output.tokens)} tokens in {output.nfe} forwards ({output.tokens_per_forward:.2f} a forward)",
        f"{output.seconds:.2f} s",
        f"sampler {output.sampler}, cache {output.cache}",
        f"finished: {output.finish_reason}",
    ]
    if output.lossless is not None:
        parts.append(promise(output.lossless, output.stats))
    console.print(Text(" · ".join(parts), style="dim"), soft_wrap=True)


def promise(lossless: bool, stats: Mapping[str, Any]) -> str:
    """What the lookahead of an answer promises, with what it found out."""
    if stats["relax"]:
        return f"not lossless: the {stats['relax']} rule cut {stats['cuts']} of {stats['steps']} steps"
    if stats["mode"] == "guarded":
        return f"lossless while logits move by less than {stats['delta']:.1g}, {stats['reruns']} re-runs"
    if stats["mode"] == "fast":
        return f"not guaranteed lossless, {stats['divergences']} of {stats['audits']} checked steps diverged"
    return "lossless"


def _watched(
    model: Model, prompt: str | list[str] | None, n: int, arguments: DecodingArguments
) -> Iterator[tuple[int, Output]]:
    """Shows the canvas while it fills: in place on a terminal, one line a forward elsewhere. The outputs come last."""
    final: dict[int, str] = {}
    drafts: dict[int, str] = {}
    outputs: dict[int, Output] = {}
    console = Console(highlight=False)
    blank, line_end = _shown_as(BLANK, "_"), _shown_as("⏎", "|")
    live = Live(console=console, refresh_per_second=30) if console.is_terminal else None
    with live or nullcontext():
        for event in dllm.stream(model, prompt, drafts=True, n=n, **arguments):
            row = event.request
            final[row], drafts[row] = final.get(row, "") + event.text, (event.draft or "").replace(BLANK, blank)
            if event.output is not None:
                outputs[row], final[row] = event.output, event.output.text
            if live:
                parts = [((final[i], "bold"), (drafts[i], "cyan"), "\n") for i in sorted(final)]
                live.update(Text.assemble(*(part for line in parts for part in line)))
            else:
                shown = (final[row] + drafts[row]).replace("\n", line_end)
                typer.echo(f"{event.nfe:4d}  {shown}")
    yield from outputs.items()


def _shown_as(sign: str, plain: str) -> str:
    """The sign, or a plain one where standard output cannot write it."""
    try:
        sign.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return plain
    return sign


HELP = """/clear   forget the conversation
/help    these lines
/quit    leave (also Ctrl-D)
Ctrl-C   interrupt an answer; the question is dropped"""


@takes(decoding)
def chat(**common: object) -> None:
    """Talk with the model. /help lists the commands; lines can be edited, the arrows bring earlier ones back."""
    from dllm.call.job import prepare

    with suppress(ImportError):
        import readline  # noqa: F401  gives input() its line editing where the system has it
    model, arguments = loaded(common)
    if model.own_decoder is None:  # the arguments are those of the samplers
        prepare(model, [{"role": "user", "content": "?"}], arguments)  # a mistake is said now, not at the first message
    console = Console(highlight=False)
    console.print(f"{model} · /help lists the commands", style="dim")
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
        elif line.startswith("/"):
            console.print(HELP, style="dim", markup=False)
        elif line:
            messages = _answered(model, [*messages, {"role": "user", "content": line}], arguments, console)


def _answered(
    model: Model, asked: list[dict[str, str]], arguments: DecodingArguments, console: Console
) -> list[dict[str, str]]:
    """The conversation with its answer, printed as it becomes final; without the question where that failed."""
    output = None
    try:
        for event in dllm.stream(model, asked, **arguments):
            console.out(event.text, end="")
            output = event.output or output
        console.print()
    except DllmError as error:  # the conversation goes on
        console.print(f"dllm: {error}", style="red", markup=False)
        return asked[:-1]
    except KeyboardInterrupt:
        console.print("\ninterrupted; the question was dropped", style="dim")
        return asked[:-1]
    assert output is not None
    summarise(output, console)
    return [*asked, {"role": "assistant", "content": output.text}]


def trace(
    source: Annotated[Path, typer.Argument(help="A trace written by `dllm generate --trace run.json`.")],
    target: Annotated[
        Path | None, typer.Argument(help="Write this .html page or .svg picture; without it, show in the terminal.")
    ] = None,
) -> None:
    """Show which forward committed which token: in the terminal, or as an .html page or an .svg picture."""
    loaded = Trace.load(source)
    if target is None:
        _show(loaded, Console(highlight=False))
        return
    if target.suffix not in (".html", ".svg"):
        raise DllmError(f"{target}: a trace is written as .html or .svg")
    if target.suffix == ".html":
        target.write_text(loaded.to_html(), encoding="utf-8")
    else:
        console = Console(record=True, width=100, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
        _show(loaded, console)
        console.save_svg(str(target), title=f"dllm trace · {loaded.sampler}")
    typer.echo(f"wrote {target}: {len(loaded.commits)} forwards")


def _show(loaded: Trace, console: Console) -> None:
    """The text coloured by commit order, then what each forward wrote."""
    steps = len(loaded.commits)
    text = Text()
    for piece, k in loaded.cells():
        shade = 0 if k is None else k / max(steps - 1, 1)
        colour = f"white on #{int(50 + 150 * shade):02x}46{int(200 - 150 * shade):02x}"
        text.append(piece, style="dim" if k is None else colour)
    console.print(text)
    console.print(Text(f"\n{loaded.summary}", style="dim"))
    forwards = Table.grid(padding=(0, 2))
    forwards.add_column(justify="right", no_wrap=True)
    forwards.add_column(overflow="fold")
    for k, pairs in enumerate(loaded.commits):
        shown = "  ".join(f"{c}:{loaded.piece(t)!r}" if t != loaded.mask_id else f"{c}:re-masked" for c, t in pairs)
        forwards.add_row(str(k + 1), Text(shown), style="dim")
    console.print(forwards)
