"""Branches of a row: the forwards of several possible futures, in one forward.

A `Query` is one row of a plan taken apart: what it feeds, and what it sees. Its key names everything that its answer
depends on, so equal keys mean equal answers; `ledger.History` gives it. `pack` lays the branches of a row out along the
sequence, over one stored prefix, and takes their answers out of the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dllm.decoding.canvas import Plan, mapped
from dllm.models.transformer import KeysValues, KVStore, Outputs, Rows, Said, Weights

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
    # the tokens that a token sees; with a store only of those that are not fresh; None: all
    peers: Bools | None  # (1 | q, q)
    lane: int  # of the store
    rows: Ints | None  # (r,) the tokens whose attention weights are wanted; None: nobody asks

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

    @cached_property
    def outside(self) -> list[Ints]:
        """`Feed.outside` of each copy."""
        return [f.outside for f in self.feeds] if self.stored else []

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
    asked = None if plan.rows is None else plan.rows.at.cpu().numpy()
    total, width = pos.shape
    if plan.stored and visible is None:
        assert plan.known is not None
        visible = np.ones((total, 1, plan.known.slots), bool)
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
        rows = None if asked is None else np.searchsorted(real, asked[n, asked[n] >= 0])
        return Feed(real, ids[n, real], pos[n, real], new, stay, sees, peers, lanes[n], rows)

    filled: Bools = np.any(pos >= 0, axis=1)  # others are padding
    copies = [[n for n in range(row, total, rows) if n == row or filled[n]] for row in range(rows)]
    return [Query([feed(n) for n in ns], plan.stored, width, plan.refresh and plan.stored) for ns in copies]


class Branch(NamedTuple):
    """A query of a forward: the true one of its row, or a guess of what the row may ask later."""

    query: Query
    parent: int  # the branch of its row whose state it continues, 0 for the true query; -1: this is the true query
    depth: int  # steps ahead of the true query
    ids: Tensor  # (L,) the canvas that asks it


class BranchKV(NamedTuple):
    """Keys and values that a branch would have left in the store, still inside the tensors of its forward."""

    layers: list[KeysValues]  # each (N, Q, kv_heads, head_dim)
    rows: Sequence[int]  # plan row of each copy
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

        def cut(x: Tensor) -> Tensor:
            return torch.cat([x[n, c] for n, c in zip(self.rows, self.columns, strict=True)])[None]

        sizes = [len(c) for c in self.columns]
        columns = torch.split(torch.arange(sum(sizes), device=self.columns[0].device), sizes)
        return BranchKV([(cut(k), cut(v)) for k, v in self.layers], [0] * len(sizes), list(columns))


@dataclass(eq=False)
class Evaluated:
    """A branch with its answer."""

    branch: Branch
    said: Said  # of its (copies, q) tokens, and the r rows of attention weights that it wants
    kv: BranchKV | None = None
    old: bool = False  # evaluated before the last forward


class Place(NamedTuple):
    """Where a branch's tokens lie in a forward."""

    rows: Sequence[int]  # plan row of each copy
    at: int  # first column
    first: int  # of its rows of attention weights


class Packed(NamedTuple):
    """One forward for the branches of several rows, and where each of them lies in it."""

    plan: Plan
    places: list[list[Place]]  # row -> branch

    def split(self, rows: list[list[Branch]], outputs: Outputs) -> list[list[Evaluated]]:
        """The answer of each branch, from what the plan's forward gave."""
        return [
            [_evaluated(branch, place, outputs) for branch, place in zip(branches, places, strict=True)]
            for branches, places in zip(rows, self.places, strict=True)
        ]


def _evaluated(branch: Branch, place: Place, outputs: Outputs) -> Evaluated:
    feeds, (rows, at, first), (said, layers) = branch.query.feeds, place, outputs
    states = torch.stack([said.hidden[n, at : at + len(f.ids)] for n, f in zip(rows, feeds, strict=True)])
    own = Said(states)
    if said.weights is not None:
        count = _wanted(feeds[0])  # of every copy
        own = Said(states, mapped(lambda x: x[list(rows), first : first + count], said.weights))
    if not layers or branch.parent < 0 or not branch.query.keeps:  # the true query has written the store itself
        return Evaluated(branch, own)
    kept = [torch.from_numpy(np.flatnonzero(f.keep) + at).to(states.device) for f in feeds]
    return Evaluated(branch, own, BranchKV(layers, rows, kept))


def _wanted(f: Feed) -> int:
    """Rows of attention weights that a copy wants."""
    return 0 if f.rows is None else len(f.rows)


def pack(rows: list[list[Branch]], device: torch.device, asked: Rows | None = None) -> Packed:
    """One plan for the branches of each row; the first branch of a row is its true query.

    With a store the branches of a row lie one after another in the sequence and read its stored slots together. The
    true query writes what the plan says; the others write nothing, and see the keys and values that their own ancestors
    would have written. Without a store each branch is a row of the batch. asked: what one of the branches' plans asked
    of the attention; None: nobody asks.
    """
    packed, at = _along_sequence(rows, device) if rows[0][0].query.stored else _along_batch(rows, device)
    if asked is None:
        return packed
    asked = asked._replace(at=torch.from_numpy(at).to(device))
    return packed._replace(plan=packed.plan._replace(rows=asked))


def _along_batch(rows: list[list[Branch]], device: torch.device) -> tuple[Packed, Ints]:
    flat = [b.query.feeds for branches in rows for b in branches]
    total = len(flat) * max(map(len, flat))
    lines = [range(i, total, len(flat))[: len(feeds)] for i, feeds in enumerate(flat)]  # of the copies of each branch
    fed = [pair for own, feeds in zip(lines, flat, strict=True) for pair in zip(own, feeds, strict=True)]
    shape = total, max(len(f.ids) for _, f in fed)
    ids, pos = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    visible = np.zeros((*shape, shape[1]), bool) if any(f.peers is not None for _, f in fed) else None
    asked = np.full((len(ids), max(_wanted(f) for _, f in fed)), -1)
    for i, f in fed:
        q = len(f.ids)
        ids[i, :q], pos[i, :q] = f.ids, f.pos
        if f.rows is not None:
            asked[i, : len(f.rows)] = f.rows
        if visible is not None:
            visible[i, :q, :q] = True if f.peers is None else f.peers
    tensors = [None if x is None else torch.from_numpy(x).to(device) for x in (ids, pos, visible)]
    left = iter(lines)
    places = [[Place(next(left), 0, 0) for _ in branches] for branches in rows]
    return Packed(
        Plan._make([*tensors[:2], None, None, tensors[2], None, None, False, False, None, False]), places
    ), asked


def _along_sequence(rows: list[list[Branch]], device: torch.device) -> tuple[Packed, Ints]:
    copies, n = max(len(b.query.feeds) for branches in rows for b in branches), len(rows)
    slots = max(f.sees.shape[1] for branches in rows for b in branches for f in b.query.feeds if f.sees is not None)
    sizes = [[len(b.query.feeds[0].ids) for b in branches] for branches in rows]
    shape = copies * n, max(map(sum, sizes))
    ids, pos = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    keep, visible = np.zeros(shape, bool), np.zeros((*shape, slots + shape[1]), bool)
    wanted = [[max(map(_wanted, b.query.feeds)) for b in branches] for branches in rows]
    asked = np.full((len(ids), max(map(sum, wanted))), -1)
    lane = np.array([branches[0].query.feeds[0].lane for branches in rows] * copies)
    places: list[list[Place]] = [[] for _ in rows]
    for r, (branches, own) in enumerate(zip(rows, sizes, strict=True)):
        # which column holds each slot after a branch, in each copy; -1: the store, which the last entry stands for
        holders = np.full((len(branches) + 1, copies, slots), -1)
        starts = zip(accumulate([0, *own]), accumulate([0, *wanted[r]]), strict=True)
        for b, (branch, (at, first), q) in enumerate(zip(branches, starts, own, strict=False)):
            span, feeds = slice(at, at + q), branch.query.feeds
            places[r].append(Place(range(r, len(ids), n)[: len(feeds)], at, first))
            for c, (i, f) in enumerate(zip(places[r][b].rows, feeds, strict=True)):
                ids[i, span], pos[i, span], lane[i] = f.ids, f.pos, f.lane
                if f.rows is not None:
                    asked[i, first : first + len(f.rows)] = at + f.rows
                keep[i, span] = f.keep & (b == 0)
                private = ~keep[i, span] & (f.pos < slots)
                holder, holders[b, c] = holders[branch.parent, c].copy(), holders[branch.parent, c]
                for table, held in ((holder, f.fresh & private), (holders[b, c], f.keep & private)):
                    table[f.pos[held]] = at + np.flatnonzero(held)
                _see(visible[i, span], f, holder, slots, at)
    if (keep | (pos < 0)).all():  # nothing private: no columns for it
        visible = visible[:, :, :slots]
    tensors = [torch.from_numpy(x).to(device) for x in (ids, pos, keep, keep, visible, lane)]
    return Packed(Plan._make([*tensors, None, False, True, None, False]), places), asked


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


def laid(queries: list[Query], answers: list[Evaluated], copies: int) -> Said:
    """The answers to the queries of some rows, (copies B, Q, ...) in the layout of what was fed."""
    first, weights = answers[0].said, None
    hidden = first.hidden.new_zeros((copies, len(queries), queries[0].width, first.hidden.shape[-1]))
    for row, (query, answer) in enumerate(zip(queries, answers, strict=True)):
        for copy, f in enumerate(query.feeds):
            hidden[copy, row, torch.from_numpy(f.real).to(hidden.device)] = answer.said.hidden[copy]
    if first.weights is not None:
        found = [a.said.weights for a in answers if a.said.weights is not None]
        weights = stacked(found, copies)
    return Said(hidden.flatten(0, 1), weights)


def stacked(weights: Sequence[Weights], copies: int) -> Weights:
    """Attention weights of several rows, (own copies, r, ...) each, as those of (copies B) rows with equally many."""
    wide = max(w.cols.shape[1] for w in weights)

    def all_of(tables: list[Tensor], value: int) -> Tensor:
        tails = [(0, 0) * (t.dim() - 2) + (0, wide - t.shape[1], 0, copies - len(t)) for t in tables]
        own = [F.pad(t, tail, value=value) for t, tail in zip(tables, tails, strict=True)]
        return torch.stack(own, 1).flatten(0, 1)

    return Weights(all_of([w.cols for w in weights], -1), all_of([w.table for w in weights], 0))


def fitted(said: Said, queries: int, reads: int) -> Said:
    """The same with as many private queries behind the planned ones, if it has any, as a step on it has reads."""
    more = queries + reads - said.hidden.shape[1]
    return said if more == reads else said._replace(hidden=F.pad(said.hidden, (0, 0, 0, more)))
