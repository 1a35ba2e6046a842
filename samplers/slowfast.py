"""SlowFast: explore slowly until a confident region shows, then fill it fast (arXiv 2506.10848)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.samplers import Canvas, Context, Fed, Inputs, Needs, Prediction, Span, State, View, Window, spans
from dllm.samplers.base import OFF, Bundle, Method, Presets, param
from dllm.samplers.blocks import first_block
from dllm.samplers.threshold import Threshold

CUT = "with truncate=true it feeds a canvas cut short, which no cache keeps (truncate=false works with every cache)"


class Cycle(NamedTuple):
    """Per-row leaves of the phases, all (B,)."""

    block: Tensor  # first column of the open block
    start: Tensor  # of the region
    end: Tensor  # of the region; 0 in the slow phase
    steps: Tensor  # of the present phase
    last: Tensor  # last estimate; 0 for none
    total: Tensor  # of the estimates


@dataclass(frozen=True)
class Cycles(Window):
    """Cycles of a slow and a fast phase inside a block.

    Slow, at most `most` steps: the window is the rest of the block, and each forward estimates where the confident
    part ends: behind the farthest mask with confidence tau_min. Two estimates in a row with a population standard
    deviation below `spread` settle the end (the last one), else the mean of all estimates does. Fast: the window is the
    region from the cycle's start to that end, until it is full; the next cycle starts there.
    """

    length: int
    tau_min: float
    most: int
    spread: float
    aligned: bool = False  # blocks count from column 0

    def widest(self, canvas: Canvas) -> int:
        """A block."""
        return min(self.length, canvas.ids.shape[1])

    def memory(self, canvas: Canvas) -> Cycle:
        """No block is open yet."""
        zero = torch.zeros_like(canvas.start)
        return Cycle(zero - 1, *[zero] * 5)

    def open(self, state: State) -> tuple[State, Span]:
        """The region in a fast phase, the rest of the block in a slow one."""
        canvas, before = state.canvas, state.memory[Cycle]
        origin = first_block(canvas, self.length, self.aligned)
        block = (canvas.first_masked() - origin) // self.length
        lo = origin + block * self.length
        hi = torch.minimum(lo + self.length, canvas.length)
        new = lo != before.block
        start = torch.where(new, lo, before.start)
        end = torch.where(new, 0, before.end)
        full = (end > 0) & (canvas.first_masked() >= end)
        start, end = torch.where(full, end, start), torch.where(full, 0, end)
        fresh = (torch.where(new | full, 0, x) for x in (before.steps, before.last, before.total))
        state = state._replace(memory=state.memory.plus(Cycle(lo, start, end, *fresh)))
        region = torch.minimum(torch.where(end > 0, end, hi), canvas.length)  # the canvas may have been cut
        reads = spans(start, region, self.widest(canvas))
        return state, Span(lo=start, hi=region, end=hi, reads=reads, epoch=block)

    def narrow(self, view: View, pred: Prediction) -> None:
        """After the forward of a slow step: estimate the end of the region, and perhaps settle it."""
        before = view.memory[Cycle]
        slow, last = before.end == 0, before.last
        sure = view.live & (pred.confidence >= self.tau_min)
        estimate = torch.maximum(torch.where(sure, view.cols + 1, 0).amax(1), before.start + 1)
        steps, total = before.steps + 1, before.total + estimate
        end = torch.where(slow, self.settle(estimate, last, steps, total), before.end)
        view.memory[Cycle] = before._replace(
            end=end,
            steps=torch.where(slow & (end > 0), 0, steps),
            last=torch.where(slow, estimate, last),
            total=total,
        )

    def settle(self, estimate: Tensor, last: Tensor, steps: Tensor, total: Tensor) -> Tensor:
        """(B,) the end of the region, 0 while it is open."""
        stable = (last > 0) & ((estimate - last).abs() < 2 * self.spread)  # of two numbers: half their distance
        return torch.where(stable, estimate, torch.where(steps >= self.most, total // steps, 0))


@dataclass(frozen=True)
class Truncation(Inputs):
    """From its second step on, a fast phase feeds nothing behind its region, nor behind what the step reads."""

    def cover(self, fed: Fed, state: State, window: Span) -> Fed:
        """What is fed without the columns behind the region."""
        cycle, columns = state.memory[Cycle], torch.arange(fed.cols.shape[1], device=fed.cols.device)
        end = torch.maximum(cycle.end, window.reads.amax(1) + 1)
        end = torch.where((cycle.end > 0) & (cycle.steps > 0), end, state.canvas.length)
        return fed._replace(cols=fed.cols & (columns < end[:, None]), dense=False)


@dataclass(frozen=True)
class SlowFast(Method):
    """Alternate slow steps, which look for the end of a confident region, with fast steps that fill the region.

    Both phases commit every candidate at tau or more, and always the best. Two estimates that agree end the slow phase.
    With `truncate` the fast phase drops the columns behind its region from the input after its first forward: cheaper,
    but the model sees a shorter canvas, so that the output is not that of the full input.
    """

    tau: float = param(0.85, "the paper's bar (released code: 0.9)", low=0, high=OFF)
    tau_min: float = param(0.1, "the paper's bar for the region's end (released code: 0.3)", low=0, high=OFF)
    most: int = param(8, "the paper's longest slow phase (released code: 6)", low=1)
    spread: float = param(1.0, "columns; the released bar on the standard deviation of the last two estimates", low=0)
    truncate: bool = param(True, "as published; False feeds the whole canvas and works with every cache")

    name: ClassVar[str] = "slowfast"
    source: ClassVar[str] = "SlowFast, arXiv 2506.10848"
    cost: ClassVar[str] = "one row, the rest of the block; a fast phase feeds no column behind its region"
    presets: ClassVar[Presets] = {"released": {"tau": 0.9, "tau_min": 0.3, "most": 6}}

    def bundle(self, context: Context) -> Bundle:
        """Owns the window, and the inputs where it truncates; the selection is threshold's where nobody brings one."""
        return Bundle(
            window=Cycles(
                context.block_length, self.tau_min, self.most, self.spread, aligned=context.block_size is not None
            ),
            inputs=Truncation() if self.truncate else None,
            assumes={"select": Threshold(tau=self.tau).select},
            needs=Needs(caches=("none",), caches_why=CUT) if self.truncate else Needs(),
        )
