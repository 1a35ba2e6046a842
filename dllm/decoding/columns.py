"""Geometry of the canvas: tables of columns (B, W), -1 for padding, and what is read and written through them."""

from __future__ import annotations

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


def splice(table: Tensor, row: int, column: int, n_delete: int, new: Tensor) -> Tensor:
    """The table (B, L, ...) with `n_delete` columns of a row replaced by `new` (n, ...), cut or zero-filled to L."""
    old, width = table[row], table.shape[1]
    values = torch.cat([old[:column], new, old[column + n_delete :]])[:width]
    table = table.clone()
    table[row] = 0
    table[row, : len(values)] = values
    return table
