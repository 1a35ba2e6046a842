"""What a sampler is made of, and what its slots see of a step: Sampler, Needs, Context, View."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from dllm.decoding import noise
from dllm.decoding.canvas import Canvas, Decision, Fed, Leaf, Leaves, Plan, Span, State
from dllm.decoding.columns import marked, packed, scatter, spread
from dllm.decoding.prediction import Prediction
from dllm.errors import DllmError
from dllm.models.tokenizer import Tokenizer


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
    tokenizer: Tokenizer | None = None
    family: str = ""
    logits: torch.dtype = torch.float32  # of the predictions

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


Layers: TypeAlias = tuple[Literal["last"], int] | tuple[Literal["share"], float] | frozenset[int]


class Attention(NamedTuple):
    """Attention weights that a sampler reads, as `Prediction.attention`: the mean over some layers and all heads.

    ("last", 4): the last four layers, or all where there are fewer; ("share", 0.3): the last three tenths of them,
    rounded up; frozenset({22, 23}): these, from 0.
    """

    layers: Layers
    rows: Literal["window", "all"] = "window"  # of the columns that the step reads, or of every column that it feeds

    @classmethod
    def last(cls, layers: int | Sequence[int], name: str, rows: Literal["window", "all"] = "window") -> Self:
        """The last so many layers, or those of a list, as a parameter of sampler `name` says. Errors: neither."""
        numbers = [layers] if isinstance(layers, int) else list(layers) if isinstance(layers, Sequence) else []
        good = numbers and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in numbers)
        if not good or layers == 0:
            raise DllmError(f"sampler {name!r}: layers={layers!r} is no number of last layers and no list of layers")
        return cls(("last", layers) if isinstance(layers, int) else frozenset(numbers), rows)

    def of(self, layers: int, name: str) -> Attention:
        """The same with the layers named one by one, for a model that gives the weights of so many. Errors: it gives
        none, or not those."""
        if not layers:
            raise DllmError(
                f"sampler {name!r} reads attention weights, and this model gives none: it runs through another "
                "backend, or its heads are split over processes; load it natively on one device"
            )
        if isinstance(self.layers, frozenset):
            if absent := sorted(i for i in self.layers if not 0 <= i < layers):
                raise DllmError(f"sampler {name!r} reads layer {absent[0]}; this model has layers 0 to {layers - 1}")
            return self
        kind, value = self.layers
        count = min(int(value), layers) if kind == "last" else layers - int(layers * (1 - value))
        return self._replace(layers=frozenset(range(layers - count, layers)))

    def __str__(self) -> str:
        if isinstance(self.layers, frozenset):
            return f"layers {', '.join(map(str, sorted(self.layers)))}"
        kind, value = self.layers
        return f"the last {value} layers" if kind == "last" else f"the last {value:.0%} of the layers"


@dataclass(frozen=True)
class Needs:
    """What a sampler asks of the engine and the caches; checked when the sampler is built."""

    committed: bool = False  # reads committed columns of the window too
    edits_length: bool = False
    revises: bool = False  # may re-mask or edit what it wrote: no early stop inside a block
    whole_block: bool = False  # nor has this one
    generation: bool = False  # reads every column of the generation at every step
    may_idle: bool = False  # a step without a commit is legal
    stochastic: bool = False  # an answer depends on its seed even at temperature 0
    edits: bool = False  # may write another token over a committed one
    impure: bool = False  # a step depends on more than its state (global randomness, a clock): refused by lookahead
    filtered: bool = False  # confidences come from the law after temperature and filters
    attention: Attention | None = None  # weights that it reads; None: nothing is computed
    caches: tuple[str, ...] | None = None  # the caches it works with; None for all
    caches_why: str = ""  # why no other cache serves it, as the end of a sentence

    def __or__(self, other: Needs) -> Needs:
        """What both ask; who merges samplers has seen that they read the attention of the same layers."""
        mine, theirs = self.caches, other.caches
        caches = theirs if mine is None else mine if theirs is None else tuple(c for c in mine if c in theirs)
        why = ", and ".join(filter(None, (self.caches_why, other.caches_why)))
        either = {name: flag or vars(other)[name] for name, flag in vars(self).items()}
        if other.attention is not None and other.attention.rows == "all":
            either["attention"] = other.attention
        return Needs(**{**either, "caches": caches, "caches_why": why})


class Hold(NamedTuple):
    """Per-row leaves of a sampler that may keep a window open although nothing in it is masked (editing)."""

    held: Tensor  # (B,) bool: the window stays where it is
    rounds: Tensor  # (B,) forwards on it since its last mask was written


class Closed(NamedTuple):
    """Per-row leaves of a call with stop strings: the end of the prefix that can change no more."""

    end: Tensor  # (B,)


Start: TypeAlias = Callable[[Canvas], Leaf | None]  # the first leaves of rows with this canvas
Reads: TypeAlias = Callable[[State, Span], Tensor]  # (B, R) columns to read beside the window's, -1 for padding


class Window(Protocol):
    """The slot that says which columns may be committed and which must be read. Derive from it to have its defaults."""

    def open(self, state: State) -> tuple[State, Span]:
        """The window of this step before its forward, and the state that remembers it."""
        ...

    @property
    def whole(self) -> bool:
        """Whether it is the whole generation, whatever the length of a block."""
        return False

    def narrow(self, view: View, pred: Prediction) -> None:
        """Change the window after the forward, by `view.narrow` (AdaBlock). By default it stays."""
        return None

    def widest(self, canvas: Canvas) -> int:
        """The most columns that it ever holds of such rows. Slots that follow its columns size their leaves by it."""
        return canvas.ids.shape[1]

    def memory(self, canvas: Canvas) -> Leaf | None:
        """Its first per-row leaves (B, ...); None where it remembers nothing."""
        return None

    def columns(self, canvas: Canvas) -> Leaf | None:
        """Its first per-column leaves (B, L, ...); None where it remembers nothing."""
        return None


class Forward(Protocol):
    """One forward as `Inputs.reduce` sees it."""

    state: State
    window: Span
    extra: object  # what `reduce` told at an earlier read of it; None at the first

    def private(self) -> Tensor:
        """Logits (copies B, E, V) of the queries that `expand` added behind those of the plan."""


class Inputs(Protocol):
    """The slot that changes what is fed, and folds the answers back. Derive from it to have its defaults."""

    lanes: ClassVar[int] = 1  # of the store, a row

    def cover(self, fed: Fed, state: State, window: Span) -> Fed:
        """What a forward feeds, before it is planned: `fed`, or some of its columns with all that the step reads."""
        return fed

    def expand(self, plan: Plan, state: State, window: Span) -> Plan:
        """The plan that is fed: `plan` with more queries behind its own, which nobody else reads, or with copies of all
        its rows, one after the other. Row i of copy c is row c B + i."""
        return plan

    def reduce(self, logits: Tensor, cols: Tensor, forward: Forward) -> tuple[Tensor, object]:
        """Logits (B, W, V) at `cols` (B, W) from those of all copies (copies B, W, V); and what the slots of this step
        shall know of the forward, as `Prediction.extra`."""
        return logits, None

    def answering(self, forward: Forward) -> Tensor:
        """(B,) the copy whose attention weights count, after `reduce`. By default the first."""
        return torch.zeros_like(forward.state.step)

    def canvas(self, forward: Forward) -> Canvas:
        """The canvas that the logits are of, after `reduce`: the state's, or that of the copy that answers."""
        return forward.state.canvas


class Score(Protocol):
    """The slot that ranks the candidates."""

    def __call__(self, view: View, soft: Prediction, /) -> Tensor:
        """(B, W), higher commits earlier; ties go to the lowest position. `soft` is what `adjust` left."""


class Select(Protocol):
    """The slot that chooses the candidates to commit; one with a fixed number of steps is a `Schedule`, too."""

    def __call__(self, view: View, soft: Prediction, score: Tensor, /) -> Tensor:
        """(B, W) bool. The engine cuts it to `view.live`, and adds the best candidate where a row chose nothing."""


class Adjust(Protocol):
    """A link of the chain that changes the prediction, for score and select only."""

    def __call__(self, view: View, soft: Prediction, /) -> Prediction:
        """`soft`, or what stands for it from here on (`Prediction.rescored`)."""


class Amend(Protocol):
    """A link of the chain that changes the decision: exit, re-mask, edit, insert."""

    def __call__(self, view: View, pred: Prediction, d: Decision, /) -> Decision:
        """The decision from here on. `pred` is the raw prediction, whatever `adjust` did."""


class Schedule(ABC):
    """A `Select` whose number of steps is known in advance. Others read its progress as `view.schedule` (Prophet)."""

    @abstractmethod
    def elapsed(self, view: View) -> Tensor:
        """(B,) steps of the schedule before this one, skipped ones included."""

    def fraction(self, view: View) -> Tensor | None:
        """(B,) progress behind this step, at most 1, of a schedule whose steps differ; None where each counts alike."""
        return None


class Ending(Protocol):
    """What ends a row before its canvas is full."""

    def __call__(self, view: View, canvas: Canvas, /) -> Tensor:
        """(B,) bool: rows that end with the canvas after the decision."""

    def over(self, ids: list[int], seen: int, /) -> bool:
        """Whether the host ends a row: `ids` are closed, `seen` of them were before; asked where `Closed` grows."""


class Sampler(NamedTuple):
    """Merged bundles: exactly what `step` runs."""

    name: str  # the names of its parts
    window: Window
    inputs: Inputs | None  # None: the canvas as it is
    score: Score
    select: Select
    adjust: tuple[Adjust, ...]
    amend: tuple[Amend, ...]
    needs: Needs
    starts: tuple[tuple[Start | None, Start | None], ...]  # of memory and of columns
    reads: tuple[Reads, ...]
    schedule: Schedule | None = None  # `select`, where its number of steps is known in advance
    lookahead: object = None  # that of a call which names none, as `Lookahead.parse` takes it
    stop: Ending | None = None
    spec: str = ""  # name and parameters as a specification

    def reading(self, layers: int) -> Sampler:
        """The same for a model that gives the attention weights of so many layers. Errors: `Attention.of`."""
        if self.needs.attention is None:
            return self
        return self._replace(needs=replace(self.needs, attention=self.needs.attention.of(layers, self.name)))

    def start(self, canvas: Canvas) -> tuple[Leaves, Leaves]:
        """The first per-row and per-column leaves of every slot for these rows."""
        first = ([f(canvas) for f in side if f] for side in zip(*self.starts, strict=True))
        memory, columns = (Leaves().plus(*(leaf for leaf in side if leaf is not None)) for side in first)
        return memory, columns


def widen(window: Span, extra: Tensor, width: int) -> Span:
    """The window that also reads `extra` (B, R) columns, in a table of `width`; what it reads already is dropped."""
    seen = marked(window.reads, width).gather(1, extra.clamp(min=0))
    reads = torch.cat([window.reads, torch.where(seen, -1, extra)], 1)
    aside = torch.zeros_like(window.reads, dtype=torch.bool) if window.aside is None else window.aside
    aside = torch.cat([aside, torch.ones_like(extra, dtype=torch.bool)], 1)
    reads, aside = packed(reads, width, aside)
    return window._replace(reads=reads, aside=aside)


class View:
    """What the slots see of one step: aligned (B, W) tables over the columns the step reads.

    `memory` and `columns` are copies: a slot assigns its leaves anew, never writes into a tensor.
    """

    def __init__(self, state: State, window: Span, schedule: Schedule | None = None) -> None:
        canvas, cols = state.canvas, window.reads
        self.state = state
        self.canvas = canvas
        self.window = window
        self.schedule = schedule  # of the selection, where its number of steps is known in advance
        self.cols = cols  # (B, W) absolute columns, -1 for padding
        self._at = cols.clamp(min=0)
        self.masked = canvas.masked.gather(1, self._at) & (cols >= 0)  # (B, W)
        self.live = self.inside & self.masked  # (B, W) the candidates C
        self.memory = Leaves(state.memory)
        self.columns = Leaves(state.columns)

    @property
    def inside(self) -> Tensor:
        """(B, W) bool: the columns of the window; a step may read others too."""
        return self.window.inside(self.cols)

    def narrow(self, lo: Tensor, hi: Tensor) -> None:
        """Shrink the window after the forward (AdaBlock)."""
        self.window = self.window._replace(lo=lo, hi=hi, end=hi)
        self.live = self.inside & self.masked

    @property
    def held(self) -> Tensor:
        """(B,) the window stays where it is although nothing in it is masked: an `amend` may still change it."""
        hold = self.memory.get(Hold)
        return self.state.done & False if hold is None else hold.held

    def gather(self, table: Tensor) -> Tensor:
        """A per-column table (B, L, ...) at the columns of this step: (B, W, ...)."""
        return table.gather(1, spread(self._at, table))

    def pairs(self, weights: Tensor) -> Tensor:
        """Of attention weights (B, W, L), those among the columns of this step: (B, W, W)."""
        return weights.gather(2, self._at[:, None].expand(-1, weights.shape[1], -1))

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
    order = _candidates(score, among).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    return torch.where(among, ranks, order.shape[1])


def best(score: Tensor, among: Tensor) -> Tensor:
    """(B, W) one-hot: the candidate of highest score, lowest position on ties; nothing where there is no candidate."""
    top = _candidates(score, among).argmax(1, keepdim=True)
    return torch.zeros_like(among).scatter_(1, top, True) & among


def _candidates(score: Tensor, among: Tensor) -> Tensor:
    """(B, W) the score, below that of every candidate where there is none. A candidate of score -inf is still one: the
    logarithm of a confidence may be."""
    return score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~among, -torch.inf)


def best_each(score: Tensor, among: Tensor, group: Tensor, groups: int) -> Tensor:
    """(B, W) bool: of each group (B, W), a number below `groups`, the candidate of highest score, lowest position on
    ties."""
    order = rank(score, among)
    top = order.new_full((len(order), groups), order.shape[1]).scatter_reduce_(1, group, order, "amin")
    return among & (order == top.gather(1, group))
