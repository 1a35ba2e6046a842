"""The default window: fixed blocks from left to right (semi-autoregressive decoding, LLaDA, arXiv 2502.09992)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllm.cache import spans
from dllm.canvas import Canvas, State, Window


@dataclass(frozen=True)
class Blocks:
    """Blocks of `length` columns; a block is left when none of its columns is masked. The last one may be short.

    Remembers, for the quota rules, at which step the block was opened and how many masks it held then.
    """

    length: int = field(metadata={"why": "columns of a block"})
    lone_opening: bool = field(default=False, metadata={"why": "the opening forward commits the first column only"})

    def memory(self, canvas: Canvas) -> dict[str, Tensor]:
        return {
            "window.lo": torch.full_like(canvas.start, -1),
            "window.step": torch.zeros_like(canvas.start),
            "window.masks": torch.zeros_like(canvas.start),
        }

    columns = None

    def open(self, state: State) -> tuple[State, Window]:
        canvas, memory = state.canvas, state.memory
        block = (canvas.first_masked() - canvas.start) // self.length
        lo = canvas.start + block * self.length
        hi = torch.minimum(lo + self.length, canvas.length)
        new = lo != memory["window.lo"]
        begin, end = lo, hi
        if self.lone_opening:
            begin, end = torch.where(new, lo, lo + 1), torch.where(new, lo + 1, hi)
        reads = spans(begin, end, min(self.length, canvas.ids.shape[1]))
        masks = (canvas.masked.gather(1, reads.clamp(min=0)) & (reads >= 0)).sum(1)
        state = state._replace(
            memory={
                **memory,
                "window.lo": lo,
                "window.step": torch.where(new, state.step, memory["window.step"]),
                "window.masks": torch.where(new, masks, memory["window.masks"]),
            }
        )
        return state, Window(lo=begin, hi=end, reads=reads, epoch=block)
