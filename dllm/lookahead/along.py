"""Levels of a round along the sequence: which keys each of them sees, and what stays of them.

The forward of a round keeps nothing. A level reads the stored keys and values of its row, but where itself computes new
ones, or an earlier level computed some that its step would have left in the store: then it reads those.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.canvas import Plan, mapped
from dllm.decoding.columns import scatter
from dllm.models.transformer import KeysValues, Known, KVStore, Rows, Said


class Along(NamedTuple):
    """N = copies B rows of R levels, each of Q queries: a plan of (copies R B, Q) by row."""

    ids: Tensor  # (N, R, Q)
    pos: Tensor  # (N, R, Q)
    fresh: Tensor  # (N, R, Q) bool: replaces the stored key and value of its slot, for this level
    keep: Tensor  # (N, R, Q) bool: and for those behind it, if its step is taken
    visible: Tensor  # (N, R, 1 | Q, S [+ Q]) bool
    lane: Tensor  # (N,)
    seen: int  # S: slots that are read
    slots: int  # that there are
    rows: Rows | None  # (N, R, r) whose attention weights are wanted, by place in their level

    @classmethod
    def of(cls, plan: Plan, levels: int, rows: int, slots: int) -> Along:
        """The levels of `rows` rows, in a store of `slots`."""
        assert plan.visible is not None and plan.lane is not None

        def by_row(x: Tensor) -> Tensor:
            return x.view(-1, levels, rows, *x.shape[1:]).transpose(1, 2).flatten(0, 1)

        real = plan.pos >= 0
        fresh = real if plan.fresh is None else plan.fresh & real
        keep = fresh if plan.keep is None else plan.keep & fresh
        seen = plan.visible.shape[-1] - (0 if plan.fresh is None else plan.pos.shape[1])
        ids, pos, fresh, keep, visible = (by_row(x) for x in (plan.ids, plan.pos, fresh, keep, plan.visible))
        return cls(ids, pos, fresh, keep, visible, by_row(plan.lane)[:, 0], seen, slots, mapped(by_row, plan.rows))

    @property
    def order(self) -> Tensor:
        """(R, 1) the number of each level."""
        return torch.arange(self.pos.shape[1], device=self.pos.device)[:, None]

    def plan(self, lanes: slice | None) -> Plan:
        """The forward of N rows of R Q private queries; `lanes` are theirs where they are one run."""
        nothing = torch.zeros_like(self.fresh).flatten(1)
        known = Known(padded=True, private=True, lanes=lanes, write=slice(0, 0), slots=self.seen)
        ids, pos = self.ids.flatten(1), self.pos.flatten(1)
        rows = self.rows
        if rows is not None:
            at = torch.where(rows.at < 0, -1, rows.at + self.order * self.pos.shape[2])
            rows = rows._replace(at=at.flatten(1))
        return Plan(ids, pos, nothing, None, self.sees(), self.lane, known, refresh=False, stored=True, rows=rows)

    def by_level(self, said: Said, rows: int) -> Said:
        """What that forward says, (N, R Q, ...), as the plan of (copies R B, Q) would; rows: B."""
        levels = self.pos.shape[1]

        def apart(x: Tensor) -> Tensor:
            return x.view(-1, rows, levels, x.shape[1] // levels, *x.shape[2:]).transpose(1, 2).flatten(0, 2)

        return mapped(apart, said)

    def sees(self) -> Tensor:
        """(N, R Q, S + R Q) bool: the stored slots, and behind them the keys of this forward, that each query sees."""
        levels, q = self.pos.shape[1:]
        held, sees, at = self.holders(), self.visible[..., : self.seen], self.pos.clamp(0, self.seen - 1).flatten(1)
        stored = sees & (held[..., : self.seen] < 0)[:, :, None]  # (N, R, 1 | Q, S)
        mine = held.gather(2, at[:, None].expand(-1, levels, -1)) == self.order.T.repeat_interleave(q, 1)
        mine = mine & (self.fresh & (self.pos < self.seen)).flatten(1)[:, None]  # (N, R, R Q)
        new = sees.gather(3, at[:, None, None].expand(*sees.shape[:3], -1)) & mine[:, :, None]  # (N, R, 1 | Q, R Q)
        if self.visible.shape[-1] > self.seen:  # queries that are no keys of a slot: each level has its own
            peers = self.visible[..., self.seen :].repeat(1, 1, 1, levels)
            own = self.order.T.repeat_interleave(q, 1) == self.order  # (R, R Q)
            new = new | (peers & own[:, None] & ~self.fresh.flatten(1)[:, None, None])
        return torch.cat([stored, new], 3).expand(-1, -1, q, -1).flatten(1, 2)

    def holders(self) -> Tensor:
        """(N, R, slots) the level whose key each level finds in a slot, -1: the one in the store."""
        kept = torch.where(self.by_slot(self.keep), self.order, -1).cummax(1).values
        before = F.pad(kept[:, :-1], (0, 0, 1, 0), value=-1)
        return torch.where(self.by_slot(self.fresh), self.order, before)

    def by_slot(self, marks: Tensor) -> Tensor:
        """(N, R, slots) bool: the slots of the queries that `marks` (N, R, Q) holds."""
        n, levels = self.pos.shape[:2]
        blank = torch.zeros(n * levels, self.slots, dtype=torch.bool, device=marks.device)
        return scatter(blank, torch.where(marks, self.pos, -1).flatten(0, 1), True).view(n, levels, -1)

    def write(self, store: KVStore, layers: list[KeysValues], taken: Tensor) -> None:
        """Put what the first `taken` (N,) levels of each row keep where their steps would have put it, in order."""
        keep = self.keep & (self.order < taken[:, None, None])
        last = torch.where(self.by_slot(keep), self.order, -1).amax(1, keepdim=True)  # (N, 1, slots)
        at = self.pos.clamp(min=0)
        keep = keep & (last.expand(-1, at.shape[1], -1).gather(2, at) == self.order)
        slots, rows = torch.where(keep, self.pos, store.slots).flatten(1), self.lane[:, None]
        for layer, both in enumerate(layers):
            for stored, new in zip((store.keys[layer], store.values[layer]), both, strict=True):
                stored[rows.to(stored.device), :, slots.to(stored.device)] = new
