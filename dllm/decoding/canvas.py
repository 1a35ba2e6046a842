"""The values that flow through a step: Canvas, Decision, State, Span, Plan. Immutable, leading dimension B (rows).

A *row* is one request. A *column* is an absolute position of its canvas, prompt included; rows are right-padded to L
columns. `Canvas` is the only writer of tokens: `write` replaces some, `apply` carries a decision out, `cut` shortens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.columns import Edit, splice
from dllm.models.transformer import Known, Rows


class Decision(NamedTuple):
    """What one step does to the canvas."""

    write: Tensor  # (B, L) bool: these columns get `token`
    token: Tensor  # (B, L): a commit, an edit, or the mask id for a re-masking
    done: Tensor  # (B,) bool: the row is finished after this step
    fill: Tensor | None = None  # (B,) bool: the engine gives every mask that is left its prediction and ends the row
    edits: tuple[Edit, ...] = ()  # of the length, on old columns

    @property
    def ordered(self) -> list[Edit]:
        """The edits from right to left, so that each one finds its columns where they were."""
        return sorted(self.edits, key=lambda e: (e[0], -e[1]))


class Canvas(NamedTuple):
    """The tokens of all rows."""

    ids: Tensor  # (B, L)
    masked: Tensor  # (B, L) bool: still to be written; False on padding
    frozen: Tensor  # (B, L) bool: never written (prompt, constraints, padding)
    start: Tensor  # (B,) first generated column
    length: Tensor  # (B,) prompt + generation window
    mask_id: int

    def write(self, where: Tensor, token: Tensor) -> Canvas:
        """The canvas with `token` (B, L) where `where` (B, L) holds, frozen columns apart; the mask id re-masks."""
        where = where & ~self.frozen
        ids, masked = torch.where(where, token, self.ids), torch.where(where, token == self.mask_id, self.masked)
        return self._replace(ids=ids, masked=masked)

    def apply(self, d: Decision) -> Canvas:
        """The canvas after the decision: writes on old columns first, then length edits from right to left."""
        written = self.write(d.write, d.token)
        return reduce(Canvas._splice, d.ordered, written) if d.edits else written

    def _splice(self, edit: Edit) -> Canvas:
        """The columns of one length edit replaced by its tokens; what is pushed beyond the width is dropped."""
        (row, _, n_delete, tokens), length = edit, self.length.clone()
        length[row] += len(tokens) - n_delete
        new = self.ids.new_tensor(tokens)
        ids, masked = splice(self.ids, edit, new), splice(self.masked, edit, new == self.mask_id)
        after = self._replace(ids=ids, masked=masked, frozen=splice(self.frozen, edit))
        return after.cut(length.clamp(max=ids.shape[1]))

    def cut(self, length: Tensor) -> Canvas:
        """The canvas with its rows cut to `length` (B,) columns; what was behind becomes padding."""
        outside = torch.arange(self.ids.shape[1], device=self.ids.device) >= length[:, None]
        ids = self.ids.masked_fill(outside, 0)
        return self._replace(ids=ids, masked=self.masked & ~outside, frozen=self.frozen | outside, length=length)

    def take(self, rows: Tensor) -> Canvas:
        """Some rows, by index."""
        return mapped(lambda x: x[rows], self)

    def cpu(self) -> Canvas:
        """The same on the host, in one copy."""
        if self.ids.device.type == "cpu":
            return self
        ends = torch.stack([self.start, self.length], 1)
        table = torch.cat([self.ids, self.masked.long(), self.frozen.long(), ends], 1).cpu()
        ids, masked, frozen = table[:, :-2].chunk(3, 1)
        start, length = table[:, -2:].unbind(1)
        return self._replace(ids=ids, masked=masked.bool(), frozen=frozen.bool(), start=start, length=length)

    def widened(self, columns: int) -> Canvas:
        """The same with padding up to so many columns."""
        ids, masked, frozen = self.ids, self.masked, self.frozen
        more = (0, columns - ids.shape[1])
        return self._replace(ids=F.pad(ids, more), masked=F.pad(masked, more), frozen=F.pad(frozen, more, value=True))

    def showing(self, masked: Tensor) -> Canvas:
        """The same tokens where these columns (B, L) count as open."""
        return self._replace(masked=masked)

    def given(self) -> tuple[list[list[int]], list[int]]:
        """On the host: the ids of each row, and where its first mask is."""
        canvas = self.cpu()
        return canvas.ids.tolist(), canvas.first_masked().tolist()

    def first_masked(self) -> Tensor:
        """(B,) the leftmost masked column, L where none is left."""
        any_left = self.masked.any(1)
        return torch.where(any_left, self.masked.int().argmax(1), self.masked.shape[1])


def splice_columns(columns: Leaves, d: Decision) -> Leaves:
    """Carry the per-column leaves through the length edits of a decision; inserted columns are zero."""
    return mapped(lambda leaf: reduce(splice, d.ordered, leaf), columns)


class Cached(NamedTuple):
    """What a row's lane of the store holds; every field (B,), all of them -1 where it holds nothing.

    A policy says in `Span.cached` what a step will leave there, in the fields that it goes by, and leaves the others.
    """

    epoch: Tensor  # names the refresh that filled the store: by the window's epoch, or by its step
    frontier: Tensor  # block-causal models: the columns below are final and stored
    end: Tensor  # block-causal models: the columns below are stored

    def forget(self, rows: Tensor) -> Cached:
        """The same without what `rows` (B,) bool had stored."""
        return Cached._make(torch.where(rows, -1, leaf) for leaf in self)


Leaf: TypeAlias = tuple[Tensor, ...]  # a NamedTuple of tensors whose first dimension is the rows
L = TypeVar("L", bound=Leaf)
T = TypeVar("T")


class Leaves(dict[type[Leaf], Leaf]):
    """What the slots remember: each declares its tensors as a NamedTuple and finds them under that type.

    view.memory[BlockMemory].lo
    view.memory[BlockMemory] = view.memory[BlockMemory]._replace(lo=lo)
    view.memory.get(BlockMemory)  # None: no slot of this sampler has declared it
    """

    if TYPE_CHECKING:  # dict's own methods, with the type that a key promises

        def __getitem__(self, kind: type[L], /) -> L: ...

        def get(self, kind: type[L], default: None = None, /) -> L | None: ...  # type: ignore[override]

    def plus(self, *leaves: Leaf) -> Leaves:
        """These tables with some of them added or replaced."""
        return Leaves({**self, **{type(leaf): leaf for leaf in leaves}})


class State(NamedTuple):
    """Everything a step may depend on. `take`, `put` and `cat` move whole rows."""

    canvas: Canvas
    step: Tensor  # (B,) logical steps so far: a forward each
    seed: Tensor  # (B,)
    asked: Tensor  # (B,) columns of the generation window that the call gave the row; edits leave it as it is
    cached: Cached
    done: Tensor  # (B,) bool
    closing: (
        Tensor  # (B,) bool: what is left is to be filled: by the last forward where it covered that, else by a full one
    )
    memory: Leaves  # per-row leaves of the slots, (B, ...)
    columns: Leaves  # per-column leaves of the slots, (B, L, ...); they follow length edits

    @classmethod
    def begin(cls, canvas: Canvas, seed: Tensor, asked: Tensor, memory: Leaves, columns: Leaves) -> State:
        """Rows that have not stepped yet; `seed` and `asked` (B,), the leaves as `Sampler.start` gives them."""
        zero = torch.zeros_like(canvas.start)
        nothing, no = Cached._make([zero - 1] * len(Cached._fields)), zero.bool()
        return cls(canvas, zero, seed, asked, nothing, no, no, memory, columns)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.step.shape[0]

    def take(self, rows: Tensor) -> State:
        """Some rows, by index."""
        return mapped(lambda x: x[rows], self)

    def put(self, rows: Tensor, other: State) -> State:
        """These rows with those at `rows` replaced."""

        def write(x: Tensor, y: Tensor) -> Tensor:
            x, y = _match(x, y)
            return x.index_copy(0, rows, y)

        return mapped(write, self, other)

    def cat(self, other: State) -> State:
        """These rows, then the other ones."""
        return mapped(lambda x, y: torch.cat(_match(x, y)), self, other)


def joined(nests: Sequence[T]) -> T:
    """The rows of several like-shaped nests of tensors, one nest after the other."""
    return mapped(lambda *x: torch.cat(x), *nests)


def sliced(nest: T, rows: slice) -> T:
    """A run of rows of a nest of tensors, as views."""
    return mapped(lambda x: x[rows], nest)


def chosen(rows: Tensor, a: T, b: T) -> T:
    """The rows of `a` where `rows` (B,) bool holds, those of `b` elsewhere."""
    return mapped(lambda x, y: torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, y), a, b)


def _match(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Grow the smaller leaf with zeros (some leaves grow as a row needs) and take the wider dtype."""
    if x.shape[1:] != y.shape[1:]:
        sizes = [max(a, b) for a, b in zip(x.shape[1:], y.shape[1:], strict=True)]
        x, y = (_padded(t, sizes) for t in (x, y))
    if x.dtype != y.dtype:
        kind = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(kind), y.to(kind)
    return x, y


def _padded(x: Tensor, sizes: list[int]) -> Tensor:
    """`x` with zeros up to these sizes of its dimensions after the first."""
    return F.pad(x, [n for a, b in zip(x.shape[:0:-1], sizes[::-1], strict=True) for n in (0, b - a)])


def mapped(f: Callable[..., Tensor], first: T, *rest: T) -> T:
    """`f` of the tensors of like-shaped nests of NamedTuples and leaves, in their shape."""
    made: object = first
    if isinstance(first, Tensor):
        made = f(first, *rest)
    elif isinstance(first, Leaves):
        others = cast("tuple[Leaves, ...]", rest)
        made = Leaves({kind: mapped(f, leaf, *(o[kind] for o in others)) for kind, leaf in first.items()})
    elif isinstance(first, tuple):
        fields = zip(first, *cast("tuple[tuple[object, ...], ...]", rest), strict=True)
        made = type(first)(*(mapped(f, *leaves) for leaves in fields))
    return cast("T", made)


class Fed(NamedTuple):
    """What one forward feeds of each row: tables over the columns of its canvas."""

    cols: Tensor  # (B, L) bool: these positions are computed
    keep: Tensor | None = None  # (B, L) bool: whose keys and values stay in the store; None: all
    seen: Tensor | None = None  # (B, L) bool: the stored columns that queries see; None: all of the row
    aside: Tensor | None = None  # (B, L) bool: only looked at, private to the forward; None: nothing
    dense: bool = False  # every column of every row
    refresh: bool = False  # fills the row's lane for a new epoch; a lookahead sends nothing along with it

    def sees(self, canvas: Canvas) -> Tensor:
        """(B, L) bool: `seen`, written out."""
        if self.seen is not None:
            return self.seen
        return torch.arange(canvas.ids.shape[1], device=canvas.ids.device) < canvas.length[:, None]


class Span(NamedTuple):
    """Which columns a step may commit, which it must read, and which its forward feeds."""

    lo: Tensor  # (B,)
    hi: Tensor  # (B,) exclusive
    end: Tensor  # (B,) exclusive: no step of this epoch commits from here on; `hi` may lie before it
    reads: Tensor  # (B, W) columns, the used ones first, then -1; once open W = L until the engine cuts it
    epoch: Tensor  # (B,) a new value asks the cache for a refresh
    aside: Tensor | None = None  # (B, W) bool: reads that must leave the cache as it is (None: nothing)
    cached: Cached | None = None  # what the step leaves in the store; None: not open yet
    stale: Tensor | None = None  # (B,) bool: rows that refresh in this step
    refresh: Fed | None = None  # the forward of these rows
    step: Fed | None = None  # the forward of the others

    def inside(self, cols: Tensor) -> Tensor:
        """(B, W) bool: which of the columns (B, W), or (W,) for all rows, may be committed."""
        return (cols >= self.lo[:, None]) & (cols < self.hi[:, None])

    @property
    def holds(self) -> Cached:
        """What the step leaves in the store, once the window is open."""
        assert self.cached is not None
        return self.cached

    def feeds(self, refresh: bool) -> Fed:
        """The forward of the rows that refresh, or of the others, once the window is open."""
        fed = self.refresh if refresh else self.step
        assert fed is not None
        return fed

    def sources(self, shift: int) -> Tensor:
        """(B, W) positions whose hidden states predict the columns that the step reads, -1 for padding."""
        return torch.where(self.reads < 0, -1, (self.reads - shift).clamp(min=0))

    def cut(self, width: int) -> Span:
        """The same with the first `width` reads."""
        aside = None if self.aside is None else self.aside[:, :width]
        return self._replace(reads=self.reads[:, :width], aside=aside)

    def take(self, rows: Tensor) -> Span:
        """The spans of some rows, by index."""
        return mapped(lambda x: x[rows], self)

    def put(self, rows: Tensor, other: Span) -> Span:
        """These spans with those at `rows` replaced."""
        return mapped(lambda x, y: x.index_copy(0, rows, y), self, other)


class Plan(NamedTuple):
    """One batched forward: N rows of Q queries. See `Model.forward` for what each field means."""

    ids: Tensor  # (N, Q)
    pos: Tensor  # (N, Q), -1 for padding
    fresh: Tensor | None  # (N, Q) bool
    keep: Tensor | None  # (N, Q) bool
    visible: Tensor | None  # (N, 1 | Q, S [+ Q]) bool
    lane: Tensor | None  # (N,) None: there is no store
    known: Known | None  # what the host knows of all that; None: the model asks the device
    refresh: bool  # installs a new epoch
    stored: bool  # reads or writes the store
    rows: Rows | None = None  # whose attention weights are wanted, each of the N rows its own; None: nobody asks
    dense: bool = False  # feeds every column: a query stands at its position

    def take(self, rows: Tensor) -> Plan:
        """Some of the N rows, by index: the model asks where they are."""
        return mapped(lambda x: x[rows], self._replace(known=None))

    def times(self, n: int) -> Plan:
        """The plan of `n` copies of all its rows, one copy after the other."""
        copies = self.take(torch.arange(len(self.pos), device=self.pos.device).repeat(n))
        known = self.known and self.known._replace(lanes=None)
        return copies._replace(known=known)
