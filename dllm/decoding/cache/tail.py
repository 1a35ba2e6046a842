"""The masked tail: a cache may leave out most of the masks behind the open block (DPad, arXiv 2508.14148;
Streaming-dLLM, arXiv 2601.17917).

When an epoch of the window begins a policy chooses which columns there are until the next one begins: all up to the
window's end, all behind it that are written, and of the masks there a near window, the last ones, or some that are
drawn. The others are not fed and nobody sees them. Positions stay absolute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from dllm.decoding import noise
from dllm.decoding.cache.policy import Policy
from dllm.decoding.cache.published import SETTINGS
from dllm.decoding.canvas import Canvas, Fed, Span, State
from dllm.decoding.columns import marked
from dllm.decoding.constants import constant
from dllm.decoding.slots import Needs, Sampler
from dllm.errors import DllmError
from dllm.models.model import Model
from dllm.spec import param

Offsets: TypeAlias = tuple[tuple[int, ...], ...]


class Kept(NamedTuple):
    """Per-column leaves of a cache that cuts the tail, (B, L) bool."""

    there: Tensor  # the columns that there are in this epoch of the window

    def tail(self, canvas: Canvas, window: Span) -> Tensor:
        """(B,) masks that were kept behind the window's end."""
        columns = torch.arange(self.there.shape[1], device=self.there.device)
        return (self.there & canvas.masked & (columns >= window.end[:, None])).sum(1)


class Epochs(NamedTuple):
    """Per-row leaves, (B,): how far the window has come."""

    epoch: Tensor  # of the window, -1 before the first
    begun: Tensor  # epochs that have begun
    lo: Tensor  # the window's first column when this one began
    before: Tensor  # and when the one before it did

    @classmethod
    def start(cls, canvas: Canvas) -> Self:
        """None has begun."""
        zero = torch.zeros_like(canvas.start)
        return cls(zero - 1, zero, canvas.start, canvas.start)

    def entered(self, window: Span) -> Self:
        """The same once this window is open."""
        new = window.epoch != self.epoch
        lo, before = torch.where(new, window.lo, self.lo), torch.where(new, self.lo, self.before)
        return self._replace(epoch=window.epoch, begun=self.begun + new, lo=lo, before=before)


@dataclass(frozen=True, kw_only=True)
class Tail(Policy):
    """Base of the caches that may cut the masked tail. Without `near` and `offsets` they feed and see all of it.

    Errors: options that contradict each other; a block-causal model, which sees no tail; a sampler to which the tail
    is no context but its work.
    """

    near: int = param(-1, "masks kept right behind the block, -1: all of the tail; Streaming-dLLM: 32 to 256", low=-1)
    tail: int | None = param(
        None, "masks kept at the very end; None: 1 as in Streaming-dLLM, 0 where some are drawn as in DPad", low=0
    )
    gaussian: tuple[float, float] | str | None = param(
        None,
        "k:a, of `near` one at distance d stays with probability a phi(k d / (near - 1)); DPad: 4:2, 3:1.6",
    )
    uniform: int | None = param(None, "so many of `near`, all of them equally likely; DPad's other rule", low=0)
    offsets: Offsets | None = param(
        None, "given in place of the rules: for each block the distances of the masks that stay from its end, for tests"
    )

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = SETTINGS

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gaussian", _pair(self.gaussian, self.name))
        object.__setattr__(self, "offsets", _table(self.offsets, self.name))
        drawn = [name for name in ("gaussian", "uniform") if getattr(self, name) is not None]
        if len(drawn) == 2:
            raise DllmError(f"cache {self.name!r}: gaussian and uniform are two ways to draw; keep one of them")
        others = [*drawn, *(["tail"] if self.tail is not None else [])]
        if others and self.near < 0 and self.offsets is None:
            raise DllmError(f"cache {self.name!r}: {others[0]} is about a tail that is cut; give near=, too")

    @property
    def cuts(self) -> bool:
        """Whether some of the tail may be left out."""
        return self.near >= 0 or self.offsets is not None

    def bind(self, model: Model) -> Policy:
        """See `Policy`."""
        if self.cuts and model.block_size is not None:
            raise DllmError(
                f"cache {self.name!r}: a block-causal model sees nothing behind its block, so there is no tail to cut; "
                f"leave near= out"
            )
        return super().bind(model)

    def attach(self, sampler: Sampler) -> Sampler:
        """See `Policy`."""
        sampler, needs = super().attach(sampler), sampler.needs
        if not self.cuts:
            return sampler
        reasons = {
            "edits the length, so the tail is what it works on": needs.edits_length,
            "follows every column of the generation from the first step on": needs.generation,
            "has the whole generation for a window, so nothing stands behind it": sampler.window.whole,
        }
        for reason, holds in reasons.items():
            if holds:
                raise DllmError(
                    f"cache {self.name!r} with near= leaves most of the masked tail out, but sampler {sampler.name!r} "
                    f"{reason}; leave near= out"
                )
        drawn = self.gaussian is not None or self.uniform is not None
        needs = needs | Needs(stochastic=drawn)
        return sampler._replace(needs=needs, starts=(*sampler.starts, (Epochs.start, None)))

    # -- the account ------------------------------------------------------------------------------------------------

    def columns(self, canvas: Canvas) -> Kept | None:
        """Nothing is kept yet."""
        return Kept(torch.zeros_like(canvas.masked)) if self.cuts else None

    def note(self, state: State, window: Span) -> State:
        """The columns that there are: chosen anew where an epoch begins; what the window reads joins them."""
        state = super().note(state, window)
        if not self.cuts:
            return state
        old = state.memory[Epochs]
        epochs = old.entered(window)
        new = (epochs.begun > old.begun)[:, None]
        there = torch.where(new, self.chosen(state, window, epochs), state.columns[Kept].there)
        there = there | marked(window.sources(self.shift), there.shape[1])
        return state._replace(memory=state.memory.plus(epochs), columns=state.columns.plus(Kept(there)))

    def chosen(self, state: State, window: Span, epochs: Epochs) -> Tensor:
        """(B, L) bool: the columns that there are in an epoch which begins with this window."""
        canvas = state.canvas
        columns = torch.arange(canvas.ids.shape[1], device=canvas.ids.device)
        real = columns < canvas.length[:, None]
        distance = columns - window.end[:, None]  # (B, L)
        behind = real & (distance >= 0)
        if self.offsets is not None:
            stays = behind & self._given(window, epochs, columns)
        else:
            stays = behind & (
                self._near(state, distance, behind, epochs) | (columns >= canvas.length[:, None] - self._last)
            )
        return stays | (real & ~(behind & canvas.masked))

    @property
    def _last(self) -> int:
        drawn = self.gaussian is not None or self.uniform is not None
        return self.tail if self.tail is not None else 0 if drawn else 1

    def _near(self, state: State, distance: Tensor, behind: Tensor, epochs: Epochs) -> Tensor:
        """(B, L) bool: which of the near masks stay. What is drawn goes by seed, begin of the block and column."""
        near = behind & (distance < self.near)
        if self.gaussian is None and self.uniform is None:
            return near
        columns = torch.arange(distance.shape[1], device=distance.device)
        u = noise.uniform(state.seed[:, None], epochs.lo[:, None], columns, noise.TAIL)  # (B, L)
        if isinstance(self.gaussian, tuple):  # since `__post_init__`
            k, a = self.gaussian
            x = k * distance.double() / max(self.near - 1, 1)
            return near & (u < a / math.sqrt(2 * math.pi) * torch.exp(-0.5 * x**2))
        assert self.uniform is not None
        order = u.masked_fill(~near, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        few = behind.sum(1, keepdim=True) <= self.uniform  # then all of the tail stays
        return torch.where(few, behind, near & (order < self.uniform))

    def _given(self, window: Span, epochs: Epochs, columns: Tensor) -> Tensor:
        """(B, L) bool: the columns that the table names for this epoch; none behind its end."""
        assert self.offsets is not None
        rows, width = len(self.offsets) + 1, max((1, *map(len, self.offsets)))
        flat = tuple(d for row in (*self.offsets, ()) for d in (*row, *[-1] * (width - len(row))))
        table = constant(flat, columns.device).view(rows, width)
        own = table.index_select(0, (epochs.begun - 1).clamp(0, rows - 1))  # (B, width)
        at = window.end[:, None] + own
        return marked(torch.where((own >= 0) & (at < len(columns)), at, -1), len(columns))

    # -- the forwards -----------------------------------------------------------------------------------------------

    def feed(self, state: State, window: Span) -> Span:
        """The opened window with both forwards, without the columns that are left out."""
        if not self.cuts:
            return super().feed(state, window)
        there = state.columns[Kept].there
        source, width = window.sources(self.shift), there.shape[1]
        read = marked(source, width)
        own = read if window.aside is None else marked(torch.where(window.aside, -1, source), width)

        def cut(cols: Tensor, refresh: bool) -> Fed:
            cols = (cols | own) & there
            if window.aside is None:
                return Fed(cols, seen=there, refresh=refresh)
            aside = read & ~cols
            return Fed(cols | aside, seen=there, aside=aside, refresh=refresh)

        stale, anew = self.stale(state, window), cut(self.renewed(state), refresh=True)
        return window._replace(stale=stale, refresh=anew, step=cut(self.step(state, window).cols, refresh=False))

    def renewed(self, state: State) -> Tensor:
        """(B, L) bool: the columns that a refresh computes, if there are such. Default: all."""
        return torch.ones_like(state.canvas.masked)


@dataclass(frozen=True, kw_only=True)
class StoredTail(Tail):
    """Base of those that keep keys and values; a refresh may leave old ones as they are."""

    recent: int = param(
        -1,
        "a refresh recomputes so many columns left of the block, and all from the last block on, -1: all that there "
        "are; ours",
        low=-1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent >= 0 and not self.cuts:
            raise DllmError(f"cache {self.name!r}: recent is about a tail that is cut; give near=, too")

    def renewed(self, state: State) -> Tensor:
        """With `recent`, a few columns left of the block and what follows; everything where nothing is stored."""
        if self.recent < 0:
            return super().renewed(state)
        epochs = state.memory[Epochs]
        first = torch.minimum(epochs.lo - self.recent, epochs.before) - self.shift
        first = torch.where(state.cached.epoch < 0, 0, first)
        return torch.arange(state.canvas.masked.shape[1], device=first.device) >= first[:, None]


@dataclass(frozen=True)
class NoCache(Tail):
    """Every step is a full forward without a store. Exact, at any time, for any sampler, where no tail is cut."""

    name: ClassVar[str] = "none"
    exact: ClassVar[bool] = True
    stored: ClassVar[bool] = False

    def stale(self, state: State, window: Span) -> Tensor:
        """Never."""
        return torch.zeros_like(state.done)

    def step(self, state: State, window: Span) -> Fed:
        """Everything."""
        return self.whole(state, window)


def _pair(given: object, name: str) -> tuple[float, float] | None:
    """The two numbers of `gaussian`, from "k:a" or a pair."""
    if given is None:
        return None
    parts = given.split(":") if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else []
    try:
        k, a = (float(part) for part in parts)
    except (TypeError, ValueError):
        k = a = math.nan
    if not (0 <= k < math.inf and 0 <= a < math.inf):
        raise DllmError(f"cache {name!r}: gaussian={given!r} must be two numbers of at least 0, k:a, for example 3:1.6")
    return k, a


def _table(given: object, name: str) -> Offsets | None:
    """The lists of `offsets` as tuples."""
    if given is None:
        return None
    listed = given if isinstance(given, list | tuple) else (given,)
    rows = [tuple(row) for row in listed if isinstance(row, list | tuple)]
    if len(rows) != len(listed) or not all(type(d) is int and d >= 0 for row in rows for d in row):
        raise DllmError(f"cache {name!r}: offsets must be a list of distances of at least 0 for each block")
    return tuple(rows)
