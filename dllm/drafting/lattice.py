"""The lattice of a one-forward draft: per slot, the few most probable tokens with their log-probabilities.

All ids are the verifier's. Log-probabilities are normalised over the whole vocabulary after bans and before pruning,
so that a column is honest about the mass it does not list.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dllm.drafting.proposal import sent
from dllm.errors import DllmError

Column = list[tuple[int, float]]


class DraftFailure(RuntimeError):
    """The drafter's logits are unusable (NaN, +inf): the round falls back to plain decoding and is counted."""


@dataclass(frozen=True)
class Lattice:
    """k slots of up to M candidates.

    tokens (k, M) int64, -1 padded; logp (k, M) float32, -inf padded, descending; argmax (k,) the raw argmax draft; all
    on the host. `start` the absolute position of slot 0; rows (k, V) the full log-probabilities, where the model made
    them, when factorised sampling needs them.
    """

    tokens: Tensor
    logp: Tensor
    argmax: Tensor
    start: int
    rows: Tensor | None = None

    @property
    def k(self) -> int:
        """Slots."""
        return len(self.argmax)

    @cached_property
    def columns(self) -> list[Column]:
        """Plain lists: path search is a few thousand scalar operations, where tensors cost more than they save."""
        return [
            [(t, lp) for t, lp in zip(ts, lps, strict=True) if t >= 0]
            for ts, lps in zip(self.tokens.tolist(), self.logp.tolist(), strict=True)
        ]

    @cached_property
    def confidence(self) -> list[float]:
        """Probability of the best candidate of each slot."""
        return self.logp[:, 0].exp().tolist() if self.k else []

    def check(self) -> None:
        """Raises DllmError where the columns are no distributions."""
        mass = self.logp.exp().sum(-1)  # (k,); NaN compares to nothing
        if not bool((torch.isfinite(self.logp[:, :1]).all(-1) & (mass <= 1.01)).all()):
            raise DllmError("every slot of a lattice holds log-probabilities, the best finite, together at most one")

    def suffix(self, n: int) -> Lattice:
        """The slots from `n` on: what is left after `n` tokens were emitted.

        The lattice is a function of the text before its first slot alone, hence any search over the rest is a legal
        next draft: deterministic paths are point masses, and fresh draws from these rows have these rows as their law.
        """
        return self._cut(slice(n, None), self.start + n)

    def head(self, n: int) -> Lattice:
        """The first `n` slots."""
        return self._cut(slice(n), self.start)

    def _cut(self, slots: slice, start: int) -> Lattice:
        rows = None if self.rows is None else self.rows[slots]
        return Lattice(self.tokens[slots], self.logp[slots], self.argmax[slots], start, rows)

    def first_eos(self, eos: Iterable[int]) -> int:
        """L_gen of DiffuSpec: index of the first end token in the raw argmax draft, k if there is none."""
        eos = set(eos)
        return next((i for i, t in enumerate(self.argmax.tolist()) if t in eos), self.k)


def build(
    logits: Tensor,
    start: int,
    *,
    tau_mass: float = 0.8,
    m_max: int = 15,
    keep: Iterable[int] = (),
    with_rows: bool = False,
) -> Lattice:
    """Prune logits (k, V) to a lattice (DiffuSpec, arXiv 2510.02358, section 3.2; defaults are the paper's).

    Per slot: the smallest probability-sorted prefix with mass >= `tau_mass`, at most `m_max` tokens, plus every id of
    `keep` (the end tokens) with its true log-probability. A slot with nothing but -inf ends the lattice.
    Raises DraftFailure on NaN or +inf.
    """
    if not 0 < tau_mass <= 1 or m_max < 1:
        raise DllmError(f"tau_mass must lie in (0, 1] and m_max be at least 1, got {tau_mass} and {m_max}")
    full = torch.log_softmax(logits.float(), -1)  # (k, V)
    table = _pruned(logits.float(), full, tau_mass, m_max, keep).cpu()  # the one wait for a draft
    if bool(table[:, 0].any()):
        raise DraftFailure("the drafter returned NaN or infinite logits")
    table = table[: next((i for i, empty in enumerate(table[:, 1].tolist()) if empty), len(table))]
    tokens, logp = table[:, 3:].chunk(2, 1)
    width = max(1, int((tokens >= 0).sum(-1).max())) if len(table) else 1
    rows = full[: len(table)] if with_rows else None
    return Lattice(tokens[:, :width].long(), logp[:, :width], table[:, 2].long(), start, rows)


def _pruned(logits: Tensor, full: Tensor, tau_mass: float, m_max: int, keep: Iterable[int]) -> Tensor:
    """All that the host is told of logits and log-probabilities (k, V): (k, 3 + 2 M) float32, which holds ids up to
    2^24. Per slot: unusable, without a candidate, arg-max, then M tokens and their log-probabilities."""
    vocab, low = full.shape[1], float("-inf")
    logp, tokens = full.topk(min(m_max, vocab), -1)  # (k, M)
    mass = logp.exp().cumsum(-1)
    kept = (mass - logp.exp() < tau_mass) & (logp > low)
    kept[:, :1] = True
    logp, tokens = logp.masked_fill(~kept, low), tokens.masked_fill(~kept, -1)
    tokens, logp = _keep(tokens, logp, full, sorted({t for t in keep if 0 <= t < vocab}))
    best = logits.amax(-1, keepdim=True)
    unusable = logits.isnan().any(-1, keepdim=True) | (best == -low)
    return torch.cat([unusable, best == low, full.argmax(-1, keepdim=True), tokens, logp], 1)


def _keep(tokens: Tensor, logp: Tensor, full: Tensor, keep: list[int]) -> tuple[Tensor, Tensor]:
    """Append the ids of `keep` that pruning dropped; sorting moves the padding behind them."""
    if not keep or not len(tokens):
        return tokens, logp
    ids = sent(keep, tokens.device).expand(len(tokens), -1)
    extra = full.gather(1, ids)
    present = (tokens[:, :, None] == ids[:, None, :]).any(1) | (extra == float("-inf"))
    tokens = torch.cat([tokens, ids.masked_fill(present, -1)], 1)
    logp = torch.cat([logp, extra.masked_fill(present, float("-inf"))], 1)
    logp, order = logp.sort(dim=-1, descending=True, stable=True)
    return tokens.gather(1, order), logp
