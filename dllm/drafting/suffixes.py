"""What followed in the texts of others: every place of many texts, sorted by the tokens that follow, so that all
occurrences of an n-gram are one stretch of the order and its continuations are counted without walking a tree.

A generalised suffix tree of depth `DEPTH` (SuffixDecoding, arXiv 2411.04975) in eight bytes a token.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TypeAlias

import numpy as np

from dllm.drafting.proposal import Proposal, best_first

DEPTH = 64  # tokens by which places are sorted: a match and what is read behind it
REACH = 32  # of a match
Ids: TypeAlias = "Sequence[int] | np.ndarray"
Spans = list[tuple["SuffixArray", int, int]]  # stretches of the orders of several arrays: one n-gram in all of them


class SuffixArray:
    """Texts, and the order of their places. It never changes."""

    def __init__(self, texts: Sequence[Ids] = ()) -> None:
        self.texts = [np.asarray(text, dtype=np.int32) for text in texts]
        self.size = sum(map(len, self.texts))

    @cached_property
    def flat(self) -> np.ndarray:
        """The texts one after the other, (n,) of ids + 1; zeros, behind which nothing is found, end each and the
        last."""
        end = np.zeros(1, np.int32)
        pieces = [piece for text in self.texts for piece in (text + 1, end)]
        return np.concatenate([*pieces, np.zeros(2 * DEPTH, np.int32)])

    @cached_property
    def raw(self) -> bytes:
        """`flat` so that bytes compare as numbers do."""
        return self.flat.astype(">u4").tobytes()

    @cached_property
    def order(self) -> np.ndarray:
        """The places by the `DEPTH` tokens from there on, earlier ones first among equals: (size,)."""
        n = len(self.flat)
        rank = self.flat.astype(np.int64)
        width = 1
        while width < DEPTH:  # ranks by 2 width tokens are those of pairs of ranks by width tokens
            behind = np.zeros(n, np.int64)
            behind[: n - width] = rank[width:]
            rank = np.unique(rank * (int(rank.max()) + 1) + behind, return_inverse=True)[1].reshape(-1)
            width *= 2
        order = np.argsort(rank, kind="stable").astype(np.int32)
        return order[self.flat[order] > 0]

    def find(self, gram: Sequence[int]) -> tuple[int, int]:
        """The stretch of the order where a gram of at most `DEPTH` tokens stands; empty where it is nowhere."""
        key = (np.asarray(gram, dtype=np.int64) + 1).astype(">u4").tobytes()
        raw, width = self.raw, len(key)

        def at(place: int) -> bytes:
            return raw[4 * int(place) : 4 * int(place) + width]

        low = bisect_left(self.order, key, key=at)
        return low, bisect_right(self.order, key, low, key=at)

    def holds(self, gram: Sequence[int]) -> bool:
        """Whether a gram stands anywhere."""
        low, high = self.find(gram)
        return low < high

    def following(self, low: int, high: int, depth: int, fewest: float = 0) -> list[tuple[int, int, int, int]]:
        """What follows the gram of `depth` tokens of a stretch, `fewest` times at least: (token, where its stretch
        begins and ends, its last place)."""
        if high - low == 1:
            place = int(self.order[low])
            token = int(self.flat[place + depth]) - 1
            return [(token, low, high, place)] if token >= 0 else []
        places = self.order[low:high]
        tokens = self.flat[places + depth]
        starts = np.concatenate([[0], np.flatnonzero(np.diff(tokens)) + 1])
        last = np.maximum.reduceat(places, starts)
        found = np.stack([tokens[starts] - 1, low + starts, np.append(low + starts[1:], high), last], 1)
        often = (found[:, 0] >= 0) & (found[:, 2] - found[:, 1] >= fewest)
        return list(map(tuple, found[often].tolist()))


class Texts:
    """Texts in the order in which they came, at most `limit` tokens of them: where more come, the oldest leave until an
    eighth of the limit is free. `levels` are sorted apart and merged as they grow, so that a text is sorted a few times
    in all."""

    GROWTH = 4  # a level is larger than the next by so much

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.levels: tuple[SuffixArray, ...] = ()  # oldest first; replaced whole, so that who reads them keeps his

    @property
    def size(self) -> int:
        """Tokens."""
        return sum(level.size for level in self.levels)

    @property
    def texts(self) -> list[np.ndarray]:
        """All texts, oldest first."""
        return [text for level in self.levels for text in level.texts]

    def add(self, texts: Sequence[Ids]) -> None:
        """The next texts; of one that is longer than the limit its end."""
        fresh = SuffixArray([text[-self.limit :] for text in texts if len(text)])
        levels = [*self.levels]
        while levels and levels[-1].size < self.GROWTH * fresh.size:
            fresh = SuffixArray([*levels.pop().texts, *fresh.texts])
        self.levels = tuple(level for level in self._bounded([*levels, fresh]) if level.size)

    def _bounded(self, levels: list[SuffixArray]) -> list[SuffixArray]:
        excess = sum(level.size for level in levels) - self.limit
        if excess <= 0:
            return levels
        excess += self.limit // 8
        kept = []
        for level in levels:
            texts = level.texts
            while len(texts) > (level is levels[-1]) and excess > 0:  # the newest stays
                excess -= len(texts[0])
                texts = texts[1:]
            kept.append(level if len(texts) == len(level.texts) else SuffixArray(texts))
        return kept


def longest(levels: Sequence[SuffixArray], ids: Sequence[int]) -> int:
    """Tokens of the longest end of `ids`, at most `REACH`, that stands in one of the levels."""
    best = 0
    for level in levels:
        low, high = best, min(REACH, len(ids))  # the end of `low` tokens is known to stand somewhere
        if low < high and level.holds(ids[-low - 1 :]):
            low += 1
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if level.holds(ids[-middle:]) else (low, middle - 1)
            best = low
    return best


def counted(
    levels: Sequence[SuffixArray],
    ids: Sequence[int],
    match: int,
    depth: int,
    budget: int,
    *,
    width: int | None = None,
    least: float = 0.1,
    ends: Callable[[int], bool] = lambda token: False,
) -> Proposal:
    """What followed the last `match` of `ids` most often, best first, by counts over all levels together: at most
    `budget` nodes, `depth` deep, `width` a parent (None: no bound), none that is reached with less than `least`.

    A token that followed c times of n has the confidence c / (n + 1 / match): of counts as of a match, one that is
    larger is trusted more; in a level where it is rarer than `least` would have it, it is not counted. Ties go to what
    was seen last. `ends`: whether nothing may follow a token.
    """
    gram = ids[-match:]
    root: Spans = [(level, *level.find(gram)) for level in levels]
    root = [(level, low, high) for level, low, high in root if low < high]
    depth = min(depth, DEPTH - match)

    def following(spans: Spans, at: int, chance: float) -> Iterator[tuple[int, float, Spans]]:
        if not spans or at >= depth:
            return
        total = sum(high - low for _, low, high in spans) + 1 / match
        fewest = least / chance * total  # over all levels, so in one of them a share of it
        where: dict[int, Spans] = {}
        seen: dict[int, tuple[int, int]] = {}
        for age, (level, low, high) in enumerate(spans):
            for token, start, end, place in level.following(low, high, match + at, fewest / len(spans)):
                where.setdefault(token, []).append((level, start, end))
                seen[token] = age, place
        often = {token: sum(high - low for _, low, high in some) for token, some in where.items()}
        likely = [(n, seen[token], token) for token, n in often.items() if n >= fewest]
        for n, _, token in sorted(likely, reverse=True)[:width]:
            yield token, n / total, [] if ends(token) else where[token]

    return best_first(root, following, budget)[0]
