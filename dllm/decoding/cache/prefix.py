"""Prefixes: keys and values of prompts that were decoded before, for block-causal models.

Those of a block depend on the ids up to its end and on nothing else: what one row computed serves every row whose
prompt begins with the same blocks. A block is found by a hash of its ids and of all before it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.models.transformer import KVStore


class Stored(NamedTuple):
    """A block of a prompt: keys and values of every layer, each (n_kv_heads, block, head_dim)."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(t.nbytes for side in self for t in side)


class Reuse(NamedTuple):
    """What was found so far."""

    asked: int  # whole blocks of the prompts that came
    found: int  # of these, those that were there
    evicted: int
    nbytes: int  # that are held


class Prefixes:
    """The blocks that were used last, `limit` bytes of them at most. They belong to one model and its weights."""

    def __init__(self, block: int, limit: int) -> None:
        self.block, self.limit = block, limit
        self._blocks = OrderedDict[bytes, Stored]()  # the one to go first in front
        self._asked = self._found = self._evicted = self._bytes = 0

    @property
    def reuse(self) -> Reuse:
        """What was found so far."""
        return Reuse(self._asked, self._found, self._evicted, self._bytes)

    def clear(self) -> None:
        """Let all of them go."""
        self._blocks.clear()
        self._bytes = 0

    def find(self, ids: Sequence[int]) -> list[Stored]:
        """The blocks that these ids begin with, as many as there are. What hangs on the end of `ids` is no block."""
        names, found = list(self._names(ids)), list[Stored]()
        for name in names:
            if name not in self._blocks:
                break
            found.append(self._blocks[name])
        self._touch(names[: len(found)])
        self._asked, self._found = self._asked + len(names), self._found + len(found)
        return found

    def load(self, found: Sequence[Stored], store: KVStore, lane: int) -> None:
        """Put blocks where the first columns of a lane are."""
        end = self.block * len(found)
        for side, tables in enumerate(store):
            for layer, table in enumerate(tables):
                table[lane, :, :end] = torch.cat([block[side][layer] for block in found], 1)

    def keep(self, ids: Sequence[int], store: KVStore, lane: int) -> None:
        """Take the blocks of these ids from the lane that holds them."""
        names = list(self._names(ids))
        for i, name in enumerate(names):
            if name not in self._blocks:
                at = slice(i * self.block, (i + 1) * self.block)
                keys, values = (tuple(t[lane, :, at].clone() for t in tables) for tables in store)
                self._blocks[name] = Stored(keys, values)
                self._bytes += self._blocks[name].nbytes
        self._touch(names)
        while self._bytes > self.limit:
            _, block = self._blocks.popitem(last=False)
            self._bytes -= block.nbytes
            self._evicted += 1

    def _names(self, ids: Sequence[int]) -> Iterator[bytes]:
        name = b""
        for first in range(0, len(ids) - self.block + 1, self.block):
            name = hashlib.sha256(name + array("q", ids[first : first + self.block]).tobytes()).digest()
            yield name

    def _touch(self, names: Sequence[bytes]) -> None:
        """These were used; a block goes after those that begin with it, which nobody finds without it."""
        for name in reversed(names):
            self._blocks.move_to_end(name)
