"""The passes of a step over the columns that a constraint reaches: exact, batched, and nothing is asked of the device.

A step knows for each of N columns the tokens that may stand there: one at a committed column, all with their weights at
a *read* one, whose logits the forward gave, and all alike at a *free* one, which nobody has read. The members of the
language that fill exactly these columns have as law the product of the read columns' laws; the passes give its
marginals, its best member, and draws.

Only the recursions go column by column, with as little work as there can be: the best completion of each state (max, in
logarithms), and then, in one loop over both directions, how much more all completions of a state weigh together
(`rest`) and how much all beginnings do that lead to it (`reach`). These are linear and relative to the best member
through the state, so that no ratio underflows. A free column takes the better branch backward, not the one with more
completions, which the vocabulary alone would decide; forward it takes each of its steps once.

Tables of a step have the columns in front: (N, B, ...).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.constraints.tables import Tables, folded

LEAST = 1e-300  # in place of nothing, where it divides
LEVEL = 16  # columns over which sums grow: V to the power of them is still a number


class Columns(NamedTuple):
    """What may stand in the columns of a step, by classes."""

    best: Tensor  # (N, B, C) log weight of a class's best token, float64; -inf: not allowed
    times: Tensor  # (N, B, C) how much more its tokens weigh together, at least 1
    token: Tensor  # (N, B, C) its best token, lowest id on ties
    free: Tensor | None  # (N, B) bool: not read; None: no column is


def exp(x: Tensor) -> Tensor:
    """e to the power of `x`, which is written over. A CPU's own takes several times as long for what vanishes."""
    return x.mul_(math.log2(math.e)).exp2_()


def total(x: Tensor) -> Tensor:
    """(..., 1) the sum over the last dimension, which places behind it that hold nothing do not change."""
    size = x.shape[-1]
    return folded(F.pad(x, (0, (1 << (size - 1).bit_length()) - size)), -1)[..., None]


@dataclass(frozen=True)
class Lattice:
    """Columns between the state before them, `start` (B,), and what must follow: `end` (B, Q + 1), 0 where a member
    can end and -inf elsewhere."""

    tables: Tables
    columns: Columns
    start: Tensor
    end: Tensor

    @cached_property
    def best(self) -> Tensor:
        """(N, B, G) log weight of the best token of each set of classes."""
        one, size = self.columns.best.gather(2, self._one), self.tables.together.levels[-1].shape[-1]
        blank = one.new_full((*one.shape[:2], size), -torch.inf)
        return blank.scatter_reduce_(2, self.tables.together.of_each.expand_as(one), one, "amax")

    @cached_property
    def share(self) -> Tensor:
        """(N, B, M) the weights of the classes of a set beside its best token."""
        least = torch.finfo(self.best.dtype).min
        best = self.best.clamp(min=least).gather(2, self.tables.together.of_each.expand_as(self._one))
        return exp(self.columns.best.gather(2, self._one) - best) * self.columns.times.gather(2, self._one)

    @cached_property
    def times(self) -> Tensor:
        """(N, B, G) how much more the tokens of a set weigh together than its best one; at a free column 1."""
        times = self.tables.together.sum(self.share)
        return times if self.columns.free is None else torch.where(self.columns.free[..., None], 1.0, times)

    @property
    def _one(self) -> Tensor:
        return self.tables.one.expand(len(self.columns.best), -1, -1)

    @cached_property
    def weight(self) -> Tensor:
        """(N, B, P) log weight of the best token of each edge."""
        return self.best.gather(2, self._by)

    @property
    def _by(self) -> Tensor:
        return self.tables.by.expand(len(self.columns.best), -1, -1)

    @cached_property
    def ahead(self) -> Tensor:
        """(N + 1, B, Q + 1) log weight of the best completion of each state, -inf: there is none."""
        dst, src = self.tables.ways.unbind(1)
        found = self.end.new_full((len(self.weight) + 1, *self.end.shape), -torch.inf)
        found[-1] = self.end
        edges, weights = found.unbind(), self.weight.unbind()
        for i in range(len(weights) - 1, -1, -1):
            edges[i].scatter_reduce_(1, src, edges[i + 1].gather(1, dst).add_(weights[i]), "amax")
        return found

    @property
    def alive(self) -> Tensor:
        """(B,) bool: the columns can be filled."""
        return self.ahead[0].gather(1, self.start[:, None])[:, 0] > -torch.inf

    @cached_property
    def flow(self) -> Tensor:
        """(N, B, P) the weight of each edge, relative to the best completions of the states at its ends."""
        dst, src = (way.expand_as(self.weight) for way in self.tables.ways.unbind(1))
        here = self.ahead[:-1].clamp(min=torch.finfo(self.ahead.dtype).min)
        rise = self.ahead[1:].gather(2, dst).add_(self.weight).sub_(here.gather(2, src))
        return exp(rise).mul_(self.times.gather(2, self._by))

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """`rest` and `reach`, each up to a factor a column."""
        free, flows = self.columns.free, self.flow.unbind()
        found = self.end.new_zeros(len(flows) + 1, len(self.end), 2, self.end.shape[1])
        found[0, :, 0].fill_(1)
        found[0, :, 1].scatter_(1, self.start[:, None], 1)
        edges = found.unbind()
        for i, forth in enumerate(flows):
            mass = edges[i].gather(2, self.tables.ways)  # (B, 2, P)
            behind, before = mass.unbind(1)
            behind.mul_(flows[-1 - i])
            before.mul_(forth)
            now = self.tables.ends.add(edges[i + 1], mass)  # (B, 2, Q + 1)
            if free is not None:
                greatest = self.tables.ends.greatest(mass)[:, 0]
                now[:, 0].copy_(torch.where(free[-1 - i][:, None], greatest, now[:, 0]))
            if i % LEVEL == LEVEL - 1:
                now.mul_(now.amax(2, keepdim=True).frexp().exponent.neg().double().exp2())  # which rounds nothing
        back, forward = found.unbind(2)
        return back.flip(0).clamp(min=LEAST), forward

    @property
    def rest(self) -> Tensor:
        """(N + 1, B, Q + 1) how much more all completions of a state weigh than its best one."""
        return self._sums[0]

    @property
    def reach(self) -> Tensor:
        """(N + 1, B, Q + 1) how much the beginnings that lead to a state weigh."""
        return self._sums[1]

    # -- what is asked ------------------------------------------------------------------------------------------------

    def marginals(self) -> Tensor:
        """(N, B, C) the probability of each class at each column; of a column behind a free one, beside the others
        there."""
        dst, src = (way.expand_as(self.weight) for way in self.tables.ways.unbind(1))
        crossing = self.reach[:-1].gather(2, src).mul_(self.flow).mul_(self.rest[1:].gather(2, dst))
        sets = self.tables.alike.sum(crossing) / self.times.clamp(min=LEAST)
        index = self.tables.together.of_each.expand_as(self._one)
        chance = self.tables.apart.sum(self.share * sets.gather(2, index))
        return chance / total(chance).clamp(min=LEAST)

    def member(self) -> Tensor:
        """(N, B) the tokens of the best member, the first in the order of ids among equals; at a free column some token
        of the way that it takes."""
        order = self.columns.token.argsort(2)  # of classes, so that the first of equals is the lowest token
        weights, token = self.columns.best.gather(2, order).unbind(), self.columns.token.gather(2, order)
        states, state, firsts = self.end.shape[1], self.start[:, None], list[Tensor]()
        for base, weight, ahead in zip((order * states).unbind(), weights, self.ahead[1:].unbind(), strict=True):
            after = self.tables.follow.gather(1, base + state)  # (B, C)
            first = ahead.gather(1, after).add_(weight).argmax(1, keepdim=True)
            state = after.gather(1, first)
            firsts.append(first)
        return token.gather(2, torch.stack(firsts))[..., 0]

    def drawn(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """A member by its law: (N, B) the class at each column, and (N, B) what is left of the uniform `u` (N, B) to
        draw the token within it."""
        states, count = self.end.shape[1], self.columns.best.shape[2]
        base = torch.arange(count, device=u.device) * states
        state, classes, rests = self.start[:, None], list[Tensor](), list[Tensor]()
        for i, at_most in enumerate(u[..., None].unbind()):
            after = self.tables.follow.gather(1, base + state)  # (B, C)
            rise = self.columns.best[i] + self.ahead[i + 1].gather(1, after) - self.ahead[i].gather(1, state)
            mass = (rise.exp() * self.columns.times[i] * self.rest[i + 1].gather(1, after)).nan_to_num(nan=0.0)
            law = mass.cumsum(1)
            target = at_most * law[:, -1:]
            last = (law < law[:, -1:]).sum(1, keepdim=True)  # the last class with any mass
            at = torch.minimum(torch.searchsorted(law, target, right=True), last)
            own = mass.gather(1, at)
            rests.append(((target - law.gather(1, at) + own) / own.clamp(min=LEAST)).clamp(0, 1))
            classes.append(at)
            state = after.gather(1, at)
        return torch.stack(classes)[..., 0], torch.stack(rests)[..., 0]
