"""What is known about every sampler, from its own class: for `dllm samplers`, its JSON and docs/samplers.md."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict, cast

from dllm.decoding.slots import Context, Needs
from dllm.decoding.trace import Trace
from dllm.errors import DllmError
from dllm.models.tokenizer import Tokenizer
from dllm.samplers import registry
from dllm.samplers.base import SINGLE, Bundle, Method

log = logging.getLogger(__name__)

NEEDS = {
    "committed": "reads committed columns too",
    "generation": "reads the whole generation",
    "edits_length": "changes the length of a row",
    "revises": "takes back what it wrote",
    "whole_block": "an end token counts once its block is complete",
    "may_idle": "a step may commit nothing",
    "stochastic": "draws keyed noise at temperature 0",
    "impure": "depends on more than its state",
    "filtered": "reads confidences after temperature and filters",
}


class Entry(TypedDict):
    """Everything about one sampler, as `dllm samplers --json` has it."""

    name: str
    summary: str
    text: str
    source: str
    parameters: list[dict[str, object]]  # name, default, why that, and the range in words
    presets: dict[str, Mapping[str, object]]
    owns: list[str]
    assumes: list[str]
    needs: list[str]
    caches: tuple[str, ...] | None  # None: all
    asks: str | None  # what it must be told first
    cost: str
    composes_with: list[str]


class _Newlines:
    """Enough of a tokenizer to build every sampler without a model: id 3 is a new line."""

    def __len__(self) -> int:
        return 32

    def decode(self, ids: list[int]) -> str:
        return "".join("\n" if i == 3 else chr(64 + i) for i in ids)


@cache
def _contexts() -> tuple[Context, ...]:
    """Calls on models of several kinds: bidirectional, with the embedded model's vocabulary, block-causal and shifted.

    A sampler is described by the first that it can be built for.
    """
    plain = Context(
        block_length=8,
        steps=None,
        windows=(32,),
        mask_id=31,
        eos_ids=(2,),
        vocab_size=32,
        max_positions=512,
        tokenizer=cast("Tokenizer", _Newlines()),
    )
    config = json.loads(files("dllm.assets").joinpath("tiny", "config.json").read_text(encoding="utf-8"))
    return plain, replace(plain, vocab_size=config["vocab_size"]), replace(plain, shift=1, block_size=8)


def _build(*names: str) -> tuple[list[Bundle], str | None]:
    """The bundles of these samplers, composed, for the first kind of model that has them all; else the reason."""
    reason = None
    for context in _contexts():
        try:
            registry.build("+".join(names), context)
            return [registry.method(name)().bundle(context) for name in names], None
        except DllmError as error:
            reason = str(error)
    return [], reason


@cache
def clash(*names: str) -> str | None:
    """Why these samplers cannot be composed; None where they can."""
    return _build(*names)[1]


def everything() -> list[Entry]:
    """All samplers described; one of another package that cannot be is left out with a warning."""
    found = []
    for name in registry.names():
        try:
            found.append(describe(name))
        except DllmError as error:
            log.warning("%s", error)
    return found


@cache
def describe(name: str) -> Entry:
    """Everything about one sampler. Errors: unknown name, another package's that does not load."""
    cls = registry.method(name)
    with registry.OTHERS.blamed(name):
        return _described(name, cls)


def _described(name: str, cls: type[Method]) -> Entry:
    text = inspect.cleandoc(cls.__doc__ or "")
    parameters: list[dict[str, object]] = [
        {
            "name": f.name,
            "default": f.default,
            "why": f.metadata["why"],
            "range": _range(f.metadata),
        }
        for f in dataclasses.fields(cls)
        if f.metadata
    ]
    bundles, asks = _build(name)
    bundle = bundles[0] if bundles else Bundle()  # else it must be told something first
    others = [n for n in registry.names() if n != name]
    return {
        "name": name,
        "summary": text.split("\n\n")[0].replace("\n", " "),
        "text": text,
        "source": cls.source,
        "parameters": parameters,
        "presets": dict(cls.presets),
        "owns": [s for s in (*SINGLE, "adjust", "amend", "lookahead") if vars(bundle)[s]],
        "assumes": sorted(bundle.assumes),
        "needs": _needs(bundle.needs, bool(bundle.reads)),
        "caches": bundle.needs.caches,
        "asks": asks,
        "cost": cls.cost,
        "composes_with": [n for n in others if clash(name, n) is None],
    }


def _range(meta: Mapping[str, Any]) -> str:
    low, high = meta["low"], meta["high"]
    if meta["choices"]:
        return ", ".join(map(str, meta["choices"]))
    if low is None and high is None:
        return ""
    return f"from {low}" if high is None else f"up to {high}" if low is None else f"{low} to {high}"


def _needs(needs: Needs, reads: bool) -> list[str]:
    found = [text for key, text in NEEDS.items() if vars(needs)[key]]
    found += [] if needs.attention is None else [f"attention weights of {needs.attention}"]
    return found + ["reads columns outside the window"] * reads


# -- docs/samplers.md -----------------------------------------------------------------------------------------------


def markdown(pictured: Collection[str] = ()) -> str:
    """The page about all samplers; `pictured` are those with an image in the folder samplers/ beside it."""
    entries = everything()
    lines = [
        "# Samplers",
        "",
        "Written by `dllm samplers --write-docs docs`. A sampler decides which masked columns are committed in a step.",
        "Names compose with `+`, parameters follow a colon: `adablock+credit:alpha=0.7+prophet`. In a composition an",
        "*owned* slot wins over an *assumed* one, and two owners of one slot are refused.",
        "",
        "The defaults are the published ones. A name without parameters takes the settings that a model brings (the",
        "embedded one does; `dllm tune --save` writes them beside yours), and `output.sampler` says what ran. With the",
        "preset `published` (`prophet:published`) a sampler keeps its defaults whatever the model brings.",
        "",
        "A picture shows one answer of the embedded model: a line for each forward, a square for each generated",
        "column. Dark squares are committed by that forward, pale ones were before, red ones are taken back.",
        "",
        "| sampler | what it does | source |",
        "|---|---|---|",
        *(f"| [{e['name']}](#{e['name']}) | {_cell(e['summary'])} | {e['source']} |" for e in entries),
    ]
    for e in entries:
        lines += ["", f"## {e['name']}", "", e["text"], "", f"Source: {e['source']}.", ""]
        if e["name"] in pictured:
            lines += [f"![commit order of {e['name']}](samplers/{e['name']}.png)", ""]
        if e["parameters"]:
            lines += ["| parameter | default | range | why this default |", "|---|---|---|---|"]
            lines += [
                f"| `{p['name']}` | `{p['default']}` | {p['range']} | {_cell(str(p['why']))} |" for p in e["parameters"]
            ]
            lines += [""]
        for preset, values in e["presets"].items():
            lines += [f"- preset `{e['name']}:{preset}`: {_values(values)}"]
        lines += [""] * bool(e["presets"])
        lines += [f"- {key}: {value}" for key, value in facts(e).items()]
    return "\n".join(lines) + "\n"


def facts(entry: Entry) -> dict[str, str]:
    """The lines below the parameters."""
    out = {"cost": entry["cost"]}
    if entry["asks"]:
        out["must be told"] = entry["asks"]
    out["owns"] = ", ".join(entry["owns"]) or "nothing"
    if entry["assumes"]:
        out["assumes"] = ", ".join(entry["assumes"])
    out["needs"] = "; ".join(entry["needs"]) or "nothing beyond the window's columns"
    out["caches"] = ", ".join(entry["caches"]) if entry["caches"] is not None else "all"
    out["composes with"] = ", ".join(entry["composes_with"]) or "nothing"
    return out


def _values(values: Mapping[str, object]) -> str:
    return ", ".join(f"{k}={v}" for k, v in values.items()) or "the defaults"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# -- pictures -------------------------------------------------------------------------------------------------------


def picture(trace: Trace, path: Path, title: str = "") -> None:
    """Draw the commit order of a trace: a line for each forward, a square for each generated column."""
    try:
        import matplotlib
    except ImportError as error:
        raise DllmError("pictures need matplotlib: pip install 'dllm-toolkit[plots]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    start, forwards = len(trace.prompt), len(trace.commits)
    width = max([*trace.lengths, len(trace.final)]) - start
    colours = np.ones((forwards, width, 3))
    written = np.zeros(width, dtype=bool)
    for k, pairs in enumerate(trace.commits):
        colours[k, : trace.lengths[k] - start] = 0.93  # masked
        colours[k, written] = (0.72, 0.82, 0.93)
        for column, token in pairs:
            back = token == trace.mask_id
            if back and not written[column - start]:
                continue  # a mask that was inserted
            written[column - start] = not back
            colours[k, column - start] = (0.84, 0.19, 0.15) if back else (0.13, 0.33, 0.62)
    figure, axes = plt.subplots(figsize=(max(3.0, width / 9), max(1.2, forwards / 9 + 0.7)), dpi=72)
    axes.imshow(colours, interpolation="nearest", aspect="equal")
    axes.set_xlabel("column"), axes.set_ylabel("forward")
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
