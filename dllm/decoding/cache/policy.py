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
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.canvas import Cached, Canvas, Leaf, Plan, Span, State
from dllm.decoding.columns import between
from dllm.decoding.prediction import Prediction
from dllm.decoding.slots import Sampler, View, Window
from dllm.errors import DllmError
from dllm.models.model import Model
from dllm.spec import check

Rows = Tensor | None  # (N,) indices of rows; None: all of them


def gather_plan(
    state: State, pos: Tensor, lane: Tensor | None, limit: Tensor | None = None, keep: Tensor | None = None
) -> Plan:
    """The plan that feeds the canvas at `pos` (N, Q), -1 for padding.

    `lane` (N,) says where each row's keys and values are, None: without a store. With one, queries see the columns
    below `limit` (N,), None: all of their row, and what they compute stays where `keep` (N, Q) holds, None: everywhere.
    """
    ids = state.canvas.ids.gather(1, pos.clamp(min=0))
    visible = None
    if lane is not None:
        limit = state.canvas.length if limit is None else limit
        visible = (torch.arange(int(limit.max()), device=pos.device) < limit[:, None])[:, None]  # (N, 1, S)
    return Plan(ids, pos, fresh=None, keep=keep, visible=visible, lane=lane, refresh=False, stored=lane is not None)


def full_plan(state: State, lane: Tensor | None = None) -> Plan:
    """Every column of every row; with a store it opens a new epoch."""
    pos = between(torch.zeros_like(state.step), state.canvas.length)
    return gather_plan(state, pos, lane)._replace(refresh=True)


def span_plan(state: State, window: Span, lane: Tensor, lo: Tensor, hi: Tensor, shift: int) -> Plan:
    """The columns [lo, hi), each (B,), against the stored rest of the row, and whatever else the step reads."""
    lo, hi = lo.clamp(min=0), torch.minimum(hi, state.canvas.length)
    pos, source = between(lo, hi), window.sources(shift)
    outside = (source >= 0) & ((source < lo[:, None]) | (source >= hi[:, None]))
    if not bool(outside.any()):
        return gather_plan(state, pos, lane)
    more = torch.where(outside, source, -1)[:, outside.any(0)]
    plan = gather_plan(state, torch.cat([pos, more], 1), lane)
    if window.aside is None or plan.visible is None:
        return plan
    # a region that is only looked at (Prophet) is private to the forward: reading it changes nothing
    aside = (window.aside & outside)[:, outside.any(0)]
    if not bool(aside.any()):
        return plan
    fresh = torch.cat([torch.ones_like(pos, dtype=torch.bool), ~aside], 1)
    return plan._replace(fresh=fresh, visible=F.pad(plan.visible, (0, fresh.shape[1])))


@dataclass(frozen=True)
class Accounted(Window):
    """The window slot of a sampler under a policy: the sampler's own window, followed by the policy's account."""

    inner: Window
    policy: Policy
    only_masked: bool  # the step reads masked columns only

    def open(self, state: State) -> tuple[State, Span]:
        """The window's state and span, with what the policy notes and what the step leaves in the store."""
        state, window = self.inner.open(state)
        if self.only_masked:
            read = (window.reads >= 0) & state.canvas.masked.gather(1, window.reads.clamp(min=0))
            window = window._replace(reads=torch.where(read, window.reads, -1))
        state = self.policy.note(state, window)
        return state, window._replace(cached=self.policy.holds(state, window))

    def narrow(self, view: View, pred: Prediction) -> None:
        """As the sampler's own window."""
        self.inner.narrow(view, pred)


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
        """The sampler with this policy's account behind its window."""
        only_masked = self.sparse and not sampler.needs.committed
        starts = (*sampler.starts, (self.memory, self.columns))
        return sampler._replace(window=Accounted(sampler.window, self, only_masked), starts=starts)

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

    def plan(self, state: State, window: Span, lane: Tensor) -> list[tuple[Rows, Plan]]:
        """The forwards of this tick, each with the rows it serves. Refreshing and stepping rows differ in shape."""
        if not self.stored:
            return [(None, self.step(state, window, lane))]
        stale = self.stale(state, window).tolist()
        plans: list[tuple[Rows, Plan]] = []
        for flag, forward in ((True, self.refresh), (False, self.step)):
            at = [i for i, s in enumerate(stale) if s is flag]
            if len(at) == len(stale):
                return [(None, forward(state, window, lane))]
            if at:
                rows = torch.tensor(at, device=lane.device)
                plans.append((rows, forward(state.take(rows), window.take(rows), lane[rows])))
        return plans

    def stale(self, state: State, window: Span) -> Tensor:
        """(B,) bool: rows that need a refresh in this step. Default: those of a new epoch."""
        return state.cached.epoch != window.holds.epoch

    def refresh(self, state: State, window: Span, lane: Tensor) -> Plan:
        """The forward of the stale rows (N); `lane` (N,) holds each one's keys and values. Default: a full one."""
        return full_plan(state, lane)

    @abstractmethod
    def step(self, state: State, window: Span, lane: Tensor) -> Plan:
        """The forward of the other rows (N): it covers at least `window.sources(shift)`, what the step reads."""

    def whole(self, state: State, window: Span) -> Plan:
        """A forward without a store of all that counts: a block-causal model sees nothing behind its block."""
        if self.block_size is None:
            return full_plan(state)
        end = self.ahead_of(self.block_end(state, window), state)
        return gather_plan(state, between(torch.zeros_like(end), end), lane=None)

    # -- blocks of a block-causal model -----------------------------------------------------------------------------

    def block_end(self, state: State, window: Span) -> Tensor:
        """(B,) end of the model's block that holds the last source of this step."""
        assert self.block_size is not None
        last = torch.maximum(window.sources(self.shift).amax(1), window.lo - self.shift).clamp(min=0)
        return torch.minimum((last // self.block_size + 1) * self.block_size, state.canvas.length)

    def ahead_of(self, end: Tensor, state: State) -> Tensor:
        """(B,) where a forward ends that also reads the blocks ahead."""
        return torch.minimum(end + self.ahead * (self.block_size or 0), state.canvas.length)


@dataclass(frozen=True)
class NoCache(Policy):
    """Every step is a full forward without a store. Exact, at any time, for any sampler."""

    name: ClassVar[str] = "none"
    exact: ClassVar[bool] = True
    stored: ClassVar[bool] = False

    def attach(self, sampler: Sampler) -> Sampler:
        """The sampler as it is: nothing is kept."""
        return sampler

    def step(self, state: State, window: Span, lane: Tensor) -> Plan:
        """Everything."""
        return self.whole(state, window)
