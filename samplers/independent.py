"""The greedy choice of columns none of which bars another one that was taken before it (DAPD, DAWN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def independent(order: Tensor, among: Tensor, bars: Tensor) -> Tensor:
    """(B, W) bool: of the columns `among` (B, W), by ascending `order` (B, W), each that no taken one bars.

    bars (B, W, W): column i is barred once j is taken. The set is maximal, not the largest there is. One round of three
    small operations a column: how many are taken is known on the device only.
    """
    line = order.argsort(dim=1, stable=True)  # (B, W) the column of each place
    bars = bars.gather(1, line[..., None].expand_as(bars)).gather(2, line[:, None].expand_as(bars))
    bars = torch.cat([~among.gather(1, line)[..., None], bars], 2)  # what is not among them, the first place bars
    taken = F.pad(torch.zeros_like(among), (1, 0), value=True)  # (B, 1 + W) by place
    for place in range(among.shape[1]):
        before = slice(0, place + 1)
        taken[:, place + 1] = ~(bars[:, place, before] & taken[:, before]).any(1)
    return torch.zeros_like(among).scatter(1, line, taken[:, 1:])
