"""When a row is finished: EOS or a stop string behind a closed prefix of the canvas that a step leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.canvas import Canvas
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

    def __call__(self, view: View, canvas: Canvas) -> Tensor:
        """(B,) bool: the rows that are finished with this canvas, the one after the step's decision."""
        end = canvas.first_masked()
        if self.revises:
            cols = torch.arange(canvas.ids.shape[1], device=end.device)
            left = ~((canvas.masked & view.window.inside(cols)).any(1) | view.held)
            end = torch.where(left, end, torch.minimum(end, view.window.lo))
        found = _holds(canvas.ids, self.eos_ids, canvas.start, end)
        return found if self.stopped is None else found | self._strings(canvas.ids, canvas.start, end)

    def _strings(self, ids: Tensor, start: Tensor, end: Tensor) -> Tensor:
        assert self.stopped is not None
        bounds = zip(start.tolist(), end.tolist(), strict=True)
        hits = [self.stopped(ids[i, lo:hi].tolist()) for i, (lo, hi) in enumerate(bounds)]
        return torch.tensor(hits, device=ids.device)


def _holds(ids: Tensor, wanted: tuple[int, ...], start: Tensor, end: Tensor) -> Tensor:
    """(B,) bool: one of the ids stands in a column of [start, end)."""
    cols = torch.arange(ids.shape[1], device=ids.device)
    hit = torch.zeros_like(ids, dtype=torch.bool)
    for token in wanted:
        hit |= ids == token
    return (hit & (cols >= start[:, None]) & (cols < end[:, None])).any(1)
