"""`dllm read`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dllm.cli.options import loading, located, takes
from dllm.errors import DllmError


@takes(loading)
def read(
    prompt: Annotated[str, typer.Argument(help="What the answer is about.")],
    template: Annotated[
        str, typer.Option("--template", help='The answer with its open slots, such as "urgent: {urgent}".')
    ],
    slot: Annotated[
        list[str], typer.Option("--slot", metavar="NAME=LABEL,LABEL", help="The labels of a slot; may be repeated.")
    ],
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="NAME,NAME", help="Slots read together; later stages see the best labels."),
    ] = None,
    labels: Annotated[str, typer.Option(help="Of several tokens: chain, or product.")] = "auto",
    lengths: Annotated[
        str, typer.Option(help="Labels of different numbers of tokens: refuse, or condition on the number.")
    ] = "refuse",
    null: Annotated[str | None, typer.Option(help="A prompt without content, to calibrate by.")] = None,
    cfg_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 0 is off.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of the p of labels, as an evaluation fits it.")] = 1.0,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template (default: where there is one).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    **common: object,
) -> None:
    """Probabilities of allowed labels at the open slots of an answer, in one forward."""
    slots = {}
    for text in slot:
        name, sign, values = text.partition("=")
        if not sign or name in slots:
            raise DllmError(f"--slot {text!r} must be NAME=LABEL,LABEL, each name once")
        slots[name] = values.split(",")
    from dllm.call.reads import read
    from dllm.models.hub import load

    stages = [s.split(",") for s in stage] if stage else None
    found = read(
        load(located(common)[0]), prompt, template, slots=slots, stages=stages, labels=labels,
        lengths=lengths, null=null, cfg_scale=cfg_scale, temperature=temperature, chat=chat,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    console = Console(highlight=False)
    for name, said in found.slots.items():
        rows = Table.grid(padding=(0, 2))
        for label in sorted(said.p, key=lambda label: -said.p[label]):
            rows.add_row(Text(label), f"{said.p[label]:.4f}", f"{said.logp[label]:.4f}")
        console.print(Text(f"{name} (mass {said.mass:.3f}, {said.exact})", style="bold"))
        console.print(rows)
