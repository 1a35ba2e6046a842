"""`dllm speculate`: an autoregressive verifier, drafted by a dLLM; the text is the verifier's own. `dllm align`:
train one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dllm import spec
from dllm.cli.options import named
from dllm.errors import DllmError

if TYPE_CHECKING:
    from dllm.drafting.front import SpecOptions
    from dllm.drafting.request import SpecResult
    from dllm.drafting.verifier import CausalLM
    from dllm.models.native import NativeModel
    from dllm.models.tokenizer import Tokenizer
    from dllm.training.config import AlignConfig, PairHeadConfig
    from dllm.training.online import OnlineDrafter

DRAFTER = "tiny"
ACCEPTED = ("green", "cyan")  # alternating, so that the rounds can be told apart
CORRECTION = "bold yellow"


def speculate(
    prompt: Annotated[str, typer.Argument(help="The prompt; -: each line of standard input is one.")],
    verifier: Annotated[str, typer.Option("--verifier", help="tiny-ar, a folder, or a Hugging Face id.")] = "tiny-ar",
    drafter: Annotated[
        str,
        typer.Option(
            "--drafter",
            help="tiny, a folder, a Hugging Face id, suffix, lookup, recycle, stand, one of another package, or none.",
        ),
    ] = DRAFTER,
    verifier_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--verifier-arg",
            metavar="KEY=VALUE",
            help="An argument of dllm.load_verifier, such as dtype=bfloat16, device=cuda, revision=v2, "
            "device_map=auto, attn_implementation=sdpa; may be repeated.",
        ),
    ] = None,
    drafter_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter-arg",
            metavar="KEY=VALUE",
            help="An argument of dllm.load, such as dtype=bfloat16, mask_id=5, block_size=8; may be repeated.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 64,
    search: Annotated[
        str | None, typer.Option(help="eal, cps, viterbi, argmax, sample, cps_sample, tree, sample_tree.")
    ] = None,
    tree: Annotated[int, typer.Option(help="Node budget of a tree; 0 = chain.")] = 0,
    length: Annotated[str, typer.Option(help="cost, fixed:k=8, adl, failfast, heuristic, rejection.")] = "cost",
    carry: Annotated[str, typer.Option(help="Reuse unused slots of a draft: auto, always, off.")] = "auto",
    k: Annotated[int | None, typer.Option("--k", min=0, help="Most slots per draft; default: no such limit.")] = None,
    verify: Annotated[str, typer.Option(help="Judge a sampled chain by token or as a block.")] = "token",
    ngrams: Annotated[str, typer.Option(help="The n-gram proxy counts the text, or what the verifier said.")] = "text",
    graft: Annotated[
        list[str] | None,
        typer.Option("--graft", help="Another drafter, which joins the tree or the chain; may be repeated."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="A file for what outlives a text (suffix, recycle, stand); made if new."),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option("--corpus", help="A text file, or .jsonl of texts or ids, that suffix copies from too."),
    ] = None,
    pair_head: Annotated[
        str | None, typer.Option("--pair-head", help="A folder that `dllm align` made of a recipe of pair scores.")
    ] = None,
    trim: Annotated[
        str | None, typer.Option("--trim", help="A file of `dllm trim`, or how many ids the drafter's head computes.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option("--window", help="Tokens that the drafter reads: 256, 256:sinks=4,recall=128, auto (measured)."),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k best tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus, in (0, 1].")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    graphs: Annotated[
        bool | None, typer.Option("--graphs/--no-graphs", help="CUDA graphs; on where the pair allows it.")
    ] = None,
    learn: Annotated[
        Path | None,
        typer.Option(
            "--learn",
            metavar="FOLDER",
            help="The drafter learns from these texts where its drafts are rejected, and is kept in FOLDER, from which "
            "it goes on; --drafter says what it is at first.",
        ),
    ] = None,
    pace: Annotated[
        list[str] | None,
        typer.Option(
            "--pace",
            metavar="KEY=VALUE",
            help="How it learns: every=8 (texts), steps=4, lr=3e-4, batch_size=16, divergence, limit; may be repeated.",
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also decode plainly: speed-up and equality.")] = False,
) -> None:
    """Decode PROMPT speculatively; accepted spans are coloured, corrections and bonus tokens are yellow."""
    from dllm.drafting.front import speculate as run
    from dllm.drafting.registry import as_drafter, as_verifier, is_drafter_name
    from dllm.training.steps import patience

    if pace and learn is None:
        raise DllmError("--pace is of a drafter that learns: give --learn FOLDER")
    if drafter_arg and (drafter == "none" or is_drafter_name(drafter)):
        raise DllmError(f"--drafter-arg is for a model that drafts, not for {drafter!r}")
    v = as_verifier(named(verifier, verifier_arg, "--verifier-arg"))
    online = None if learn is None else _learner(learn, drafter, drafter_arg, pace or ())
    source = named(drafter, drafter_arg, "--drafter-arg") if drafter_arg else drafter
    d = online or (None if drafter == "none" else as_drafter(source))

    decode = partial(run, v, max_new_tokens=max_new_tokens, temperature=temperature)
    decode = partial(decode, top_k=top_k, top_p=top_p, seed=seed, stop=stop, graphs=graphs)
    kept: SpecOptions = {"store": store, "corpus": corpus or (), "graft": graft or None, "pair_head": pair_head}
    kept |= {"k": k, "verify": verify, "ngrams": ngrams, "trim": trim, "window": window}
    console = Console()
    assert online is None or learn is not None
    for number, text in enumerate(_prompts(prompt)):
        warming = (None, d if online is None else online.model)
        for warm in warming if compare and not number else ():  # the first forwards of a process are slow
            decode(drafter=warm, prompt=text, max_new_tokens=4)
        with patience() if online is not None else nullcontext() as interrupted:
            out: SpecResult = decode(
                drafter=d, prompt=text, search=search, tree=tree, length=length, carry=carry, **kept
            )
            if online is not None and learn is not None:
                online.save(learn)
        assert v.tokenizer is not None  # it has read the prompt
        console.print(coloured(out, v.tokenizer), highlight=False)
        table = Table("metric", "value", box=None)
        for name, value in out.metrics().items():
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        if compare:
            plain: SpecResult = decode(drafter=None, prompt=text)
            same = "yes" if plain.tokens == out.tokens else "no (a tie in rounding)"
            table.add_row("speed-up", f"{out.speedup_vs(plain):.3g}")
            table.add_row(*(("equal to plain decoding", same) if temperature == 0 else ()))
        if online is not None:
            told = f"{online.traffic.texts} texts, {online.student.updates} updates, in {learn}"
            table.add_row("learned from", told)
        console.print(table)
        if interrupted is not None and interrupted.is_set():
            typer.echo(f"stopped; what was learned is in {learn}: go on with the same command", err=True)
            raise typer.Exit(130)


def _prompts(given: str) -> Iterator[str]:
    """The prompt, or each line of standard input as it comes. Errors: bytes that are no text."""
    if given != "-":
        yield given
        return
    try:
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DllmError(f"standard input is no {error.encoding} text: {error.reason} at byte {error.start}") from None


def _learner(folder: Path, drafter: str, arguments: list[str] | None, pace: Sequence[str]) -> OnlineDrafter:
    """The drafter that `folder` keeps, or else this one, which begins to learn. Errors: a drafter that cannot learn, a
    folder that is of another drafter."""
    from dllm.drafting.registry import is_drafter_name
    from dllm.models.arguments import pairs
    from dllm.training.online import OnlineDrafter, Pace

    if drafter == "none" or is_drafter_name(drafter):
        raise DllmError(f"--learn is for a dLLM that drafts, which {drafter!r} is not")
    how = Pace(**spec.settings("--pace", Pace, pairs(pace, "--pace")))
    if not OnlineDrafter.holds(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DllmError(f"--learn {folder}: not a folder of a drafter that learns, and not empty; name a new one")
        return OnlineDrafter.load(named(drafter, arguments, "--drafter-arg"), pace=how)
    found = OnlineDrafter.load(named(str(folder), arguments, "--drafter-arg"), pace=how)
    if drafter not in (DRAFTER, found.start, str(folder)):
        raise DllmError(
            f"{folder} holds a drafter that began as {found.start!r}: leave out --drafter, or name another folder"
        )
    return found


def coloured(out: SpecResult, tokenizer: Tokenizer) -> Text:
    """The text with every round's accepted tokens in one colour; a sign of several tokens has that of its last."""
    text, at, shown = Text(), out.prompt_length, ""
    for i, (accepted, emitted) in enumerate(out.spans):
        for j in range(emitted):
            at += 1
            whole = tokenizer.decode(out.sequences[out.prompt_length : at], skip_special_tokens=True)
            if not whole.endswith("\ufffd"):
                text.append(whole[len(shown) :], style=ACCEPTED[i % 2] if j < accepted else CORRECTION)
                shown = whole
    return text[: len(out.text or "")]


def align(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as configs/align/tiny.yaml.")],
    problems: Annotated[int, typer.Option(min=0, help="Held-out prompts a task for tau; 0 = skip.")] = 50,
    length: Annotated[str, typer.Option(help="Length controller of that measurement.")] = "fixed:k=12",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the output folder.")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key.")] = None,
) -> None:
    """Train what a recipe names on a verifier's own outputs: a dLLM drafter (DEER; tau before, after, and without a
    model), pair scores for a drafter that stays as it is, or a head over the verifier's hidden states."""
    from dllm.training.config import AlignConfig, HeadRecipe, load_recipe

    config = load_recipe(recipe, overrides or ())
    if isinstance(config, AlignConfig):
        _drafter(config, problems, length, resume)
    elif isinstance(config, HeadRecipe):
        from dllm.training import heads

        typer.echo(f"head: {heads.run(config, resume)}")
    else:
        _pair_head(config, problems, length, resume)


def _drafter(config: AlignConfig, problems: int, length: str, resume: bool) -> None:
    from dllm.bench.drafting import held_out, tau_rows
    from dllm.drafting.registry import as_verifier
    from dllm.training.alignment.recipe import parts_of, run
    from dllm.training.answers import checked
    from dllm.training.checkpoint import begin

    begin(config, resume)  # refused before anything is measured
    checked(config)  # the same for prompts that are held out
    parts = parts_of(config)  # and for a vocabulary that does not fit
    first, v = parts.model, as_verifier(cast("CausalLM", parts.verifier))
    prompts = {task: held_out(first, task, problems) for task in config.tasks if problems}
    if problems and not prompts:
        typer.echo("tau is measured on the built-in tasks only: this recipe has prompts of its own")

    def show(name: str, drafter: str | NativeModel) -> None:
        for row in tau_rows(name, v, drafter, prompts, config.max_new_tokens, length):
            typer.echo(f"{row.name} {row.value:.2f} ({row.note})")

    show("suffix automaton", "suffix")
    show("before", first)
    run(config, resume)
    aligned = str(Path(config.output) / "model")
    typer.echo(f"aligned drafter: {aligned}")
    show("after", aligned)


def _pair_head(config: PairHeadConfig, problems: int, length: str, resume: bool) -> None:
    from dllm.bench.drafting import Course, held_out
    from dllm.training.pair_heads import parts, run

    folder = str(run(config, resume))
    typer.echo(f"pair head: {folder}")
    drafter, verifier = parts(config)
    fixed = {"length": length, "carry": "off"}
    settings = {
        "eal": fixed,
        "greedy walk over pairs": {"search": "argmax", "pair_head": folder, **fixed},
        "eal over pairs": {"pair_head": folder, **fixed},
    }
    for task in config.tasks if problems else ():
        prompts = held_out(drafter.model, task, problems)
        for name, found in Course(verifier, drafter, prompts, settings, config.max_new_tokens).tallies():
            typer.echo(f"{task}, {name}: tau {found.tau:.2f} ({found.note})")
