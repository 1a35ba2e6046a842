"""Early exit: Prophet (arXiv 2508.19982) and its successor SchED (arXiv 2512.02892).

Both watch the gap between the best and the second-best *logit* over a region of the answer. Once its mean reaches a
threshold that falls with progress, every mask that is left gets its prediction and the row is finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from dllm.decoding.columns import spans
from dllm.errors import DllmError
from dllm.samplers import Bundle, Canvas, Context, Decision, Method, Prediction, Presets, Span, State, View, param

Region: TypeAlias = Callable[[Canvas], Tensor]  # canvas -> (B, L) bool
Where: TypeAlias = str | tuple[int, int] | Region
REGIONS = ("auto", "suffix", "text", "span", "last_k", "all")


@dataclass(frozen=True)
class Exit:
    """The amend link: fill and finish the rows whose mean gap over the region reaches tau(progress).

    The exit looks at raw logits, comes before the step's ordinary commits, and takes their place. Every column of the
    region counts, masked or not, as in the released code.
    """

    tau: Callable[[Tensor], Tensor]  # progress (B,) -> threshold (B,)
    region: str | Region
    context: Context
    progress: str  # steps | tokens | auto: steps where the selection has a fixed number of them
    base: int = 1
    start: int = 0
    length: int = 5
    skip: int = 1

    def __call__(self, view: View, pred: Prediction, d: Decision) -> Decision:
        """The decision; rows whose mean gap reaches the threshold fill what is left instead."""
        inside = self.inside(view, pred)  # (B, W)
        count = inside.sum(1)
        mean = torch.where(inside, pred.gap, 0.0).sum(1) / count.clamp(min=1)
        decoding = view.window.hi > view.window.lo  # DAEDAL grows a row before it opens a window
        leave = (mean >= self.tau(self.fraction(view))) & (count > 0) & decoding
        fill = leave if d.fill is None else leave | d.fill
        return d._replace(write=d.write & ~leave[:, None], fill=fill)

    def fraction(self, view: View) -> Tensor:
        """(B,) progress: steps of the budget, this one included, or committed columns of the window."""
        canvas = view.canvas
        size = (canvas.length - canvas.start).clamp(min=1)
        if self.progress == "tokens" or (self.progress == "auto" and view.schedule is None):
            return 1 - canvas.masked.sum(1) / size
        total = size if self.context.steps is None else self.context.steps
        done = view.state.step if view.schedule is None else view.schedule.elapsed(view)
        return (done + self.base) / total

    # -- the region -------------------------------------------------------------------------------------------------

    def inside(self, view: View, pred: Prediction) -> Tensor:
        """(B, W) the columns of this step whose gap counts."""
        canvas, read = view.canvas, view.cols >= 0
        if callable(self.region):
            return view.gather(self.region(canvas)) & read
        lo, hi = self.bounds(canvas)
        inside = (view.cols >= lo[:, None]) & (view.cols < hi[:, None]) & read
        if self.region not in ("auto", "text") or not self.context.eos_ids:
            return inside
        end = self.first_eos(view, pred)
        if self.region == "auto":  # a planted suffix says where the answer is
            end = torch.where(self.planted(canvas)[0] < canvas.length, canvas.length, end)
        return inside & (view.cols <= end[:, None])

    def bounds(self, canvas: Canvas) -> tuple[Tensor, Tensor]:
        """(B,) first column of the region and its end."""
        lo, hi = canvas.start, canvas.length
        if self.region == "span":
            lo = lo + self.start
            return lo, torch.minimum(lo + self.length, hi)
        if self.region == "last_k":
            return torch.maximum(lo, hi - self.length), hi
        if self.region in ("suffix", "auto"):
            after, end = self.planted(canvas)
            if self.region == "suffix":
                return after, end
            found = after < canvas.length
            return torch.where(found, after, lo), torch.where(found, end, hi)
        return lo, hi

    def planted(self, canvas: Canvas) -> tuple[Tensor, Tensor]:
        """The answer behind the last given token of the window: `skip` columns after it, `length` of them."""
        cols = torch.arange(canvas.ids.shape[1], device=canvas.ids.device)
        given = canvas.frozen & (cols >= canvas.start[:, None]) & (cols < canvas.length[:, None])
        last = torch.where(given, cols, -1).amax(1)
        lo = torch.where(last >= 0, last + 1 + self.skip, canvas.length).clamp(max=canvas.ids.shape[1])
        lo = torch.minimum(lo, canvas.length)
        return lo, torch.minimum(lo + self.length, canvas.length)

    def first_eos(self, view: View, pred: Prediction) -> Tensor:
        """(B,) the first column that holds, or would now be given, an end of sequence; L where there is none."""
        guess = torch.where(view.masked, pred.argmax, view.gather(view.canvas.ids))
        ends = torch.zeros_like(view.masked)
        for eos in self.context.eos_ids:
            ends |= guess == eos
        ends &= view.cols >= view.canvas.start[:, None]
        return torch.where(ends, view.cols, view.canvas.ids.shape[1]).amin(1)

    def reads(self, state: State, window: Span) -> Tensor:
        """(B, R) columns of the region, wherever the window is."""
        canvas, width = state.canvas, state.canvas.ids.shape[1]
        if callable(self.region):
            return torch.where(self.region(canvas), torch.arange(width, device=canvas.ids.device), -1)
        short = self.region in ("suffix", "span", "last_k")
        return spans(*self.bounds(canvas), self.length if short else width)


def _region(method: str, region: Where, start: int, length: int, context: Context) -> tuple[str | Region, int, int]:
    """Check a region. A pair (start, length) is a span relative to the generation."""
    if isinstance(region, list | tuple):
        if len(region) != 2 or not all(isinstance(x, int) for x in region):
            raise DllmError(f"{method}: region={region!r} must be a pair [start, length], relative to the generation")
        (start, length), region = region, "span"
    if not callable(region) and region not in REGIONS:
        known = ", ".join(REGIONS)
        raise DllmError(f"{method}: region={region!r} must be one of {known}, a pair [start, length] or a function")
    if region == "span" and not (0 <= start < context.windows[0] and length >= 1):
        raise DllmError(
            f"{method}: the region of {length} columns from {start} is outside the window of "
            f"{context.windows[0]} columns; start counts from the first generated column"
        )
    return region, start, length


@dataclass(frozen=True)
class Prophet(Method):
    """Fill everything and stop once the mean top-2 logit gap of the answer region reaches a threshold.

    The threshold is `high` below a third of the progress, `mid` below two thirds, `low` after; `smooth` uses
    8 - 4.5 progress. Regions: `suffix` is what follows a phrase planted in the window (`infill=True`), `span` a
    (start, length) of the generation, `last_k` its last `length` columns, `all` the whole window, `text` the window up
    to the first end of sequence in the model's present guess, or a function of the canvas giving a (B, L) mask.
    `auto` is the planted suffix where there is one and `text` elsewhere: it needs no position set by hand.
    """

    high: float = param(7.5, "released code; paper table 6 has 7.5 or 8.0 (GSM8K, GPQA)")
    mid: float = param(5.0, "paper table 6, all tasks")
    low: float = param(2.5, "released code; paper table 6 has 2.5 (choices), 3.5 (maths), 4.5 (code)")
    smooth: bool = param(False, "True: 8 - 4.5 progress, the paper's smooth alternative (GSM8K 77.4 % at 154 steps)")
    region: Where = param(
        "auto", "the released code exits only behind a planted phrase; `auto` covers the other prompts"
    )
    progress: str = param(
        "auto",
        "steps as published where the base has a fixed budget, else committed / length",
        choices=("auto", "steps", "tokens"),
    )
    progress_base: int = param(1, "the released code counts the running step; the paper starts at 0", choices=(0, 1))
    skip: int = param(1, "columns between the planted phrase and the region, as released", low=0)
    length: int = param(5, "columns of the region, as released", low=1)
    start: int = param(0, "first column of region='span', counted from the generation", low=0)

    name: ClassVar[str] = "prophet"
    source: ClassVar[str] = "Prophet, arXiv 2508.19982"
    cost: ClassVar[str] = "one row, the window's and the region's columns; under cache dual a full forward at the exit"
    presets: ClassVar[Presets] = {
        "released": {"region": "suffix", "progress": "steps"},
        "maths": {"high": 8.0, "low": 3.5},
        "code": {"low": 4.5},
        "choice": {},
    }

    def bundle(self, context: Context) -> Bundle:
        """A link that ends rows. Errors: a region outside the window."""
        region, start, length = _region(self.name, self.region, self.start, self.length, context)
        link = Exit(self.tau, region, context, self.progress, self.progress_base, start, length, self.skip)
        return Bundle(amend=(link,), reads=link.reads)

    def tau(self, progress: Tensor) -> Tensor:
        """(B,) the threshold at this progress."""
        if self.smooth:
            return 8.0 - 4.5 * progress
        high, mid, low = (torch.full_like(progress, x, dtype=torch.float64) for x in (self.high, self.mid, self.low))
        return torch.where(progress < 0.33, high, torch.where(progress < 0.67, mid, low))


@dataclass(frozen=True)
class Sched(Method):
    """Prophet's exit over the whole generation, with a threshold that falls smoothly from `high` to `low`."""

    high: float = param(7.5, "Prophet's highest threshold: nothing exits early by chance")
    low: float = param(2.5, "Prophet's lowest threshold")
    shape: str = param("linear", "the simplest of the paper's three", choices=("linear", "cosine", "exponential"))
    rate: float = param(2.0, "decay of shape='exponential'", low=0)
    region: Where = param("all", "the paper's signal is the mean over the whole generation")
    progress: str = param(
        "auto",
        "steps as published where the base has a fixed budget, else committed / length",
        choices=("auto", "steps", "tokens"),
    )

    name: ClassVar[str] = "sched"
    source: ClassVar[str] = "SchED, arXiv 2512.02892"
    cost: ClassVar[str] = "one row, every generated column; under cache dual all of them are recomputed"

    def bundle(self, context: Context) -> Bundle:
        """A link that ends rows. Errors: a region outside the window."""
        region, start, length = _region(self.name, self.region, 0, 5, context)
        link = Exit(self.tau, region, context, self.progress, 1, start, length)
        return Bundle(amend=(link,), reads=link.reads)

    def tau(self, progress: Tensor) -> Tensor:
        """(B,) the threshold at this progress."""
        if self.shape == "linear":
            share = 1 - progress
        elif self.shape == "cosine":
            share = (1 + torch.cos(math.pi * progress)) / 2
        else:
            share = torch.exp(-self.rate * progress)
        return self.low + (self.high - self.low) * share
