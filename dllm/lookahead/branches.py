"""Branches of a row: the forwards of several possible futures, in one forward.

A `Query` is one row of a plan taken apart: what it feeds, what it sees, and *whose* keys and values it sees. Its key
names everything its answer depends on, so equal keys mean equal answers: the store enters through the keys of the
queries that wrote the visible slots. `pack` lays the queries of a row out along the sequence, over one stored prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dllm.decoding.canvas import Plan

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Authors = dict[int, Ints]  # lane -> the number of the query that wrote each slot (-1: nobody)


class Feed(NamedTuple):
    """The tokens that one copy of a row feeds; q real queries, padding dropped."""

    real: Ints  # (q,) their columns in the plan
    ids: Ints  # (q,)
    pos: Ints  # (q,)
    fresh: Bools  # (q,) replace the stored keys and values for this forward
    keep: Bools  # (q,) and stay
    sees: Bools | None  # (1 | q, S) stored slots; None: no store, and every query sees every other
    peers: Bools | None  # (1 | q, q) tokens that are not fresh, or all tokens where there is no store
    lane: int

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
    outside: list[Ints] = field(default_factory=list)  # of each copy

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
    fresh, keep, visible, lane = (_host(x) for x in (plan.fresh, plan.keep, plan.visible, plan.lane))
    ids, pos = plan.ids.cpu().numpy(), plan.pos.cpu().numpy()
    total, width = pos.shape
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
        own = 0 if lane is None else int(lane[n])
        return Feed(real, ids[n, real], pos[n, real], new, stay, sees, peers, own)

    out = []
    for row in range(rows):
        feeds = [feed(n) for n in range(row, total, rows) if n == row or (pos[n] >= 0).any()]  # others are padding
        query = Query(feeds, plan.stored, width, plan.refresh and plan.stored)
        query.outside = [f.outside for f in feeds] if plan.stored else []
        out.append(query)
    return out


def _host(x: Tensor | None) -> NDArray | None:
    return None if x is None else x.cpu().numpy()


def name(query: Query, authors: Authors) -> Query:
    """Give the query its key, which depends on who wrote the slots that it sees."""
    parts: list[bytes] = [bytes([query.stored, query.opening])]
    for i, f in enumerate(query.feeds):
        parts += [f.ids.tobytes(), f.pos.tobytes(), f.fresh.tobytes(), f.keep.tobytes()]
        for table in (f.sees, f.peers):
            parts.append(b"" if table is None else np.packbits(table).tobytes() + bytes(str(table.shape), "ascii"))
        if query.stored:
            parts.append(authors[f.lane][query.outside[i]].tobytes())
    query.key = b"|".join(parts)
    return query


class Branch(NamedTuple):
    """A query to be evaluated, and the index of the branch whose state it continues (-1: none, the true query)."""

    query: Query
    parent: int


class Packed(NamedTuple):
    """One forward for the branches of several rows, and where each branch's tokens lie in it."""

    plan: Plan
    places: list[list[tuple[list[int], int]]]  # row -> branch -> (plan row of each copy, first column)

    def split(self, hidden: Tensor, rows: list[list[Branch]]) -> list[list[Tensor]]:
        """Hidden states of each branch, (copies, q, D)."""
        return [
            [
                torch.stack([hidden[n, at : at + len(f.ids)] for n, f in zip(ns, b.query.feeds, strict=True)])
                for b, (ns, at) in zip(branches, places, strict=True)
            ]
            for branches, places in zip(rows, self.places, strict=True)
        ]


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
