"""`dllm samplers`: what each sampler does, where it comes from, what it needs and costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dllm.cli.options import loading, located, takes

if TYPE_CHECKING:
    from dllm.models.arguments import Checkpoint
    from dllm.samplers.catalog import Entry


@takes(loading)
def samplers(
    name: Annotated[str | None, typer.Argument(help="One sampler; all of them without a name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    write_docs: Annotated[
        Path | None, typer.Option(help="Write samplers.md and a picture of each sampler into this folder.")
    ] = None,
    **common: object,
) -> None:
    """List the unmasking schedulers: what they do, parameters and reasons, needs, cost, what composes.

    The model is that of the pictures, and the one whose own settings are shown.
    """
    from dllm.call.arguments import DEFAULTS, FamilyDefaults
    from dllm.samplers import catalog

    model, _ = located(common)
    if write_docs is not None:
        _write(write_docs, model)
        return
    console = Console(highlight=False, markup=False)
    entries = [catalog.describe(name)] if name else catalog.everything()
    if as_json:
        typer.echo(json.dumps(entries[0] if name else entries, indent=2, default=str))
    elif name:
        _one(entries[0], console)
        _own(name, model, console)
    else:
        table = Table("sampler", "what it does", "source")
        for e in entries:
            table.add_row(e["name"], e["summary"], e["source"])
        console.print(table)
        console.print("compose with '+', set parameters after ':', e.g. adablock+credit:alpha=0.7+prophet")
        families = ", ".join(f"{family}: {d.sampler}" for family, d in DEFAULTS.items())
        console.print(f"default sampler: {FamilyDefaults().sampler}; by family: {families}")


def _one(e: Entry, console: Console) -> None:
    from dllm.samplers import catalog

    console.print(Text.assemble((e["name"], "bold"), f"  ({e['source']})\n"))
    for paragraph in e["text"].split("\n\n"):
        console.print(paragraph.replace("\n", " ") + "\n")
    if e["parameters"]:
        table = Table("parameter", "default", "range", "why")
        for p in e["parameters"]:
            table.add_row(*(str(p[key]) for key in ("name", "default", "range", "why")))
        console.print(table)
    for preset, values in e["presets"].items():
        shown = ", ".join(f"{k}={v}" for k, v in values.items()) or "the defaults"
        console.print(f"preset {e['name']}:{preset}: {shown}")
    for key, value in catalog.facts(e).items():
        console.print(f"{key}: {value}")


def _own(name: str, model: Checkpoint, console: Console) -> None:
    """The settings that a model brings for a sampler and its compositions."""
    from dllm.models.hub import locate
    from dllm.models.settings import read_settings

    for key, s in read_settings(locate(model.name, **model.hub)).items():
        if name in key.split("+"):
            low, high = (100 * x for x in s.interval)
            figures = f"{100 * s.accuracy:.1f} % [{low:.1f}, {high:.1f}] at {s.tokens_per_forward:g} tokens a forward"
            against = f"{s.loss:+.1f} points lost against {s.baseline}, n = {s.n} ({s.task})"
            console.print(f"{model.name} brings for {key}: {s.spelled}: {figures}, {against}")


PROMPT = "Tom has 12 apples. He buys 7 more. Then he gives 5 to Ann. How many apples does he have now?"


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    from tqdm import tqdm

    import dllm
    from dllm.errors import DllmError
    from dllm.samplers import catalog, registry

    (folder / "samplers").mkdir(parents=True, exist_ok=True)
    model = dllm.load(checkpoint)
    if model.tokenizer is None:
        raise DllmError(f"{checkpoint.name} has no tokenizer, and the pictures begin with a text")
    separator = getattr(model.tokenizer, "sep_token_id", None)  # foreign
    ids = model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"] + ([separator] if separator else [])
    pictured = set()
    for sampler in tqdm(registry.names(), desc="pictures"):
        try:
            spec = {"name": sampler, **registry.method(sampler).example}
            out = dllm.generate(
                model, ids, sampler=spec, max_new_tokens=48, block_length=16, early_stop=False, trace=True
            )
        except DllmError as error:
            typer.echo(f"no picture of {sampler}: {error}", err=True)
            continue
        assert out.trace is not None  # it was asked for
        catalog.picture(out.trace, folder / "samplers" / f"{sampler}.png", f"{sampler}: {out.nfe} forwards")
        pictured.add(sampler)
    (folder / "samplers.md").write_text(catalog.markdown(pictured), encoding="utf-8")
