"""Prediction: what the model says about the columns a step reads. Quantities are computed when somebody asks.

Scores come from the *raw* law, the softmax of the un-noised logits, or from the *filtered* one, after temperature,
top-k and top-p (Dream, arXiv 2508.15487). The mask id has logit -inf before it arrives here, so it is never predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding import noise
from dllm.decoding.canvas import Canvas, Decision
from dllm.decoding.columns import indices
from dllm.errors import DllmError
from dllm.models.transformer import Weights

# Logits handled at once where temporaries of their size are needed: what fits a CPU's cache, or keeps a GPU busy.
CHUNK = {"cpu": 1 << 17}
CHUNK_ELSEWHERE = 1 << 24

NEGLIGIBLE = -1e30  # a forbidden token's logit where 0 * -inf must not be NaN


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
        """Whether the arg-max is taken."""
        return self.temperature == 0

    @property
    def trims(self) -> bool:
        """Whether top-p or top-k cuts the distribution."""
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
        extra: object = None,
        weights: Callable[[], Weights] | None = None,
    ) -> None:
        self.logits = logits  # (B, W, V), float32 at least
        self.cols = cols  # (B, W)
        self.law = law
        self.seed = torch.zeros_like(cols[:, 0]) if seed is None else seed
        self.step = torch.zeros_like(cols[:, 0]) if step is None else step
        self.more = more or (lambda _: None)
        self.extra = extra  # what the inputs slot told of the forward (`Inputs.reduce`)
        self._weights = weights

    # -- the token --------------------------------------------------------------------------------------------------

    @property
    def argmax(self) -> Tensor:
        """(B, W) the most probable token, lowest id on ties."""
        return self._best[0]

    @property
    def token(self) -> Tensor:
        """(B, W) the token that would be committed: the arg-max at temperature 0, else the keyed draw."""
        return self.argmax if self.law.greedy else self._draw[0]

    @property
    def odds(self) -> Tensor:
        """(B, W) odds against `argmax` under the raw law, summed without cancellation."""
        return self._best[-1]

    @property
    def raw(self) -> Prediction:
        """The prediction beneath what a link of the `adjust` chain made of it; itself where none did."""
        return self

    @property
    def free(self) -> Prediction:
        """The prediction before a constraint changed it; itself where none did."""
        return self

    def replaced(self, token: Tensor) -> Tensor:
        """(B, W) the tokens after a link of the `adjust` chain put these in their place; its own, where they go
        together."""
        return token

    def posterior(self, token: Tensor) -> Tensor | None:
        """(B, W) natural log-probabilities of tokens (B, W) given that a constraint is met; None: there is none."""
        return None

    def lawful(self, canvas: Canvas, d: Decision) -> Decision:
        """What may be carried out of a decision on this canvas: all of it, where no constraint speaks."""
        return d

    @property
    def finite(self) -> Tensor:
        """(B,) bool: every column has a softmax. One NaN or +inf among its logits makes all of it NaN."""
        return ~self.odds.isnan().any(1)

    def over(self, logits: Tensor, weights: Weights | None = None) -> Prediction:
        """The same forward with other logits (B, W, V), and attention weights where some are given."""
        return Prediction(
            logits, self.cols, law=self.law, seed=self.seed, step=self.step, more=self.more, extra=self.extra,
            weights=self._weights if weights is None else lambda: weights,
        )  # fmt: skip

    # -- attention ----------------------------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> Weights:
        """Every row of attention weights that this forward computed. Errors: the sampler's needs do not ask for any."""
        if self._weights is None:
            raise DllmError("a sampler reads attention weights that its needs do not ask for: Needs(attention=...)")
        return self._weights()

    @cached_property
    def attention(self) -> Tensor:
        """(B, W, L) of the query at each column of `cols`, over absolute columns; see `Weights`.

        The query of a column stands at its own position, in models with shifted logits too. 0 where the query was not
        fed, or its row not asked for. Columns fed beside the canvas count where they stand (WINO's shadow); where a row
        is fed several times, the copy that answers is read: the conditional one of guidance, LoPA's winner.
        """
        return rows_at(self.weights, self.cols)

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
        first, second = self._top2
        return self.probability_of(first) - self.probability_of(second)

    @property
    def negative_entropy(self) -> Tensor:
        """Sum of p ln p, in nats."""
        return self._filtered[2] if self._uses_filter else self._raw_negative_entropy

    @cached_property
    def gap(self) -> Tensor:
        """Best logit minus second best (Prophet's signal; the softmax normaliser cancels)."""
        first, second = self._top2
        return first - second

    @cached_property
    def probs(self) -> Tensor:
        """(B, W, V) softmax of the raw logits."""
        return self.logits.softmax(-1)

    @cached_property
    def _top2(self) -> tuple[Tensor, ...]:
        """The two highest logits, (B, W) each."""
        first, second = best_two(self.logits.flatten(0, 1), self._best[2].flatten(0, 1))
        return first.view(self.cols.shape), second.view(self.cols.shape)

    @cached_property
    def lse(self) -> Tensor:
        """(B, W) log-sum-exp of the raw logits."""
        top = self.argmax
        return self.logits.gather(-1, top[..., None])[..., 0] + self.odds.log1p()

    def probability_of(self, logit: Tensor) -> Tensor:
        """Raw probability of a token with this logit at the same columns."""
        return (logit - self.lse).exp()

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Raw natural log-probabilities of tokens (B, W, n) at the same columns, without cancellation at the best."""
        best = self.logits.gather(-1, self.argmax[..., None])
        return self.logits.gather(-1, tokens) - best - self.odds.log1p()[..., None]

    def highest(self, k: int) -> Tensor:
        """(B, W, k) the most probable tokens under the raw law, the best first and equals by ascending ids."""
        return highest(self.logits.flatten(0, 1), k, self._best[2].flatten(0, 1)).view(*self.cols.shape, k)

    def chunks(self, *tables: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The logits, and (B, W) tables beside them, flattened and cut so that temporaries stay small."""
        rows = max(1, CHUNK.get(self.logits.device.type, CHUNK_ELSEWHERE) // self.logits.shape[-1])
        return zip(
            torch.split(self.logits.flatten(0, 1), rows), *(torch.split(t.flatten(), rows) for t in tables), strict=True
        )

    def _joined(self, parts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        joined = (torch.cat(p) if len(p) > 1 else p[0] for p in zip(*parts, strict=True))
        return tuple(x.view(*self.cols.shape, *x.shape[1:]) for x in joined)

    @cached_property
    def _best(self) -> tuple[Tensor, ...]:
        """The arg-max, its probability, the peaks (B, W, S) that led to it, and the odds against it summed without
        cancellation."""
        return self._joined(_best_of(z) for (z,) in self.chunks())

    @cached_property
    def _raw(self) -> tuple[Tensor, Tensor]:
        _, best, _, odds = self._best
        if self.law.greedy:
            return best, -odds.log1p()
        log_p = self.logits.gather(-1, self.token[..., None])[..., 0] - self.lse
        return log_p.exp(), log_p

    @cached_property
    def _raw_negative_entropy(self) -> Tensor:
        (expected,) = self._joined(_expected_logit(z) for (z,) in self.chunks())
        return expected - self.lse

    def rescored(self, confidence: Tensor, token: Tensor | None = None) -> Prediction:
        """The same prediction with another confidence (B, W), and perhaps another token, for selection only."""
        return Rescored(self, confidence, token)

    # -- temperature and filters ------------------------------------------------------------------------------------

    @property
    def _uses_filter(self) -> bool:
        return self.law.filtered and (self.law.trims or not self.law.greedy)

    @cached_property
    def _filtered(self) -> tuple[Tensor, ...]:
        return self._draw[1:]

    @cached_property
    def _draw(self) -> tuple[Tensor, ...]:
        """Token, and confidence, margin and negative entropy under the filtered law; all (B, W)."""
        shape = self.cols.shape
        keys = self.seed[:, None].expand(shape), self.step[:, None].expand(shape), self.cols
        return self._joined(draw(z, self.law, *key) for z, *key in self.chunks(*keys))

    def at(self, cols: Tensor) -> Prediction | None:
        """The same forward read at other columns (B, W'); None where the forward did not cover them."""
        return self.more(cols)


def rows_at(weights: Weights, cols: Tensor) -> Tensor:
    """(B, W, L) the rows of attention weights at columns (B, W), 0 where there is none."""
    same = (weights.cols[:, None] == cols[..., None]) & (cols >= 0)[..., None]  # (B, W, R)
    at = same.int().argmax(2)[..., None].expand(-1, -1, weights.table.shape[2])
    return weights.table.gather(1, at).masked_fill(~same.any(2)[..., None], 0.0)


def _best_of(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arg-max, its probability, the peaks of the stretches and the odds against it; (n, V) -> (n,), peaks (n, S)."""
    peaks = stretch_peaks(logits)
    top = first_argmax(logits, peaks)
    probs = logits.softmax(-1)
    best = probs.gather(-1, top)
    rest = probs.scatter_(-1, top, 0.0).sum(-1)
    return top[:, 0], best[:, 0], peaks, rest / best[:, 0]


STRETCH = 512  # tokens


def stretch_peaks(logits: Tensor) -> Tensor:
    """(n, S) the maximum of each whole stretch of the vocabulary. On a CPU `amax` is vectorised and `argmax` and `topk`
    are not: they then look into one stretch only. Elsewhere, and for small vocabularies, S = 0."""
    if logits.device.type != "cpu" or logits.shape[1] < 4 * STRETCH:
        return logits[:, :0]
    return _stretches(logits).amax(-1)


def _stretches(logits: Tensor) -> Tensor:
    """(n, S, STRETCH); what is left behind the last whole stretch is not in it."""
    return logits[:, : logits.shape[1] // STRETCH * STRETCH].view(len(logits), -1, STRETCH)


def _highest_stretch(logits: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor]:
    """The first stretch that holds the highest peak (n, 1), and its logits (n, STRETCH)."""
    at = peaks.argmax(-1, keepdim=True)
    return at, _stretches(logits).gather(1, at[..., None].expand(-1, -1, STRETCH))[:, 0]


def first_argmax(logits: Tensor, peaks: Tensor | None = None) -> Tensor:
    """(n, 1) arg-max of (n, V), lowest id on ties."""
    peaks = stretch_peaks(logits) if peaks is None else peaks
    if not peaks.shape[1]:
        return logits.argmax(-1, keepdim=True)
    at, inner = _highest_stretch(logits, peaks)
    found = at * STRETCH + inner.argmax(-1, keepdim=True)
    whole = peaks.shape[1] * STRETCH
    if whole == logits.shape[1]:
        return found
    tail = logits[:, whole:].argmax(-1, keepdim=True) + whole
    better = logits.gather(1, tail) > peaks.gather(1, at)
    return torch.where(better | logits.gather(1, tail).isnan(), tail, found)


def best_two(logits: Tensor, peaks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The two highest values of (n, V), (n,) each: the second is in the stretch of the first, the peak of another
    stretch, or behind the last whole one."""
    peaks = stretch_peaks(logits) if peaks is None else peaks
    if peaks.shape[1]:
        at, inner = _highest_stretch(logits, peaks)
        others = peaks.scatter(1, at, -torch.inf).amax(-1, keepdim=True)
        logits = torch.cat([inner.topk(2, dim=-1).values, others, logits[:, peaks.shape[1] * STRETCH :]], 1)
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    return first, second


def highest(logits: Tensor, k: int, peaks: Tensor | None = None) -> Tensor:
    """(n, k) ids of the k highest of (n, V), the best first, equals by ascending ids: they are in the k stretches with
    the highest peaks, or behind the last whole one."""
    peaks, ids = stretch_peaks(logits) if peaks is None else peaks, None
    if not k:
        return torch.zeros(len(logits), 0, dtype=torch.long, device=logits.device)
    if peaks.shape[1] > k:
        inside, whole = torch.arange(STRETCH, device=logits.device), peaks.shape[1] * STRETCH
        at = peaks.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values
        rest = torch.arange(whole, logits.shape[1], device=logits.device).expand(len(logits), -1)
        ids = torch.cat([(at[..., None] * STRETCH + inside).flatten(1), rest], 1)  # (n, k STRETCH + V % STRETCH)
        logits = logits.gather(1, ids)
    least = logits.topk(k, dim=-1).values[:, -1:]
    above, equal = logits > least, logits == least
    kept = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    found = indices(kept, k).clamp(min=0)  # by ids
    found = found.gather(1, logits.gather(1, found).sort(dim=-1, descending=True, stable=True).indices)
    return found if ids is None else ids.gather(1, found)


def _expected_logit(logits: Tensor) -> tuple[Tensor]:
    """Sum of p z; (n, V) -> (n,)."""
    return (torch.linalg.vecdot(logits.softmax(-1), logits.clamp(min=NEGLIGIBLE)),)


class Rescored(Prediction):
    """A prediction whose confidences were replaced by an `adjust`; every other score is that of the one beneath it."""

    def __init__(self, raw: Prediction, confidence: Tensor, token: Tensor | None = None) -> None:
        super().__init__(
            raw.logits, raw.cols, law=raw.law, seed=raw.seed, step=raw.step, more=raw.more, extra=raw.extra,
            weights=lambda: raw.weights,
        )  # fmt: skip
        self._beneath, self._confidence = raw, confidence
        self._token = raw.token if token is None else raw.replaced(token)

    @property
    def raw(self) -> Prediction:
        """The prediction whose confidences were replaced."""
        return self._beneath

    @property
    def token(self) -> Tensor:
        """(B, W) the token that would be committed."""
        return self._token

    @property
    def confidence(self) -> Tensor:
        """(B, W) the confidence that was put in place."""
        return self._confidence

    @property
    def log_confidence(self) -> Tensor:
        """(B, W) its logarithm."""
        return self._confidence.log()

    @property
    def margin(self) -> Tensor:
        """(B, W) as it was."""
        return self._beneath.margin

    @property
    def negative_entropy(self) -> Tensor:
        """(B, W) as it was."""
        return self._beneath.negative_entropy


def draw(
    logits: Tensor, law: Law, seed: Tensor, step: Tensor, position: Tensor, token: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample one token a row from logits (n, V) under `law`, keyed by (seed, step, position), each (n,).

    Temperature 0 takes the arg-max of the filtered distribution; a `token` (n,) that is given stands. Returns the
    token, and its confidence, the margin and the negative entropy of the filtered distribution (all (n,)). One uniform
    a row goes through the exact inverse CDF.
    """
    probs = (logits / law.temperature if law.temperature > 0 else logits).softmax(-1)
    if law.trims:
        kept = support(probs, law)
        probs = probs.mul_(kept)
        probs /= probs.sum(-1, keepdim=True)
    if token is not None:
        pass
    elif law.greedy:
        token = probs.argmax(-1)
    elif law.gumbel:
        token = (probs.double().log() + noise.gumbel_rows(seed, step, position, logits.shape[-1])).argmax(-1)
    else:
        token = inverse_cdf(probs, noise.uniform(seed, step, position))
    confidence = probs.gather(-1, token[:, None])[:, 0]
    if not law.filtered:  # the raw law reads neither
        return token, confidence, confidence, confidence
    first, second = probs.topk(2, dim=-1).values.unbind(-1)
    return token, confidence, first - second, -torch.special.entr(probs).sum(-1)


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """(n,) the token whose interval of the cumulative distribution holds u (n,); probs (n, V), not necessarily summing
    to one exactly. Two levels, so that only one stretch of the vocabulary is accumulated token by token."""
    n, size = probs.shape
    width = 512
    stretches = F.pad(probs, (0, -size % width)).view(n, -1, width)
    cdf = stretches.sum(-1, dtype=torch.float64).cumsum(-1)  # (n, V / width)
    target = (u * cdf[:, -1])[:, None]
    at = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[1] - 1)
    before = torch.where(at > 0, cdf.gather(1, (at - 1).clamp(min=0)), 0.0)
    inner = stretches.gather(1, at[..., None].expand(-1, -1, width))[:, 0].double().cumsum(-1)
    within = torch.searchsorted(inner, target - before, right=True)
    last = (inner < inner[:, -1:]).sum(-1, keepdim=True)  # the last token of the stretch with any mass
    return (at * width + torch.minimum(within, last))[:, 0].clamp_(max=size - 1)


def support(probs: Tensor, law: Law) -> Tensor:
    """(n, V) bool: the tokens that top-p and top-k leave. The first is always kept, and so is the one that crosses
    top-p. Ties at the boundary go to the lowest id."""
    kept = torch.ones_like(probs, dtype=torch.bool)
    size = probs.shape[-1]
    if law.top_k is not None and law.top_k < size:
        kept = torch.zeros_like(kept).scatter_(-1, probs.topk(law.top_k, dim=-1).indices, True)
    if law.top_p is not None and law.top_p < 1:
        kept &= nucleus(probs, law.top_p)
    return kept


DIGIT = 15  # bits of a key that one pass tells apart
SPARE = 64  # bins for what a pass need not tell apart; on a GPU all of it in one would have to queue
UNIT = 2.0**62  # masses are whole numbers of its inverse, at least one: their sums do not depend on the order


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """(n, V) bool: the smallest set of most probable tokens whose mass exceeds top_p.

    No sort, and no shape that depends on the values: a radix selection. The bits of a probability are an order-
    preserving key. Each pass sums masses by the next digit of it, among the tokens with the digits found so far, and
    finds the digit in which the mass crosses top_p; the last one leaves the least likely token that stays.
    """
    kind, digits = (torch.int64, 5) if probs.dtype == torch.float64 else (torch.int32, 2)
    key = probs.view(kind)  # (n, V), higher is likelier
    mass = (probs * UNIT).ceil_().long()
    room = torch.full_like(mass[:, :1], int(top_p * UNIT))  # what may still stand before a token
    least = torch.zeros_like(key[:, :1])
    for shift in range(DIGIT * (digits - 1), -1, -DIGIT):
        at = (key >> shift) & ((1 << DIGIT) - 1)
        if shift + DIGIT < DIGIT * digits:
            alike = key >> (shift + DIGIT) == least >> (shift + DIGIT)
            at = torch.where(alike, at, (at & (SPARE - 1)) | (1 << DIGIT))
        bins = torch.zeros(len(key), (1 << DIGIT) + SPARE, dtype=torch.long, device=key.device)
        digit, room = _crossed(bins.scatter_add_(1, at.long(), mass)[:, : 1 << DIGIT], room)
        least = least | (digit << shift).to(kind)
    least = least.clamp(min=1)  # a token without mass never stays
    ties = room // (least.view(probs.dtype) * UNIT).ceil().long().clamp(min=1) + 1  # as many equals stay
    equal = key == least
    return (key > least) | (equal & (equal.cumsum(1) <= ties))


def _crossed(bins: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """The bin (n, 1) in which the mass of the higher ones and its own exceeds `room` (n, 1), the lowest where none
    does; and what the higher ones leave of the room. bins (n, d) int64."""
    mass = bins.flip(1).cumsum(1)
    at = torch.searchsorted(mass, room, right=True).clamp_(max=mass.shape[1] - 1)
    before = torch.where(at > 0, mass.gather(1, (at - 1).clamp(min=0)), 0)
    return mass.shape[1] - 1 - at, room - before
