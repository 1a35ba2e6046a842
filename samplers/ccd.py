"""CCD: trust what a column predicts across several contexts, not in one (arXiv 2512.02044)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.decoding.prediction import Prediction, Rescored
from dllm.samplers import Adjust, Blocks, Bundle, Canvas, Context, Method, Needs, Presets, View, param, quota, rank

WARM_UP = 5  # steps that only fill the history, as released
UNSEEN = -1e9  # the score of a column without an average: below every other one, and still a candidate


@dataclass(frozen=True)
class CCD(Method):
    """Commit what is coherent with earlier steps, or the u = max_new_tokens // steps best columns, by entropy
    unless another sampler brings a score.

    `agree` (as released): the best n columns of this step that were also among the n best left over by the step
    before, and kept their arg-max, commit together if they hold one of the u best. n grows from 1 by one a step to
    u (1 + expand). `mean` (the paper's form): a column's distribution is averaged over the last `depth` steps in which
    it was among the `top` surest, by entropy; columns whose averaged entropy is below `eps` commit with the average's
    arg-max. A score that is named ranks the averages. With `seek=False` exactly u columns commit: coherence changes the
    order alone.
    """

    mode: str = param("agree", "the form that was released and measured", choices=("agree", "mean"))
    seek: bool = param(True, "CCD-DS, the adaptive form; False is CCD at a fixed budget")
    expand: float = param(4.0, "the released code's growth of the compared set", low=0)
    depth: int = param(3, "mode 'mean': the paper's buffer for Dream (2 for LLaDA)", low=1)
    top: int = param(4, "mode 'mean': the paper's number of buffered columns a step", low=1)
    eps: float = param(0.1, "mode 'mean': nats; our choice, the paper gives no number", low=0)

    name: ClassVar[str] = "ccd"
    source: ClassVar[str] = "CCD, arXiv 2512.02044"
    cost: ClassVar[str] = "one row, the window's columns; mode 'mean' keeps depth x top distributions"
    presets: ClassVar[Presets] = {"paper": {"mode": "mean"}, "llada": {"mode": "mean", "depth": 2}}

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection; the whole window and entropy where nobody brings others."""
        rule = (Agree if self.mode == "agree" else Mean)(self, context)
        return Bundle(
            select=rule,
            adjust=rule.adjust,
            memory=rule.memory,
            columns=rule.columns,
            assumes={"window": Blocks(context.max_new_tokens, whole=True), "score": quota.entropy},
            needs=Needs(filtered=True),
        )


class Looked(NamedTuple):
    """Per-column leaves of mode `agree`, (B, L): what the last step saw."""

    token: Tensor  # its arg-max, -1 for none
    runner_up: Tensor  # bool: among the best that it left over


class Ring(NamedTuple):
    """Per-row leaves of mode `mean`: the distributions of the last steps, newest first."""

    cols: Tensor  # (B, K) their columns, -1 for none
    law: Tensor  # (B, K, V)


@dataclass(frozen=True)
class Rule:
    """What both modes share: the base budget u, one for each row."""

    m: CCD
    context: Context
    memory: ClassVar[None] = None
    columns: ClassVar[None] = None

    @property
    def adjust(self) -> tuple[Adjust, ...]:
        """Links of the adjust chain."""
        return ()

    def base(self, view: View) -> Tensor:
        """(B, 1) u."""
        return (view.state.asked // self.context.budget(view.state)).clamp(min=1)[:, None]


class Agree(Rule):
    """Two steps must agree. The history of a column is its last arg-max and whether it was among the runners-up."""

    def columns(self, canvas: Canvas) -> Looked:  # type: ignore[override]
        """Nothing was looked at yet."""
        return Looked(torch.full_like(canvas.ids, -1), torch.zeros_like(canvas.masked))

    def __call__(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: what two steps agree on, else the u best."""
        order, step = rank(score, view.live), view.state.step[:, None]
        u = self.base(view)
        n = self._compared(view, u)
        plain = view.live & (order < u)
        last_token, runner_up = map(view.gather, view.columns[Looked])
        stable = (soft.argmax == last_token) & runner_up & (order < n)
        if not self.m.seek:
            stable &= rank(-order.to(score.dtype), stable) < u
        coherent = (plain & runner_up).any(1, keepdim=True) & (stable.sum(1, keepdim=True) >= u)
        coherent &= (step >= WARM_UP) & (step < self.context.budget(view.state)[:, None] - 1)
        chosen = torch.where(coherent, stable, plain)
        left = view.live & ~chosen
        saved = (rank(score, left) < n) & left & (step >= WARM_UP - 2)
        token = torch.where(step >= WARM_UP - 1, soft.argmax, -1)
        nothing = self.columns(view.canvas)
        view.columns[Looked] = Looked(
            view.scatter(nothing.token, token, view.live), view.scatter(nothing.runner_up, saved, saved)
        )
        return chosen

    def _compared(self, view: View, u: Tensor) -> Tensor:
        """(B, 1) n: how many of the best columns are compared with the step before. 2 once a tenth is left."""
        canvas, step = view.canvas, view.state.step[:, None]
        most = u + (u.double() * self.m.expand).long()
        grown = torch.minimum((step - WARM_UP + 3).clamp(min=1), most)
        few = canvas.masked.sum(1) <= 0.1 * (canvas.length - canvas.start)
        return torch.where(few[:, None] & (step >= WARM_UP - 1), most.clamp(max=2), grown)


class Mean(Rule):
    """Averages over a ring of the last `depth` - 1 steps; each holds the distributions of its `top` surest columns."""

    @property
    def top(self) -> int:
        """Columns that a step leaves in the ring: of the row with most."""
        context = self.context
        return max(self.m.top, context.max_new_tokens // context.steps if context.steps else 1)

    @property
    def adjust(self) -> tuple[Adjust, ...]:
        """The average."""
        return (self.blend,)

    def memory(self, canvas: Canvas) -> Ring:  # type: ignore[override]
        """An empty ring."""
        rows, depth = len(canvas.ids), self.m.depth - 1
        cols = canvas.ids.new_full((rows, depth * self.top), -1)
        return Ring(cols, torch.zeros(*cols.shape, self.context.vocab_size, device=cols.device))

    def blend(self, view: View, pred: Prediction) -> Prediction:
        """The prediction with averages in place of the laws of the `top` surest columns."""
        order = rank(pred.negative_entropy, view.live)
        at = order.argsort(dim=1, stable=True)[:, : self.top]  # (B, k) index into the columns of this step
        own = self.base(view).clamp(min=self.m.top)  # the row's own `top`
        ok = order.gather(1, at) < torch.minimum(view.live.sum(1, keepdim=True), own)
        law = pred.logits.gather(1, at[..., None].expand(-1, -1, pred.logits.shape[-1])).softmax(-1)  # (B, k, V)
        cols = torch.where(ok, view.cols.gather(1, at), -1)
        old_cols, kept = view.memory[Ring]
        old = kept.to(law.dtype)
        same = ((cols[:, :, None] == old_cols[:, None]) & ok[..., None]).to(law.dtype)  # (B, k, d k)
        contexts = 1 + same.sum(-1)
        mean = (law + same @ old) / contexts[..., None]
        keep = old_cols.shape[1] - at.shape[1]
        if keep >= 0:  # a ring: the newest first
            newest = torch.cat([law, old[:, :keep]], 1).to(kept.dtype)
            view.memory[Ring] = Ring(torch.cat([cols, old_cols[:, :keep]], 1), newest)
        return Blended(pred, at, ok, mean, contexts)

    def __call__(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: the u best, and with `seek` every average that is sure."""
        blend = averages(soft)
        chosen = rank(score.masked_fill(blend.contexts == 0, UNSEEN), view.live) < self.base(view)
        if not self.m.seek:
            return chosen
        return chosen | ((blend.contexts > 1) & (-soft.negative_entropy < self.m.eps))


class Blended(Rescored):
    """A prediction with averaged laws (B, k, V) at the columns `at` (B, k) where `ok`, of so many contexts each."""

    def __init__(self, raw: Prediction, at: Tensor, ok: Tensor, mean: Tensor, contexts: Tensor) -> None:
        self._at, self._ok, self._mean = at, ok, mean
        best, token = mean.max(-1)
        super().__init__(raw, self._put(raw.confidence, best), self._put(raw.token, token))
        self.contexts = self._put(torch.zeros_like(raw.confidence), contexts)  # (B, W)

    def _put(self, table: Tensor, values: Tensor) -> Tensor:
        """(B, W) the table with the values (B, k) of the averages."""
        kept = torch.where(self._ok, values.to(table.dtype), table.gather(1, self._at))
        return table.scatter(1, self._at, kept)

    @cached_property
    def margin(self) -> Tensor:
        """(B, W) of the averages where there is one."""
        first, second = self._mean.topk(2, dim=-1).values.unbind(-1)
        return self._put(self.raw.margin, first - second)

    @cached_property
    def negative_entropy(self) -> Tensor:
        """(B, W) of the averages where there is one."""
        return self._put(self.raw.negative_entropy, -torch.special.entr(self._mean).sum(-1))


def averages(soft: Prediction) -> Blended:
    """The blend, beneath what later links of the chain made of it."""
    while not isinstance(soft, Blended):
        assert isinstance(soft, Rescored)
        soft = soft.raw
    return soft
