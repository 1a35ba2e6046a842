"""Cache policies. A policy answers one question: which positions are recomputed in this step, which keys are visible, and
what stays in the store?

A row whose window opens a new epoch runs a full forward that refreshes its lane of the store; other steps recompute an
index set around the window against the stored keys and values. `none` recomputes everything and is exact; `prefix` and
`dual` (Fast-dLLM, arXiv 2505.22618) are exact at the refresh and stale until the next one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dllm.canvas import Plan, State, Window
from dllm.errors import DllmError, unknown

Rows = Tensor | None  # None: all rows


def spans(lo: Tensor, hi: Tensor, width: int) -> Tensor:
    """(B, width) columns lo, lo+1, ... of each row, -1 from hi on."""
    cols = lo[:, None] + torch.arange(width, device=lo.device)
    return torch.where(cols < hi[:, None], cols, -1)


def gather_plan(state: State, pos: Tensor, *, lane: Tensor | None, refresh: bool, stored: bool, slots: int) -> Plan:
    """The plan that feeds the canvas at `pos` (N, Q) and lets every query see all columns of its row."""
    canvas = state.canvas
    ids = canvas.ids.gather(1, pos.clamp(min=0))
    visible = None
    if stored:
        visible = (torch.arange(slots, device=pos.device) < canvas.length[:, None])[:, None]  # (N, 1, S)
    return Plan(ids=ids, pos=pos, fresh=None, keep=None, visible=visible, lane=lane, refresh=refresh, stored=stored)


def full_plan(state: State, *, lane: Tensor | None = None, stored: bool = False) -> Plan:
    """Every column of every row."""
    width = int(state.canvas.length.max())
    pos = spans(torch.zeros_like(state.step), state.canvas.length, width)
    return gather_plan(state, pos, lane=lane, refresh=True, stored=stored, slots=width)


@dataclass(frozen=True)
class Policy:
    """`none`: every step is a full forward without a store. Exact, at any time, for any sampler."""

    name: ClassVar[str] = "none"
    exact: ClassVar[bool] = True
    stored: ClassVar[bool] = False

    def plan(self, state: State, window: Window, lane: Tensor, shift: int) -> list[tuple[Rows, Plan]]:
        """The forwards of this tick, each with the rows it serves. Refreshing and stepping rows differ in shape."""
        if not self.stored:
            return [(None, full_plan(state))]
        stale = self.stale(state, window).tolist()
        if all(stale):
            return [(None, full_plan(state, lane=lane, stored=True))]
        if not any(stale):
            return [(None, self.partial(state, window, lane, shift))]
        plans: list[tuple[Rows, Plan]] = []
        for flag in (True, False):
            rows = torch.tensor([i for i, s in enumerate(stale) if s is flag], device=lane.device)
            sub, win = state.take(rows), window.take(rows)
            if flag:
                plans.append((rows, full_plan(sub, lane=lane[rows], stored=True)))
            else:
                plans.append((rows, self.partial(sub, win, lane[rows], shift)))
        return plans

    def stale(self, state: State, window: Window) -> Tensor:
        """(B,) rows that need a refresh before this step."""
        return state.cached != window.epoch

    def recomputed(self, state: State, window: Window, shift: int) -> tuple[Tensor, Tensor]:
        """First and last (exclusive) column that a stepping row recomputes, each (B,)."""
        raise NotImplementedError

    def partial(self, state: State, window: Window, lane: Tensor, shift: int) -> Plan:
        """The forward of stepping rows: the recomputed span, plus whatever else the step reads."""
        lo, hi = self.recomputed(state, window, shift)
        lo = lo.clamp(min=0)
        hi = torch.minimum(hi, state.canvas.length)
        low, high = torch.stack([lo, hi]).tolist()
        pos = spans(lo, hi, max(h - l for l, h in zip(low, high, strict=True)))
        source = (window.reads - shift).clamp(min=0)
        outside = (window.reads >= 0) & ((source < lo[:, None]) | (source >= hi[:, None]))
        if bool(outside.any()):  # a region read beyond the span (Prophet): more query rows
            extra = torch.where(outside, source, -1)
            pos = torch.cat([pos, extra[:, outside.any(0)]], 1)
        slots = int(state.canvas.length.max())
        return gather_plan(state, pos, lane=lane, refresh=False, stored=True, slots=slots)


@dataclass(frozen=True)
class Prefix(Policy):
    """Keys and values before the block are kept; the block and everything right of it are recomputed."""

    name: ClassVar[str] = "prefix"
    exact: ClassVar[bool] = False
    stored: ClassVar[bool] = True

    def recomputed(self, state: State, window: Window, shift: int) -> tuple[Tensor, Tensor]:
        return window.lo - shift, state.canvas.length


@dataclass(frozen=True)
class Dual(Policy):
    """Prefix and suffix are kept; the block with its margins is recomputed (dInfer 16/16, DSB 24/0)."""

    name: ClassVar[str] = "dual"
    exact: ClassVar[bool] = False
    stored: ClassVar[bool] = True
    left: int = field(default=0, metadata={"why": "columns recomputed left of the window; a shifted model adds one"})
    right: int = field(default=0, metadata={"why": "columns recomputed right of the window"})

    def __post_init__(self) -> None:
        if self.left < 0 or self.right < 0:
            raise DllmError(f"cache dual: left={self.left}, right={self.right} must not be negative")

    def recomputed(self, state: State, window: Window, shift: int) -> tuple[Tensor, Tensor]:
        return window.lo - max(self.left, shift), window.hi + self.right


POLICIES: dict[str, type[Policy]] = {cls.name: cls for cls in (Policy, Prefix, Dual)}


def policy(spec: str | dict[str, Any] | Policy | None) -> Policy:
    """A cache policy from a name ("dual"), "dual:left=16,right=16", a dict with `name`, or a policy."""
    if isinstance(spec, Policy):
        return spec
    if spec is None:
        return Policy()
    params: dict[str, Any] = dict(spec) if isinstance(spec, dict) else {}
    name = params.pop("name", None) if isinstance(spec, dict) else spec
    if isinstance(name, str) and ":" in name:
        name, _, rest = name.partition(":")
        for item in rest.split(","):
            key, _, value = item.partition("=")
            try:
                params[key.strip()] = int(value)
            except ValueError:
                raise DllmError(f"cache {name!r}: {item!r} is not of the form name=integer") from None
    if name not in POLICIES:
        raise unknown("cache", str(name), POLICIES)
    cls = POLICIES[name]
    known = {f.name for f in dataclasses.fields(cls)}
    for key in params:
        if key not in known:
            raise unknown(f"parameter of cache {name!r}", key, known or {"(none)"})
    return cls(**params)
