"""Caches of block-causal models: keys and values of a finished block depend on nothing that comes later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm.decoding.cache import Cached, Fed, Policy, Span, State, stretch


@dataclass(frozen=True)
class Block(Policy):
    """Only keys and values of finished blocks are kept; the open block is recomputed. Exact for block-causal models.

    A block is committed once it is clean, by the forward that opens the next block: that one runs both of them. So the
    store holds nothing that a forward with masks computed, and a block costs no forward of its own.
    """

    name: ClassVar[str] = "block"
    exact: ClassVar[bool] = True
    blockwise: ClassVar[bool | None] = True
    resumes: ClassVar[bool] = True

    def frontier(self, state: State, window: Span) -> Tensor:
        """(B,) start of the block that holds the first column which may still change."""
        assert self.block_size is not None
        first = torch.minimum(torch.minimum(state.canvas.first_masked(), window.lo), state.canvas.length)
        return first // self.block_size * self.block_size

    def holds(self, state: State, window: Span) -> Cached:
        """The blocks below the frontier."""
        return state.cached._replace(frontier=self.frontier(state, window))

    def stale(self, state: State, window: Span) -> Tensor:
        """Rows whose frontier moved: a finished block is to be committed."""
        return state.cached.frontier != window.holds.frontier

    def span(self, state: State, window: Span) -> Fed:
        """From the first column that is not in the store, or is read, to the end of the block."""
        frontier, source = window.holds.frontier, window.sources(self.shift)
        first = torch.where(source < 0, state.canvas.ids.shape[1], source).amin(1)
        lo = torch.minimum(torch.minimum(state.cached.frontier.clamp(min=0), frontier), first)
        end = self.ahead_of(torch.maximum(self.block_end(state, window), frontier), state)
        columns = torch.arange(state.canvas.ids.shape[1], device=end.device)
        return stretch(state, lo, end)._replace(seen=columns < torch.minimum(end, state.canvas.length)[:, None])

    def refresh(self, state: State, window: Span) -> Fed:
        """The open block and what is not in the store yet; of these keys and values only the clean ones stay."""
        columns = torch.arange(state.canvas.ids.shape[1], device=state.step.device)
        return self.span(state, window)._replace(keep=columns < window.holds.frontier[:, None])

    def step(self, state: State, window: Span) -> Fed:
        """The same: the open block, whose keys and values do not stay."""
        return self.refresh(state, window)


@dataclass(frozen=True)
class BlockDual(Block):
    """`block`, but inside a block only the window is recomputed, against keys of the block's last whole forward.

    Fast-dLLM v2's block cache (arXiv 2509.26328): exact across blocks, stale inside one. A shifted model reruns the
    block while the window's first column is masked, since the row that predicts it lies outside the window. The end of
    what is in the store counts, too: a window may reach into the next block.
    """

    name: ClassVar[str] = "block_dual"
    exact: ClassVar[bool] = False
    resumes: ClassVar[bool] = False  # it goes by the end of what is stored, too

    def holds(self, state: State, window: Span) -> Cached:
        """The blocks below the frontier, and the open one as its last whole forward saw it."""
        frontier = self.frontier(state, window)
        return state.cached._replace(frontier=frontier, end=torch.maximum(self.block_end(state, window), frontier))

    def stale(self, state: State, window: Span) -> Tensor:
        """Rows whose block is new, or longer, and those whose first column the window alone cannot predict."""
        first = window.lo.clamp(max=state.canvas.ids.shape[1] - 1)[:, None]
        headless = state.canvas.masked.gather(1, first)[:, 0] & bool(self.shift)
        return super().stale(state, window) | (state.cached.end != window.holds.end) | headless

    def refresh(self, state: State, window: Span) -> Fed:
        """The open block and what is not in the store yet; all of it stays."""
        return self.span(state, window)

    def step(self, state: State, window: Span) -> Fed:
        """The window."""
        return stretch(state, window.lo, window.hi)
