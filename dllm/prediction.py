"""Prediction: what the model says about the columns a step reads. Quantities are computed when somebody asks.

Scores come from the *raw* law, the softmax of the un-noised logits, or from the *filtered* one, after temperature, top-k
and top-p (Dream, arXiv 2508.15487). The mask id has logit -inf before it arrives here, so it is never predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dllm import noise

CHUNK = 1 << 20  # logits handled at once when a law needs temporaries of their size


@dataclass(frozen=True)
class Law:
    """How a token is drawn from logits, and from which distribution its confidence is read."""

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    filtered: bool = False
    gumbel: bool = False  # full-vocabulary Gumbel noise in place of one uniform a position

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def trims(self) -> bool:
        return self.top_p is not None or self.top_k is not None


class Prediction:
    """The model's answer at `cols` (B, W); padding columns (-1) hold numbers that nobody may read.

    `more(cols)` gives a Prediction for other columns of the same forward, or None where it did not cover them.
    """

    def __init__(
        self,
        logits: Tensor,
        cols: Tensor,
        *,
        law: Law = Law(),
        seed: Tensor | None = None,
        step: Tensor | None = None,
        more: Callable[[Tensor], Prediction | None] | None = None,
    ) -> None:
        self.logits = logits  # (B, W, V), float32 at least
        self.cols = cols  # (B, W)
        self.law = law
        self.seed = torch.zeros_like(cols[:, 0]) if seed is None else seed
        self.step = torch.zeros_like(cols[:, 0]) if step is None else step
        self.more = more or (lambda _: None)

    # -- the token --------------------------------------------------------------------------------------------------

    @cached_property
    def argmax(self) -> Tensor:
        """(B, W) the most probable token, lowest id on ties."""
        return self.logits.argmax(-1)

    @property
    def token(self) -> Tensor:
        """(B, W) the token that would be committed: the arg-max at temperature 0, else the keyed draw."""
        return self.argmax if self.law.greedy else self._draw[0]

    # -- scores: all (B, W), higher means surer ---------------------------------------------------------------------

    @property
    def confidence(self) -> Tensor:
        """Probability of `token`."""
        return self._filtered[0] if self._uses_filter else self._raw[0]

    @property
    def log_confidence(self) -> Tensor:
        """Same order as `confidence`, still resolved where the probability rounds to one."""
        return self._filtered[0].log() if self._uses_filter else self._raw[1]

    @property
    def margin(self) -> Tensor:
        """Probability of the best token minus that of the second."""
        if self._uses_filter:
            return self._filtered[1]
        first, second = self._top2.unbind(-1)
        return self.probability_of(first) - self.probability_of(second)

    @property
    def negative_entropy(self) -> Tensor:
        """Sum of p ln p, in nats."""
        return self._filtered[2] if self._uses_filter else self._raw_negative_entropy

    @cached_property
    def gap(self) -> Tensor:
        """Best logit minus second best (Prophet's signal; the softmax normaliser cancels)."""
        first, second = self._top2.unbind(-1)
        return first - second

    @cached_property
    def probs(self) -> Tensor:
        """(B, W, V) softmax of the raw logits."""
        return self.logits.softmax(-1)

    @cached_property
    def _top2(self) -> Tensor:  # (B, W, 2) logits
        return self.logits.topk(2, dim=-1).values

    @cached_property
    def lse(self) -> Tensor:
        """(B, W) log-sum-exp of the raw logits."""
        top = self.argmax
        return self.logits.gather(-1, top[..., None])[..., 0] + self._best[1].log1p()

    def probability_of(self, logit: Tensor) -> Tensor:
        """Raw probability of a token with this logit at the same columns."""
        return (logit - self.lse).exp()

    @cached_property
    def _best(self) -> tuple[Tensor, Tensor]:
        """Probability of the arg-max, and the odds against it summed without cancellation."""
        top = self.argmax[..., None]
        probs = self.probs
        best = probs.gather(-1, top)
        probs.scatter_(-1, top, 0.0)
        rest = probs.sum(-1)
        probs.scatter_(-1, top, best)
        return best[..., 0], rest / best[..., 0]

    @cached_property
    def _raw(self) -> tuple[Tensor, Tensor]:
        best, odds = self._best
        if self.law.greedy:
            return best, -odds.log1p()
        log_p = self.logits.gather(-1, self.token[..., None])[..., 0] - self.lse
        return log_p.exp(), log_p

    @cached_property
    def _raw_negative_entropy(self) -> Tensor:
        probs = self.probs.flatten(0, 1)
        rows = max(1, CHUNK // probs.shape[-1])
        sums = [-torch.special.entr(chunk).sum(-1) for chunk in probs.split(rows)]
        return torch.cat(sums).view(self.cols.shape)

    def rescored(self, confidence: Tensor, token: Tensor | None = None) -> Prediction:
        """The same prediction with another confidence (B, W), and perhaps another token, for selection only."""
        return Rescored(self, confidence, token)

    # -- temperature and filters ------------------------------------------------------------------------------------

    @property
    def _uses_filter(self) -> bool:
        return self.law.filtered and (self.law.trims or not self.law.greedy)

    @cached_property
    def _filtered(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._draw[1], self._draw[2], self._draw[3]

    @cached_property
    def _draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token, and confidence, margin and negative entropy under the filtered law; all (B, W)."""
        shape, size = self.cols.shape, self.logits.shape[-1]
        seed, step = (key[:, None].expand(shape).flatten() for key in (self.seed, self.step))
        cols, logits = self.cols.flatten(), self.logits.flatten(0, 1)
        rows = max(1, CHUNK // size)
        parts = [
            draw(chunk, self.law, *keys)
            for chunk, *keys in zip(logits.split(rows), seed.split(rows), step.split(rows), cols.split(rows), strict=True)
        ]
        token, confidence, margin, negative_entropy = (torch.cat(p).view(shape) for p in zip(*parts, strict=True))
        return token, confidence, margin, negative_entropy

    def at(self, cols: Tensor) -> Prediction | None:
        """The same forward read at other columns (B, W'); None where the forward did not cover them."""
        return self.more(cols)


class Rescored(Prediction):
    """A prediction whose confidences were replaced by an `adjust`; every other quantity is the raw one's."""

    def __init__(self, raw: Prediction, confidence: Tensor, token: Tensor | None = None) -> None:
        super().__init__(raw.logits, raw.cols, law=raw.law, seed=raw.seed, step=raw.step, more=raw.more)
        self.raw = raw
        self._confidence, self._token = confidence, raw.token if token is None else token

    @property
    def token(self) -> Tensor:
        return self._token

    @property
    def confidence(self) -> Tensor:
        return self._confidence

    @property
    def log_confidence(self) -> Tensor:
        return self._confidence.log()


def draw(logits: Tensor, law: Law, seed: Tensor, step: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample one token a row from logits (n, V) under `law`, keyed by (seed, step, position), each (n,).

    Temperature 0 takes the arg-max of the filtered distribution. Returns token, and its confidence, the margin and the
    negative entropy of the filtered distribution (all (n,)). One uniform a row goes through the exact inverse CDF.
    """
    if law.temperature > 0:
        logits = logits / law.temperature
    probs, ids = _support(logits.softmax(-1), law)
    if law.greedy:
        choice = probs.argmax(-1, keepdim=True)
    elif law.gumbel:
        g = noise.gumbel_rows(seed, step, position, logits.shape[-1])
        choice = (probs.double().log() + (g if ids is None else g.gather(-1, ids))).argmax(-1, keepdim=True)
    else:
        u = noise.uniform(seed, step, position)[:, None]
        cdf = probs.double().cumsum(-1)
        choice = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp_(max=probs.shape[-1] - 1)
    top2 = probs.topk(min(2, probs.shape[-1]), dim=-1).values
    margin = top2[:, 0] - top2[:, 1] if top2.shape[-1] == 2 else top2[:, 0]
    token = choice if ids is None else ids.gather(-1, choice)
    return token[:, 0], probs.gather(-1, choice)[:, 0], margin, -torch.special.entr(probs).sum(-1)


def _support(probs: Tensor, law: Law) -> tuple[Tensor, Tensor | None]:
    """Keep the tokens that top-p, then top-k allow: renormalised (n, K) probabilities and their ids (None: all).

    The nucleus is found by growing a partial top-k: a full sort of the vocabulary is never needed.
    """
    if not law.trims:
        return probs, None
    size = probs.shape[-1]
    k = min(law.top_k or size, size)
    if law.top_p is None or law.top_p >= 1:
        values, ids = probs.topk(k, dim=-1)
        return values / values.sum(-1, keepdim=True), ids
    width = min(64, size)
    while True:
        values, ids = probs.topk(width, dim=-1)
        mass = values.double().cumsum(-1)
        if width >= min(k, size) or bool((mass[:, -1] > law.top_p).all()):
            break
        width = min(4 * width, size)
    kept = (mass - values) <= law.top_p  # the token that crosses top_p stays, and so does the first
    kept[:, 0] = True
    kept[:, k:] = False
    values = values * kept
    return values / values.sum(-1, keepdim=True), ids
