"""When a row is finished: EOS or a stop string behind a closed prefix. The last link of every amend chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.canvas import Decision
from dllm.prediction import Prediction
from dllm.samplers.base import View

Stopped = Callable[[list[int]], bool]  # ids of a closed generated prefix -> does a stop string end it?


@dataclass(frozen=True)
class Stop:
    """Finish a row once its *closed* prefix holds an EOS id or satisfies the stop predicate.

    A prefix is closed where nothing in it can change any more: up to the first mask for samplers that never revise, up
    to the last block that was left for those that do.
    """

    eos_ids: tuple[int, ...]
    revises: bool
    stopped: Stopped | None = None

    def __call__(self, view: View, pred: Prediction, d: Decision) -> Decision:
        canvas = view.canvas.apply(d)
        end = canvas.first_masked()
        if self.revises:
            cols = torch.arange(canvas.ids.shape[1], device=end.device)
            inside = (cols >= view.window.lo[:, None]) & (cols < view.window.hi[:, None])
            left = ~((canvas.masked & inside).any(1) | view.held)
            end = torch.where(left, end, torch.minimum(end, view.window.lo))
        found = _first(canvas.ids, self.eos_ids, canvas.start, end) < end
        if self.stopped is not None:
            found = found | self._strings(canvas.ids, canvas.start, end)
        return d._replace(done=d.done | found)

    def _strings(self, ids: Tensor, start: Tensor, end: Tensor) -> Tensor:
        assert self.stopped is not None
        bounds = zip(start.tolist(), end.tolist(), strict=True)
        hits = [self.stopped(ids[i, lo:hi].tolist()) for i, (lo, hi) in enumerate(bounds)]
        return torch.tensor(hits, device=ids.device)


def _first(ids: Tensor, wanted: tuple[int, ...], start: Tensor, end: Tensor) -> Tensor:
    """(B,) the first column in [start, end) that holds one of the ids, `end` where none does."""
    cols = torch.arange(ids.shape[1], device=ids.device)
    hit = torch.zeros_like(ids, dtype=torch.bool)
    for token in wanted:
        hit |= ids == token
    hit &= (cols >= start[:, None]) & (cols < end[:, None])
    return torch.where(hit, cols, end[:, None]).amin(1)
