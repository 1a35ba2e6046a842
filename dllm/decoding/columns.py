"""Geometry of the canvas: tables of columns (B, W), -1 for padding, and what is read and written through them."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor


def spans(lo: Tensor, hi: Tensor, width: int) -> Tensor:
    """(B, width) columns lo, lo+1, ... of each row, -1 from hi on."""
    cols = lo[:, None] + torch.arange(width, device=lo.device)
    return torch.where(cols < hi[:, None], cols, -1)


def indices(chosen: Tensor, width: int) -> Tensor:
    """(B, width) the first columns where `chosen` (B, L) holds, in order, -1 behind them."""
    cols = torch.arange(chosen.shape[1], device=chosen.device)
    return packed(torch.where(chosen, cols, -1), width)[0]


def packed(cols: Tensor, width: int, *tables: Tensor) -> tuple[Tensor, ...]:
    """Columns (B, W) with those in use in front, in order, then -1, as (B, width); tables (B, W) bool go with them."""
    used = cols >= 0
    place = torch.where(used, used.cumsum(1) - 1, width).clamp(max=width)  # the last one takes what has no place
    blank = torch.full((len(cols), width + 1), -1, device=cols.device)
    first = blank.scatter(1, place, cols)[:, :width]
    return first, *(torch.zeros_like(blank, dtype=t.dtype).scatter_(1, place, t)[:, :width] for t in tables)


def marked(cols: Tensor, width: int) -> Tensor:
    """(B, width) bool: the columns listed in `cols` (B, W), -1 for padding."""
    return scatter(torch.zeros(cols.shape[0], width, dtype=torch.bool, device=cols.device), cols, True)


def scatter(table: Tensor, cols: Tensor, values: Tensor | float) -> Tensor:
    """The per-column table (B, L, ...) with `values` (B, W, ...) at `cols` (B, W); at -1 nothing is written."""
    spare = torch.cat([table, table[:, :1]], 1)  # its last column takes what is written nowhere
    return spare.scatter(1, spread(cols % spare.shape[1], table), values)[:, :-1]


def spread(index: Tensor, table: Tensor) -> Tensor:
    """An index (B, W) of columns as `gather` and `scatter` take it for a table (B, L, ...)."""
    return index.view(*index.shape, *[1] * (table.dim() - 2)).expand(*index.shape, *table.shape[2:])


Edit: TypeAlias = tuple[int, int, int, tuple[int, ...]]  # (row, column, n_delete, tokens)


def splice(table: Tensor, edit: Edit, new: Tensor | None = None) -> Tensor:
    """The table (B, L, ...) after a length edit that puts `new` (n, ...) in, None: as many zeros as tokens.

    What is pushed beyond L is dropped, what is missing there is zero.
    """
    (row, column, n_delete, tokens), width = edit, table.shape[1]
    old = table[row]
    if new is None:
        new = old.new_zeros((len(tokens), *old.shape[1:]))
    values = torch.cat([old[:column], new, old[column + n_delete :]])[:width]
    table = table.clone()
    table[row] = 0
    table[row, : len(values)] = values
    return table
