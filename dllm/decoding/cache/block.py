"""Caches of block-causal models: keys and values of a finished block depend on nothing that comes later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm.decoding.cache.policy import Policy, gather_plan
from dllm.decoding.canvas import Plan, Span, State
from dllm.decoding.columns import between, sources


@dataclass(frozen=True)
class Block(Policy):
    """Only keys and values of finished blocks are kept; the open block is recomputed. Exact for block-causal models.

    A block is committed once it is clean, by the forward that opens the next block: that one runs both of them. So the
    store holds nothing that a forward with masks computed, and a block costs no forward of its own.
    `cached` is the frontier: the columns below it are in the store.
    """

    name: ClassVar[str] = "block"
    stored: ClassVar[bool] = True
    blockwise: ClassVar[bool | None] = True

    def frontier(self, state: State, window: Span) -> Tensor:
        """(B,) start of the block that holds the first column which may still change."""
        assert self.block_size is not None
        first = torch.minimum(torch.minimum(state.canvas.first_masked(), window.lo), state.canvas.length)
        return first // self.block_size * self.block_size

    def enter(self, state: State, window: Span) -> tuple[State, Span]:
        return state, window._replace(epoch=self.frontier(state, window))

    def span(self, state: State, window: Span, cached: Tensor, frontier: Tensor) -> Tensor:
        """(B, Q) from the first column that is not in the store, or is read, to the end of the block."""
        source = sources(window, self.shift)
        first = torch.where(source < 0, state.canvas.ids.shape[1], source).amin(1)
        lo = torch.minimum(torch.minimum(cached.clamp(min=0), frontier), first)
        return between(lo, self.ahead_of(torch.maximum(self.block_end(state, window), frontier), state))

    def refresh(self, state: State, window: Span, lane: Tensor) -> Plan:
        pos = self.span(state, window, state.cached, window.epoch)
        clean = (pos >= 0) & (pos < window.epoch[:, None])
        limit = pos.amax(1) + 1
        return gather_plan(state, pos, lane=lane, refresh=False, stored=True, limit=limit, keep=clean)

    partial = refresh


FAR = 1 << 24  # beyond the columns of any canvas


@dataclass(frozen=True)
class BlockDual(Block):
    """`block`, but inside a block only the window is recomputed, against keys of the block's last whole forward.

    Fast-dLLM v2's block cache (arXiv 2509.26328): exact across blocks, stale inside one. A shifted model reruns the
    block while the window's first column is masked, since the row that predicts it lies outside the window.
    `cached` is the frontier and the end of what is in the store, `FAR` apart: a window may reach into the next block.
    """

    name: ClassVar[str] = "block_dual"
    exact: ClassVar[bool] = False

    def enter(self, state: State, window: Span) -> tuple[State, Span]:
        frontier = self.frontier(state, window)
        return state, window._replace(epoch=FAR * frontier + torch.maximum(self.block_end(state, window), frontier))

    def stale(self, state: State, window: Span) -> Tensor:
        first = window.lo.clamp(max=state.canvas.ids.shape[1] - 1)[:, None]
        headless = state.canvas.masked.gather(1, first)[:, 0] & bool(self.shift)
        return (state.cached != window.epoch) | headless

    def refresh(self, state: State, window: Span, lane: Tensor) -> Plan:
        pos = self.span(state, window, state.cached // FAR, window.epoch // FAR)
        return gather_plan(state, pos, lane=lane, refresh=False, stored=True, limit=pos.amax(1) + 1)

    def recomputed(self, state: State, window: Span) -> tuple[Tensor, Tensor]:
        return window.lo, window.hi

    partial = Policy.partial
