"""What the engine notes for a trace: the commits of each step, and how sure the model was of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dllm.decoding.canvas import Canvas, Decision
from dllm.decoding.prediction import Prediction
from dllm.decoding.runner import Tick
from dllm.decoding.slots import Confidence, View
from dllm.decoding.trace import Trace


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
        view.columns[Confidence] = Confidence(table)
        return d


def record(trace: Trace, tick: Tick, row: int, before: list[int]) -> None:
    """Add one forward to a row's trace; `before` are the ids of its canvas until then."""
    at, f = tick.rows[row], tick.facts[row]
    start, length, new = f.start, f.length, tick.state.canvas.ids[at].tolist()
    sure = tick.state.columns[Confidence].table[at].tolist()
    changed = [col for col in range(start, length) if before[col] != new[col]]
    trace.commits.append([[col, new[col]] for col in changed])
    trace.confidence.append([None if math.isnan(sure[col]) else round(sure[col], 6) for col in changed])
    trace.windows.append([tick.before[row].lo, tick.before[row].hi])
    trace.lengths.append(length)
    before[:] = new
