"""DAEDAL: the answer finds its own length (arXiv 2508.00819)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.errors import DllmError
from dllm.samplers import Canvas, Context, Decision, Needs, Prediction, Span, State, View, Window, best, spans
from dllm.samplers.base import OFF, Bundle, Method, param
from dllm.samplers.blocks import first_block


@dataclass(frozen=True)
class DAEDAL(Method):
    """Start short. Stage 1 appends masks until the tail predicts an end of sequence with confidence tau_eos; stage 2
    decodes block by block above tau_high, and as long as the tail is unsure (tau_expand) replaces the least confident
    mask below tau_low by `factor` masks.

    The row's own window (max_new_tokens) is the ceiling. The confidence of the tail is the sum of p(EOS) over its last
    `tail` columns whose arg-max is EOS, divided by `tail`. Every length edit makes the next forward a full one. As
    released, stage 1 ends by writing tail // 2 end tokens behind the answer.
    """

    initial: int | None = param(None, "None: 64 columns, the paper's start (32 to 512 do equally well)", low=1)
    tau_high: float = param(0.9, "paper, all tasks: a column above it is committed", low=0, high=OFF)
    tau_low: float = param(0.1, "paper, all tasks: a column below it may be expanded", low=0, high=OFF)
    tau_eos: float = param(0.5, "paper, all tasks: the tail's confidence that ends stage 1", low=0, high=OFF)
    tau_expand: float = param(0.9, "paper, all tasks: no expansion once the tail is this sure", low=0, high=OFF)
    factor: int = param(8, "paper's expansion; 16 to 32 do equally well on GSM8K", low=1)
    tail: int = param(32, "paper's best window of the end-of-sequence signal", low=1)
    growth: str = param(
        "linear",
        "as published, `factor` columns a forward; 'geometric' doubles and needs log2 as many forwards",
        choices=("linear", "geometric"),
    )

    name: ClassVar[str] = "daedal"
    example: ClassVar[Mapping[str, object]] = {"initial": 8, "factor": 4, "tail": 4, "tau_low": 0.3}
    source: ClassVar[str] = "DAEDAL, arXiv 2508.00819"
    cost: ClassVar[str] = "one row, every generated column until the ceiling is reached; stage 1 adds forwards"

    def bundle(self, context: Context) -> Bundle:
        """Owns the window and edits lengths. Errors: an initial length above the ceiling, no end token."""
        if self.initial is not None and self.initial > context.windows[0]:
            raise DllmError(f"daedal: initial={self.initial} exceeds the ceiling max_new_tokens={context.windows[0]}")
        if not context.eos_ids:
            raise DllmError(
                "daedal: the length follows the end-of-sequence token and this model has none: pass eos=..."
            )
        rule = Growing(self, context, self.initial or 64)
        return Bundle(
            window=rule,
            amend=(rule.grow,),
            assumes={"select": rule.select},
            needs=Needs(committed=True, edits_length=True),
        )


class Stage(NamedTuple):
    """Per-row leaves, (B,)."""

    pos: Tensor  # first column of the open block
    denoising: Tensor  # bool: stage 2


@dataclass(frozen=True)
class Growing(Window):
    """Window and length edits. A row in stage 1 has an empty window; in stage 2 the open block starts at `pos`."""

    m: DAEDAL
    context: Context
    initial: int

    def memory(self, canvas: Canvas) -> Stage:
        """Stage 1, before the first block."""
        context = self.context
        first = first_block(canvas, context.block_length, aligned=context.block_size is not None)
        return Stage(first, torch.zeros_like(canvas.start, dtype=torch.bool))

    def open(self, state: State) -> tuple[State, Span]:
        """An empty window in stage 1, the open block in stage 2; the tail is read as long as the row may grow."""
        state = self._begin(state)
        canvas, (pos, denoising), length = state.canvas, state.memory[Stage], self.context.block_length
        ahead = (canvas.first_masked() - pos).clamp(min=0) // length
        pos = torch.where(denoising, pos + length * ahead, pos)
        state = state._replace(memory=state.memory.plus(Stage(pos, denoising)))
        lo, block = pos, torch.minimum(pos + length, canvas.length)
        hi = torch.where(denoising, block, lo)
        full = canvas.length - canvas.start >= state.asked
        begin = torch.where(full & (hi > lo), lo, canvas.start)  # at the ceiling nobody asks for the tail
        end = torch.where(full & (hi > lo), hi, canvas.length)
        return state, Span(lo=lo, hi=hi, end=block, reads=spans(begin, end, canvas.ids.shape[1]), epoch=pos)

    def _begin(self, state: State) -> State:
        """Cut a row that has not stepped yet to its initial length; tokens that were given stay."""
        canvas = state.canvas
        cols = torch.arange(canvas.ids.shape[1], device=canvas.ids.device)
        given = torch.where(canvas.frozen & (cols < canvas.length[:, None]), cols + 1, 0).amax(1)
        short = torch.minimum(torch.maximum(canvas.start + self.initial, given), canvas.length)
        length = torch.where(state.step == 0, short, canvas.length)
        return state._replace(canvas=canvas.cut(length))

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: candidates above tau_high."""
        return soft.confidence > self.m.tau_high

    def grow(self, view: View, pred: Prediction, d: Decision) -> Decision:
        """The length edits of this step, on the columns before its commits are shifted."""
        canvas, (pos, denoising) = view.canvas, view.memory[Stage]
        room = view.state.asked - (canvas.length - canvas.start)  # (B,)
        sure = tail_confidence(view, pred, self.context.eos_ids[0], self.m.tail)
        written = view.gather(d.write)
        weak = view.live & ~written & (pred.confidence < self.m.tau_low)
        lowest = best(-pred.confidence, weak)  # (B, W)
        expand = denoising & (sure < self.m.tau_expand) & (room > 0) & weak.any(1)
        append = ~denoising & (sure < self.m.tau_eos) & (room > 0)
        view.memory[Stage] = Stage(pos, denoising | ~append)
        at = torch.where(lowest, view.cols, -1).amax(1)
        table = torch.stack([expand, append, ~denoising & ~append, room, at, canvas.length, canvas.start]).tolist()
        edits = tuple(e for row, values in enumerate(zip(*table, strict=True)) for e in self._edits(row, *values))
        return d._replace(edits=d.edits + edits)

    def _edits(
        self, row: int, expand: int, append: int, finish: int, room: int, at: int, length: int, start: int
    ) -> list[tuple[int, int, int, tuple[int, ...]]]:
        mask = self.context.mask_id
        if append:
            more = self.m.factor if self.m.growth == "linear" else length - start
            return [(row, length, 0, (mask,) * min(more, room))]
        if finish:
            guard = min(self.m.tail // 2, room)
            return [(row, length, 0, (self.context.eos_ids[0],) * guard)] if guard else []
        if not expand:
            return []
        over = self.m.factor - 1 - room  # columns that the ceiling pushes out
        if over <= 0:
            return [(row, at, 1, (mask,) * self.m.factor)]
        if at >= length - over:  # the new masks themselves reach the ceiling
            return [(row, at, length - at, (mask,) * (length + room - at))]
        return [(row, at, 1, (mask,) * self.m.factor), (row, length - over, over, ())]


def tail_confidence(view: View, pred: Prediction, eos: int, tail: int) -> Tensor:
    """(B,) the end-of-sequence signal of the last `tail` columns whose arg-max is `eos`."""
    ends = (pred.argmax == eos) & (view.cols >= view.canvas.start[:, None])
    order = ends.flip(1).cumsum(1).flip(1)  # counted from the right: the columns ascend
    p = pred.probability_of(pred.logits[..., eos])
    return torch.where(ends & (order <= tail), p, 0.0).sum(1) / tail
