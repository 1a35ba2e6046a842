"""Branches of a row: the forwards of several possible futures, in one forward.

A `Query` is one row of a plan taken apart: what it feeds, and what it sees. Its key names everything that its answer
depends on, so equal keys mean equal answers; `ledger.History` gives it. `pack` lays the branches of a row out along the
sequence, over one stored prefix, and takes their answers out of the forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dllm.decoding.canvas import Plan
from dllm.models.transformer import KeysValues, KVStore

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


class Feed(NamedTuple):
    """The tokens that one copy of a row feeds; q real queries, padding dropped."""

    real: Ints  # (q,) their columns in the plan
    ids: Ints  # (q,)
    pos: Ints  # (q,)
    fresh: Bools  # (q,) whether a token's keys and values replace the stored ones for this forward
    keep: Bools  # (q,) whether they also stay in the store after it
    sees: Bools | None  # (1 | q, S) the stored slots that a token sees; None: there is no store
    peers: (
        Bools | None
    )  # (1 | q, q) the tokens that a token sees; with a store only of those that are not fresh; None: all
    lane: int  # of the store

    @property
    def outside(self) -> Ints:
        """Stored slots that somebody sees and this forward does not replace."""
        if self.sees is None:
            return np.empty(0, np.int64)
        seen: Bools = np.any(self.sees, axis=0)
        inside = self.pos[self.fresh & (self.pos < len(seen))]
        seen[inside] = False
        return np.flatnonzero(seen)


@dataclass(eq=False)
class Query:
    """One row of a plan: its copies, and the key of everything that its answer depends on."""

    feeds: list[Feed]
    stored: bool
    width: int  # query columns that were fed, padding included
    opening: bool  # a refresh of the whole lane
    key: bytes = b""
    outside: list[Ints] = field(default_factory=list)  # `Feed.outside` of each copy

    @property
    def keeps(self) -> bool:
        """Whether it leaves anything in the store."""
        return self.stored and any(f.keep.any() for f in self.feeds)

    @property
    def size(self) -> int:
        """Query tokens of all copies."""
        return sum(len(f.ids) for f in self.feeds)


def queries(plan: Plan, rows: int) -> list[Query]:
    """Take a plan of `rows` rows apart (its copies lie one after the other). One host sync."""
    fresh, keep, visible = (None if x is None else x.cpu().numpy() for x in (plan.fresh, plan.keep, plan.visible))
    ids, pos = plan.ids.cpu().numpy(), plan.pos.cpu().numpy()
    total, width = pos.shape
    lanes = [0] * total if plan.lane is None else plan.lane.tolist()
    private = fresh is not None and not (fresh | (pos < 0)).all()

    def feed(n: int) -> Feed:
        real = np.flatnonzero(pos[n] >= 0)
        new = np.ones(len(real), bool) if fresh is None else fresh[n, real]
        stay = new if keep is None else keep[n, real] & new
        sees = peers = None
        if visible is not None:
            table = visible[n] if visible.shape[1] == 1 else visible[n, real]
            if plan.stored:
                slots = table.shape[1] - width * private
                sees, peers = table[:, :slots], table[:, slots + real] if private else None
                sees = sees[:, : int(np.flatnonzero(sees.any(0))[-1]) + 1 if sees.any() else 0]
            else:
                peers = table[:, real]
        return Feed(real, ids[n, real], pos[n, real], new, stay, sees, peers, lanes[n])

    out = []
    for row in range(rows):
        feeds = [feed(n) for n in range(row, total, rows) if n == row or (pos[n] >= 0).any()]  # others are padding
        query = Query(feeds, plan.stored, width, plan.refresh and plan.stored)
        query.outside = [f.outside for f in feeds] if plan.stored else []
        out.append(query)
    return out


class Branch(NamedTuple):
    """A query of a forward: the true one of its row, or a guess of what the row may ask later."""

    query: Query
    parent: int  # the branch of its row whose state it continues, 0 for the true query; -1: this is the true query
    depth: int  # steps ahead of the true query
    ids: Tensor  # (L,) the canvas that asks it


class BranchKV(NamedTuple):
    """Keys and values that a branch would have left in the store, still inside the tensors of its forward."""

    layers: list[KeysValues]  # each (N, Q, kv_heads, head_dim)
    rows: list[int]  # plan row of each copy
    columns: list[Tensor]  # of each copy, those that it keeps

    def write(self, store: KVStore, query: Query) -> None:
        """Put what the query keeps where the plain call would have put it."""
        for n, columns, f in zip(self.rows, self.columns, query.feeds, strict=True):
            slots = torch.from_numpy(f.pos[f.keep]).to(columns.device)
            for layer, new in enumerate(self.layers):
                for stored, fresh in zip((store.keys[layer], store.values[layer]), new, strict=True):
                    stored[f.lane][:, slots] = fresh[n, columns].transpose(0, 1)

    def alone(self) -> BranchKV:
        """The same, cut out of the tensors of the forward."""
        cut = [
            torch.cat([x[n, c] for n, c in zip(self.rows, self.columns, strict=True)])
            for pair in self.layers
            for x in pair
        ]
        sizes = np.cumsum([0] + [len(c) for c in self.columns])
        columns = [torch.arange(a, b, device=c.device) for a, b, c in zip(sizes, sizes[1:], self.columns, strict=False)]
        layers = [(k[None], v[None]) for k, v in zip(cut[::2], cut[1::2], strict=True)]
        return BranchKV(layers, [0] * len(columns), columns)


@dataclass(eq=False)
class Evaluated:
    """A branch with its answer."""

    branch: Branch
    hidden: Tensor  # (copies, q, D)
    kv: BranchKV | None = None
    old: bool = False  # evaluated before the last forward


class Packed(NamedTuple):
    """One forward for the branches of several rows, and where each branch's tokens lie in it."""

    plan: Plan
    places: list[list[tuple[list[int], int]]]  # row -> branch -> (plan row of each copy, first column)

    def split(self, rows: list[list[Branch]], hidden: Tensor, layers: list[KeysValues]) -> list[list[Evaluated]]:
        """The answer of each branch, from the plan's hidden states and its new keys and values (none: no store)."""
        return [
            [_evaluated(branch, *place, hidden, layers) for branch, place in zip(branches, places, strict=True)]
            for branches, places in zip(rows, self.places, strict=True)
        ]


def _evaluated(branch: Branch, rows: list[int], at: int, hidden: Tensor, layers: list[KeysValues]) -> Evaluated:
    feeds = branch.query.feeds
    states = torch.stack([hidden[n, at : at + len(f.ids)] for n, f in zip(rows, feeds, strict=True)])
    if not layers or branch.parent < 0 or not branch.query.keeps:  # the true query has written the store itself
        return Evaluated(branch, states)
    kept = [torch.from_numpy(np.flatnonzero(f.keep) + at).to(hidden.device) for f in feeds]
    return Evaluated(branch, states, BranchKV(layers, rows, kept))


def pack(rows: list[list[Branch]], device: torch.device) -> Packed:
    """One plan for the branches of each row; the first branch of a row is its true query.

    With a store the branches of a row lie one after another in the sequence and read its stored slots together. The
    true query writes what the plan says; the others write nothing, and see the keys and values that their own ancestors
    would have written. Without a store each branch is a row of the batch.
    """
    return _along_sequence(rows, device) if rows[0][0].query.stored else _along_batch(rows, device)


def _along_batch(rows: list[list[Branch]], device: torch.device) -> Packed:
    copies = _copies(rows)
    flat = [_copy(b.query, c) for c in range(copies) for branches in rows for b in branches]
    count, width = sum(map(len, rows)), max(len(f.ids) for f in flat if f is not None)
    ids, pos = np.zeros((len(flat), width), np.int64), np.full((len(flat), width), -1, np.int64)
    visible = None
    if any(f is not None and f.peers is not None for f in flat):
        visible = np.zeros((len(flat), width, width), bool)
    for n, f in enumerate(flat):
        if f is None:
            continue
        q = len(f.ids)
        ids[n, :q], pos[n, :q] = f.ids, f.pos
        if visible is not None:
            visible[n, :q, :q] = True if f.peers is None else f.peers
    table, at = [], 0
    for branches in rows:
        own = [range(len(b.query.feeds)) for b in branches]
        table.append([([at + i + c * count for c in cs], 0) for i, cs in enumerate(own)])
        at += len(branches)
    tensors = [None if x is None else torch.from_numpy(x).to(device) for x in (ids, pos, visible)]
    return Packed(Plan._make([*tensors[:2], None, None, tensors[2], None, False, False]), table)


def _along_sequence(rows: list[list[Branch]], device: torch.device) -> Packed:
    copies, n = _copies(rows), len(rows)
    lines = [[_copy(b.query, c) for b in branches] for c in range(copies) for branches in rows]
    sizes = [[len(b.query.feeds[0].ids) for b in branches] for branches in rows] * copies
    parents = [[b.parent for b in branches] for branches in rows] * copies
    width = max(map(sum, sizes))
    slots = max(f.sees.shape[1] for line in lines for f in line if f is not None and f.sees is not None)
    ids, pos = np.zeros((len(lines), width), np.int64), np.full((len(lines), width), -1, np.int64)
    keep, lane = np.zeros((len(lines), width), bool), np.zeros(len(lines), np.int64)
    visible = np.zeros((len(lines), width, slots + width), bool)
    places: list[list[tuple[list[int], int]]] = [[([], 0)] * len(branches) for branches in rows]
    for i, (line, parent) in enumerate(zip(lines, parents, strict=True)):
        lane[i], at = next((f.lane for f in line if f is not None), lane[i % n]), 0
        holders: list[Ints] = []  # of each branch: which column holds each slot after it
        for b, (f, p, q) in enumerate(zip(line, parent, sizes[i], strict=True)):
            if f is None:  # padding
                holders.append(np.full(slots, -1, np.int64))
                at += q
                continue
            span = slice(at, at + q)
            ids[i, span], pos[i, span] = f.ids, f.pos
            stays = f.keep if b == 0 else np.zeros(q, bool)
            keep[i, span] = stays
            holder = np.full(slots, -1, np.int64) if p < 0 else holders[p].copy()  # -1: the store
            after, own = holder.copy(), np.arange(at, at + q)
            held = f.fresh & ~stays & (f.pos < slots)
            holder[f.pos[held]] = own[held]
            if b:
                left = f.keep & (f.pos < slots)
                after[f.pos[left]] = own[left]
            _see(visible[i, span], f, holder, slots, at)
            holders.append(after)
            places[i % n][b] = ([*places[i % n][b][0], i], at)
            at += q
    if (keep | (pos < 0)).all():  # nothing private: no columns for it
        visible = visible[:, :, :slots]
    tensors = [torch.from_numpy(x).to(device) for x in (ids, pos, keep, keep, visible, lane)]
    return Packed(Plan._make([*tensors, False, True]), places)


def _copies(rows: list[list[Branch]]) -> int:
    return max(len(b.query.feeds) for branches in rows for b in branches)


def _copy(query: Query, c: int) -> Feed | None:
    """What a copy of a query feeds; None for one that it has not."""
    return query.feeds[c] if c < len(query.feeds) else None


def _see(visible: Bools, f: Feed, holder: Ints, slots: int, at: int) -> None:
    """Fill the (q, slots + Q) visibility of one branch: a slot is read where its keys and values are."""
    assert f.sees is not None
    sees = np.zeros((len(visible), slots), bool)
    sees[:, : f.sees.shape[1]] = f.sees
    inside = np.flatnonzero(holder >= 0)
    visible[:, :slots] = sees
    visible[:, inside] = False
    visible[:, slots + holder[inside]] = sees[:, inside]
    if f.peers is not None:
        alone = np.flatnonzero(~f.fresh)
        visible[:, slots + at + alone] = np.broadcast_to(f.peers, (len(visible), len(f.ids)))[:, alone]


def lay(hidden: Tensor, query: Query, copies: int) -> Tensor:
    """Hidden states (own copies, q, D) of a query back in the layout of what was fed, (copies, Q, D)."""
    out = hidden.new_zeros((copies, query.width, hidden.shape[-1]))
    for copy, f in enumerate(query.feeds):
        out[copy, torch.from_numpy(f.real).to(hidden.device)] = hidden[copy]
    return out
