"""DAWN: lower the bar for tokens that attend to certain ones, keep those apart that attend to each other (arXiv
2602.06953)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.errors import DllmError
from dllm.samplers import (
    OFF,
    Attention,
    Bundle,
    Canvas,
    Context,
    Decision,
    Method,
    Needs,
    Prediction,
    Presets,
    Span,
    State,
    View,
    param,
    rank,
    spans,
)  # fmt: skip
from dllm.samplers.independent import independent

SETTINGS = {  # tau_sink, tau_edge, tau_induce, and tau_low by task: the released scripts
    "llada": (0.01, 0.07, 0.70, {"gsm8k": 0.75, "math": 0.75, "humaneval": 0.80, "mbpp": 0.70}),
    "llada15": (0.01, 0.07, 0.70, {"gsm8k": 0.75, "math": 0.75, "humaneval": 0.80, "mbpp": 0.75}),
    "dream": (0.03, 0.10, 0.75, {"gsm8k": 0.80, "math": 0.80, "humaneval": 0.80, "mbpp": 0.80}),
    "dream_base": (0.03, 0.05, 0.75, {"gsm8k": 0.75, "math": 0.80, "humaneval": 0.80, "mbpp": 0.80}),
}


class Archive(NamedTuple):
    """Per-column leaves: how sure the model was of a token when it was committed, (B, L); 1 for given ones."""

    table: Tensor


@dataclass(frozen=True)
class DAWN(Method):
    """Commit candidates with confidence tau_high; those with tau_induce that depend on an anchor, a token that stands
    with confidence tau_high; and of the others with tau_low an independent set, the most confident first.

    A column depends on those that it attends to by tau_edge or more. Nobody depends on a sink: a column that gets more
    than tau_sink of the attention on average. What depends on a candidate of both the first and the second kind waits.

    Weights average to 1/L: with tau_sink below that, most columns are sinks and this is `threshold` at tau_low. The
    published 0.01 is made for long few-shot prompts.
    """

    tau_sink: float = param(0.01, "released for LLaDA; 0.03 for Dream; made for prompts of about 1000 tokens")
    tau_edge: float = param(0.07, "released for LLaDA; 0.10 Dream-Instruct, 0.05 Dream-Base", low=0)
    tau_induce: float = param(0.70, "released for LLaDA; 0.75 for Dream", low=0, high=OFF)
    tau_low: float = param(0.75, "released for LLaDA-8B-Instruct on GSM8K and MATH; HumanEval .80", low=0, high=OFF)
    tau_high: float = param(0.9, "released, fixed", low=0, high=OFF)
    anchors: str = param(
        "archived",
        "how sure a token was at its commit, given ones are; `current`, as released: how sure this forward is of any "
        "token in its place, which takes the head and the attention of every column",
        choices=("archived", "current"),
    )
    layers: int | Sequence[int] = param(4, "released: the last four, of 32 or 28; or a list of layers, from 0")

    name: ClassVar[str] = "dawn"
    source: ClassVar[str] = "DAWN, arXiv 2602.06953"
    cost: ClassVar[str] = "one row, the window's columns, and their attention weights in a few layers"
    presets: ClassVar[Presets] = {
        f"{model}_{task}": {"tau_sink": sink, "tau_edge": edge, "tau_induce": induce, "tau_low": low}
        for model, (sink, edge, induce, tasks) in SETTINGS.items()
        for task, low in tasks.items()
    }

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection. Errors: current anchors of a block-causal model, layers that are none."""
        if self.anchors == "archived":
            needs = Needs(committed=True, attention=Attention.last(self.layers, self.name))
            return Bundle(select=self.select, amend=(self.archive,), needs=needs, columns=certain)
        if context.block_size is not None:
            raise DllmError(
                "dawn: anchors=current reads the attention of all columns, and a block-causal model computes none "
                "behind its block: use anchors=archived"
            )
        needs = Needs(
            committed=True,
            attention=Attention.last(self.layers, self.name, "all"),
            caches=("none",),
            caches_why="anchors=current reads every column in every step; anchors=archived goes with all of them",
        )
        return Bundle(select=self.select, reads=below, needs=needs)

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: the confident, the induced, and an independent set of the others."""
        conf, live, weights = soft.confidence, view.live, soft.attention
        own = view.cols.clamp(min=0)[..., None]
        depends = (weights >= self.tau_edge) & ~self.sinks(view, soft)[:, None]  # (B, W, L) D
        depends = depends.scatter(2, own, False)
        high = live & (conf >= self.tau_high)
        induced = live & (conf >= self.tau_induce) & (depends & self.anchored(view, soft)[:, None]).any(2)
        among = view.pairs(depends)  # (B, W, W)
        barred = (among & (high & induced)[:, None]).any(2)
        low = live & (conf >= self.tau_low) & ~high & ~induced & ~barred
        return high | induced | independent(rank(soft.log_confidence, low), low, among | among.mT)

    def sinks(self, view: View, soft: Prediction) -> Tensor:
        """(B, L) bool: the columns that get more than tau_sink, on average over the rows that are read."""
        if self.anchors == "current":
            table, counts = soft.weights.table, soft.weights.cols >= 0
        else:
            table, counts = soft.attention, view.inside & (view.cols >= 0)
        total = table.masked_fill(~counts[..., None], 0.0).sum(1)
        return total / counts.sum(1, keepdim=True).clamp(min=1) > self.tau_sink

    def anchored(self, view: View, soft: Prediction) -> Tensor:
        """(B, L) bool: the tokens below the end of the window of which the model is, or was, sure."""
        if self.anchors == "archived":
            sure = view.columns[Archive].table >= self.tau_high
        else:
            read = (soft.confidence >= self.tau_high) & (view.cols >= 0)
            sure = view.scatter(torch.zeros_like(view.canvas.masked), read, read)
        columns, ids = torch.arange(sure.shape[1], device=sure.device), view.canvas.ids
        return sure & (ids != view.canvas.mask_id) & (columns < view.window.hi[:, None])

    def archive(self, view: View, pred: Prediction, d: Decision) -> Decision:
        """The same decision; notes how sure the model is of what it writes."""
        table = view.columns[Archive].table
        written = view.gather(d.write) & (view.cols >= 0)
        view.columns[Archive] = Archive(view.scatter(table, pred.confidence, written))
        return d


def certain(canvas: Canvas) -> Archive:
    """Given tokens count as certain."""
    return Archive((~canvas.masked).float())


def below(state: State, window: Span) -> Tensor:
    """(B, L) all columns below the end of the window."""
    return spans(torch.zeros_like(window.hi), window.hi, state.canvas.ids.shape[1])
