"""Windows of several open blocks: the next one opens when the last one has its share (D2F, arXiv 2508.09192)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from dllm.samplers import OFF, Bundle, Canvas, Context, Method, Span, State, View, Window, best_each, param, spans
from dllm.samplers.blocks import first_block
from dllm.samplers.threshold import Threshold


class Front(NamedTuple):
    """Per-row leaves of a window of several blocks, all (B,)."""

    opened: Tensor  # blocks of the row that were opened so far, those that were left too
    first: Tensor  # index of the first block that is open, -1 before there is one
    since: Tensor  # the step from which on it was the first


@dataclass(frozen=True)
class OpenBlocks(Window):
    """From the block of the first mask to the last one that was opened. A step opens the next block once the last one
    has `share` of its columns, and any block that holds the first mask. None is closed before it is left.

    Behind an end token that was written no block opens but by itself, when all before it is done. A row's first block
    of an aligned window counts its generated columns only. The cache refreshes in the first `settle` steps of a first
    block.
    """

    length: int
    share: float
    most: int  # blocks that are open at once
    ends: tuple[int, ...]  # end tokens
    aligned: bool
    settle: int = 1

    @classmethod
    def of(cls, context: Context, share: float, most: int | None, settle: int = 1) -> Self:
        """The blocks of a call; most: None for all of a row."""
        length, aligned = context.block_length, context.block_size is not None
        all_of_it = -(-context.max_new_tokens // length) + aligned  # an aligned row may begin and end inside of a block
        return cls(length, share, min(most or all_of_it, all_of_it), context.eos_ids, aligned, settle)

    def widest(self, canvas: Canvas) -> int:
        """`most` blocks."""
        return min(self.most * self.length, canvas.ids.shape[1])

    def memory(self, canvas: Canvas) -> Front:
        """No block is open yet."""
        zero = torch.zeros_like(canvas.start)
        return Front(zero, zero - 1, zero)

    def open(self, state: State) -> tuple[State, Span]:
        """The open blocks, one more where the last has its share."""
        canvas, before = state.canvas, state.memory[Front]
        origin = self.origin(canvas)
        first = (canvas.first_masked() - origin) // self.length
        last = (before.opened - 1).clamp(min=0)[:, None]
        more = (self.written(canvas).gather(1, last)[:, 0] >= self.share) & ~self.ended(canvas)
        opened = torch.minimum(before.opened + more, first + self.most)
        opened = torch.maximum(opened, torch.maximum(before.opened, first + 1))  # none is closed
        since = torch.where(first != before.first, state.step, before.since)
        state = state._replace(memory=state.memory.plus(Front(opened, first, since)))
        lo = origin + first * self.length
        hi = torch.minimum(origin + opened * self.length, canvas.length)
        end = torch.minimum(lo + self.most * self.length, canvas.length)
        epoch = first * self.settle + (state.step - since).clamp(max=self.settle - 1)
        return state, Span(lo=lo, hi=hi, end=end, reads=spans(lo, hi, self.widest(canvas)), epoch=epoch)

    def blocks(self, canvas: Canvas) -> int:
        """More than any row has."""
        return canvas.ids.shape[1] // self.length + 2

    def origin(self, canvas: Canvas) -> Tensor:
        """(B,) column at which the first block of each row begins."""
        return first_block(canvas, self.length, self.aligned)

    def written(self, canvas: Canvas) -> Tensor:
        """(B, N) the share of each block's generated columns that hold a token, those that were given too; float64."""
        cols = torch.arange(canvas.ids.shape[1], device=canvas.ids.device)
        generated = (cols >= canvas.start[:, None]) & (cols < canvas.length[:, None])
        block = ((cols - self.origin(canvas)[:, None]) // self.length).clamp(min=0)  # (B, L)
        none = torch.zeros(len(block), self.blocks(canvas), dtype=torch.float64, device=cols.device)
        size = none.scatter_add(1, block, generated.double())
        masks = none.scatter_add(1, block, (generated & canvas.masked).double())
        return (size - masks) / size.clamp(min=1)

    def ended(self, canvas: Canvas) -> Tensor:
        """(B,) bool: an end token was written."""
        hit = torch.zeros_like(canvas.masked)
        for token in self.ends:
            hit |= canvas.ids == token
        cols = torch.arange(canvas.ids.shape[1], device=canvas.ids.device)
        return (hit & (cols >= canvas.start[:, None]) & ~canvas.frozen & ~canvas.masked).any(1)

    def forced(self, view: View, chosen: Tensor, score: Tensor, active: float) -> Tensor:
        """(B, W) bool: what is chosen, and the best candidate of each block of which nothing is, where that is fully
        activated: the block before it has the share `active`, or is left."""
        canvas, lo = view.canvas, self.origin(view.canvas)[:, None]
        block = torch.where(view.inside, (view.cols - lo) // self.length, 0)  # (B, W)
        first = (view.window.lo[:, None] - lo) // self.length
        ready = (block == first) | (self.written(canvas).gather(1, (block - 1).clamp(min=0)) >= active)
        counts = torch.zeros(len(block), self.blocks(canvas), dtype=torch.long, device=block.device)
        counts = counts.scatter_add(1, block, (chosen & view.live).long())
        idle = view.live & ready & (counts.gather(1, block) == 0)
        return chosen | best_each(score, idle, block, counts.shape[1])


@dataclass(frozen=True)
class MultiBlock(Method):
    """Decode in several blocks at once: a step opens the next block when the last open one has the share tau_add of its
    tokens. Any selection may choose among all of them; threshold's does unless another sampler brings one.

    With one block at most, or with tau_add = 1, these are the blocks of a call. A bidirectional model sees the masks
    behind the open blocks too; a block-causal one sees no block behind another.
    """

    tau_add: float = param(0.1, "D2F's and d3LLM's released default", above=0, high=1)
    max_open: int | None = param(None, "None: no bound, as released; blocks that are open at once", low=1)
    tau: float = param(0.9, "the bar where no other sampler selects (Fast-dLLM's default)", low=0, high=OFF)

    name: ClassVar[str] = "multiblock"
    example: ClassVar[Mapping[str, object]] = {"tau": 0.999}
    source: ClassVar[str] = "the windows of D2F, arXiv 2508.09192"
    cost: ClassVar[str] = "one row, the columns of all open blocks"

    def bundle(self, context: Context) -> Bundle:
        """Owns the window; the selection is threshold's where nobody brings one."""
        window = OpenBlocks.of(context, self.tau_add, self.max_open)
        return Bundle(window=window, assumes={"select": Threshold(tau=self.tau).select})
