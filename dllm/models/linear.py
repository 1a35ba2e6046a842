"""Linear layers on a CPU for the few rows of a decoding step.

A step feeds one token, or the handful that a verify has, and could take the time of reading the weights once. Some BLAS
take twice as long for one row and three times as long for two, and less with the factors in the other order, W x^T in
place of x W^T (a Zen 4 with oneMKL, 1536 x 576 in float32, ms for 1, 2, 3, 4, 8 rows: 0.37, 0.58, 0.65, 0.45, 0.53
against 0.20 (as two rows), 0.20, 0.27, 0.29, 0.47). Which one this is shows once, and costs a tenth of a second.
"""

from __future__ import annotations

from functools import cache
from time import process_time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 8  # rows; with more of them the usual order is the faster one
EVEN = 4  # rows that the usual order takes no longer for than for three
LARGE = 1 << 16  # weights of a layer below which all of this is too small to count
CLEAR = 1.3  # times as fast, so that the same machine says the same every time


class FewRows(nn.Linear):
    """nn.Linear in the order of factors that is fast for few rows: the same to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) with weight (out, in) as `F.linear`, to rounding."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if not 0 < rows <= FEW or not fits(weight) or x.dtype != weight.dtype or not turned():
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    if rows > 2 and weight.shape[0] < weight.shape[1]:  # long sums, few of them: as usual
        return F.linear(padded(flat, EVEN), weight, bias)[:rows].view(*x.shape[:-1], -1)
    out = torch.mm(weight, padded(flat, 2).T)[:, :rows].T.contiguous()
    out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], -1)


def padded(x: Tensor, rows: int) -> Tensor:
    """x (n, D) with zeros behind, to at least so many rows."""
    return x if len(x) >= rows else F.pad(x, (0, 0, 0, rows - len(x)))


def fits(weight: Tensor) -> bool:
    """Whether a matrix is one that the order of factors matters for."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= LARGE


def fast_for_few(model: nn.Module) -> None:
    """Have a model's linear layers take few rows in the faster order, where there is one. Weights stay as they are."""
    layers = [m for m in model.modules() if type(m) is nn.Linear and fits(m.weight) and type(m.weight) is nn.Parameter]
    if layers and turned():
        for layer in layers:
            layer.__class__ = FewRows


@cache
def turned() -> bool:
    """Whether W x^T of two rows is clearly faster here than x W^T, over more weights than caches hold."""
    with torch.inference_mode():
        weights, x = torch.ones(24, 1536, 576).unbind(), torch.ones(2, 576)

        def seconds(turn: bool) -> float:
            began = process_time()
            for weight in weights:
                torch.mm(weight, x.T) if turn else F.linear(x, weight)
            return process_time() - began

        both = [(seconds(False), seconds(True)) for _ in range(3)]
        usual, other = (min(times) for times in zip(*both, strict=True))
    return bool(usual > CLEAR * other)
