"""LoPA: try several next columns side by side and go where the rest becomes surest (arXiv 2512.16229)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.samplers import Canvas, Context, Decision, Forward, Inputs, Plan, Prediction, Span, State, View, rank
from dllm.samplers.base import OFF, Bundle, Method, param
from dllm.samplers.threshold import Threshold


class Tried(NamedTuple):
    """Per-column leaves, (B, L): what the next forward tries."""

    branch: Tensor  # the branch that fills the column, 0 for none
    token: Tensor  # and with what


class Winner(NamedTuple):
    """What the branches tell of a forward."""

    branch: Tensor  # (B,) the copy that answers, 0: the row as it is


@dataclass(frozen=True)
class Branches(Inputs):
    """Feeds every row as it is, and once more with each column that it tries filled; the surest copy answers.

    A row that tries fewer columns than its neighbours has padding for copies. All copies read their row's lane of the
    store; the row as it is leaves there what it would leave alone. The forward that opens an epoch has no branches.
    """

    def expand(self, plan: Plan, state: State, window: Span) -> Plan:
        """Copies of the rows, each with one column filled."""
        branch, token = state.columns[Tried]  # (B, L)
        tried = branch.amax(1, keepdim=True)  # (B, 1) branches of each row: columns that it tries
        copies = 1 + int(tried.max())
        if (plan.stored and plan.refresh) or copies == 1:
            return plan
        at = plan.pos.clamp(min=0)
        branch, token = branch.gather(1, at).masked_fill(plan.pos < 0, 0), token.gather(1, at)  # (B, Q)
        filled = [torch.where(branch == k, token, plan.ids) for k in range(1, copies)]
        places = [torch.where(tried >= k, plan.pos, -1) for k in range(1, copies)]
        keep = None
        if plan.stored:
            own = plan.pos >= 0 if plan.fresh is None else plan.fresh
            own = own if plan.keep is None else own & plan.keep
            keep = torch.cat([own, torch.zeros_like(own).repeat(copies - 1, 1)])
        ids, pos = torch.cat([plan.ids, *filled]), torch.cat([plan.pos, *places])
        many = plan.times(copies)
        known = many.known and many.known._replace(padded=True, write=None)
        return many._replace(ids=ids, pos=pos, keep=keep, known=known)

    def reduce(self, logits: Tensor, cols: Tensor, forward: Forward) -> tuple[Tensor, Winner]:
        """The winner's logits. The first read of a forward, the step's own columns, decides the winner."""
        branches, won = logits.view(-1, *cols.shape, logits.shape[-1]), forward.extra  # (b, B, W, V)
        if not isinstance(won, Winner):
            won = Winner(surest(branches, cols, forward.state, forward.window))
        return branches[won.branch, torch.arange(len(cols), device=cols.device)], won

    def answering(self, forward: Forward) -> Tensor:
        """The winner."""
        assert isinstance(forward.extra, Winner)
        return forward.extra.branch

    def canvas(self, forward: Forward) -> Canvas:
        """The winner's: with the column that it had filled."""
        assert isinstance(forward.extra, Winner)
        canvas, (branch, token) = forward.state.canvas, forward.state.columns[Tried]
        return canvas.write((branch > 0) & (branch == forward.extra.branch[:, None]) & canvas.masked, token)


def surest(branches: Tensor, cols: Tensor, state: State, window: Span) -> Tensor:
    """(B,) the copy with the highest mean confidence over the masks that it leaves in the window, lowest on ties.

    A copy that leaves none is sure of everything: its mean is 1.
    """
    if len(branches) == 1:
        return torch.zeros_like(state.step)
    at = cols.clamp(min=0)
    inside = window.inside(cols)
    masked = inside & state.canvas.masked.gather(1, at)
    branch = state.columns[Tried].branch.gather(1, at).masked_fill(~inside, 0)
    means = []
    for k, logits in enumerate(branches):
        left = masked & (branch != k) if k else masked
        conf = Prediction(logits, cols).confidence.double()
        mean = torch.where(left, conf, 0.0).sum(1) / left.sum(1).clamp(min=1)
        mean = torch.where(left.any(1), mean, 1.0)
        means.append(torch.where((branch == k).any(1), mean, -1.0) if k else mean)
    return torch.stack(means).argmax(0)


@dataclass(frozen=True)
class LoPA(Method):
    """After the ordinary commits, branch k also fills the k-th most confident column that is left; one forward reads
    all branches, and the one whose remaining masks have the highest mean confidence becomes the row. Its logits decide
    the next commits, so a step costs one batched forward of b rows, fewer where fewer masks are left.
    """

    b: int = param(4, "branches with the row itself; released scripts use 2-4, the paper's D2F runs 7 and 14", low=1)
    tau: float = param(0.9, "the bar of the ordinary commits where no other sampler selects", low=0, high=OFF)

    name: ClassVar[str] = "lopa"
    source: ClassVar[str] = "LoPA, arXiv 2512.16229"
    cost: ClassVar[str] = "b rows a step, the window's columns of each"

    def bundle(self, context: Context) -> Bundle:
        """Owns the inputs; the selection is threshold's where nobody brings one."""
        return Bundle(
            inputs=Branches(),
            adjust=(exclude,),
            amend=(self.branch,),
            assumes={"select": Threshold(tau=self.tau).select},
            columns=lambda canvas: Tried(*[torch.zeros_like(canvas.ids)] * 2),
        )

    def branch(self, view: View, pred: Prediction, d: Decision) -> Decision:
        """Write the winner's column, then choose the columns that the next forward tries."""
        mine = won(view, pred)
        write = view.scatter(torch.zeros_like(d.write), mine, mine)
        d = d._replace(write=d.write | write, token=torch.where(write, view.state.columns[Tried].token, d.token))
        left = view.live & ~view.gather(d.write)
        order = rank(pred.log_confidence, left) + 1
        tried = left & (order < self.b)
        zero = torch.zeros_like(view.canvas.ids)
        view.columns[Tried] = Tried(view.scatter(zero, order, tried), view.scatter(zero, pred.token, tried))
        return d


def won(view: View, pred: Prediction) -> Tensor:
    """(B, W) bool: the column that the winning branch had filled; nothing where the row itself won."""
    assert isinstance(pred.extra, Winner)
    branch = view.gather(view.state.columns[Tried].branch)
    return view.masked & (branch > 0) & (branch == pred.extra.branch[:, None])


def exclude(view: View, pred: Prediction) -> Prediction:
    """The column that the winner filled is no candidate: its token is settled."""
    view.live = view.live & ~won(view, pred)
    return pred
