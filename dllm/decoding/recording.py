"""What the engine notes for a trace: the commits of each step, and how sure the model was of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.decoding.canvas import Canvas, Decision
from dllm.decoding.columns import indices, scatter
from dllm.decoding.engine import Tick
from dllm.decoding.prediction import Prediction
from dllm.decoding.slots import View
from dllm.decoding.trace import Trace


class Confidence(NamedTuple):
    """Per-column leaves: the model's probability of the token that stands there, NaN where none is known."""

    table: Tensor  # (B, L)


@dataclass(frozen=True)
class Confidences:
    """Notes the confidences of a trace. It is the last in the chain of amendments and changes nothing."""

    def columns(self, canvas: Canvas) -> Confidence:
        """Nothing is known at first."""
        return Confidence(torch.full(canvas.ids.shape, torch.nan, device=canvas.ids.device))

    def __call__(self, view: View, pred: Prediction, d: Decision) -> Decision:
        """The same decision; notes the confidence of what it writes."""
        table = torch.where(view.canvas.masked | d.write, torch.nan, view.columns[Confidence].table)
        logit = pred.logits.gather(-1, view.gather(d.token)[..., None])[..., 0]
        table = view.scatter(table, pred.probability_of(logit), view.gather(d.write) & (view.cols >= 0))
        if d.fill is not None:
            cols = indices(view.canvas.apply(d).masked & d.fill[:, None])
            wide = pred.at(cols)
            table = table if wide is None else scatter(table, cols, wide.confidence.to(table.dtype))
        view.columns[Confidence] = Confidence(table)
        return d


def record(trace: Trace, tick: Tick, row: int) -> None:
    """Add one forward to a row's trace."""
    canvas, sure = tick.state.canvas, tick.state.columns[Confidence].table[row].tolist()
    start, length = int(canvas.start[row]), int(canvas.length[row])
    old, new = tick.before.ids[row].tolist(), canvas.ids[row].tolist()
    changed = [col for col in range(start, length) if old[col] != new[col]]
    trace.commits.append([[col, new[col]] for col in changed])
    trace.confidence.append([None if math.isnan(sure[col]) else round(sure[col], 6) for col in changed])
    trace.windows.append([int(tick.window.lo[row]), int(tick.window.hi[row])])
    trace.lengths.append(length)
