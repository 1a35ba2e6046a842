"""Cache policies. A policy answers one question: which positions are recomputed in this step, which keys are visible,
and what stays in the store?

Bidirectional models. A row that opens a new epoch runs a full forward that refreshes its lane of the store; other steps
recompute an index set against the stored keys and values, which are stale (`bidirectional`).

Block-causal models. Keys and values of a finished block depend on nothing that comes later, so they stay exact
(`block`).

A policy keeps its account in the decoding state (`note`, called right after the window opens), so a plan is a function
of the state alone. docs/caches.md says which one to use when, docs/adding-a-cache.md how to write one.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from dllm.decoding.canvas import Cached, Canvas, Fed, Leaf, Plan, Span, State
from dllm.decoding.columns import indices, marked
from dllm.decoding.facts import Shape
from dllm.decoding.slots import Sampler
from dllm.errors import DllmError
from dllm.models.model import Model
from dllm.models.transformer import Known
from dllm.spec import check


def plan(state: State, fed: Fed, shape: Shape, lane: Tensor | None, lanes: slice | None) -> Plan:
    """The plan that feeds the canvases of N rows.

    `lane` (N,) says where each row's keys and values are, None: without a store; `lanes` is the same as one run.
    """
    canvas, width = state.canvas, shape.queries
    pos = indices(fed.cols, width)
    at = pos.clamp(min=0)
    aside, keep = (None if t is None else t.gather(1, at) for t in (fed.aside, fed.keep))
    visible = None
    if lane is not None and (shape.ragged or aside is not None):
        visible = fed.sees(canvas)[:, None, : shape.slots]  # (N, 1, S)
    if aside is not None:  # nobody else sees what is private, and itself where the store has nothing of it to show
        alone = aside if fed.seen is None else aside & ~fed.seen.gather(1, at)
        peers = torch.zeros_like(aside)[:, None] if lane is not None else ~aside[:, None]  # (N, 1, Q)
        if fed.seen is not None:
            peers = peers | torch.diag_embed(alone)  # (N, Q, Q)
        visible = peers if visible is None else torch.cat([visible.expand(-1, peers.shape[1], -1), peers], 2)
    fresh = None if aside is None or lane is None else ~aside
    write = None if shape.write is None else slice(*shape.write)
    known = Known(shape.padded, fresh is not None, lanes, write, shape.slots)
    ids = canvas.ids.gather(1, at)
    return Plan(ids, pos, fresh, keep, visible, lane, known, fed.refresh, lane is not None, dense=fed.dense)


def planned(state: State, fed: Fed, lane: Tensor | None = None) -> Plan:
    """The same where the host knows nothing: it asks how many columns are fed."""
    seen = fed.sees(state.canvas).any(0)
    last = torch.where(seen, torch.arange(1, len(seen) + 1, device=seen.device), 0).amax()
    queries, slots = torch.stack([fed.cols.sum(1).amax(), last]).tolist()
    return plan(state, fed, Shape(max(queries, 1), slots, 1), lane, None)


def everything(state: State) -> Fed:
    """All columns of every row."""
    columns = torch.arange(state.canvas.ids.shape[1], device=state.step.device)
    return Fed(columns < state.canvas.length[:, None], dense=True, refresh=True)


def stretch(state: State, lo: Tensor, hi: Tensor) -> Fed:
    """The columns [lo, hi) of each row, (B,) each, as far as it goes."""
    columns = torch.arange(state.canvas.ids.shape[1], device=lo.device)
    hi = torch.minimum(hi, state.canvas.length)
    return Fed((columns >= lo[:, None]) & (columns < hi[:, None]))


@dataclass(frozen=True)
class Policy(ABC):
    """What every cache policy is made of; a subclass gives `name` and `step`, and the rest where it differs.

    Parameters are dataclass fields, each a `param(default, why)`. All methods are pure: they never write into a tensor
    that they are given, and no row looks at another one.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False  # logits equal those of full forwards
    stored: ClassVar[bool] = True  # needs a store; False: `step` is every row's forward
    blockwise: ClassVar[bool | None] = None  # True: for block-causal models only, False: for bidirectional ones only
    resumes: ClassVar[bool] = False  # a row may begin with the columns below `Cached.frontier` in its lane of the store
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType({})  # parameters by name
    sparse: ClassVar[bool] = False  # recomputes scattered columns: committed ones are read only by those who need them
    block_size: int | None = field(default=None, kw_only=True, repr=False)  # of the model
    shift: int = field(default=0, kw_only=True, repr=False)  # of the model
    ahead: int = field(default=0, kw_only=True, repr=False)  # blocks that a forward reads behind the open one

    def __post_init__(self) -> None:
        check(self, f"cache {self.name!r}")

    def bind(self, model: Model) -> Policy:
        """The policy for this model. Errors: a model without a store, or with the wrong kind of attention."""
        if self.stored and not model.supports_cache:
            raise DllmError(
                f"cache {self.name!r} needs a native model; this one runs through transformers: use cache='none'"
            )
        if self.blockwise is not None and self.blockwise != bool(model.block_size):
            kind, use = ("block-causal", "'block'") if model.block_size else ("bidirectional", "'prefix' or 'dual'")
            raise DllmError(f"cache {self.name!r} does not fit a {kind} model: use {use}, or 'none'")
        return dataclasses.replace(self, block_size=model.block_size, shift=model.shift)

    def attach(self, sampler: Sampler) -> Sampler:
        """The sampler with the first leaves of this policy's account."""
        return sampler._replace(starts=(*sampler.starts, (self.memory, self.columns)))

    # -- the account: leaves of the decoding state ------------------------------------------------------------------

    def memory(self, canvas: Canvas) -> Leaf | None:
        """First leaves (B, ...) of the account, a NamedTuple; None: nothing is kept a row."""
        return None

    def columns(self, canvas: Canvas) -> Leaf | None:
        """First leaves (B, L, ...), which follow length edits; None: nothing is kept a column."""
        return None

    def note(self, state: State, window: Span) -> State:
        """The state with the account of this step: called once a step, right after the window opened."""
        return state

    def holds(self, state: State, window: Span) -> Cached:
        """What the store holds after this step. Default: what a refresh leaves at each new epoch of the window."""
        return state.cached._replace(epoch=window.epoch)

    # -- the forwards -----------------------------------------------------------------------------------------------

    def stale(self, state: State, window: Span) -> Tensor:
        """(B,) bool: rows that need a refresh in this step. Default: those of a new epoch."""
        return state.cached.epoch != window.holds.epoch

    def refresh(self, state: State, window: Span) -> Fed:
        """What the forward of a stale row feeds. Default: everything."""
        return everything(state)

    @abstractmethod
    def step(self, state: State, window: Span) -> Fed:
        """What the forward of another row feeds; what the step reads comes with it."""

    def feed(self, state: State, window: Span) -> Span:
        """The opened window with both forwards."""
        refresh, step = self.refresh(state, window), self._reading(self.step(state, window), window)
        return window._replace(stale=self.stale(state, window), refresh=refresh, step=step)

    def _reading(self, fed: Fed, window: Span) -> Fed:
        """The same with the sources of all columns that the step reads.

        A region that is only looked at (Prophet) is private to the forward: reading it changes nothing. Where a step
        recomputes scattered columns anyway, it is recomputed with them.
        """
        width, source = fed.cols.shape[1], window.sources(self.shift)
        if window.aside is None or not self.stored or self.sparse:
            return fed._replace(cols=fed.cols | marked(source, width))
        cols = fed.cols | marked(torch.where(window.aside, -1, source), width)
        aside = marked(source, width) & ~cols
        return fed._replace(cols=cols | aside, aside=aside)

    def whole(self, state: State, window: Span) -> Fed:
        """All that counts for a forward without a store: a block-causal model sees nothing behind its block."""
        if self.block_size is None:
            return everything(state)
        return stretch(state, torch.zeros_like(state.step), self.ahead_of(self.block_end(state, window), state))

    # -- blocks of a block-causal model -----------------------------------------------------------------------------

    def block_end(self, state: State, window: Span) -> Tensor:
        """(B,) end of the model's block that holds the last source of this step."""
        assert self.block_size is not None
        last = torch.maximum(window.sources(self.shift).amax(1), window.lo - self.shift).clamp(min=0)
        return torch.minimum((last // self.block_size + 1) * self.block_size, state.canvas.length)

    def ahead_of(self, end: Tensor, state: State) -> Tensor:
        """(B,) where a forward ends that also reads the blocks ahead."""
        return torch.minimum(end + self.ahead * (self.block_size or 0), state.canvas.length)
