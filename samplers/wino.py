"""WINO: draft widely, verify what was written without looking at it, take back what fails (arXiv 2507.18578)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.errors import DllmError
from dllm.samplers import Context, Decision, Forward, Inputs, Needs, Plan, Prediction, Span, State, View, rank
from dllm.samplers.base import OFF, Bundle, Method, Presets, param
from dllm.samplers.revoke import committed_here, decoded, remask


class LeaveOneOut(NamedTuple):
    """What the shadow tells of a forward; its head is run where somebody asks."""

    logits: Callable[[], Tensor]  # (B, W, V) at the columns that the step reads


@dataclass(frozen=True)
class Shadow(Inputs):
    """Feeds a second, masked copy of the window's columns at the same positions, private to the forward.

    Nobody attends to the shadow but the shadow itself. A shadow column sees every real column but its own: its logits
    are leave-one-out predictions of the token that stands there.
    """

    mask_id: int

    def expand(self, plan: Plan, state: State, window: Span) -> Plan:
        """The plan with a masked copy of the window's columns behind it."""
        shadow, known = columns(window), plan.known  # (B, E)
        assert known is not None
        n, q = plan.pos.shape
        pos = torch.cat([plan.pos, shadow], 1)
        real = torch.arange(pos.shape[1], device=pos.device) < q  # (Q + E,)
        if plan.stored:
            slots = torch.arange(known.slots, device=pos.device)
            # of other private queries nobody sees anything either
            given = (
                torch.ones_like(slots, dtype=torch.bool)[None, None]
                if plan.visible is None
                else plan.visible[..., : known.slots]
            )
            seen = given.expand(n, q, -1)  # (B, Q, S)
            alone = given.expand(n, -1, -1)[:, -1:] & (slots != shadow[..., None])  # (B, E, S)
        else:
            everyone = torch.ones(1, 1, q, dtype=torch.bool, device=pos.device)
            seen = (everyone if plan.visible is None else plan.visible).expand(n, q, q)
            shared = plan.visible is None or (seen.sum(1, keepdim=True) > 1)  # one that only itself sees is private
            alone = shared & (plan.pos[:, None] != shadow[..., None])  # (B, E, Q)
        visible = torch.cat([seen, alone], 1)
        own = (~real[:, None] & ~real).expand(n, -1, -1)  # (B, Q + E, Q + E): the shadow among itself
        if not plan.stored:
            own = own[..., q:]  # the planned queries are keys already
        elif plan.visible is not None and plan.visible.shape[2] > known.slots:  # and private ones as they were
            private = plan.visible[..., known.slots :].expand(n, q, q)
            own = own | F.pad(private, (0, shadow.shape[1], 0, shadow.shape[1]))
        fresh = None
        if plan.stored:
            fresh = torch.ones_like(plan.pos, dtype=torch.bool) if plan.fresh is None else plan.fresh
            fresh = F.pad(fresh, (0, shadow.shape[1]))
        return plan._replace(
            ids=torch.cat([plan.ids, torch.full_like(shadow, self.mask_id)], 1),
            pos=pos,
            fresh=fresh,
            keep=None if plan.keep is None else F.pad(plan.keep, (0, shadow.shape[1])),
            visible=torch.cat([visible, own], 2),
            known=known._replace(padded=True, private=plan.stored, write=None),
        )

    def reduce(self, logits: Tensor, cols: Tensor, forward: Forward) -> tuple[Tensor, LeaveOneOut]:
        """The row's own logits, and the way to those of the shadow."""
        return logits, LeaveOneOut(forward.private)


def columns(window: Span) -> Tensor:
    """(B, E) the columns of the reads that lie in the window, -1 for the others."""
    return torch.where(window.inside(window.reads), window.reads, -1)


class Accepted(NamedTuple):
    """Per-row leaves: the columns that the last step committed, (B,); 1 at first: nothing can be taken back."""

    n: Tensor


@dataclass(frozen=True)
class WINO(Method):
    """Commit candidates above tau_draft, at most `share` of the window's masks, between `least` and `most`. A step that
    commits more than one masks those again that were decoded earlier and whose leave-one-out probability is below
    tau_verify.

    At most one fewer than the last step committed are taken back, the least probable first, so a block takes no more
    steps than it has columns. Given tokens are never verified.
    """

    tau_draft: float = param(
        0.7, "released: 0.7 MATH500, HumanEval, Sudoku; 0.6 GSM8K; 0.8 MBPP; 0.5 ARC", low=0, high=OFF
    )
    tau_verify: float = param(0.9, "the paper's bar, all tasks; 0 never takes back", low=0, high=OFF)
    share: float = param(0.7, "the released cap: a share of the masks left", low=0, high=1)
    least: int = param(5, "the released floor of the cap", low=1)
    most: int = param(20, "the released ceiling of the cap", low=1)

    name: ClassVar[str] = "wino"
    source: ClassVar[str] = "WINO, arXiv 2507.18578"
    cost: ClassVar[str] = "one row, the window's columns twice (the second time masked)"
    presets: ClassVar[Presets] = {
        "gsm8k": {"tau_draft": 0.6},
        "math": {"tau_draft": 0.7},
        "humaneval": {"tau_draft": 0.7},
        "mbpp": {"tau_draft": 0.8},
        "choice": {"tau_draft": 0.5},
    }

    def bundle(self, context: Context) -> Bundle:
        """Owns inputs and selection, and amends. Errors: a shifted model."""
        if context.shift:
            raise DllmError(
                "sampler 'wino' needs a model that predicts a position from that position; this one predicts the next "
                "token, so a shadow column would see what it is to verify"
            )
        return Bundle(
            inputs=Shadow(context.mask_id),
            select=self.select,
            amend=(self.verify,),
            needs=Needs(committed=True, revises=True),
            memory=lambda canvas: Accepted(torch.ones_like(canvas.start)),
        )

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: candidates above tau_draft, as many as the cap allows."""
        cap = (view.live.sum(1) * self.share).long().clamp(min=self.least, max=self.most)
        chosen = view.live & (soft.confidence > self.tau_draft)
        return chosen & (rank(score, view.live) < cap[:, None])

    def verify(self, view: View, pred: Prediction, d: Decision) -> Decision:
        """The decision with the tokens masked again that fail the verification."""
        accepted = committed_here(view, d).sum(1)
        last = view.memory[Accepted].n
        view.memory[Accepted] = Accepted(accepted)
        among = decoded(view) & (accepted > 1)[:, None]
        if not self.tau_verify:
            return d
        token = view.gather(view.canvas.ids)
        assert isinstance(pred.extra, LeaveOneOut)
        alone = Prediction(pred.extra.logits(), view.cols)
        now = alone.probability_of(alone.logits.gather(-1, token[..., None])[..., 0])
        return remask(view, d, now, among & (now < self.tau_verify), last - 1)
