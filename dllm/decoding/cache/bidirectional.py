"""Caches of bidirectional models: stored keys and values go stale, so these are approximate.

`prefix` and `dual` come from Fast-dLLM (arXiv 2505.22618), `interval` from dInfer (arXiv 2510.08666), `delayed` from
dKV-Cache (arXiv 2505.15781), `dllm_cache` from dLLM-Cache (arXiv 2506.06295).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.decoding.cache import Cached, Canvas, Fed, Policy, Span, State, marked, param, stretch
from dllm.decoding.cache.tail import StoredTail


@dataclass(frozen=True)
class Prefix(StoredTail):
    """Keys and values before the block are kept; the block and everything right of it are recomputed."""

    name: ClassVar[str] = "prefix"
    blockwise: ClassVar[bool | None] = False

    def step(self, state: State, window: Span) -> Fed:
        """From the block's first column to the end of the row."""
        return stretch(state, window.lo - self.shift, state.canvas.length)


@dataclass(frozen=True)
class Dual(StoredTail):
    """Prefix and suffix are kept; the block with its margins is recomputed (dInfer 16/16, DSB 24/0)."""

    name: ClassVar[str] = "dual"
    blockwise: ClassVar[bool | None] = False
    left: int = param(0, "columns recomputed left of the window; a shifted model adds one", low=0)
    right: int = param(0, "columns recomputed right of the window", low=0)

    def step(self, state: State, window: Span) -> Fed:
        """The window and its margins."""
        return stretch(state, window.lo - max(self.left, self.shift), window.hi + self.right)


class Opened(NamedTuple):
    """Per-row leaves, (B,): the epoch of the window, -1 before the first, and the step at which it began."""

    epoch: Tensor
    since: Tensor


@dataclass(frozen=True)
class Dated(Policy):
    """Base of the policies that refresh within an epoch, too: what the store holds goes by the last refresh's step."""

    def memory(self, canvas: Canvas) -> Opened:
        """No epoch has begun."""
        return Opened(torch.full_like(canvas.start, -1), torch.zeros_like(canvas.start))

    def note(self, state: State, window: Span) -> State:
        """When the epoch of the window began."""
        state = super().note(state, window)
        before = state.memory[Opened]
        since = torch.where(window.epoch != before.epoch, state.step, before.since)
        return state._replace(memory=state.memory.plus(Opened(window.epoch, since)))


@dataclass(frozen=True)
class Interval(Dated, Dual):
    """`dual` with wide margins, full forwards while the canvas settles, and a refresh every few steps of a block."""

    name: ClassVar[str] = "interval"
    left: int = param(16, "dInfer's vicinity", low=0)
    right: int = param(16, "dInfer's vicinity", low=0)
    warmup: int = param(4, "dInfer: the first four steps of a row are full forwards", low=0)
    every: int = param(0, "0: refresh at a new block only, as dInfer does", low=0)

    def holds(self, state: State, window: Span) -> Cached:
        """What each step of the warm-up, the first one of an epoch and every `every`-th after it refreshes."""
        since = state.memory[Opened].since
        last = torch.maximum(since, state.step.clamp(max=max(self.warmup - 1, 0)))
        if self.every:
            last = torch.maximum(last, state.step - (state.step - since) % self.every)
        return state.cached._replace(epoch=last)


class Masks(NamedTuple):
    """Per-column leaves of `delayed`, (B, L) bool."""

    masked: Tensor  # masks that the previous forward saw
    redo: Tensor  # columns that this step recomputes


class Computed(NamedTuple):
    """Per-column leaves of `dllm_cache`, (B, L)."""

    ids: Tensor  # what was fed when the column was last computed, -1 for never
    when: Tensor  # the step of that
    redo: Tensor  # bool: columns that this step recomputes


@dataclass(frozen=True)
class Scattered(Policy):
    """Base of the policies whose steps recompute a scattered set of columns, which `note` leaves for `redo`."""

    blockwise: ClassVar[bool | None] = False
    sparse: ClassVar[bool] = True

    @abstractmethod
    def redo(self, state: State) -> Tensor:
        """(B, L) bool: the columns that this step recomputes, whatever it reads."""

    def step(self, state: State, window: Span) -> Fed:
        """The columns of `redo`."""
        return Fed(self.redo(state))


@dataclass(frozen=True)
class DKVCache(Dated, Scattered):
    """A token's keys and values are kept from the second forward after its commit on; masks are always recomputed.

    They change most when a mask turns into a token, so the forward after a commit still recomputes it. The first two
    steps of a block are full forwards, and every `every`-th one.
    """

    name: ClassVar[str] = "delayed"
    every: int = param(8, "bounds how stale a token may get; the paper tries 2 to 16", low=1)

    def columns(self, canvas: Canvas) -> Masks:
        """All masks are recomputed."""
        return Masks(canvas.masked, canvas.masked)

    def redo(self, state: State) -> Tensor:
        """The masks that the previous forward saw."""
        return state.columns[Masks].redo

    def note(self, state: State, window: Span) -> State:
        """What this forward feeds as masks, the next one recomputes."""
        fed = Masks(masked=state.canvas.masked, redo=state.columns[Masks].masked)
        return super().note(state._replace(columns=state.columns.plus(fed)), window)

    def holds(self, state: State, window: Span) -> Cached:
        """What the first two steps of an epoch and every `every`-th one refresh."""
        since = state.memory[Opened].since
        age = state.step - since
        return state.cached._replace(epoch=since + torch.maximum(age.clamp(max=1), age - age % self.every))


URGENT = 1 << 20  # more steps than any row takes


@dataclass(frozen=True)
class DLLMCache(Scattered):
    """The prompt is recomputed every `prompt_every` steps, the response every `response_every`, a part in between.

    The part is what the step reads and the tokens that changed since they were last computed, filled up to `rho` of
    the response by those that were computed longest ago. dLLM-Cache picks by the similarity of each layer's values.
    """

    name: ClassVar[str] = "dllm_cache"
    prompt_every: int = param(50, "the paper's K_p, 25 to 100", low=1)
    response_every: int = param(8, "the paper's K_r, 2 to 8", low=1)
    rho: float = param(0.25, "the paper's share of the response", low=0, high=1)

    def columns(self, canvas: Canvas) -> Computed:
        """Nothing has been computed."""
        never = torch.full_like(canvas.ids, -1)
        return Computed(never, never, canvas.masked)

    def redo(self, state: State) -> Tensor:
        """The response, or a part of it."""
        return state.columns[Computed].redo

    def note(self, state: State, window: Span) -> State:
        """Which columns this step computes, and with what tokens."""
        canvas, before = state.canvas, state.columns[Computed]
        cols = torch.arange(canvas.ids.shape[1], device=canvas.ids.device)
        response = (cols >= canvas.start[:, None]) & (cols < canvas.length[:, None])
        prompt = (state.step % self.prompt_every == 0)[:, None]
        all_of_it = (state.step % self.response_every == 0)[:, None]
        redo = torch.where(all_of_it, response, self._part(state, window, response))
        computed = redo | prompt
        ids = torch.where(computed, canvas.ids, before.ids)
        when = torch.where(computed, state.step[:, None], before.when)
        return state._replace(columns=state.columns.plus(Computed(ids, when, redo)))

    def holds(self, state: State, window: Span) -> Cached:
        """What every `prompt_every`-th step refreshes."""
        return state.cached._replace(epoch=state.step // self.prompt_every)

    def _part(self, state: State, window: Span, response: Tensor) -> Tensor:
        """(B, L) bool: the columns of an ordinary step."""
        computed, ids = state.columns[Computed], state.canvas.ids
        read = marked(window.sources(self.shift), ids.shape[1])
        changed = response & (computed.ids != ids)
        urgency = torch.where(read, 2 * URGENT, 0) + torch.where(changed, URGENT, 0) - computed.when
        order = urgency.masked_fill(~response, -4 * URGENT).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        share = torch.ceil(self.rho * response.sum(1)).long()
        return read | changed | response & (order < share[:, None])
