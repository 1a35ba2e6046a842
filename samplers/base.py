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

A slot whose rule depends on what fills another one has a method `bind(slots)`: once the single slots are settled, the
merge calls it with their mapping and uses what it returns (Prophet's progress, EOSER's schedule).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

import dllm
from dllm import spec
from dllm.decoding.canvas import Decision, Span, State
from dllm.decoding.slots import Context, Needs, Sampler, Start, View, Window
from dllm.errors import DllmError, unknown

if TYPE_CHECKING:
    from dllm.decoding.prediction import Prediction


SINGLE = {  # slots of one owner, and what they decide
    "window": "which columns may be committed",
    "inputs": "what is fed to the model",
    "score": "how columns are ranked",
    "select": "which columns commit",
}


CHAINS = ("adjust", "amend")


@dataclass(frozen=True)
class Bundle:
    """The slots a named sampler owns, and those it assumes."""

    window: Window | None = None
    inputs: Any = None
    score: Callable[[View, Prediction], Tensor] | None = None
    select: Callable[[View, Prediction, Tensor], Tensor] | None = None
    adjust: tuple[Callable[[View, Prediction], Prediction], ...] = ()
    amend: tuple[Callable[[View, Prediction, Decision], Decision], ...] = ()
    assumes: dict[str, Any] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)
    memory: Start | None = None  # the first per-row leaves: a NamedTuple of (B, ...) tensors
    columns: Start | None = None  # the first per-column leaves: a NamedTuple of (B, L, ...) tensors
    reads: Callable[[State, Span], Tensor] | None = None  # extra columns to read (B, R), -1 for padding
    lookahead: Any = None  # the lookahead of a call that names none (FreeDave)


def merge(parts: list[tuple[str, Bundle]], defaults: Bundle) -> Sampler:
    """One sampler from named bundles; `defaults` fills what nobody owns or assumes."""
    slots: dict[str, Any] = {}
    for slot, decides in SINGLE.items():
        owners = [(name, b) for name, b in parts if getattr(b, slot) is not None]
        if len(owners) > 1:
            a, b = owners[0][0], owners[1][0]
            raise DllmError(f"samplers {a!r} and {b!r} both decide the {slot}, {decides}; keep one of them")
        assumed = [b.assumes[slot] for _, b in parts if slot in b.assumes]
        if owners:
            slots[slot] = getattr(owners[0][1], slot)
        else:
            slots[slot] = assumed[0] if assumed else getattr(defaults, slot)
    bundles = [b for _, b in parts] + [defaults]
    needs = Needs()
    for bundle in bundles:
        needs = needs | bundle.needs
    if needs.caches == ():
        raise DllmError(f"{'+'.join(name for name, _ in parts)}: no cache serves all of these samplers together")
    starts = [slots["window"]] + [b for b in bundles]
    settled = {slot: _bind(f, slots) for slot, f in slots.items()}
    return Sampler(
        name="+".join(name for name, _ in parts),
        **settled,
        adjust=tuple(_bind(f, settled) for b in bundles for f in b.adjust),
        amend=tuple(_bind(f, settled) for b in bundles for f in b.amend),
        needs=needs,
        starts=tuple((s.memory, s.columns) for s in starts if s.memory or s.columns),
        reads=tuple(b.reads for b in bundles if b.reads),
        lookahead=next((b.lookahead for b in bundles if b.lookahead is not None), None),
    )


def _bind(f: Any, slots: dict[str, Any]) -> Any:
    return f.bind(slots) if hasattr(f, "bind") else f


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
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        spec.check(self, f"sampler {self.name!r}")

    @classmethod
    def build(cls, preset: str | None = None, **params: Any) -> Method:
        """The method with these parameters on top of a named preset; unknown names are errors with the nearest one.

        The preset "published" is the class's own defaults.
        """
        presets = {"published": {}, **cls.presets}
        if preset is not None and preset not in presets:
            raise unknown("preset", preset, presets, of=f"sampler {cls.name!r}")
        return cls(**spec.settings(f"sampler {cls.name!r}", cls, {**(presets[preset] if preset else {}), **params}))

    def bundle(self, context: Context) -> Bundle:
        raise NotImplementedError


if not TYPE_CHECKING:
    __getattr__ = dllm.moved(__name__)
