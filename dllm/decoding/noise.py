"""Counter-keyed randomness: every draw is a pure function of (seed, step, position, stream).

Rows therefore draw the same numbers alone and in a batch, before and after compaction, and when a step is replayed. The
mixer is the finaliser of SplitMix64 applied once per key word.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKEN, ORDER, TRANSFER, REMASK = range(4)  # independent streams of one step
TAIL = 1 << 62  # of an epoch of the window: apart from those four of every seed


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN, _MIX1, _MIX2 = (_signed(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # logical, torch shifts int64 arithmetically


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _key(seed: Tensor, step: Tensor, position: Tensor, stream: int) -> Tensor:
    x = _mix(seed * 4 + stream + _GOLDEN)
    x = _mix(x + step * _GOLDEN)
    return _mix(x + position * _GOLDEN)


def _open_interval(key: Tensor) -> Tensor:
    return (_shift(key, 11).double() + 0.5) * 2.0**-53


def uniform(seed: Tensor, step: Tensor, position: Tensor, stream: int = TOKEN) -> Tensor:
    """Uniforms in the open interval (0, 1), float64, of the broadcast shape of the three int64 keys."""
    return _open_interval(_key(seed, step, position, stream))


def gumbel_rows(seed: Tensor, step: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """One Gumbel draw for each token of the vocabulary: keys (n,), result (n, V)."""
    token = torch.arange(vocabulary, device=seed.device)
    key = _key(seed, step, position, TOKEN)[:, None]
    return -torch.log(-torch.log(_open_interval(_mix(key + token * _GOLDEN))))
