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

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.decoding import noise
from dllm.decoding.canvas import Canvas, Decision, State, Window, scatter, spread
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
class Context:
    """What a bundle may know of the call it is built for."""

    block_length: int
    steps: int | None  # over the whole generation; None: one token a step
    windows: tuple[int, ...]  # columns of the generation windows of its rows, ascending, each once
    mask_id: int
    eos_ids: tuple[int, ...]
    vocab_size: int
    max_positions: int
    shift: int = 0
    block_size: int | None = None  # of a block-causal model: its blocks count from column 0
    tokenizer: Any = None
    family: str = ""

    @property
    def max_new_tokens(self) -> int:
        """The longest window of the call: for sizes of tables. A row goes by its own, `State.asked`."""
        return self.windows[-1]

    def budget(self, state: State) -> Tensor:
        """(B,) steps of each row."""
        return state.asked if self.steps is None else torch.full_like(state.asked, self.steps)

    @property
    def budgets(self) -> tuple[int, ...]:
        """The values that `budget` takes in this call, ascending."""
        return self.windows if self.steps is None else (self.steps,)


@dataclass(frozen=True)
class Needs:
    """What a sampler asks of the engine and the caches; checked when the sampler is built."""

    committed: bool = False  # reads committed columns of the window too
    generation: bool = False  # keeps history over columns outside the window
    extra_rows: int = 0  # additional query rows or branches a step
    edits_length: bool = False
    revises: bool = False  # may re-mask or edit what it wrote: no early stop inside a block
    may_idle: bool = False  # a step without a commit is legal
    stochastic: bool = False  # draws keyed noise even at temperature 0
    impure: bool = False  # a step depends on more than its state (global randomness, a clock): no lookahead
    filtered: bool = False  # confidences come from the law after temperature and filters
    caches: tuple[str, ...] | None = None  # the caches it works with; None for all
    caches_why: str = ""  # why no other cache serves it, as the end of a sentence

    def __or__(self, other: Needs) -> Needs:
        values: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            if f.name == "caches":
                values[f.name] = b if a is None else a if b is None else tuple(c for c in a if c in b)
            elif f.name == "extra_rows":
                values[f.name] = max(a, b)
            elif f.name == "caches_why":
                values[f.name] = ", and ".join(filter(None, (a, b)))
            else:
                values[f.name] = a or b
        return Needs(**values)


@dataclass(frozen=True)
class Bundle:
    """The slots a named sampler owns, and those it assumes."""

    window: Any = None
    inputs: Any = None
    score: Callable[[View, Prediction], Tensor] | None = None
    select: Callable[[View, Prediction, Tensor], Tensor] | None = None
    adjust: tuple[Callable[[View, Prediction], Prediction], ...] = ()
    amend: tuple[Callable[[View, Prediction, Decision], Decision], ...] = ()
    assumes: dict[str, Any] = field(default_factory=dict)
    needs: Needs = Needs()
    memory: Callable[[Canvas], dict[str, Tensor]] | None = None  # initial per-row leaves
    columns: Callable[[Canvas], dict[str, Tensor]] | None = None  # initial per-column leaves (B, L, ...)
    reads: Callable[[State, Window], Tensor] | None = None  # extra columns to read (B, R), -1 for padding
    lookahead: Any = None  # the lookahead of a call that names none (FreeDave)


class Sampler(NamedTuple):
    """Merged bundles: exactly what `step` runs."""

    name: str  # the names of its parts
    window: Any
    inputs: Any  # None: the canvas as it is
    score: Callable[[View, Prediction], Tensor]
    select: Callable[[View, Prediction, Tensor], Tensor]
    adjust: tuple[Callable[[View, Prediction], Prediction], ...]
    amend: tuple[Callable[[View, Prediction, Decision], Decision], ...]
    needs: Needs
    starts: tuple[tuple[Any, Any], ...]  # (memory, columns) initialisers
    reads: tuple[Callable[[State, Window], Tensor], ...]
    lookahead: Any = None
    stop: Callable[[View, Canvas], Tensor] | None = None  # (B,) rows that end with the canvas after the decision
    spec: str = ""  # name and parameters as a specification

    def start(self, canvas: Canvas) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The initial memory of every slot for these rows."""
        memory: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        for rows, cols in self.starts:
            memory |= rows(canvas) if rows else {}
            columns |= cols(canvas) if cols else {}
        return memory, columns


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


def widen(window: Window, extra: Tensor) -> Window:
    """The window that also reads `extra` (B, R) columns; those that it reads already are dropped."""
    seen = (extra[:, :, None] == window.reads[:, None]).any(-1)
    extra = torch.where(seen, -1, extra)
    new = extra[:, (extra >= 0).any(0)]  # a column that no row reads would cost a row of the head
    aside = torch.zeros_like(window.reads, dtype=torch.bool) if window.aside is None else window.aside
    aside = torch.cat([aside, torch.ones_like(new, dtype=torch.bool)], 1)
    return window._replace(reads=torch.cat([window.reads, new], 1), aside=aside)


class View:
    """What the slots see of one step: aligned (B, W) tables over the columns the step reads.

    `memory` and `columns` are copies: a slot assigns new tensors to their keys, never writes into a tensor.
    """

    def __init__(self, state: State, window: Window) -> None:
        canvas, cols = state.canvas, window.reads
        self.state = state
        self.canvas = canvas
        self.window = window
        self.cols = cols  # (B, W) absolute columns, -1 for padding
        self._at = cols.clamp(min=0)
        self.masked = canvas.masked.gather(1, self._at) & (cols >= 0)  # (B, W)
        self.live = self.inside & self.masked  # (B, W) the candidates C
        self.memory = dict(state.memory)
        self.columns = dict(state.columns)

    @property
    def inside(self) -> Tensor:
        """(B, W) bool: the columns of the window; a step may read others too."""
        return self.window.inside(self.cols)

    def narrow(self, lo: Tensor, hi: Tensor) -> None:
        """Shrink the window after the forward (AdaBlock)."""
        self.window = self.window._replace(lo=lo, hi=hi)
        self.live = self.inside & self.masked

    @property
    def held(self) -> Tensor:
        """(B,) the window stays where it is although nothing in it is masked: an `amend` may still change it."""
        return self.memory.get("window.hold", self.state.done & False)

    def gather(self, table: Tensor) -> Tensor:
        """A per-column table (B, L, ...) at the columns of this step: (B, W, ...)."""
        return table.gather(1, spread(self._at, table))

    def scatter(self, table: Tensor, values: Tensor, where: Tensor) -> Tensor:
        """The per-column table (B, L, ...) with `values` (B, W, ...) at the columns where `where` (B, W) holds."""
        return scatter(table, torch.where(where, self.cols, -1), values.to(table.dtype))

    def uniform(self, stream: int) -> Tensor:
        """(B, W) the keyed uniforms of this step, one a column."""
        return noise.uniform(self.state.seed[:, None], self.state.step[:, None], self.cols, stream)

    def commit(self, chosen: Tensor, token: Tensor) -> Decision:
        """The decision that writes `token` (B, W) where `chosen` (B, W)."""
        cols = torch.where(chosen, self.cols, -1)
        write = scatter(torch.zeros_like(self.canvas.masked), cols, True)
        no = torch.zeros_like(self.state.done)
        return Decision(write=write, token=scatter(self.canvas.ids, cols, token), done=no)


def rank(score: Tensor, among: Tensor) -> Tensor:
    """(B, W) 0-based rank of each candidate: highest score first, ties to the lowest position; W for the others."""
    order = score.masked_fill(~among, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    return torch.where(among, ranks, order.shape[1])


def best(score: Tensor, among: Tensor) -> Tensor:
    """(B, W) one-hot: the candidate of highest score, lowest position on ties; nothing where there is no candidate."""
    top = score.masked_fill(~among, -torch.inf).argmax(1, keepdim=True)
    return torch.zeros_like(among).scatter_(1, top, True) & among


# -- parameters of a named sampler ----------------------------------------------------------------------------------


# The highest bar for a confidence: above 1 nothing reaches it, which switches the rule off (one token a step is left of
# `threshold`). What is larger still is a slip: 7 for 0.7.
OFF = 2


def param(default: Any, why: str, *, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    """A documented parameter: default, the reason for it, and the range that `__post_init__` enforces."""
    return field(default=default, metadata={"why": why, "low": low, "high": high, "choices": choices})


def _is_float(value: Real) -> bool:
    """Whether a number is one as a float: no NaN, and no integer beyond all floats."""
    try:
        return not math.isnan(value)
    except OverflowError:
        return False


# annotation -> what fits it, and how to say so
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda v: isinstance(v, Integral) and not isinstance(v, bool), "an integer"),
    "float": (lambda v: isinstance(v, Real) and not isinstance(v, bool) and _is_float(v), "a number"),
    "bool": (lambda v: isinstance(v, bool), "true or false"),
}


def misfit(kind: Any, value: Any) -> str:
    """What a value of this annotation must be, empty where it is that; only integers, numbers and flags are checked."""
    kinds = str(getattr(kind, "__name__", kind)).split(" | ")
    if not set(kinds) <= {*KINDS, "None"} or (value is None and "None" in kinds):
        return ""
    fits, what = KINDS[kinds[0]]
    return "" if fits(value) else what


@dataclass(frozen=True)
class Method:
    """Base of the named samplers: a frozen dataclass of documented parameters that builds its bundle."""

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    cost: ClassVar[str] = "one row, the window's columns"
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if f.metadata:
                self._check(f.name, getattr(self, f.name), f)

    def _check(self, name: str, value: Any, f: dataclasses.Field) -> None:
        """Errors: a value of another kind than the annotation names, outside of the range, or none of the choices."""
        said = f"{self.name}: {name}={value!r} must be"
        low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
        if choices:
            if value not in choices:
                raise DllmError(f"{said} one of {', '.join(map(repr, choices))}")
            return
        if what := misfit(f.type, value):
            raise DllmError(f"{said} {what} (default {f.default!r})")
        if not isinstance(value, Real):  # without a value, or of a form that its method reads
            return
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"from {low}" if high is None else f"up to {high}" if low is None else f"in [{low}, {high}]"
            raise DllmError(f"{said} {bounds} (default {f.default!r})")

    @classmethod
    def build(cls, preset: str | None = None, **params: Any) -> Method:
        """The method with these parameters on top of a named preset; unknown names are errors with the nearest one.

        The preset "published" is the class's own defaults.
        """
        presets = {"published": {}, **cls.presets}
        if preset is not None and preset not in presets:
            raise unknown("preset", preset, presets, of=f"sampler {cls.name!r}")
        known = {f.name for f in dataclasses.fields(cls)}
        for key in params:
            if key not in known:
                raise unknown("parameter", key, known or {"(none)"}, of=f"sampler {cls.name!r}")
        return cls(**{**(presets[preset] if preset else {}), **params})

    def bundle(self, context: Context) -> Bundle:
        raise NotImplementedError
