"""Token automata as tensors, those of a call stacked: what the passes of a step read, fixed in shape and on the device.

State Q is dead: nothing leads out of it. Class 0 has no edges, and unused places hold edges of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.constraints.automaton import DEAD, Ints, TokenAutomaton

WIDTH = 16  # numbers that are summed at once


class Groups(NamedTuple):
    """Sums over groups of E numbers, as gathers: the order of a sum never depends on what else the device does."""

    tables: tuple[Tensor, ...]  # (A, D, n) places to sum, level by level; the place behind the last holds nothing

    @classmethod
    def of(cls, groups: Sequence[Ints], n: int) -> Groups:
        """groups: for each automaton the group (E,) of each number; n: groups."""
        tables, places = list[Tensor](), [np.arange(len(g)) for g in groups]
        size = max(map(len, groups))
        while True:
            orders = [np.argsort(g, kind="stable") for g in groups]
            groups, places = ([x[o] for x, o in zip(xs, orders, strict=True)] for xs in (groups, places))
            rank = [np.arange(len(g)) - np.searchsorted(g, g) for g in groups]
            deepest = max((int(r.max(initial=0)) for r in rank), default=0) + 1
            last, width = deepest <= WIDTH, min(1 << (deepest - 1).bit_length(), WIDTH)
            chunk = [g if last else _chunks(g, r) for g, r in zip(groups, rank, strict=True)]
            count = n if last else max(int(c.max(initial=-1)) + 1 for c in chunk)
            table = np.full((len(groups), width, count), size)
            for row, c, r, p in zip(table, chunk, rank, places, strict=True):
                row[r % WIDTH, c] = p
            tables.append(torch.from_numpy(table))
            if last:
                return cls(tuple(tables))
            firsts = [np.flatnonzero(r % WIDTH == 0) for r in rank]
            groups = [g[f] for g, f in zip(groups, firsts, strict=True)]
            places = [c[f] for c, f in zip(chunk, firsts, strict=True)]
            size = count

    def sum(self, x: Tensor) -> Tensor:
        """(B, n) from (B, E)."""
        for table in self.tables:
            x = _folded(F.pad(x, (0, 1)).gather(1, table.flatten(1)).view(len(x), *table.shape[1:]))
        return x


def _folded(x: Tensor) -> Tensor:
    """(B, n), the sum over the middle of (B, 2^k, n), one half onto the other: `sum` adds in an order of the shape.
    Places that hold nothing change no bit, so neither does another automaton in the batch."""
    while (half := x.shape[1] // 2) > 0:
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def _chunks(groups: Ints, rank: Ints) -> Ints:
    """The chunk of each number: WIDTH of one group at most."""
    return np.cumsum(rank % WIDTH == 0) - 1


class Tables(NamedTuple):
    """The automata of a call, or of each row of a batch: A of Q states, C classes and E edges."""

    classes: Tensor  # (A, V) of each token
    leads: Tensor  # (A, C) the first token of each class, V where there is none
    follow: Tensor  # (A, (Q + 1) C) the next state, Q where there is none
    accepting: Tensor  # (A, Q + 1) 0 in an accepting state, -inf elsewhere
    late: Tensor  # (A, C) bool: the classes of end tokens, which min_new_tokens forbids at first
    src: Tensor  # (A, E)
    by: Tensor  # (A, E)
    dst: Tensor  # (A, E)
    leaving: Groups  # edges by the state that they leave
    entering: Groups  # by the state that they lead to
    alike: Groups  # by class

    @classmethod
    def of(cls, automata: Sequence[TokenAutomaton], ends: Sequence[int] = ()) -> Tables:
        """Stack them; `ends` are the end tokens."""
        states, count = max(a.states for a in automata), max(a.count for a in automata)
        edges = max(len(a.src) for a in automata)

        def stacked(rows: list[Ints], size: int, fill: int) -> Tensor:
            return torch.from_numpy(np.stack([np.pad(r, (0, size - len(r)), constant_values=fill) for r in rows]))

        src, dst = (stacked([getattr(a, name) for a in automata], edges, states) for name in ("src", "dst"))
        by, classes = stacked([a.by for a in automata], edges, DEAD), np.stack([a.classes for a in automata])
        follow = torch.full((len(automata), (states + 1) * count), states)
        follow.scatter_(1, src * count + by, torch.where(by == DEAD, states, dst))
        size = classes.shape[1]
        leads = torch.full((len(automata), count), size).scatter_reduce_(
            1, torch.from_numpy(classes), torch.arange(size).expand(len(automata), -1), "amin"
        )
        leads[:, DEAD] = size
        accepting = torch.full((len(automata), states + 1), -torch.inf, dtype=torch.float64)
        for row, a in zip(accepting, automata, strict=True):
            row[: a.states][torch.from_numpy(a.accepting)] = 0.0
        late = torch.zeros_like(leads, dtype=torch.bool)
        if ends:
            late.scatter_(1, torch.from_numpy(classes[:, list(ends)]), True)
        late[:, DEAD] = False
        sizes = {"src": states + 1, "dst": states + 1, "by": count}
        groups = (Groups.of([getattr(a, name) for a in automata], n) for name, n in sizes.items())
        return cls(torch.from_numpy(classes), leads, follow, accepting, late, src, by, dst, *groups)

    def to(self, device: torch.device) -> Tables:
        """The same on this device."""
        return self._each(lambda x: x.to(device))

    def of_rows(self, which: Tensor) -> Tables:
        """Those of rows with the automata `which` (B,); without a copy where all have one."""
        return self._each(lambda x: x.expand(len(which), *x.shape[1:]) if len(x) == 1 else x[which])

    def _each(self, f: Callable[[Tensor], Tensor]) -> Tables:
        return Tables._make(Groups(tuple(map(f, x.tables))) if isinstance(x, Groups) else f(x) for x in self)
