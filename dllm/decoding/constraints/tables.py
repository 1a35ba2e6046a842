"""Token automata as tensors, those of a call stacked: what the passes of a step read, fixed in shape and on the device.

State Q is dead: nothing leads out of it. Class 0, that of tokens without an edge, serves columns that are no part of an
answer: it leaves each state where it is. Unused places hold such a step of the dead state.

Classes that lead from one state to the same other one make one edge there. The sets of classes that edges have are few,
so a step weighs each set once, and every edge by its set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dllm.decoding.constraints.automaton import DEAD, Ints, TokenAutomaton

STAY = DEAD  # what class 0 does in a column that is no part of the answer
WIDTH = 16  # numbers that are summed at once


class Groups(NamedTuple):
    """Sums over groups of E numbers that add in one order, whatever else is computed beside them.

    A CPU adds them one after the other. Other devices would add in the order of their threads: there the numbers are
    gathered and folded.
    """

    of_each: Tensor  # (A, ..., E) the group of each number
    levels: tuple[Tensor, ...]  # (A, ..., D, n) places to sum, level by level; the place behind the last holds nothing

    @classmethod
    def of(cls, index: Ints, n: int) -> Groups:
        """index: the group, of n, of each number, (A, ..., E)."""
        size, levels = index.shape[-1], list[Tensor]()
        groups = list(index.reshape(-1, size))
        places = [np.arange(size)] * len(groups)
        while True:
            orders = [np.argsort(g, kind="stable") for g in groups]
            groups, places = ([x[o] for x, o in zip(xs, orders, strict=True)] for xs in (groups, places))
            rank = [np.arange(len(g)) - np.searchsorted(g, g) for g in groups]
            deepest = max(int(r.max(initial=0)) for r in rank) + 1
            last, width = deepest <= WIDTH, min(1 << (deepest - 1).bit_length(), WIDTH)
            chunk = [g if last else np.cumsum(r % WIDTH == 0) - 1 for g, r in zip(groups, rank, strict=True)]
            count = n if last else max(int(c.max(initial=-1)) + 1 for c in chunk)
            table = np.full((len(groups), width, count), size)
            for row, c, r, p in zip(table, chunk, rank, places, strict=True):
                row[r % WIDTH, c] = p
            levels.append(torch.from_numpy(table.reshape(*index.shape[:-1], width, count)))
            if last:
                return cls(torch.from_numpy(index), tuple(levels))
            firsts = [np.flatnonzero(r % WIDTH == 0) for r in rank]
            groups = [g[f] for g, f in zip(groups, firsts, strict=True)]
            places = [c[f] for c, f in zip(chunk, firsts, strict=True)]
            size = count

    def each(self, f: Callable[[Tensor], Tensor]) -> Groups:
        """Those whose tables a function makes of these."""
        return Groups(f(self.of_each), tuple(map(f, self.levels)))

    def sum(self, x: Tensor) -> Tensor:
        """(..., B, ..., n) from (..., B, ..., E)."""
        return self.add(x.new_zeros(*x.shape[:-1], self.levels[-1].shape[-1]), x)

    def add(self, blank: Tensor, x: Tensor) -> Tensor:
        """The same, written into a table of zeros."""
        if x.device.type == "cpu":
            return blank.scatter_add_(-1, self.of_each.expand(x.shape), x)
        return blank.copy_(self.folded(x))

    def folded(self, x: Tensor) -> Tensor:
        """The same, one half of a group's numbers onto the other. Places that hold nothing change no bit."""
        for level in self.levels:
            places = level.flatten(-2).expand(*x.shape[:-1], -1)
            x = folded(F.pad(x, (0, 1)).gather(-1, places).view(*x.shape[:-1], *level.shape[-2:]), -2)
        return x

    def greatest(self, x: Tensor) -> Tensor:
        """Of numbers that are not negative, the greatest of each group."""
        blank = x.new_zeros(*x.shape[:-1], self.levels[-1].shape[-1])
        return blank.scatter_reduce_(-1, self.of_each.expand(x.shape), x, "amax")


def folded(x: Tensor, dim: int) -> Tensor:
    """The sum over a dimension of 2^k numbers, in an order that zeros behind them do not change."""
    while (half := x.shape[dim] // 2) > 0:
        x = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
    return x.squeeze(dim)


class Tables(NamedTuple):
    """The automata of a call, or of each row of a batch: A of Q states, C classes, P edges and G sets of classes."""

    classes: Tensor  # (A, V) of each token
    leads: Tensor  # (A, C) the first token of each class, V where there is none
    places: Tensor  # (A, D, R) tokens, a class after the other in runs of D by ascending ids
    absent: Tensor  # (A, D, R) -inf where a run is shorter, else 0
    runs: Groups  # runs of tokens by class
    again: Tensor  # (A, 1) the class of what stands between two holes, -1 where there is one text
    late: Tensor  # (A, C) bool: the classes of end tokens, which min_new_tokens forbids at first
    follow: Tensor  # (A, C (Q + 1)) the next state, by class, then state; Q where there is none
    final: Tensor  # (A, K + 1, Q + 1) bool: a member can end k columns on
    ways: Tensor  # (A, 2, P) the state that an edge leads to, and the one that it leaves
    by: Tensor  # (A, P) the set of an edge
    one: Tensor  # (A, M) the classes of all sets, set after set
    ends: Groups  # of `ways` read backward and forward: edges by the state that they leave, and that they lead to
    alike: Groups  # edges by set
    together: Groups  # classes of sets by set
    apart: Groups  # by class

    @classmethod
    def of(cls, automata: Sequence[TokenAutomaton], columns: int, ends: Sequence[int] = ()) -> Tables:
        """Stack them, for answers of so many columns; `ends` are the end tokens."""
        states, count = max(a.states for a in automata), max(a.count for a in automata)
        classes = np.stack([a.classes for a in automata])
        ids = np.arange(classes.shape[1])
        leads = np.full((len(automata), count), len(ids))
        late = np.zeros((len(automata), count), np.bool_)
        follow = np.full((len(automata), count, states + 1), states)
        follow[:, STAY] = np.arange(states + 1)
        for a, first, last, table in zip(automata, leads, late, follow, strict=True):
            np.minimum.at(first, a.classes, ids)
            last[a.classes[list(ends)]] = True
            table[a.by, a.src] = a.dst
        leads[:, DEAD], late[:, DEAD] = len(ids), False
        edges = [_Edges.of(a) for a in automata]
        src, dst = (_stacked([e[k] for e in edges], states) for k in range(2))
        by, one = (_stacked([e[k] for e in edges], STAY) for k in (2, 3))
        sets = max(int(e.group.max()) + 1 for e in edges)
        group = _stacked([e.group for e in edges], sets)  # a set of nothing takes what fills the rows
        within = [e if a.hole is None else _Edges.of(a.hole) for a, e in zip(automata, edges, strict=True)]
        final = np.stack([e.final(a.accepting, states, columns) for a, e in zip(automata, within, strict=True)])
        again = np.array([[a.again] for a in automata])
        flat = follow.reshape(len(automata), -1)
        places, absent, runs = map(np.stack, zip(*_runs(classes), strict=True))
        front = map(torch.from_numpy, (classes, leads, places, absent))
        back = map(torch.from_numpy, (again, late, flat, final, np.stack([dst, src], 1), by, one))
        groups = (np.stack([src, dst], 1), states + 1), (by, sets + 1), (group, sets + 1), (one, count)
        return cls._make([*front, Groups.of(runs, count), *back, *(Groups.of(index, n) for index, n in groups)])

    def to(self, device: torch.device) -> Tables:
        """The same on this device."""
        return self._each(lambda x: x.to(device))

    def of_rows(self, which: Tensor) -> Tables:
        """Those of rows with the automata `which` (B,); without a copy where all have one."""
        return self._each(lambda x: x.expand(len(which), *x.shape[1:]) if len(x) == 1 else x[which])

    def _each(self, f: Callable[[Tensor], Tensor]) -> Tables:
        return Tables._make(x.each(f) if isinstance(x, Groups) else f(x) for x in self)


class _Edges(NamedTuple):
    """The steps of an automaton from state to state, each with its set of classes; last those that stay."""

    src: Ints  # (P,) ascending but for those that stay
    dst: Ints
    by: Ints  # (P,) the set; 0: to stay
    one: Ints  # (M,) the classes of the sets
    group: Ints  # (M,) the set of each

    @classmethod
    def of(cls, a: TokenAutomaton) -> _Edges:
        order = np.lexsort((a.by, a.dst, a.src))
        src, dst, by = a.src[order], a.dst[order], a.by[order]
        first = np.flatnonzero(np.diff(src, prepend=-1) | np.diff(dst, prepend=-1))
        known = {np.array([STAY]).tobytes(): 0}
        sets = [known.setdefault(x.tobytes(), len(known)) for x in np.split(by, first[1:])] if len(by) else []
        every = [np.frombuffer(key, np.int64) for key in known]
        own = np.arange(a.states)
        label = np.append(np.array(sets, np.int64), np.zeros_like(own))
        group = np.repeat(np.arange(len(every)), [len(x) for x in every])
        return cls(np.append(src[first], own), np.append(dst[first], own), label, np.concatenate(every), group)

    def final(self, accepting: NDArray[np.bool_], states: int, columns: int) -> NDArray[np.bool_]:
        """(K + 1, Q + 1) whether a member can end k columns on."""
        moves = self.by != STAY
        src, dst = self.src[moves], self.dst[moves]
        some, begins = np.unique(src, return_index=True)
        found = np.zeros((columns + 1, states + 1), np.bool_)
        found[0, : len(accepting)] = accepting
        for k in range(columns if len(src) else 0):
            found[k + 1, some] = np.logical_or.reduceat(found[k, dst], begins)
        return found


def _runs(classes: Ints) -> Iterator[tuple[Ints, NDArray[np.float32], Ints]]:
    """For each automaton `Tables.places` and `Tables.absent` of the tokens that have an edge, and the class of each
    run."""
    counts = [np.bincount(own)[DEAD + 1 :] for own in classes]
    most = max(1, *(int((-(-c // WIDTH)).sum()) for c in counts))
    for own in classes:
        order = np.argsort(own, kind="stable")
        order = order[own[order] != DEAD]
        rank = np.arange(len(order)) - np.searchsorted(own[order], own[order])
        run = np.cumsum(rank % WIDTH == 0) - 1
        table, absent, kinds = np.zeros((WIDTH, most), np.int64), np.full((WIDTH, most), -np.inf), np.full(most, DEAD)
        table[rank % WIDTH, run], absent[rank % WIDTH, run], kinds[run] = order, 0, own[order]
        yield table, absent.astype(np.float32), kinds


def _stacked(rows: Sequence[Ints], fill: int) -> Ints:
    """Rows of different lengths as a table."""
    size = max(1, *map(len, rows))
    return np.stack([np.pad(r, (0, size - len(r)), constant_values=fill) for r in rows])
