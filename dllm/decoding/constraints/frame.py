"""What a forward says of the columns that a constraint reaches, gathered by classes of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.decoding import noise
from dllm.decoding.constraints.automaton import DEAD
from dllm.decoding.constraints.passes import Columns, Lattice, total
from dllm.decoding.constraints.tables import Tables
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
        shape, count = pred.cols.shape, self.tables.leads.shape[1]
        parts = [
            by_class(z if kept is None else torch.where(kept[at], z, -torch.inf), classes, count, heat)
            for z, classes, at in self._chunks(pred)
        ]
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
        shift = shift.transpose(0, 1).to(pred.logits.dtype).flatten(0, 1)
        return torch.cat([z + shift[at].gather(1, classes) for z, classes, at in self._chunks(pred)]).view_as(
            pred.logits
        )

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
        for z, classes, at in self._chunks(pred):
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

    def _chunks(self, pred: Prediction) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits (n, V), the classes (n, V) of their tokens, and which of the B W columns they are (n,)."""
        rows = torch.arange(len(pred.cols), device=pred.cols.device)[:, None].expand_as(pred.cols)
        classes = self.tables.classes
        shared = len(classes) == 1 or classes.stride(0) == 0
        for z, row, at in pred.chunks(rows, torch.arange(rows.numel(), device=rows.device).view_as(rows)):
            yield z, classes[:1].expand(len(z), -1) if shared else classes[row], at


def by_class(logits: Tensor, classes: Tensor, count: int, heat: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each class the log weight of its best token at this temperature, how much more its tokens weigh together (0
    where none is allowed), and that token, lowest id on ties; (n, V) -> (n, count), float64, float64, long.

    The weights are summed as whole numbers of a small unit, so that the order of a sum does not matter.
    """
    n, size = logits.shape
    top = torch.full((n, count), -torch.inf, dtype=logits.dtype, device=logits.device)
    top = top.scatter_reduce(1, classes, logits, "amax")
    own = top.gather(1, classes)
    ids = torch.arange(size, device=logits.device).expand(n, -1)
    first = torch.full((n, count), size, device=logits.device)
    first = first.scatter_reduce(1, classes, torch.where(logits == own, ids, size), "amin")
    unit = 2.0 ** (62 - size.bit_length())
    weight = (((logits - own.clamp(min=torch.finfo(own.dtype).min)) / heat).exp().double() * unit).long()
    times = torch.zeros(n, count, dtype=torch.long, device=logits.device).scatter_add(1, classes, weight)
    return top.double() / heat, times.double() / unit, first
