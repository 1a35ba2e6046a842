"""What a forward says of the columns that a constraint reaches, gathered by classes of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.decoding import noise
from dllm.decoding.constraints.automaton import DEAD
from dllm.decoding.constraints.passes import Columns, Lattice, exp, total
from dllm.decoding.constraints.tables import Groups, Tables, folded
from dllm.decoding.prediction import Prediction, inverse_cdf, support


class Heard(NamedTuple):
    """What a forward says at one temperature, and what can be made of it."""

    heat: float  # the temperature
    top: Tensor  # (W, B, C) log weight of the best token of each class
    times: Tensor  # (W, B, C) how much more its tokens weigh together
    lattice: Lattice


@dataclass(frozen=True)
class Frame:
    """The columns that a prediction reads, among the N that a step looks at."""

    tables: Tables
    given: Lattice
    place: Tensor  # (W, B) which of the N; N where none is read
    first: Tensor  # (B,) the first of the N
    gaps: bool  # whether some of the N may be free

    def hear(self, pred: Prediction, heat: float, kept: Tensor | None = None) -> Heard:
        """What the forward says at this temperature, of the tokens that are `kept` (B W, V) bool; None: of all."""
        shape, count, tables = pred.cols.shape, self.tables.leads.shape[1], self.tables
        parts = []
        for z, at, some in self._chunks(pred):
            said = z if kept is None else torch.where(kept[at], z, -torch.inf)
            parts.append(by_class(said, some(tables.places), some(tables.absent), tables.runs.each(some), heat))
        top, times, token = (torch.cat(p).view(*shape, count).transpose(0, 1) for p in zip(*parts, strict=True))
        edge, given = torch.arange(count, device=top.device) != DEAD, self.given.columns
        assert given.free is not None
        free = self._put(given.free, torch.zeros_like(self.place, dtype=torch.bool)) if self.gaps else None
        columns = Columns(
            self._put(given.best, torch.where(edge, top, -torch.inf)), self._put(given.times, times),
            self._put(given.token, token), free,
        )  # fmt: skip
        return Heard(heat, top, times, replace(self.given, columns=columns))

    def posterior(self, pred: Prediction, heard: Heard) -> Tensor:
        """(B, W, V) the logits that make the softmax at this temperature the chance of each token."""
        mass = heard.top + heard.times.log()  # (W, B, C)
        most = mass.amax(2, keepdim=True)
        whole = total((mass - most).exp()).log() + most
        chance = self._at(heard.lattice.marginals())
        shift = torch.where(chance > 0, chance.log() - mass + whole, -torch.inf) * heard.heat
        shift = torch.where((self.place < len(self.given.columns.best))[..., None], shift, 0.0)
        return self.moved(pred, shift.transpose(0, 1).to(pred.logits.dtype).flatten(0, 1))

    def moved(self, pred: Prediction, shift: Tensor) -> Tensor:
        """(B, W, V) the logits, those of each class moved by `shift` (B W, C)."""
        moved, begun = torch.empty_like(pred.logits), 0
        for z, at, some in self._chunks(pred):
            into = moved.flatten(0, 1).narrow(0, begun, len(z))
            torch.add(z, shift[at].gather(1, some(self.tables.classes)), out=into)
            begun += len(z)
        return moved

    def best(self, heard: Heard) -> Tensor:
        """(B, W) the tokens of the best member."""
        return self._at(heard.lattice.member()).T

    def draw(self, pred: Prediction, heard: Heard) -> Tensor:
        """(B, W) the tokens of a member, by the law at the temperature of `heard`, cut by top-p and top-k."""
        kept = self.kept(pred, heard) if pred.law.trims else None
        heard = heard if kept is None else self.hear(pred, heard.heat, kept)
        cols = torch.arange(len(heard.lattice.columns.best), device=self.first.device) + self.first[:, None]
        u = noise.uniform(pred.seed[:, None], pred.step[:, None], cols).T  # (N, B)
        one, rest = (self._at(x).T.flatten() for x in heard.lattice.drawn(u))  # (B W,)
        top = heard.top.transpose(0, 1).flatten(0, 1).gather(1, one[:, None])
        tokens = []
        for z, at, some in self._chunks(pred):
            classes = some(self.tables.classes)
            within = classes == one[at, None] if kept is None else (classes == one[at, None]) & kept[at]
            tokens.append(inverse_cdf(torch.where(within, (z / heard.heat - top[at]).exp(), 0.0), rest[at]))
        return torch.cat(tokens).view_as(pred.cols)

    def kept(self, pred: Prediction, heard: Heard) -> Tensor:
        """(B W, V) bool: the tokens that top-p and top-k leave of each column's posterior. Where no member is made of
        these alone, the best one is let in."""
        said = Prediction(self.posterior(pred, heard), pred.cols)
        kept = torch.cat([support((z / heard.heat).softmax(-1), pred.law) for (z,) in said.chunks()])
        alive = self.hear(pred, heard.heat, kept).lattice.alive
        star = self.best(heard).flatten()
        more = kept.scatter(1, star[:, None], True)
        return torch.where(alive.repeat_interleave(pred.cols.shape[1])[:, None], kept, more)

    # -- between the W columns of a prediction and the N of the step --------------------------------------------------

    def _put(self, table: Tensor, new: Tensor) -> Tensor:
        """The table (N, B, ...) with `new` (W, B, ...) at the columns that are read."""
        place = self.place.view(*self.place.shape, *[1] * (table.dim() - 2)).expand_as(new)
        return torch.cat([table, table[:1]]).scatter(0, place, new)[:-1]

    def _at(self, table: Tensor) -> Tensor:
        """(W, B, ...) the table (N, B, ...) at the columns of the prediction; what stands for others nobody may
        read."""
        place = self.place.clamp(max=len(table) - 1).view(*self.place.shape, *[1] * (table.dim() - 2))
        return table.gather(0, place.expand(*self.place.shape, *table.shape[2:]))

    def _chunks(self, pred: Prediction) -> Iterator[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]:
        """Logits (n, V), which of the B W columns they are (n,), and what takes from a table (B, ...) theirs."""
        rows = torch.arange(len(pred.cols), device=pred.cols.device)[:, None].expand_as(pred.cols)
        alike = len(rows) == 1 or self.tables.classes.stride(0) == 0
        for z, row, at in pred.chunks(rows, torch.arange(rows.numel(), device=rows.device).view_as(rows)):
            yield z, at, partial(_alike, len(z)) if alike else partial(torch.index_select, dim=0, index=row)


def _alike(n: int, table: Tensor) -> Tensor:
    return table[:1].expand(n, *table.shape[1:])


def by_class(
    logits: Tensor, places: Tensor, absent: Tensor, runs: Groups, heat: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each class the log weight of its best token at this temperature, how much more its tokens weigh together (0
    where none is allowed), and that token, lowest id on ties; (n, V) -> (n, C), float64, float64, long.

    The tokens of a class lie in runs: each run is looked at, and then the runs of each class. places, absent,
    runs: those of `Tables` for each of the n.
    """
    (width, count), n, classes = places.shape[1:], len(logits), runs.levels[-1].shape[-1]
    said = logits.gather(1, places.flatten(1)).view(n, width, count).add_(absent)
    peaks = said.amax(1)  # (n, R)
    top = logits.new_full((n, classes), -torch.inf).scatter_reduce(1, runs.of_each, peaks, "amax")
    own = top.gather(1, runs.of_each)
    which = torch.where(peaks == own, torch.arange(count, device=own.device), count - 1)
    first = torch.full((n, classes), count - 1, device=own.device).scatter_reduce(1, runs.of_each, which, "amin")
    at = first[:, None].expand(-1, width, -1)
    best = (said.gather(2, at) == top[:, None]).int().argmax(1, keepdim=True)
    token = places.gather(2, at).gather(1, best)[:, 0]
    weight = exp((said - own.clamp(min=torch.finfo(own.dtype).min)[:, None]).div_(heat))
    return top.double() / heat, runs.sum(folded(weight, 1).double()), token
