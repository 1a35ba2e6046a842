"""The passes of a step over the columns that a constraint reaches: exact, batched, and nothing is asked of the device.

A step knows for each of K columns the tokens that may stand there: one at a committed column, all with their weights at
a *read* one, whose logits the forward gave, and all alike at a *free* one, which nobody has read. The members of the
language that fill exactly these columns have as law the product of the read columns' laws; the passes give its
marginals, its best member, and draws.

Backward, `Ahead` holds for each state the best completion (max, in logarithms) and how much more all completions weigh
together (`rest`, linear and scaled: a ratio cannot underflow). A free column takes the better branch, not the one with
more completions, which the vocabulary alone would decide. The chain of states that follows is a Markov chain, so its
marginals come forward in plain probabilities.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.constraints.tables import Tables


class Columns(NamedTuple):
    """What may stand in the columns of a step, by classes."""

    best: Tensor  # (B, K, C) log weight of a class's best token, float64; -inf: not allowed
    times: Tensor  # (B, K, C) how much more its tokens weigh together, at least 1
    token: Tensor  # (B, K, C) its best token, lowest id on ties
    free: Tensor  # (B, K) bool: not read
    beyond: Tensor  # (B, K) bool: behind the end of the answer


class Ahead(NamedTuple):
    """What can follow, at the edge before each column."""

    best: Tensor  # (B, K + 1, Q + 1) log weight of the best completion, -inf: none
    rest: Tensor  # (B, K + 1, Q + 1) how much more all completions weigh, up to a factor a column
    flow: Tensor  # (B, K, E) chance of each edge, from the state that it leaves

    @property
    def alive(self) -> Tensor:
        """(B,) bool: the columns can be filled."""
        return self.best[:, 0, 0] > -torch.inf


def ahead(tables: Tables, columns: Columns) -> Ahead:
    """The backward pass."""
    best, weight = tables.accepting, torch.ones_like(tables.accepting)
    before, rests, flows = [best], [weight], list[Tensor]()
    for i in range(columns.best.shape[1] - 1, -1, -1):
        through = columns.best[:, i].gather(1, tables.by) + best.gather(1, tables.dst)  # (B, E)
        top = torch.full_like(best, -torch.inf).scatter_reduce_(1, tables.src, through, "amax")  # (B, Q + 1)
        share = (through - top.clamp(min=torch.finfo(top.dtype).min).gather(1, tables.src)).exp()
        mass = share * columns.times[:, i].gather(1, tables.by) * weight.gather(1, tables.dst)
        total = tables.leaving.sum(mass)
        flows.append(mass / total.clamp(min=LEAST).gather(1, tables.src))
        greatest = torch.zeros_like(best).scatter_reduce_(1, tables.src, mass, "amax")
        total = torch.where(columns.free[:, i, None], greatest, total)
        total = (total / total.amax(1, keepdim=True).clamp(min=LEAST)).clamp(min=LEAST)
        behind = columns.beyond[:, i, None]
        best, weight = torch.where(behind, best, top), torch.where(behind, weight, total)
        before.append(best)
        rests.append(weight)
    return Ahead(*(torch.stack(x[::-1], 1) for x in (before, rests, flows)))


LEAST = 1e-300  # in place of nothing, where it divides


def marginals(tables: Tables, columns: Columns, ahead: Ahead) -> Tensor:
    """(B, K, C) the probability of each class at each column; a column behind a free one by the chain that takes every
    class of the free one to be as likely."""
    now, found = F.one_hot(torch.zeros_like(ahead.best[:, 0, 0], dtype=torch.long), ahead.best.shape[2]), []
    here = now.to(ahead.best.dtype)  # (B, Q + 1)
    for i in range(ahead.flow.shape[1]):
        crossing = here.gather(1, tables.src) * ahead.flow[:, i]
        found.append(tables.alike.sum(crossing))
        here = torch.where(columns.beyond[:, i, None], here, tables.entering.sum(crossing))
    return torch.stack(found, 1)


def best(tables: Tables, columns: Columns, ahead: Ahead) -> Tensor:
    """(B, K) the tokens of the best member, the first in the order of ids among equals; at a free column some token of
    the way that it takes."""
    state, tokens = torch.zeros_like(ahead.best[:, 0, :1], dtype=torch.long), list[Tensor]()
    for i in range(ahead.flow.shape[1]):
        after = _after(tables, state, columns)
        weight = columns.best[:, i] + ahead.best[:, i + 1].gather(1, after)  # (B, C)
        top = weight == weight.amax(1, keepdim=True)
        token = torch.where(top, columns.token[:, i], tables.classes.shape[1])
        first = token.argmin(1, keepdim=True)
        tokens.append(token.gather(1, first))
        state = torch.where(columns.beyond[:, i, None], state, after.gather(1, first))
    return torch.cat(tokens, 1)


def drawn(tables: Tables, columns: Columns, ahead: Ahead, u: Tensor) -> tuple[Tensor, Tensor]:
    """A member by its law: (B, K) the class at each column, and (B, K) what is left of the uniform `u` (B, K) to draw
    the token within it."""
    state, classes, rests = torch.zeros_like(ahead.best[:, 0, :1], dtype=torch.long), list[Tensor](), list[Tensor]()
    for i in range(ahead.flow.shape[1]):
        after = _after(tables, state, columns)
        share = (columns.best[:, i] + ahead.best[:, i + 1].gather(1, after) - ahead.best[:, i].gather(1, state)).exp()
        mass = (share * columns.times[:, i] * ahead.rest[:, i + 1].gather(1, after)).nan_to_num(nan=0.0)  # (B, C)
        law = mass.cumsum(1)
        target = u[:, i, None] * law[:, -1:]
        last = (law < law[:, -1:]).sum(1, keepdim=True)  # the last class with any mass
        at = torch.minimum(torch.searchsorted(law, target, right=True), last)
        own = mass.gather(1, at)
        rests.append(((target - law.gather(1, at) + own) / own.clamp(min=LEAST)).clamp(0, 1))
        classes.append(at)
        state = torch.where(columns.beyond[:, i, None], state, after.gather(1, at))
    return torch.cat(classes, 1), torch.cat(rests, 1)


def _after(tables: Tables, state: Tensor, columns: Columns) -> Tensor:
    """(B, C) where each class leads from `state` (B, 1)."""
    count = columns.best.shape[2]
    return tables.follow.gather(1, state * count + torch.arange(count, device=state.device))
