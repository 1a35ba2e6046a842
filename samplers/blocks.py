"""The default window: fixed blocks from left to right (semi-autoregressive decoding, LLaDA, arXiv 2502.09992)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dllm.decoding.canvas import Canvas, Span, State
from dllm.decoding.columns import spans
from dllm.decoding.slots import Context, Hold, Window


class BlockMemory(NamedTuple):
    """Per-row leaves of a window of blocks, all (B,): what the quota rules go by."""

    lo: Tensor  # first column of the open block, -1 before the first
    step: Tensor  # the step that opened it
    masks: Tensor  # masks that it held then

    @classmethod
    def start(cls, canvas: Canvas) -> Self:
        """No block is open yet."""
        zero = torch.zeros_like(canvas.start)
        return cls(zero - 1, zero, zero)


def first_block(canvas: Canvas, length: int, aligned: bool) -> Tensor:
    """(B,) column at which the first block of each row begins; an aligned one may begin with prompt tokens."""
    return canvas.start // length * length if aligned else canvas.start


@dataclass(frozen=True)
class Blocks(Window):
    """Blocks of `length` columns; a block is left when none of its columns is masked. The last one may be short.

    Remembers, for the quota rules, at which step the block was opened and how many masks it held then.
    """

    length: int = field(metadata={"why": "columns of a block"})
    lone_opening: bool = field(default=False, metadata={"why": "the opening forward commits the first column only"})
    aligned: bool = field(default=False, metadata={"why": "blocks count from column 0, as block-causal models have it"})
    whole: bool = field(default=False, metadata={"why": "one block takes the whole generation, whatever the call says"})
    holds: bool = field(default=False, metadata={"why": "a block stays open while `Hold` says so"})

    @classmethod
    def of(cls, context: Context, *, lone_opening: bool = False, holds: bool = False) -> Self:
        """The blocks of a call."""
        return cls(context.block_length, lone_opening, context.block_size is not None, holds=holds)

    def widest(self, canvas: Canvas) -> int:
        """A block."""
        return min(self.length, canvas.ids.shape[1])

    def memory(self, canvas: Canvas) -> BlockMemory:
        """No block is open yet."""
        return BlockMemory.start(canvas)

    def open(self, state: State) -> tuple[State, Span]:
        """The block that holds the first mask, or one that is held."""
        canvas, before = state.canvas, state.memory[BlockMemory]
        origin = first_block(canvas, self.length, self.aligned)
        block = (canvas.first_masked() - origin) // self.length
        if self.holds:
            block = torch.where(state.memory[Hold].held, (before.lo - origin) // self.length, block)
        lo = origin + block * self.length
        hi = torch.minimum(lo + self.length, canvas.length)
        new = lo != before.lo
        begin, end = lo, hi
        if self.lone_opening:
            begin, end = torch.where(new, lo, lo + 1), torch.where(new, lo + 1, hi)
        reads = spans(begin, end, self.widest(canvas))
        inside = spans(lo, hi, self.widest(canvas))
        masks = (canvas.masked.gather(1, inside.clamp(min=0)) & (inside >= 0)).sum(1)
        step, masks = torch.where(new, state.step, before.step), torch.where(new, masks, before.masks)
        state = state._replace(memory=state.memory.plus(BlockMemory(lo, step, masks)))
        return state, Span(lo=begin, hi=end, end=hi, reads=reads, epoch=block)
