"""CreditDecoding: a token that was the arg-max for several steps earns credit on its logit (arXiv 2510.06133)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.prediction import Prediction, Rescored
from dllm.samplers import OFF, Bundle, Canvas, Context, Method, Presets, View, param
from dllm.samplers.threshold import Threshold

FREE = 0  # an unused slot; token ids are stored plus one, so that new slots may be zeros


class Listed(NamedTuple):
    """Per-column leaves: a list of tokens and their credits, (B, L, S); S grows as arg-maxes change."""

    token: Tensor  # id + 1; FREE: an unused slot
    value: Tensor


@dataclass(frozen=True)
class Credit(Method):
    """Each step K <- beta K, then K[arg-max] += p^gamma; columns are chosen by softmax(z + alpha ln(1 + K)).

    Only tokens that were once the arg-max of their column have credit, so K is a short list for each column and the
    fused softmax follows from the log-sum-exp by one correction a listed token: exact, no (W, V) table. The fused
    prediction reaches the selection alone; exits and revisions see the raw one. A committed or re-masked column loses
    its credit. At temperature > 0 the token is the model's draw, and credit only changes its confidence.
    """

    alpha: float = param(0.65, "the paper's final setting for all models: strength of the credit", low=0)
    beta: float = param(0.70, "the paper's final setting: what a step keeps of earlier credit", low=0, high=1)
    gamma: float = param(0.20, "the paper's final setting: below 1 lifts weak early evidence", low=0)
    tau: float = param(0.9, "the bar where no other sampler selects (Fast-dLLM's default)", low=0, high=OFF)
    tie: float = param(0.0, "candidates this close to the best one commit with it (dInfer: 1e-5)", low=0, high=1)
    tuning_free: bool = param(False, "True: gamma 1 and alpha = beta = 1 - masked fraction, the paper's variant")

    name: ClassVar[str] = "credit"
    source: ClassVar[str] = "CreditDecoding, arXiv 2510.06133"
    cost: ClassVar[str] = "one row, the window's columns; a short list of tokens for each column"
    presets: ClassVar[Presets] = {
        "paper": {},
        "dinfer": {"alpha": 0.7, "beta": 0.8, "gamma": 0.2, "tau": 0.8, "tie": 1e-5},
        "tuning-free": {"tuning_free": True},
    }

    def bundle(self, context: Context) -> Bundle:
        """A link of the adjust chain; the selection is threshold's where nobody brings one."""
        select = Threshold(tau=self.tau, tie=self.tie).select
        return Bundle(adjust=(self.fuse,), columns=self.columns, assumes={"select": select})

    @staticmethod
    def columns(canvas: Canvas) -> Listed:
        """No token has credit at first."""
        slots = canvas.ids[..., None].expand(-1, -1, 2)
        return Listed(torch.zeros_like(slots), torch.zeros_like(slots, dtype=torch.float64))

    def fuse(self, view: View, pred: Prediction) -> Prediction:
        """The prediction with credit, for the selection; the step's arg-maxes earn theirs."""
        alpha, beta, gamma = self._constants(view)
        tokens, credit = self._update(view, pred, beta, gamma)  # (B, W, S)
        held, tokens = tokens != FREE, tokens - 1
        logits = pred.logits.gather(-1, tokens.clamp(min=0))
        boost = (1 + credit) ** alpha
        p = torch.where(held, (logits - pred.lse[..., None]).exp(), 0.0)
        extra = p * (boost - 1)
        if pred.law.greedy:
            fused = torch.where(held, logits + boost.log(), -torch.inf)
            first = fused == fused.amax(-1, keepdim=True)
            token = tokens.masked_fill(~first, torch.iinfo(tokens.dtype).max).amin(-1)  # lowest id on ties
            token = torch.where(held.any(-1), token, pred.argmax)
        else:
            token = pred.token
        mine = tokens == token[..., None]
        own = (pred.logits.gather(-1, token[..., None])[..., 0] - pred.lse).exp()  # p of the token
        rest = (extra * ~mine).sum(-1) + torch.where(token == pred.argmax, own * pred.odds, 1 - own)
        odds = rest / (own * torch.where(mine, boost, 1.0).amax(-1))
        return Fused(pred, odds, token)

    def _constants(self, view: View) -> tuple[Tensor | float, Tensor | float, float]:
        if not self.tuning_free:
            return self.alpha, self.beta, self.gamma
        canvas = view.canvas
        free = 1 - canvas.masked.sum(1) / (canvas.length - canvas.start)  # (B,) decoded share
        return free[:, None, None], free[:, None, None], 1.0

    def _update(self, view: View, pred: Prediction, beta: Tensor | float, gamma: float) -> tuple[Tensor, Tensor]:
        """Decay, then credit the arg-max of every candidate. Returns tokens and credits (B, W, S) after the step."""
        listed = view.columns[Listed]
        tokens, credit = map(view.gather, listed)
        live, top = view.live[..., None], pred.argmax[..., None] + 1
        tokens = torch.where(live, tokens, FREE)
        credit = torch.where(live, credit * beta, 0.0)
        if bool((live[..., 0] & ((tokens != top) & (tokens != FREE)).all(-1)).any()):  # no slot for a new token
            tokens, credit = F.pad(tokens, (0, 2)), F.pad(credit, (0, 2))
        same, free = tokens == top, tokens == FREE
        first_free = free & (free.cumsum(-1) == 1)
        hit = live & torch.where(same.any(-1, keepdim=True), same, first_free)
        tokens = torch.where(hit, top, tokens)
        credit = credit + torch.where(hit, (1 + pred.odds)[..., None] ** -gamma, 0.0)
        more, read = tokens.shape[-1] - listed.token.shape[-1], view.cols >= 0
        tables = (F.pad(table, (0, more)) for table in listed)
        view.columns[Listed] = Listed(*map(view.scatter, tables, (tokens, credit), (read, read)))
        return tokens, credit


class Fused(Rescored):
    """A prediction with these odds against its tokens: confidences near one keep their order."""

    def __init__(self, raw: Prediction, odds: Tensor, token: Tensor) -> None:
        super().__init__(raw, 1 / (1 + odds), token)
        self._against = odds

    @property
    def log_confidence(self) -> Tensor:
        """(B, W) resolved where the confidence rounds to one."""
        return -self._against.log1p()
