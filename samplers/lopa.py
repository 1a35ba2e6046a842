"""LoPA: try several next columns side by side and go where the rest becomes surest (arXiv 2512.16229)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dllm.canvas import Canvas, Decision, Plan, State, Window
from dllm.prediction import Prediction
from dllm.samplers.base import Bundle, Context, Method, Needs, View, param, rank
from dllm.samplers.threshold import Threshold


@dataclass(frozen=True)
class Branches:
    """Feeds every row b times: as it is, and with one more column filled in each copy; the surest copy answers.

    The copies share their row's lane of the store and leave nothing in it. The forward that opens an epoch has to
    leave its keys and values there: it has no branches.
    """

    lanes: ClassVar[int] = 1

    def expand(self, plan: Plan, state: State, window: Window) -> Plan:
        cols, token = state.memory["lopa.cols"] - 1, state.memory["lopa.token"]  # (B, b - 1)
        if (plan.stored and plan.refresh) or not bool((cols >= 0).any()):
            return plan
        copies = cols.shape[1] + 1
        tries = zip(cols.T[..., None], token.T[..., None], strict=True)
        filled = [torch.where(plan.pos == column, value, plan.ids) for column, value in tries]

        def repeat(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.repeat(copies, *[1] * (x.dim() - 1))

        keep = torch.zeros_like(plan.pos, dtype=torch.bool).repeat(copies, 1) if plan.stored else None
        return plan._replace(
            ids=torch.cat([plan.ids, *filled]),
            pos=plan.pos.repeat(copies, 1),
            fresh=repeat(plan.fresh),
            keep=keep,
            visible=repeat(plan.visible),
            lane=repeat(plan.lane),
        )

    def reduce(self, logits: Tensor, cols: Tensor, answer: Any) -> Tensor:
        """The winner's logits (B, W, V). The first read of a forward, the step's own columns, decides the winner."""
        rows = len(cols)
        branches = logits.view(-1, *cols.shape, logits.shape[-1])  # (b, B, W, V)
        if "winner" not in answer.notes:
            answer.notes["winner"] = winner(branches, cols, answer)
        return branches[answer.notes["winner"], torch.arange(rows, device=cols.device)]


def winner(branches: Tensor, cols: Tensor, answer: Any) -> Tensor:
    """(B,) the copy with the highest mean confidence over the masks that it leaves in the window, lowest on ties.

    A copy that leaves none is sure of everything: its mean is 1.
    """
    state, window = answer.state, answer.window
    if len(branches) == 1:
        return torch.zeros_like(state.step)
    extra = state.memory["lopa.cols"] - 1
    inside = (cols >= window.lo[:, None]) & (cols < window.hi[:, None])
    masked = inside & state.canvas.masked.gather(1, cols.clamp(min=0))
    means = []
    for k, logits in enumerate(branches):
        left = masked if k == 0 else masked & (cols != extra[:, k - 1, None])
        conf = Prediction(logits, cols).confidence.double()
        mean = torch.where(left, conf, 0.0).sum(1) / left.sum(1).clamp(min=1)
        mean = torch.where(left.any(1), mean, 1.0)
        means.append(mean if k == 0 else torch.where(extra[:, k - 1] >= 0, mean, -1.0))
    return torch.stack(means).argmax(0)


@dataclass(frozen=True)
class LoPA(Method):
    """After the ordinary commits, branch k also fills the k-th most confident column that is left; one forward reads
    all branches, and the one whose remaining masks have the highest mean confidence becomes the row. Its logits decide
    the next commits, so a step costs one batched forward of b rows.
    """

    b: int = param(4, "branches with the row itself; released scripts use 2-4, the paper's D2F runs 7 and 14", low=1)
    tau: float = param(0.9, "the bar of the ordinary commits where no other sampler selects", low=0)

    name: ClassVar[str] = "lopa"
    source: ClassVar[str] = "LoPA, arXiv 2512.16229"
    cost: ClassVar[str] = "b rows a step, the window's columns of each"

    def bundle(self, context: Context) -> Bundle:
        def memory(canvas: Canvas) -> dict[str, Tensor]:
            none = canvas.ids.new_zeros((len(canvas.ids), self.b - 1))
            return {"lopa.cols": none, "lopa.token": none}  # column + 1, 0 for none; and the token tried there

        return Bundle(
            inputs=Branches(),
            adjust=(exclude,),
            amend=(self.branch,),
            assumes={"select": Threshold(tau=self.tau).select},
            needs=Needs(extra_rows=self.b - 1),
            memory=memory,
        )

    def branch(self, view: View, pred: Prediction, d: Decision) -> Decision:
        """Write the winner's column, then choose the columns that the next forward tries."""
        column, token = won(view, pred)
        mine = view.cols == column[:, None]
        write = view.scatter(torch.zeros_like(d.write), mine, mine)
        d = d._replace(write=d.write | write, token=torch.where(write, token[:, None], d.token))
        left = view.live & ~view.gather(d.write)
        order = rank(pred.log_confidence, left)
        picks = [left & (order == k) for k in range(self.b - 1)]
        if picks:
            view.memory["lopa.cols"] = torch.stack([torch.where(p, view.cols + 1, 0).amax(1) for p in picks], 1)
            view.memory["lopa.token"] = torch.stack([torch.where(p, pred.token, 0).amax(1) for p in picks], 1)
        return d


def won(view: View, pred: Prediction) -> tuple[Tensor, Tensor]:
    """(B,) the column that the winning branch filled, -1 where the row itself won, and its token."""
    index = pred.answer.notes["winner"][:, None]
    none = torch.zeros_like(index)
    cols = torch.cat([none, view.state.memory["lopa.cols"]], 1).gather(1, index)[:, 0] - 1
    return cols, torch.cat([none, view.state.memory["lopa.token"]], 1).gather(1, index)[:, 0]


def exclude(view: View, pred: Prediction) -> Prediction:
    """The column that the winner filled is no candidate: its token is settled."""
    view.live = view.live & (view.cols != won(view, pred)[0][:, None])
    return pred
