"""ASS: commit 1, 2, 4, 8 ... columns, because confidence rises late (arXiv 2509.23924)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm.errors import DllmError
from dllm.samplers import Canvas, Context, Prediction, Schedule, Span, State, View, Window, rank, spans
from dllm.samplers.base import Bundle, Method, param


def log2_floor(size: Tensor) -> Tensor:
    """floor(log2) of positive integers, exact."""
    return torch.frexp(size.clamp(min=1).double()).exponent.long() - 1


def size_of(canvas: Canvas) -> Tensor:
    """(B,) columns of each row's generation."""
    return canvas.length - canvas.start


@dataclass(frozen=True)
class Doubling(Window, Schedule):
    """Window and selection of a row with G columns: S = floor(log2 G) steps; n steps write 2^n - 1 columns.

    With b blocks the first one takes the steps up to S - b; each later step has a block of its own.
    """

    blocks: int

    @property
    def whole(self) -> bool:
        """One block is."""
        return self.blocks == 1

    def open(self, state: State) -> tuple[State, Span]:
        """The columns that may be written by the end of this step."""
        canvas = state.canvas
        size, n = size_of(canvas), state.step
        s = log2_floor(size)
        first = s - self.blocks  # the last step of the first block
        lo = torch.where(n <= first, 0, 2 ** n.clamp(max=62) - 1)
        hi = torch.where((self.blocks == 1) | (n >= s - 1), size, 2 ** (torch.maximum(n, first) + 1).clamp(0, 62) - 1)
        lo, hi = canvas.start + lo, canvas.start + torch.minimum(hi, size)
        lo = torch.minimum(lo, canvas.first_masked())  # nothing is left behind where tokens were given
        hi = torch.maximum(hi, torch.minimum(canvas.first_masked() + 1, canvas.length))
        return state, Span(lo=lo, hi=hi, end=hi, reads=spans(lo, hi, canvas.ids.shape[1]), epoch=lo)

    def __call__(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: the 2^n best, everything at the last step."""
        n, s = view.state.step, log2_floor(size_of(view.canvas))
        count = torch.where(n >= s - 1, view.cols.shape[1], 2 ** n.clamp(max=62))
        return rank(score, view.live) < count[:, None]

    def elapsed(self, view: View) -> Tensor:
        """(B,) a step of the schedule is a forward."""
        return view.state.step

    def fraction(self, view: View) -> Tensor:
        """(B,) (2^(n+1) - 1) / 2^S."""
        s = log2_floor(size_of(view.canvas)).double()
        return (2.0 ** (view.state.step + 1).double() - 1) / 2.0**s


@dataclass(frozen=True)
class ASS(Method):
    """Step n commits the 2^n most confident columns, the last step everything left: floor(log2 G) forwards.

    An option for the smallest budgets: accuracy on mathematics drops sharply (the authors' discussion).
    """

    blocks: int = param(1, "1 decodes the whole window at once; more blocks go from left to right", low=1)

    name: ClassVar[str] = "ass"
    source: ClassVar[str] = "EOSER and ASS, arXiv 2509.23924"

    def bundle(self, context: Context) -> Bundle:
        """Owns window and selection. Errors: more blocks than steps, another number of steps than the schedule has."""
        for size in context.windows:
            steps = max(1, size.bit_length() - 1)
            if self.blocks > steps:
                raise DllmError(f"ass: blocks={self.blocks} exceed the {steps} steps that {size} tokens take")
            if context.steps not in (None, steps):
                raise DllmError(
                    f"ass: its schedule has {steps} steps for {size} tokens; leave out steps={context.steps}"
                )
        rule = Doubling(self.blocks)
        return Bundle(window=rule, select=rule)
