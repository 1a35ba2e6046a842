"""What the host knows of a batch: one small table of numbers comes over with the one wait of a tick.

A tick ends by opening the next window, so the table says how large the next forward is: `Shape` has its sizes, and
nobody asks the device for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dllm.decoding import graphs
from dllm.decoding.canvas import Canvas, Fed, Span, State
from dllm.decoding.columns import marked
from dllm.decoding.constraints.bound import Bound, Reach
from dllm.decoding.slots import Closed

COLUMNS = 64  # what is laid out for rows of several calls counts columns in multiples of it


class Facts(NamedTuple):
    """A row after a tick, its next window open; the truth values are 0 or 1."""

    done: int
    closing: int  # an exit asks that what is left is filled
    covered: int  # and the last forward computed all that this takes
    finite: int  # whether the logits of the last forward had a softmax
    step: int
    start: int  # first generated column
    length: int  # columns
    masks: int  # columns that are open
    closed: int  # end of the prefix that can change no more, where the call has stop strings
    fed: int  # positions that the last forward computed, all copies of the row together
    lo: int  # first column of the next window
    hi: int  # its end, exclusive
    stale: int  # the next step refreshes
    size: int  # columns that the next forward feeds
    first: int  # of them
    last: int
    limit: int  # end of the stored columns that the next forward may see
    seen: int  # how many these are
    reads: int  # columns that the next step reads
    reach: int  # columns from the first open one to the last that is read or stands, where a constraint asks
    gaps: int  # of these the open ones that are not read
    doubt: int  # a lookahead leaves the next step to a forward of this row alone


def flags(
    state: State, window: Span, covered: Tensor, finite: Tensor, fed: Tensor, doubt: Tensor | None = None
) -> Tensor:
    """The `Facts` of rows with an open window, (B, F). Of the last forward: covered, finite, fed (B,) each, doubt
    (B,), None: there is none."""
    canvas, (refresh, step), stale = state.canvas, (window.feeds(True), window.feeds(False)), window.stale
    assert stale is not None
    cols = torch.where(stale[:, None], refresh.cols, step.cols)
    seen = torch.where(stale[:, None], refresh.sees(canvas), step.sees(canvas))
    closed = state.memory.get(Closed)
    columns = torch.arange(1, cols.shape[1] + 1, device=cols.device)
    last = torch.where(cols, columns, 0).amax(1) - 1
    reads = torch.where(window.reads >= 0, columns[: window.reads.shape[1]], 0).amax(1)
    zero = torch.zeros_like(state.step)
    reach, gaps = _reached(canvas, window) if Bound in state.memory else (zero, zero)
    known: dict[str, Tensor] = dict(
        done=state.done, closing=state.closing, covered=covered, finite=finite, step=state.step,
        start=canvas.start, length=canvas.length, masks=canvas.masked.sum(1),
        closed=canvas.start if closed is None else closed.end, fed=fed, lo=window.lo, hi=window.hi, stale=stale,
        size=cols.sum(1), first=cols.int().argmax(1), last=last, limit=torch.where(seen, columns, 0).amax(1),
        seen=seen.sum(1), reads=reads, reach=reach, gaps=gaps, doubt=zero if doubt is None else doubt,
    )  # fmt: skip
    return torch.stack([known[name] for name in Facts._fields], 1)


def _reached(canvas: Canvas, window: Span) -> tuple[Tensor, Tensor]:
    """`Facts.reach` and `Facts.gaps`, (B,) each."""
    cols = torch.arange(canvas.ids.shape[1], device=canvas.ids.device)
    read, inside = marked(window.reads, len(cols)), cols < canvas.length[:, None]
    first = torch.where(canvas.masked, cols, len(cols)).amin(1)
    end = torch.where(inside & (read | ~canvas.masked), cols + 1, 0).amax(1)
    return (end - first).clamp(min=0), (canvas.masked & ~read & (cols < end[:, None])).sum(1)


def fetch(table: Tensor) -> list[Facts]:
    """The facts of each row: the one wait of a tick."""
    return [Facts._make(row) for row in graphs.fetch(table)]


def kinds(rows: Sequence[int], facts: Sequence[Facts]) -> list[list[int]]:
    """The rows that refresh, and those that do not: one forward serves rows of a kind. One that has no rows is left
    out; `facts` are those that the rows are the indices of."""
    parts = ([i for i in rows if facts[i].stale == stale] for stale in (1, 0))
    return [part for part in parts if part]


def matched(rows: Sequence[int], facts: Sequence[Facts]) -> list[list[int]]:
    """The rows of one kind in forwards that compute no more than if each row fed a multiple of COLUMNS: rows of few
    columns do not pay for those of many."""
    parts, taken = list[list[int]](), 0
    for i in sorted(rows, key=lambda i: -facts[i].size):
        taken += -(-facts[i].size // COLUMNS) * COLUMNS
        if parts and (len(parts[-1]) + 1) * facts[parts[-1][0]].size <= taken:
            parts[-1].append(i)
        else:
            parts.append([i])
            taken = -(-facts[i].size // COLUMNS) * COLUMNS
    return [sorted(part) for part in parts]


class Shape(NamedTuple):
    """The sizes of one forward, for all of its rows; equal shapes make equal kernels."""

    queries: int  # Q
    slots: int  # S: stored columns that are read
    reads: int  # W
    padded: bool = True  # some row feeds fewer than Q columns
    ragged: bool = True  # some row may not see all S stored columns
    write: tuple[int, int] | None = None  # all rows feed, and keep, exactly these columns; None: it takes an index
    reach: Reach | None = None  # the columns that a constraint looks at; None: all

    @classmethod
    def of(cls, rows: Sequence[Facts], fed: Fed) -> Self:
        """The narrowest forward of these rows."""
        queries, slots = max(1, *(r.size for r in rows)), max(r.limit for r in rows)
        first, write = rows[0].first, None
        plain = fed.keep is None and fed.aside is None
        if plain and all(r.size == queries and r.first == first and r.last == first + queries - 1 for r in rows):
            write = first, first + queries
        return cls(
            queries=queries,
            slots=slots,
            reads=max(1, *(r.reads for r in rows)),
            padded=any(r.size != queries for r in rows),
            ragged=any(r.seen != slots for r in rows),
            write=write,
            reach=reach(rows),
        )

    def static(self, columns: int) -> Self:
        """A shape that many forwards have, for captured work: sizes rounded up, for rows of so many columns."""
        queries, reads = (min(_rounded(n), columns) for n in (self.queries, self.reads))
        reach = self.reach and self.reach._replace(columns=min(_rounded(self.reach.columns), columns))
        return self._replace(
            queries=queries, slots=columns, reads=reads, padded=True, ragged=True, write=None, reach=reach
        )


def reach(rows: Sequence[Facts]) -> Reach:
    """What the host knows of the columns that constraints of these rows look at."""
    return Reach(max(r.reach for r in rows), any(r.gaps for r in rows))


def _rounded(n: int) -> int:
    """The next multiple of 8, or of an eighth of the power of two above: at most a quarter is padding."""
    step = max(8, 1 << max((n - 1).bit_length() - 3, 0))
    return -(-n // step) * step
