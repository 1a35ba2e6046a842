"""Geometry of the canvas: index tables of columns, one row a row, -1 for padding."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm.decoding.canvas import Span, scatter


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


def sources(window: Span, shift: int) -> Tensor:
    """(B, W) positions whose hidden states predict the columns that the step reads, -1 for padding."""
    return torch.where(window.reads < 0, -1, (window.reads - shift).clamp(min=0))
