"""CreditDecoding: a token that was the arg-max for several steps earns credit on its logit (arXiv 2510.06133)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.decoding.prediction import Prediction, Rescored
from dllm.samplers import OFF, Bundle, Canvas, Context, Method, Presets, Sized, View, param
from dllm.samplers.threshold import Threshold

FREE = 0  # an unused slot; token ids are stored plus one, so that new slots may be zeros


class Listed(NamedTuple):
    """Per-column leaves: a list of tokens and their credits, (B, L, S)."""

    token: Tensor  # id + 1; FREE: an unused slot
    value: Tensor


@dataclass(frozen=True)
class Credit(Method):
    """Each step K <- beta K, then K[arg-max] += p^gamma; columns are chosen by softmax(z + alpha ln(1 + K)).

    Only tokens that were once the arg-max of their column have credit, so K is a short list for each column and the
    fused softmax follows from the log-sum-exp by one correction a listed token: exact, no (W, V) table. The list has a
    place for each step that a column may stay masked, or for each step after which a credit is too small to change a
    float64 (120 at the defaults and 126 464 tokens), whichever are fewer. With beta = 1, and in the variant without
    tuning, a sampler that takes tokens back may keep a column masked for longer than 4 `max_new_tokens` + 64 steps:
    then the least credit goes.

    The fused prediction reaches the selection alone; exits and revisions see the raw one. A committed or re-masked
    column loses its credit. At temperature > 0 the token is the model's draw, and credit only changes its confidence.
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
        longest = 4 * context.max_new_tokens + 64

        def first(canvas: Canvas, columns: int, steps: int | None) -> Listed:
            """No token has credit at first."""
            bounds = (steps, self.lasting(context.vocab_size))
            slots = min((n for n in bounds if n is not None), default=longest)
            token = canvas.ids.new_zeros((*canvas.ids.shape, slots))
            return Listed(token, token.double())

        select = Threshold(tau=self.tau, tie=self.tie).select
        return Bundle(adjust=(self.fuse,), columns=Sized(first), assumes={"select": select})

    def least(self, vocabulary: int) -> float:
        """A credit below it changes nothing: neither 1 + K nor, some steps later, K + p^gamma, as an arg-max has p of
        1 / vocabulary at least."""
        return float(2.0**-56 * vocabulary ** -(1.0 if self.tuning_free else self.gamma))

    def lasting(self, vocabulary: int) -> int | None:
        """Steps after which a credit is below `least`; None where credit need not fade."""
        if self.tuning_free or self.beta == 1:
            return None
        if not self.beta:
            return 1
        return 1 + math.ceil(math.log(self.least(vocabulary) * (1 - self.beta), self.beta))

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
        tokens, credit = map(view.gather, view.columns[Listed])
        live, top = view.live[..., None], pred.argmax[..., None] + 1
        credit = torch.where(live, credit * beta, 0.0)
        held = credit >= self.least(pred.logits.shape[-1])
        tokens, credit = torch.where(held, tokens, FREE), torch.where(held, credit, 0.0)
        same = tokens == top
        slots = torch.arange(tokens.shape[-1], device=tokens.device)
        place = slots == credit.argmin(-1, keepdim=True)  # a free one, the first
        hit = live & torch.where(same.any(-1, keepdim=True), same, place)
        tokens = torch.where(hit, top, tokens)
        credit = torch.where(hit & ~same, 0.0, credit) + torch.where(hit, (1 + pred.odds)[..., None] ** -gamma, 0.0)
        read = view.cols >= 0
        view.columns[Listed] = Listed(*map(view.scatter, view.columns[Listed], (tokens, credit), (read, read)))
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
