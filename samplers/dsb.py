"""DSB: a block that slides with the first mask and grows with what was committed (arXiv 2602.05992)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.samplers import OFF, Bundle, Canvas, Context, Method, Span, State, Window, param, spans
from dllm.samplers.threshold import Threshold


class SlidingMemory(NamedTuple):
    """Per-row leaves, (B,)."""

    epoch: Tensor
    refreshed: Tensor  # columns that were written when the epoch began
    lo: Tensor  # first column of the last window


@dataclass(frozen=True)
class Sliding(Window):
    """From the first mask s to start + length + committed, at most s + `most`; an epoch each `length` commits."""

    length: int
    most: int | None = None

    def widest(self, canvas: Canvas) -> int:
        """All columns, or `most` of them."""
        width = canvas.ids.shape[1]
        return width if self.most is None else min(self.most, width)

    def memory(self, canvas: Canvas) -> SlidingMemory:
        """The first epoch, from the first mask on."""
        return SlidingMemory(torch.zeros_like(canvas.start), written(canvas), canvas.first_masked())

    def open(self, state: State) -> tuple[State, Span]:
        """From the first mask on; a new epoch where `length` columns were written since the last."""
        canvas, before = state.canvas, state.memory[SlidingMemory]
        count = written(canvas)
        lo = canvas.first_masked()
        hi = torch.minimum(canvas.start + self.length + count, canvas.length)
        if self.most is not None:
            hi = torch.minimum(hi, lo + self.most)
        due = count - before.refreshed >= self.length
        epoch = before.epoch + due
        refreshed = torch.where(due, count, before.refreshed)
        # columns that the last step left behind are read once more: a cache that recomputes only what is near the
        # window would keep the keys and values that they had as masks
        first = torch.minimum(lo, before.lo)
        reads = spans(first, hi, canvas.ids.shape[1])
        state = state._replace(memory=state.memory.plus(SlidingMemory(epoch, refreshed, lo)))
        end = torch.minimum(canvas.start + 2 * self.length + refreshed - 1, canvas.length)  # before a next epoch is due
        return state, Span(lo=lo, hi=hi, end=end, reads=reads, epoch=epoch)


def written(canvas: Canvas) -> Tensor:
    """(B,) columns of the generation part that hold a token; given ones count, so the window always reaches a mask."""
    return canvas.length - canvas.start - canvas.masked.sum(1)


@dataclass(frozen=True)
class DSB(Method):
    """Decode in a window that starts at the first mask and whose end moves right with every commit.

    A column that is hard no longer holds its block open, and a column just behind the block's end no longer waits. The
    rule inside the window is threshold's unless another sampler brings its own. The published cache is
    `dual:left=24`: 24 columns left of the window are recomputed with it, everything after each `block_length` commits.
    """

    max_length: int | None = param(None, "None lets the window grow (`greedy`); a number bounds it (`const`)", low=1)
    tau: float = param(0.9, "the threshold of its published runs", low=0, high=OFF)

    name: ClassVar[str] = "dsb"
    source: ClassVar[str] = "DSB, arXiv 2602.05992"
    cost: ClassVar[str] = "one row, up to block_length columns and as many more as were committed behind the first mask"

    def bundle(self, context: Context) -> Bundle:
        """Owns the window; the selection is threshold's where nobody brings one."""
        window = Sliding(context.block_length, self.max_length)
        return Bundle(window=window, assumes={"select": Threshold(tau=self.tau).select})
