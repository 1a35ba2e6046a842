"""Geometry of the canvas: tables of columns (B, W), -1 for padding, and what is read and written through them."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor


def spans(lo: Tensor, hi: Tensor, width: int) -> Tensor:
    """(B, width) columns lo, lo+1, ... of each row, -1 from hi on."""
    cols = lo[:, None] + torch.arange(width, device=lo.device)
    return torch.where(cols < hi[:, None], cols, -1)


def between(lo: Tensor, hi: Tensor) -> Tensor:
    """(B, W) the columns [lo, hi) of each row, padded with -1 to the widest row."""
    return spans(lo, hi, max(int((hi - lo).max()), 1))


def indices(chosen: Tensor) -> Tensor:
    """(B, W) the columns where `chosen` (B, L) holds, in order, padded with -1 to the row that has most."""
    order = (~chosen).int().argsort(dim=1, stable=True)[:, : max(int(chosen.sum(1).max()), 1)]
    return torch.where(chosen.gather(1, order), order, -1)


def marked(cols: Tensor, width: int) -> Tensor:
    """(B, width) bool: the columns listed in `cols` (B, W), -1 for padding."""
    return scatter(torch.zeros(cols.shape[0], width, dtype=torch.bool, device=cols.device), cols, True)


def scatter(table: Tensor, cols: Tensor, values: Tensor | bool) -> Tensor:
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
