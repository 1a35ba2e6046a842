"""The values that flow through a step: Canvas, Decision, State, Span, Plan. Immutable, leading dimension B (rows).

A *row* is one request. A *column* is an absolute position of its canvas, prompt included; rows are right-padded to L
columns. `Canvas.apply` is the only writer of tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Decision(NamedTuple):
    """What one step does to the canvas."""

    write: Tensor  # (B, L) bool: these columns get `token`
    token: Tensor  # (B, L): a commit, an edit, or the mask id for a re-masking
    done: Tensor  # (B,) bool: the row is finished after this step
    fill: Tensor | None = None  # (B,) bool: every mask that is left gets its prediction, then the row is finished
    edits: tuple[tuple[int, int, int, tuple[int, ...]], ...] = ()  # (row, column, n_delete, tokens), old columns


class Canvas(NamedTuple):
    """The tokens of all rows."""

    ids: Tensor  # (B, L)
    masked: Tensor  # (B, L) bool: still to be written; False on padding
    frozen: Tensor  # (B, L) bool: never written (prompt, constraints, padding)
    start: Tensor  # (B,) first generated column
    length: Tensor  # (B,) prompt + generation window
    mask_id: int

    def apply(self, d: Decision) -> Canvas:
        """The canvas after the decision: writes on old columns first, then length edits from right to left."""
        write = d.write & ~self.frozen
        ids = torch.where(write, d.token, self.ids)
        masked = torch.where(write, d.token == self.mask_id, self.masked)
        after = self._replace(ids=ids, masked=masked)
        for edit in sorted(d.edits, key=lambda e: (e[0], -e[1])):
            after = after._splice(*edit)
        return after

    def _splice(self, row: int, column: int, n_delete: int, tokens: tuple[int, ...]) -> Canvas:
        """Replace `n_delete` columns by `tokens`; what is pushed beyond the allocated width is dropped."""
        width, old = self.ids.shape[1], int(self.length[row])
        new = min(old + len(tokens) - n_delete, width)
        inserted = self.ids.new_tensor(tokens)
        frozen = self.frozen[row].clone()
        frozen[old:] = False
        ids = torch.cat([self.ids[row, :column], inserted, self.ids[row, column + n_delete :]])
        frozen = torch.cat([frozen[:column], torch.zeros_like(inserted, dtype=torch.bool), frozen[column + n_delete :]])
        ids, frozen = (F.pad(x[:width], (0, max(0, width - len(x)))) for x in (ids, frozen))
        inside = torch.arange(width, device=ids.device) < new
        ids = torch.where(inside, ids, 0)

        def put(table: Tensor, values: Tensor) -> Tensor:
            table = table.clone()
            table[row] = values
            return table

        return self._replace(
            ids=put(self.ids, ids),
            masked=put(self.masked, inside & (ids == self.mask_id)),
            frozen=put(self.frozen, frozen | ~inside),
            length=put(self.length, self.length.new_tensor(new)),
        )

    def first_masked(self) -> Tensor:
        """(B,) the leftmost masked column, L where none is left."""
        any_left = self.masked.any(1)
        return torch.where(any_left, self.masked.int().argmax(1), self.masked.shape[1])


def scatter(table: Tensor, cols: Tensor, values: Tensor | bool) -> Tensor:
    """The per-column table (B, L, ...) with `values` (B, W, ...) at `cols` (B, W); at -1 nothing is written."""
    spare = torch.cat([table, table[:, :1]], 1)  # its last column takes what is written nowhere
    return spare.scatter(1, spread(cols % spare.shape[1], table), values)[:, :-1]


def spread(index: Tensor, table: Tensor) -> Tensor:
    """An index (B, W) of columns as `gather` and `scatter` take it for a table (B, L, ...)."""
    return index.view(*index.shape, *[1] * (table.dim() - 2)).expand(*index.shape, *table.shape[2:])


def splice_columns(leaf: Tensor, d: Decision) -> Tensor:
    """Carry a per-column leaf (B, L, ...) through the length edits of a decision; inserted columns are zero."""
    for row, column, n_delete, tokens in sorted(d.edits, key=lambda e: (e[0], -e[1])):
        width = leaf.shape[1]
        old = leaf[row]
        gap = old.new_zeros((len(tokens), *old.shape[1:]))
        new = torch.cat([old[:column], gap, old[column + n_delete :]])[:width]
        leaf = leaf.clone()
        leaf[row] = 0
        leaf[row, : len(new)] = new
    return leaf


class State(NamedTuple):
    """Everything a step may depend on. `take`, `put` and `cat` move whole rows."""

    canvas: Canvas
    step: Tensor  # (B,) logical steps so far: a forward each
    seed: Tensor  # (B,)
    asked: Tensor  # (B,) columns of the generation window that the call gave the row; edits leave it as it is
    cached: Tensor  # (B,) the epoch whose cache is installed, -1 for none
    done: Tensor  # (B,) bool
    closing: Tensor  # (B,) bool: an exit asked for a full forward that fills what is left
    memory: dict[str, Tensor]  # per-row leaves of the slots, (B, ...)
    columns: dict[str, Tensor]  # per-column leaves of the slots, (B, L, ...); they follow length edits

    @property
    def rows(self) -> int:
        return self.step.shape[0]

    def take(self, rows: Tensor) -> State:
        return _map(lambda x: x[rows], self)

    def put(self, rows: Tensor, other: State) -> State:
        def write(x: Tensor, y: Tensor) -> Tensor:
            x, y = _match(x, y)
            x = x.clone()
            x[rows] = y
            return x

        return _map(write, self, other)

    def cat(self, other: State) -> State:
        return _map(lambda x, y: torch.cat(_match(x, y)), self, other)


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


def _map(f: Any, first: Any, *rest: Any) -> Any:
    """Apply `f` to the tensors of like-shaped nests of NamedTuples and dicts."""
    if isinstance(first, Tensor):
        return f(first, *rest)
    if isinstance(first, dict):
        return {key: _map(f, value, *(r[key] for r in rest)) for key, value in first.items()}
    if isinstance(first, tuple):
        values = (_map(f, *leaves) for leaves in zip(tuple(first), *(tuple(r) for r in rest), strict=True))
        return type(first)(*values)
    return first


class Span(NamedTuple):
    """Which columns a step may commit, and which it must read."""

    lo: Tensor  # (B,)
    hi: Tensor  # (B,) exclusive
    reads: Tensor  # (B, W) columns, -1 for padding
    epoch: Tensor  # (B,) a new value asks the cache for a refresh
    aside: Tensor | None = None  # (B, W) bool: reads that must leave the cache as it is (None: nothing)

    def inside(self, cols: Tensor) -> Tensor:
        """(B, W) bool: which of the columns (B, W), or (W,) for all rows, may be committed."""
        return (cols >= self.lo[:, None]) & (cols < self.hi[:, None])

    def take(self, rows: Tensor) -> Span:
        aside = None if self.aside is None else self.aside[rows]
        return Span(self.lo[rows], self.hi[rows], self.reads[rows], self.epoch[rows], aside)


class Plan(NamedTuple):
    """One batched forward: N rows of Q queries. See `Transformer.forward` for what each field means."""

    ids: Tensor  # (N, Q)
    pos: Tensor  # (N, Q), -1 for padding
    fresh: Tensor | None  # (N, Q) bool
    keep: Tensor | None  # (N, Q) bool
    visible: Tensor | None  # (N, 1 | Q, S [+ Q]) bool
    lane: Tensor | None  # (N,) None: rows are lanes
    refresh: bool  # a full forward that installs a new epoch
    stored: bool  # reads or writes the store
