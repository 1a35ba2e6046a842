"""The automata of a constraint: over bytes, and over classes of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DEAD = 0  # the class of tokens without an edge

Ints = NDArray[np.int64]


class ByteAutomaton(NamedTuple):
    """A deterministic automaton over bytes, minimal, which starts in state 0."""

    delta: NDArray[np.int32]  # (S, 256), -1: dead
    accepting: NDArray[np.bool_]  # (S,)

    def accepts(self, text: bytes) -> bool:
        """Whether it reads all of the text and accepts."""
        state = 0
        for byte in text:
            state = int(self.delta[state, byte])
            if state < 0:
                return False
        return bool(self.accepting[state])


class Vocabulary(NamedTuple):
    """The bytes of every token; a token without any (a special one, or half a character that no text holds) has no
    edge."""

    flat: NDArray[np.uint8]  # all of them, one token after the other
    ends: Ints  # (V,) where each token's bytes end in it

    @property
    def digest(self) -> bytes:
        """Equal for equal vocabularies."""
        return hashlib.blake2b(self.flat.tobytes() + self.ends.tobytes()).digest()

    @classmethod
    def of(cls, tokens: Sequence[bytes]) -> Vocabulary:
        """From the bytes of each."""
        return cls(np.frombuffer(b"".join(tokens), np.uint8), np.cumsum([len(t) for t in tokens], dtype=np.int64))


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """A deterministic automaton over classes of tokens that starts in state 0; every state can be reached and leads to
    an accepting one."""

    classes: Ints  # (V,) the class of each token, DEAD: none of its texts is allowed anywhere
    accepting: NDArray[np.bool_]  # (Q,)
    src: Ints  # (E,) edges, ascending by state, then class
    by: Ints  # (E,)
    dst: Ints  # (E,)
    free: bool = False  # it stands for no constraint at all
    hole: TokenAutomaton | None = None  # it reads several holes, one after another, and this one each of them

    @classmethod
    def anything(cls, size: int, ends: Sequence[int]) -> TokenAutomaton:
        """That of a row without a constraint, over so many tokens."""
        classes = np.ones(size, np.int64)
        classes[list(ends)] = 2
        by = np.unique(classes)
        return cls(classes, np.ones(1, np.bool_), np.zeros_like(by), by, np.zeros_like(by), free=True)

    @property
    def again(self) -> int:
        """The class of what stands between two holes, which no token has; -1: there is one text."""
        return -1 if self.hole is None else self.hole.count

    def for_holes(self) -> TokenAutomaton:
        """That of holes which must each hold a member: between two of them it begins again."""
        ends = np.flatnonzero(self.accepting)
        src, dst = np.append(self.src, ends), np.append(self.dst, np.zeros_like(ends))
        by = np.append(self.by, np.full_like(ends, self.count))
        order = np.lexsort((by, src))
        return TokenAutomaton(self.classes, self.accepting, src[order], by[order], dst[order], hole=self)

    def lengths(self, most: int) -> list[int]:
        """How many tokens a member may have, up to so many."""
        near, found = np.zeros(self.states, np.bool_), list[int]()
        near[:1] = True
        for count in range(most + 1):
            if (near & self.accepting).any():
                found.append(count)
            ahead = np.zeros_like(near)
            ahead[self.dst[near[self.src]]] = True
            near = ahead
        return found

    @property
    def states(self) -> int:
        """Q; 0 where no text is a member."""
        return len(self.accepting)

    @property
    def count(self) -> int:
        """Classes, DEAD among them."""
        return int(self.by.max(initial=0)) + 1

    @cached_property
    def digest(self) -> bytes:
        """Equal for equal automata."""
        parts = (x.tobytes() for x in (self.classes, self.accepting, self.src, self.by, self.dst))
        return hashlib.blake2b(b"".join(hashlib.blake2b(p).digest() for p in parts) + bytes([self.free])).digest()

    @cached_property
    def follow(self) -> Ints:
        """(Q, C) the next state, -1 where there is none."""
        table = np.full((self.states, self.count), -1, np.int64)
        table[self.src, self.by] = self.dst
        return table

    @cached_property
    def least(self) -> int | None:
        """Tokens of the shortest member, end tokens apart; None: there is none."""
        near = np.zeros(self.states, np.bool_)
        near[:1] = True
        for count in range(self.states):
            if (near & self.accepting).any():
                return count
            ahead = np.zeros_like(near)
            ahead[self.dst[near[self.src]]] = True
            near = ahead
        return None

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Whether these tokens are a member."""
        table, state = self.follow, 0 if self.states else -1
        for token in tokens:
            state = int(table[state, self.classes[token]]) if state >= 0 else -1
        return bool(state >= 0 and self.accepting[state])
