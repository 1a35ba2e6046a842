"""Slots, bundles and how bundles merge. A named sampler is one file with one bundle.

Six slots make a sampler (docs/architecture.md):

    window   which columns may be committed, which must be read, when a new cache epoch starts      one
    inputs   what is fed to the model, and how its answers are folded back                          one
    score    ranks the columns of the window, higher first                                          one
    select   which candidates commit                                                                one
    adjust   changes the prediction, for score and select only                                      chain
    amend    changes the decision: exit, re-mask, edit, insert                                      chain

A bundle *owns* slots and *assumes* defaults for others. In `a+b` an assumption yields to an owner; two owners of a
single-choice slot clash. Order matters in the chains only.

What each slot takes and gives is said by its protocol in `dllm.decoding.slots`. A selection that is a `Schedule` tells
the other slots its progress as `view.schedule` (Prophet, EOSER).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any, ClassVar, TypeAlias, TypedDict, TypeVar

from dllm import spec
from dllm.decoding.canvas import Canvas, Leaf
from dllm.decoding.slots import (
    Adjust,
    Amend,
    Context,
    Inputs,
    Needs,
    Reads,
    Sampler,
    Schedule,
    Score,
    Select,
    Start,
    Window,
)
from dllm.errors import DllmError, unknown

T = TypeVar("T")
Presets: TypeAlias = Mapping[str, Mapping[str, object]]  # name -> parameters

SINGLE = {  # slots of one owner, and what they decide
    "window": "which columns may be committed",
    "inputs": "what is fed to the model",
    "score": "how columns are ranked",
    "select": "which columns commit",
}


class Assumed(TypedDict, total=False):
    """The slots that a bundle would like filled so, where nobody owns them."""

    window: Window
    inputs: Inputs
    score: Score
    select: Select


@dataclass(frozen=True)
class Sized:
    """The first leaves of a slot that follows the columns of the window, whoever owns that.

    `first(canvas, columns, steps)`: the window holds so many columns at most, and one is read as a mask in so many
    steps at most; None: no bound is known, as the sampler takes tokens back, idles or edits the length.
    """

    first: Callable[[Canvas, int, int | None], Leaf]

    def start(self, window: Window, needs: Needs) -> Start:
        """The leaves in a sampler with this window and these needs."""
        endless = needs.revises or needs.may_idle or needs.edits_length

        def first(canvas: Canvas) -> Leaf:
            # each step commits one of the fewer than 2 n columns that are ever in the window together with this one
            columns = window.widest(canvas)
            return self.first(canvas, columns, None if endless else 2 * columns - 1)

        return first


@dataclass(frozen=True)
class Bundle:
    """The slots a named sampler owns, and those it assumes."""

    window: Window | None = None
    inputs: Inputs | None = None
    score: Score | None = None
    select: Select | None = None
    adjust: tuple[Adjust, ...] = ()
    amend: tuple[Amend, ...] = ()
    assumes: Assumed = field(default_factory=Assumed)
    needs: Needs = field(default_factory=Needs)
    memory: Start | Sized | None = None  # the first per-row leaves: a NamedTuple of (B, ...) tensors
    columns: Start | Sized | None = None  # the first per-column leaves: a NamedTuple of (B, L, ...) tensors
    reads: Reads | None = None  # extra columns to read
    lookahead: object = None  # the lookahead of a call that names none (FreeDave)


def merge(parts: list[tuple[str, Bundle]], defaults: Bundle) -> Sampler:
    """One sampler from named bundles; `defaults` fills what nobody owns or assumes. Errors: two owners of one slot,
    needs that no cache meets."""
    name = "+".join(name for name, _ in parts)
    window = _settled("window", [(n, b.window, b.assumes.get("window")) for n, b in parts]) or defaults.window
    score = _settled("score", [(n, b.score, b.assumes.get("score")) for n, b in parts]) or defaults.score
    select = _settled("select", [(n, b.select, b.assumes.get("select")) for n, b in parts]) or defaults.select
    assert window is not None and score is not None and select is not None, "the defaults fill these"
    bundles = [b for _, b in parts] + [defaults]
    needs = _needs(parts, defaults)

    def starts(b: Bundle) -> tuple[Start | None, Start | None]:
        memory, columns = (f.start(window, needs) if isinstance(f, Sized) else f for f in (b.memory, b.columns))
        return memory, columns

    if needs.caches == ():
        raise DllmError(f"{name}: no cache serves all of these samplers together")
    return Sampler(
        name=name,
        window=window,
        inputs=_settled("inputs", [(n, b.inputs, b.assumes.get("inputs")) for n, b in parts]),
        score=score,
        select=select,
        adjust=tuple(f for b in bundles for f in b.adjust),
        amend=tuple(f for b in bundles for f in b.amend),
        needs=needs,
        starts=((window.memory, window.columns), *map(starts, bundles)),
        reads=tuple(b.reads for b in bundles if b.reads),
        schedule=select if isinstance(select, Schedule) else None,
        lookahead=next((b.lookahead for b in bundles if b.lookahead is not None), None),
    )


def _needs(parts: list[tuple[str, Bundle]], defaults: Bundle) -> Needs:
    """What all of them ask. Errors: two that read the attention of different layers."""
    reading = [(name, b.needs.attention) for name, b in parts if b.needs.attention is not None]
    for name, attention in reading[1:]:
        first, other = reading[0]
        if attention.layers != other.layers:
            raise DllmError(
                f"samplers {first!r} and {name!r} read the attention of different layers, {other} and {attention}; "
                "give both the same"
            )
    return reduce(or_, (b.needs for _, b in parts), defaults.needs)


def _settled(slot: str, parts: list[tuple[str, T | None, T | None]]) -> T | None:
    """What fills a single slot: its owner's, else the first that a bundle assumes. parts: (name, owned, assumed)."""
    owned = [(name, own) for name, own, _ in parts if own is not None]
    if len(owned) > 1:
        a, b = owned[0][0], owned[1][0]
        raise DllmError(f"samplers {a!r} and {b!r} both decide the {slot}, {SINGLE[slot]}; keep one of them")
    return next((own for _, own in owned), None) or next((like for *_, like in parts if like is not None), None)


# The highest bar for a confidence: above 1 nothing reaches it, which switches the rule off (one token a step is left of
# `threshold`). What is larger still is a slip: 7 for 0.7.
OFF = 2

param = spec.param  # authors of samplers import it from here


@dataclass(frozen=True)
class Method:
    """Base of the named samplers: a frozen dataclass of documented parameters that builds its bundle."""

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    cost: ClassVar[str] = "one row, the window's columns"
    presets: ClassVar[Presets] = {}
    example: ClassVar[Mapping[str, object]] = {}  # parameters that show the rule on a small model and a short answer

    def __post_init__(self) -> None:
        spec.check(self, f"sampler {self.name!r}")

    @classmethod
    def build(cls, preset: str | None = None, **params: Any) -> Method:
        """The method with these parameters on top of a named preset; unknown names are errors with the nearest one.

        The preset "published" is the class's own defaults.
        """
        presets: Presets = {"published": {}, **cls.presets}
        if preset is not None and preset not in presets:
            raise unknown("preset", preset, presets, of=f"sampler {cls.name!r}")
        return cls(**spec.settings(f"sampler {cls.name!r}", cls, {**(presets[preset] if preset else {}), **params}))

    def bundle(self, context: Context) -> Bundle:
        """The slots that this sampler owns or assumes in such a call. Errors: a call that it cannot serve, and why."""
        raise NotImplementedError
