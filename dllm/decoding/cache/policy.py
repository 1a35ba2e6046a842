"""Cache policies. A policy answers one question: which positions are recomputed in this step, which keys are visible,
and what stays in the store?

Bidirectional models. A row whose window opens a new epoch runs a full forward that refreshes its lane of the store;
other steps recompute an index set against the stored keys and values, which are stale. `none` recomputes everything and
is exact; `prefix` and `dual` come from Fast-dLLM (arXiv 2505.22618), `interval` from dInfer (arXiv 2510.08666),
`delayed` from dKV-Cache (arXiv 2505.15781), `dllm_cache` from dLLM-Cache (arXiv 2506.06295).

Block-causal models. Keys and values of a finished block depend on nothing that comes later, so `block` is exact.

A policy keeps its account in the decoding state (`enter`, called right after the window opens), so a plan is a function
of the state alone. docs/caches.md says which one to use when.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.canvas import Canvas, Plan, Span, State
from dllm.decoding.columns import between, sources
from dllm.errors import DllmError

if TYPE_CHECKING:
    from dllm.models.model import Model


Rows = Tensor | None  # None: all rows


EPOCHS = 1 << 20  # refreshes that one epoch of the window may hold


def gather_plan(
    state: State,
    pos: Tensor,
    *,
    lane: Tensor | None,
    refresh: bool,
    stored: bool,
    limit: Tensor | None = None,
    keep: Tensor | None = None,
) -> Plan:
    """The plan that feeds the canvas at `pos` (N, Q); queries see columns below `limit` (N,), None: their row."""
    canvas = state.canvas
    ids = canvas.ids.gather(1, pos.clamp(min=0))
    visible = None
    if stored:
        limit = canvas.length if limit is None else limit
        visible = (torch.arange(int(limit.max()), device=pos.device) < limit[:, None])[:, None]  # (N, 1, S)
    return Plan(ids=ids, pos=pos, fresh=None, keep=keep, visible=visible, lane=lane, refresh=refresh, stored=stored)


def full_plan(state: State, *, lane: Tensor | None = None, stored: bool = False) -> Plan:
    """Every column of every row."""
    pos = between(torch.zeros_like(state.step), state.canvas.length)
    return gather_plan(state, pos, lane=lane, refresh=True, stored=stored)


class Framed(NamedTuple):
    """A sampler's window, followed by what the policy notes of each step."""

    inner: Any
    policy: Policy
    only_masked: bool  # the step reads masked columns only

    def open(self, state: State) -> tuple[State, Span]:
        state, window = self.inner.open(state)
        if self.only_masked:
            read = (window.reads >= 0) & state.canvas.masked.gather(1, window.reads.clamp(min=0))
            window = window._replace(reads=torch.where(read, window.reads, -1))
        return self.policy.enter(state, window)

    def __getattr__(self, name: str) -> Any:  # `narrow`, where the window has it
        return getattr(self.inner, name)


@dataclass(frozen=True)
class Policy:
    """`none`: every step is a full forward without a store. Exact, at any time, for any sampler."""

    name: ClassVar[str] = "none"
    exact: ClassVar[bool] = True
    stored: ClassVar[bool] = False
    blockwise: ClassVar[bool | None] = None  # True: for block-causal models only, False: for bidirectional ones only
    sparse: ClassVar[bool] = False  # recomputes scattered columns: committed ones are read only by those who need them
    block_size: int | None = field(default=None, kw_only=True, repr=False)  # of the model
    shift: int = field(default=0, kw_only=True, repr=False)  # of the model
    ahead: int = field(default=0, kw_only=True, repr=False)  # blocks that a forward reads behind the open one

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

    def attach(self, sampler: Any) -> Any:
        """The sampler with this policy's account behind its window."""
        only_masked = self.sparse and not sampler.needs.committed
        starts = (*sampler.starts, (self.memory, self.columns))
        return sampler._replace(window=Framed(sampler.window, self, only_masked), starts=starts)

    # -- the account: leaves of the decoding state ------------------------------------------------------------------

    def memory(self, canvas: Canvas) -> dict[str, Tensor]:
        """Initial leaves (B, ...) of the account."""
        return {}

    def columns(self, canvas: Canvas) -> dict[str, Tensor]:
        """Initial leaves (B, L, ...), which follow length edits."""
        return {}

    def enter(self, state: State, window: Span) -> tuple[State, Span]:
        """Note what this step will recompute; `window.epoch` says afterwards what the store holds after it."""
        return state, window

    # -- the forwards -----------------------------------------------------------------------------------------------

    def plan(self, state: State, window: Span, lane: Tensor) -> list[tuple[Rows, Plan]]:
        """The forwards of this tick, each with the rows it serves. Refreshing and stepping rows differ in shape."""
        if not self.stored:
            return [(None, self.whole(state, window))]
        stale = self.stale(state, window).tolist()
        if len(set(stale)) == 1:
            forward = self.refresh if stale[0] else self.partial
            return [(None, forward(state, window, lane))]
        plans: list[tuple[Rows, Plan]] = []
        for flag, forward in ((True, self.refresh), (False, self.partial)):
            rows = torch.tensor([i for i, s in enumerate(stale) if s is flag], device=lane.device)
            plans.append((rows, forward(state.take(rows), window.take(rows), lane[rows])))
        return plans

    def whole(self, state: State, window: Span) -> Plan:
        """Everything that the answer can depend on: a block-causal model sees nothing right of the block."""
        if self.block_size is None:
            return full_plan(state)
        end = self.ahead_of(self.block_end(state, window), state)
        return gather_plan(state, between(torch.zeros_like(end), end), lane=None, refresh=False, stored=False)

    def stale(self, state: State, window: Span) -> Tensor:
        """(B,) rows that need a refresh before this step."""
        return state.cached != window.epoch

    def refresh(self, state: State, window: Span, lane: Tensor) -> Plan:
        """The forward of rows that open an epoch."""
        return full_plan(state, lane=lane, stored=True)

    def recomputed(self, state: State, window: Span) -> tuple[Tensor, Tensor]:
        """First and last (exclusive) column that a stepping row recomputes, each (B,)."""
        raise NotImplementedError

    def partial(self, state: State, window: Span, lane: Tensor) -> Plan:
        """The forward of stepping rows: the recomputed span, plus whatever else the step reads."""
        lo, hi = self.recomputed(state, window)
        lo, hi = lo.clamp(min=0), torch.minimum(hi, state.canvas.length)
        pos, source = between(lo, hi), sources(window, self.shift)
        outside = (source >= 0) & ((source < lo[:, None]) | (source >= hi[:, None]))
        if not bool(outside.any()):
            return gather_plan(state, pos, lane=lane, refresh=False, stored=True)
        more = torch.where(outside, source, -1)[:, outside.any(0)]
        plan = gather_plan(state, torch.cat([pos, more], 1), lane=lane, refresh=False, stored=True)
        if window.aside is None or plan.visible is None:
            return plan
        # a region that is only looked at (Prophet) is private to the forward: reading it changes nothing
        aside = (window.aside & outside)[:, outside.any(0)]
        if not bool(aside.any()):
            return plan
        fresh = torch.cat([torch.ones_like(pos, dtype=torch.bool), ~aside], 1)
        return plan._replace(fresh=fresh, visible=F.pad(plan.visible, (0, fresh.shape[1])))

    def block_end(self, state: State, window: Span) -> Tensor:
        """(B,) end of the model's block that holds the last source of this step."""
        assert self.block_size is not None
        last = torch.maximum(sources(window, self.shift).amax(1), window.lo - self.shift).clamp(min=0)
        return torch.minimum((last // self.block_size + 1) * self.block_size, state.canvas.length)

    def ahead_of(self, end: Tensor, state: State) -> Tensor:
        """(B,) where a forward ends that also reads the blocks ahead."""
        return torch.minimum(end + self.ahead * (self.block_size or 0), state.canvas.length)
