"""CLAD: confident neighbours commit as spans, and of two spans that hang on each other only one (arXiv 2605.29607)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.samplers import OFF, Attention, Bundle, Context, Method, Needs, Prediction, Presets, View, param

BARS = {  # tau by task: the released scripts
    "llada": {"gsm8k": 0.70, "math": 0.70, "humaneval": 0.75, "mbpp": 0.75},
    "llada15": {"gsm8k": 0.73, "math": 0.70, "humaneval": 0.75, "mbpp": 0.73},
    "dream": {"gsm8k": 0.75, "math": 0.70, "humaneval": 0.71, "mbpp": 0.70},
    "dream_base": {"gsm8k": 0.75, "math": 0.70, "humaneval": 0.73, "mbpp": 0.75},
}


@dataclass(frozen=True)
class CLAD(Method):
    """Commit the candidates that reach tau by spans of neighbours; of two spans whose strongest link is each other only
    the longer one, the left one of equals.

    A link is the mean attention from a token of one span to the other, the strongest token's, in either direction. Of
    two spans alone it counts from pair / W on, W columns of the window; of three or more it always does. So a step
    commits at least half of what `threshold` at tau commits. Preset `dream_compat` has the released code for Dream,
    where W is the length of the row.
    """

    tau: float = param(0.70, "released for LLaDA-8B-Instruct: 0.70 GSM8K, MATH; 0.75 HumanEval, MBPP", low=0, high=OFF)
    pair: float = param(1.2, "released: a link of two spans alone counts a fifth above the even share", low=0)
    width: str = param("window", "the released code for LLaDA; that for Dream takes the row", choices=("window", "row"))
    layers: int | Sequence[int] = param(4, "released: the last four, of 32 or 28; or a list of layers, from 0")

    name: ClassVar[str] = "clad"
    source: ClassVar[str] = "CLAD, arXiv 2605.29607"
    cost: ClassVar[str] = "one row, the window's columns, and their attention weights in a few layers"
    presets: ClassVar[Presets] = {
        **{f"{model}_{task}": {"tau": tau} for model, bars in BARS.items() for task, tau in bars.items()},
        "dream_compat": {"tau": 0.75, "width": "row"},
    }

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection. Errors: layers that are none."""
        return Bundle(select=self.select, needs=Needs(attention=Attention.last(self.layers, self.name)))

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: the candidates that reach tau, but those of the spans that wait."""
        chosen = view.live & (soft.confidence >= self.tau)
        weights = view.pairs(soft.attention)  # (B, W, W)
        reach = view.window.hi - view.window.lo if self.width == "window" else view.canvas.length
        return chosen & ~waiting(spans(view, chosen), torch.maximum(weights, weights.mT), self.pair / reach)


def spans(view: View, chosen: Tensor) -> Tensor:
    """(B, W) the number of the run of consecutive columns that a chosen one is in, from 0; -1 for the others."""
    table = view.scatter(torch.zeros_like(view.canvas.masked), chosen, chosen)  # (B, L): absolute columns
    starts = table & ~F.pad(table, (1, 0))[:, :-1]
    return torch.where(chosen, view.gather(starts.long().cumsum(1)) - 1, -1)


def waiting(span: Tensor, links: Tensor, least: Tensor) -> Tensor:
    """(B, W) bool: the columns of the spans that wait. span (B, W), -1 for none; links (B, W, W) between columns,
    symmetric; least (B,): below it two spans alone do not conflict."""
    n = span.shape[1]
    member = (span[..., None] == torch.arange(n, device=span.device)).to(links.dtype)  # (B, W, C)
    size = member.sum(1)  # (B, C)
    means = links @ member / size.clamp(min=1)[:, None]  # (B, W, C) from a column to a span
    place = torch.where(span < 0, n, span)[..., None].expand(-1, -1, n)
    most = means.new_zeros(len(span), n + 1, n).scatter_reduce_(1, place, means, "amax")[:, :n]  # (B, C, C)
    real = size > 0
    among = real[:, None] & real[..., None] & ~torch.eye(n, dtype=torch.bool, device=span.device)
    strength = torch.maximum(most, most.mT).masked_fill(~among, -torch.inf)
    link, other = strength.amax(2), strength.argmax(2)  # (B, C), the lowest on ties
    count, numbers = real.sum(1, keepdim=True), torch.arange(n, device=span.device)
    clash = (other.gather(1, other) == numbers) & (count > 1) & ((count > 2) | (link >= least[:, None]))
    rival = size.gather(1, other)
    loses = clash & real & ((size < rival) | ((size == rival) & (other < numbers)))
    return (span >= 0) & loses.gather(1, span.clamp(min=0))
