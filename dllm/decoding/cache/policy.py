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
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.canvas import Canvas, Plan, State, Window, scatter
from dllm.errors import DllmError, unknown

if TYPE_CHECKING:
    from dllm.models.model import Model

Rows = Tensor | None  # None: all rows
EPOCHS = 1 << 20  # refreshes that one epoch of the window may hold


def spans(lo: Tensor, hi: Tensor, width: int) -> Tensor:
    """(B, width) columns lo, lo+1, ... of each row, -1 from hi on."""
    cols = lo[:, None] + torch.arange(width, device=lo.device)
    return torch.where(cols < hi[:, None], cols, -1)


def between(lo: Tensor, hi: Tensor) -> Tensor:
    """(B, W) the columns [lo, hi) of each row, padded with -1 to the widest row."""
    return spans(lo, hi, max(int((hi - lo).max()), 1))


def indices(chosen: Tensor) -> Tensor:
    """(B, W) the columns where `chosen` (B, L) holds, in order, padded with -1 to the row that has most."""
    order = (~chosen).int().argsort(dim=1, stable=True)[:, : max(int(chosen.sum(1).max()), 1)]
    return torch.where(chosen.gather(1, order), order, -1)


def marked(cols: Tensor, width: int) -> Tensor:
    """(B, width) bool: the columns listed in `cols` (B, W), -1 for padding."""
    return scatter(torch.zeros(cols.shape[0], width, dtype=torch.bool, device=cols.device), cols, True)


def sources(window: Window, shift: int) -> Tensor:
    """(B, W) positions whose hidden states predict the columns that the step reads, -1 for padding."""
    return torch.where(window.reads < 0, -1, (window.reads - shift).clamp(min=0))


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

    def open(self, state: State) -> tuple[State, Window]:
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

    def enter(self, state: State, window: Window) -> tuple[State, Window]:
        """Note what this step will recompute; `window.epoch` says afterwards what the store holds after it."""
        return state, window

    # -- the forwards -----------------------------------------------------------------------------------------------

    def plan(self, state: State, window: Window, lane: Tensor) -> list[tuple[Rows, Plan]]:
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

    def whole(self, state: State, window: Window) -> Plan:
        """Everything that the answer can depend on: a block-causal model sees nothing right of the block."""
        if self.block_size is None:
            return full_plan(state)
        end = self.ahead_of(self.block_end(state, window), state)
        return gather_plan(state, between(torch.zeros_like(end), end), lane=None, refresh=False, stored=False)

    def stale(self, state: State, window: Window) -> Tensor:
        """(B,) rows that need a refresh before this step."""
        return state.cached != window.epoch

    def refresh(self, state: State, window: Window, lane: Tensor) -> Plan:
        """The forward of rows that open an epoch."""
        return full_plan(state, lane=lane, stored=True)

    def recomputed(self, state: State, window: Window) -> tuple[Tensor, Tensor]:
        """First and last (exclusive) column that a stepping row recomputes, each (B,)."""
        raise NotImplementedError

    def partial(self, state: State, window: Window, lane: Tensor) -> Plan:
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

    def block_end(self, state: State, window: Window) -> Tensor:
        """(B,) end of the model's block that holds the last source of this step."""
        assert self.block_size is not None
        last = torch.maximum(sources(window, self.shift).amax(1), window.lo - self.shift).clamp(min=0)
        return torch.minimum((last // self.block_size + 1) * self.block_size, state.canvas.length)

    def ahead_of(self, end: Tensor, state: State) -> Tensor:
        """(B,) where a forward ends that also reads the blocks ahead."""
        return torch.minimum(end + self.ahead * (self.block_size or 0), state.canvas.length)


# -- bidirectional models: approximate ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefix(Policy):
    """Keys and values before the block are kept; the block and everything right of it are recomputed."""

    name: ClassVar[str] = "prefix"
    exact: ClassVar[bool] = False
    stored: ClassVar[bool] = True
    blockwise: ClassVar[bool | None] = False

    def recomputed(self, state: State, window: Window) -> tuple[Tensor, Tensor]:
        return window.lo - self.shift, state.canvas.length


@dataclass(frozen=True)
class Dual(Policy):
    """Prefix and suffix are kept; the block with its margins is recomputed (dInfer 16/16, DSB 24/0)."""

    name: ClassVar[str] = "dual"
    exact: ClassVar[bool] = False
    stored: ClassVar[bool] = True
    blockwise: ClassVar[bool | None] = False
    left: int = field(default=0, metadata={"why": "columns recomputed left of the window; a shifted model adds one"})
    right: int = field(default=0, metadata={"why": "columns recomputed right of the window"})

    def __post_init__(self) -> None:
        if self.left < 0 or self.right < 0:
            raise DllmError(f"cache {self.name}: left={self.left}, right={self.right} must not be negative")

    def recomputed(self, state: State, window: Window) -> tuple[Tensor, Tensor]:
        return window.lo - max(self.left, self.shift), window.hi + self.right


def opened(state: State, window: Window) -> tuple[State, Tensor]:
    """The state that remembers when the window's epoch opened, and how many steps ago that was, (B,)."""
    memory = state.memory
    since = torch.where(window.epoch != memory["cache.epoch"], state.step, memory["cache.since"])
    state = state._replace(memory={**memory, "cache.epoch": window.epoch, "cache.since": since})
    return state, state.step - since


def no_epoch(canvas: Canvas) -> dict[str, Tensor]:
    return {"cache.epoch": torch.full_like(canvas.start, -1), "cache.since": torch.zeros_like(canvas.start)}


@dataclass(frozen=True)
class Interval(Dual):
    """`dual` with wide margins, full forwards while the canvas settles, and a refresh every few steps of a block."""

    name: ClassVar[str] = "interval"
    left: int = field(default=16, metadata={"why": "dInfer's vicinity"})
    right: int = field(default=16, metadata={"why": "dInfer's vicinity"})
    warmup: int = field(default=4, metadata={"why": "dInfer: the first four steps of a row are full forwards"})
    every: int = field(default=0, metadata={"why": "0: refresh at a new block only, as dInfer does"})

    def memory(self, canvas: Canvas) -> dict[str, Tensor]:
        return no_epoch(canvas)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup < 0 or self.every < 0:
            raise DllmError(f"cache interval: warmup={self.warmup}, every={self.every} must not be negative")

    def enter(self, state: State, window: Window) -> tuple[State, Window]:
        state, age = opened(state, window)
        refreshes = state.step.clamp(max=max(self.warmup - 1, 0))
        if self.every:
            refreshes = refreshes + age // self.every
        return state, window._replace(epoch=window.epoch * EPOCHS + refreshes)


@dataclass(frozen=True)
class Sparse(Policy):
    """Base of the policies whose steps recompute a scattered set of columns, noted in `cache.redo`."""

    exact: ClassVar[bool] = False
    stored: ClassVar[bool] = True
    blockwise: ClassVar[bool | None] = False
    sparse: ClassVar[bool] = True

    def partial(self, state: State, window: Window, lane: Tensor) -> Plan:
        redo = state.columns["cache.redo"]
        redo = redo | marked(sources(window, self.shift), redo.shape[1])
        return gather_plan(state, indices(redo), lane=lane, refresh=False, stored=True)


@dataclass(frozen=True)
class Delayed(Sparse):
    """A token's keys and values are kept from the second forward after its commit on; masks are always recomputed.

    They change most when a mask turns into a token, so the forward after a commit still recomputes it. The first two
    steps of a block are full forwards, and every `every`-th one.
    """

    name: ClassVar[str] = "delayed"
    every: int = field(default=8, metadata={"why": "bounds how stale a token may get; the paper tries 2 to 16"})

    def memory(self, canvas: Canvas) -> dict[str, Tensor]:
        return no_epoch(canvas)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise DllmError(f"cache delayed: every={self.every} must be at least 1")

    def columns(self, canvas: Canvas) -> dict[str, Tensor]:
        return {"cache.fed": canvas.masked, "cache.redo": canvas.masked}

    def enter(self, state: State, window: Window) -> tuple[State, Window]:
        state, age = opened(state, window)
        fed = state.columns["cache.fed"]  # masks that the previous forward saw
        state = state._replace(columns={**state.columns, "cache.redo": fed, "cache.fed": state.canvas.masked})
        refreshes = age.clamp(max=1) + age // self.every
        return state, window._replace(epoch=window.epoch * EPOCHS + refreshes)


@dataclass(frozen=True)
class Partial(Sparse):
    """The prompt is recomputed every `prompt_every` steps, the response every `response_every`, a part in between.

    The part is what the step reads and the tokens that changed since they were last computed, filled up to `rho` of
    the response by those that were computed longest ago. dLLM-Cache picks by the similarity of each layer's values.
    """

    name: ClassVar[str] = "dllm_cache"
    prompt_every: int = field(default=50, metadata={"why": "the paper's K_p, 25 to 100"})
    response_every: int = field(default=8, metadata={"why": "the paper's K_r, 2 to 8"})
    rho: float = field(default=0.25, metadata={"why": "the paper's share of the response"})

    def __post_init__(self) -> None:
        if self.prompt_every < 1 or self.response_every < 1 or not 0 <= self.rho <= 1:
            values = f"prompt_every={self.prompt_every}, response_every={self.response_every}, rho={self.rho}"
            raise DllmError(f"cache dllm_cache: {values}: the first two must be at least 1, rho in [0, 1]")

    def columns(self, canvas: Canvas) -> dict[str, Tensor]:
        never = torch.full_like(canvas.ids, -1)
        return {"cache.ids": never, "cache.when": never, "cache.redo": canvas.masked}

    def enter(self, state: State, window: Window) -> tuple[State, Window]:
        canvas, columns = state.canvas, state.columns
        cols = torch.arange(canvas.ids.shape[1], device=canvas.ids.device)
        response = (cols >= canvas.start[:, None]) & (cols < canvas.length[:, None])
        prompt = (state.step % self.prompt_every == 0)[:, None]
        all_of_it = (state.step % self.response_every == 0)[:, None]
        redo = torch.where(all_of_it, response, self._part(state, window, response))
        computed = redo | prompt
        columns = {
            **columns,
            "cache.redo": redo,
            "cache.ids": torch.where(computed, canvas.ids, columns["cache.ids"]),
            "cache.when": torch.where(computed, state.step[:, None], columns["cache.when"]),
        }
        return state._replace(columns=columns), window._replace(epoch=state.step // self.prompt_every)

    def _part(self, state: State, window: Window, response: Tensor) -> Tensor:
        """(B, L) bool: the columns of an ordinary step."""
        columns, ids = state.columns, state.canvas.ids
        read = marked(sources(window, self.shift), ids.shape[1])
        changed = response & (columns["cache.ids"] != ids)
        urgency = torch.where(read, 2 * EPOCHS, 0) + torch.where(changed, EPOCHS, 0) - columns["cache.when"]
        order = urgency.masked_fill(~response, -4 * EPOCHS).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        share = torch.ceil(self.rho * response.sum(1)).long()
        return read | changed | response & (order < share[:, None])


# -- block-causal models --------------------------------------------------------------------------------------------


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

    def frontier(self, state: State, window: Window) -> Tensor:
        """(B,) start of the block that holds the first column which may still change."""
        assert self.block_size is not None
        first = torch.minimum(torch.minimum(state.canvas.first_masked(), window.lo), state.canvas.length)
        return first // self.block_size * self.block_size

    def enter(self, state: State, window: Window) -> tuple[State, Window]:
        return state, window._replace(epoch=self.frontier(state, window))

    def span(self, state: State, window: Window, cached: Tensor, frontier: Tensor) -> Tensor:
        """(B, Q) from the first column that is not in the store, or is read, to the end of the block."""
        source = sources(window, self.shift)
        first = torch.where(source < 0, state.canvas.ids.shape[1], source).amin(1)
        lo = torch.minimum(torch.minimum(cached.clamp(min=0), frontier), first)
        return between(lo, self.ahead_of(torch.maximum(self.block_end(state, window), frontier), state))

    def refresh(self, state: State, window: Window, lane: Tensor) -> Plan:
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

    def enter(self, state: State, window: Window) -> tuple[State, Window]:
        frontier = self.frontier(state, window)
        return state, window._replace(epoch=FAR * frontier + torch.maximum(self.block_end(state, window), frontier))

    def stale(self, state: State, window: Window) -> Tensor:
        first = window.lo.clamp(max=state.canvas.ids.shape[1] - 1)[:, None]
        headless = state.canvas.masked.gather(1, first)[:, 0] & bool(self.shift)
        return (state.cached != window.epoch) | headless

    def refresh(self, state: State, window: Window, lane: Tensor) -> Plan:
        pos = self.span(state, window, state.cached // FAR, window.epoch // FAR)
        return gather_plan(state, pos, lane=lane, refresh=False, stored=True, limit=pos.amax(1) + 1)

    def recomputed(self, state: State, window: Window) -> tuple[Tensor, Tensor]:
        return window.lo, window.hi

    partial = Policy.partial


POLICIES: dict[str, type[Policy]] = {
    cls.name: cls for cls in (Policy, Prefix, Dual, Interval, Delayed, Partial, Block, BlockDual)
}


def default(model: Model, usable: tuple[str, ...] | None) -> Policy:
    """The cache of a call that names none: `block` where it is exact and the sampler can use it, else `none`."""
    exact = model.block_size is not None and model.supports_cache and (usable is None or Block.name in usable)
    return Block() if exact else Policy()


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
        params = dict(_parameter(name, item) for item in rest.split(","))
    if name not in POLICIES:
        raise unknown("cache", str(name), POLICIES)
    cls = POLICIES[name]
    known = {f.name: Integral if f.type == "int" else Real for f in dataclasses.fields(cls) if not f.kw_only}
    for key, value in params.items():
        if key not in known:
            raise unknown("parameter", key, known or {"(none)"}, of=f"cache {name!r}")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            kind = "an integer" if known[key] is Integral else "a number"
            raise DllmError(f"cache {name!r}: {key}={value!r} must be {kind}")
    return cls(**params)


def _parameter(name: str, item: str) -> tuple[str, int | float]:
    key, _, value = item.partition("=")
    for kind in (int, float):
        try:
            return key.strip(), kind(value)
        except ValueError:
            continue
    raise DllmError(f"cache {name!r}: {item!r} is not of the form name=number")
