"""Who wrote what in the store of a row, and what the store still lacks.

The answer to a query depends on the keys and values that it sees, so these have names too: the number of the query that
wrote them. A step whose answer was there ahead of time runs no forward and writes nothing. What the plain call would
have written then is owed, and paid before a forward that sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from dllm.lookahead.branches import Evaluated, Ints, Query


class History:
    """Who wrote each slot of a row's lanes. It never changes: `after` gives another one."""

    def __init__(self, authors: Mapping[int, Ints]) -> None:
        self.authors = authors  # lane -> the number of the query that wrote each slot, -1 for nobody

    def after(self, query: Query, number: int) -> History:
        """The history once the query of this number has written what it keeps."""
        authors = dict(self.authors)
        for f in query.feeds if query.stored else ():
            authors[f.lane] = authors[f.lane].copy()
            authors[f.lane][f.pos[f.keep]] = number
        return History(authors)

    def differs(self, other: History, query: Query) -> bool:
        """Whether the query would read other keys and values in a store of this history than in that of the other."""
        seen = [(f.lane, slots) for f, slots in zip(query.feeds, query.outside, strict=False)]
        return any((self.authors[lane][slots] != other.authors[lane][slots]).any() for lane, slots in seen)

    def name(self, query: Query) -> Query:
        """Give the query the key that it has in a store of this history."""
        parts = [bytes([query.stored, query.opening])]
        for i, f in enumerate(query.feeds):
            parts += [f.ids.tobytes(), f.pos.tobytes(), f.fresh.tobytes(), f.keep.tobytes()]
            for table in (f.sees, f.peers):
                parts.append(b"" if table is None else np.packbits(table).tobytes() + bytes(str(table.shape), "ascii"))
            parts.append(b"" if f.rows is None else f.rows.tobytes())
            if query.stored:
                parts.append(self.authors[f.lane][query.outside[i]].tobytes())
        query.key = b"|".join(parts)
        return query


class Ledger:
    """The account of one row: who wrote what in the plain call, who in the store as it is, and what hits owe."""

    def __init__(self, lanes: Iterable[int], slots: int, *, steady: bool) -> None:
        self.plain = self.held = History({lane: np.full(slots, -1, np.int64) for lane in lanes})
        self.steady = steady  # whether all steps between two refreshes have kept the same slots so far
        self._debts: list[Evaluated] = []
        self._numbers: dict[bytes, int] = {}
        self._kept: list[bytes] | None = None  # the slots that the last step kept

    def number(self, query: Query) -> int:
        """The number of a query, by its key: the same for equal queries."""
        return self._numbers.setdefault(query.key, len(self._numbers))

    def wrote(self, query: Query | None) -> None:
        """A forward of the plain call has run. None: its queries have no names, so everything may be new."""
        if query is None:
            number = self._numbers.setdefault(b"plain %d" % len(self._numbers), len(self._numbers))
            self.plain = self.held = History({i: np.full_like(a, number) for i, a in self.plain.authors.items()})
            return
        number = self.number(query)
        self.plain, self.held = self.plain.after(query, number), self.held.after(query, number)
        if all((slots == self.held.authors[lane]).all() for lane, slots in self.plain.authors.items()):
            self._debts = []

    def owes(self, answer: Evaluated) -> None:
        """A step was answered ahead of time: what its query keeps is not in the store."""
        query = answer.branch.query
        if query.keeps:
            self.plain = self.plain.after(query, self.number(query))
            self._debts.append(answer)

    def behind(self, query: Query) -> bool:
        """Whether the query sees slots that the store lacks."""
        return self.plain.differs(self.held, query)

    def due(self, query: Query | None) -> list[Evaluated]:
        """What has to be written before the next forward of the plain call, in order; it counts as written.

        A steady row rewrites the slots that it owes with that forward: it pays only where they are seen before. Other
        rows pay at once, while the keys and values of the hits are at hand.
        """
        if query is not None and query.stored:
            self._watch(query)
        return self._paid() if query is None or not self.steady or self.behind(query) else []

    def due_again(self, query: Query) -> list[Evaluated]:
        """The same before the step that was just taken is taken again: its forward writes what itself owes."""
        if not self.behind(query):
            return []
        if self._debts and self._debts[-1].branch.query.key == query.key:
            self._debts.pop()
        return self._paid()

    def _watch(self, query: Query) -> None:
        """Learn whether the steps keep the same slots."""
        kept = None if query.opening else [f.pos[f.keep].tobytes() for f in query.feeds]
        self.steady = self.steady and (kept is None or self._kept is None or kept == self._kept)
        self._kept = kept

    def _paid(self) -> list[Evaluated]:
        debts, self._debts, self.held = self._debts, [], self.plain
        return debts
