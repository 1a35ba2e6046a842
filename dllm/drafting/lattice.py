"""The lattice of a one-forward draft: per slot, the few most probable tokens with their log-probabilities.

All ids are the verifier's. Log-probabilities are normalised over the whole vocabulary after bans and before pruning,
so that a column is honest about the mass it does not list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from dllm.decoding.constants import constant
from dllm.drafting.pairs import Names, Pairs, PairScores, before_of
from dllm.drafting.proposal import Proposal, Spread, drawn, sent
from dllm.errors import DllmError

Column = list[tuple[int, float]]


class DraftFailure(RuntimeError):
    """The drafter's logits are unusable (NaN, +inf): the round falls back to plain decoding and is counted."""


@dataclass(frozen=True)
class Lattice:
    """k slots of up to M candidates.

    tokens (k, M) int64, -1 padded; logp (k, M) float32, -inf padded, descending; argmax (k,) the raw argmax draft; all
    on the host. `start` the absolute position of slot 0; rows (k, V) the full log-probabilities, where the model made
    them, when factorised sampling needs them; draws (k, n) of these rows, see `draws`, on the host: what a search would
    draw of a new lattice, made where the rows are; pairs what neighbours say of each other, None: nothing.
    """

    tokens: Tensor
    logp: Tensor
    argmax: Tensor
    start: int
    rows: Tensor | None = None
    draws: Tensor | None = None
    pairs: Pairs | None = None

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

    @cached_property
    def spread(self) -> list[Spread]:
        """How sure each slot is; the mass that it does not list counts as one more candidate."""
        logp = self.logp.double().numpy()
        prob = np.exp(logp)
        tail = np.clip(1 - prob.sum(-1, keepdims=True), 1e-9, 1)
        entropy = -(prob * np.maximum(logp, -99)).sum(-1) - (tail * np.log(tail))[:, 0]
        second = np.log(tail)[:, 0] if logp.shape[1] < 2 else np.where(prob[:, 1] > 0, logp[:, 1], np.log(tail)[:, 0])
        return [Spread(*both) for both in np.stack([logp[:, 0] - second, entropy], 1).tolist()]

    def marked(self, proposal: Proposal) -> Proposal:
        """A proposal of these candidates that says how sure the slot of each node is."""
        return replace(proposal, spread=tuple(self.spread[depth - 1] for depth in proposal.depths))

    @property
    def law(self) -> tuple[Tensor, Tensor | None]:
        """Probabilities to draw from, (k, M), where the model made them, and their ids (None = the vocabulary)."""
        if self.rows is None:
            return torch.softmax(self.logp, -1), self.tokens
        return torch.softmax(self.rows, -1), None

    def draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """(k, n) tokens of every slot's law, see `draws`: those that came with the lattice, or new ones."""
        if self.draws is not None and self.draws.shape[1] == n:
            return self.draws
        prob, index = self.law
        found = draws(prob, sent(uniforms(self.k, n, generator), prob.device))
        return (found if index is None else index.gather(1, found.clamp_min(0)).where(found >= 0, -1)).cpu()

    def check(self) -> None:
        """Raises DllmError where the columns are no distributions."""
        mass = self.logp.exp().sum(-1)  # (k,); NaN compares to nothing
        if not bool((torch.isfinite(self.logp[:, :1]).all(-1) & (mass <= 1.01)).all()):
            raise DllmError("every slot of a lattice holds log-probabilities, the best finite, together at most one")
        if self.pairs is not None:
            self.pairs.check(self.tokens)

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
        pairs = None if self.pairs is None else self.pairs.cut(slots)
        return Lattice(self.tokens[slots], self.logp[slots], self.argmax[slots], start, rows, pairs=pairs)

    def first_eos(self, eos: Iterable[int]) -> int:
        """L_gen of DiffuSpec: index of the first end token in the raw argmax draft, k if there is none."""
        eos = set(eos)
        return next((i for i, t in enumerate(self.argmax.tolist()) if t in eos), self.k)


def uniforms(k: int, n: int, generator: torch.Generator | None) -> Tensor:
    """(k, n) float64 on the host."""
    return torch.rand(k, n, generator=generator, dtype=torch.float64)


def draws(prob: Tensor, u: Tensor) -> Tensor:
    """n tokens of each of the rows (k, V) at uniforms (k, n), without a question: (k, n) int64. They are independent,
    but those of the first row are drawn without replacement, -1 where nothing is left."""
    found = drawn(prob, u)
    return found if u.shape[1] == 1 else torch.cat([without(prob[:1], u[:1]), found[1:]])


def without(prob: Tensor, u: Tensor) -> Tensor:
    """b tokens of each of the rows (n, V) at uniforms (n, b), drawn without replacement and without a question: (n, b)
    int64, -1 where nothing is left."""
    left, found = prob.double(), list[Tensor]()
    for j in range(u.shape[1]):
        token = drawn(left, u[:, j : j + 1])
        found.append(token.masked_fill(left.sum(-1, keepdim=True) <= 0, -1))
        left = left.scatter(1, token, 0.0)
    return torch.cat(found, 1)


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
    table, rows = pruned(logits, tau_mass, m_max, keep)
    return listed(table.cpu(), rows if with_rows else None, start)


def pruned(
    logits: Tensor,
    tau_mass: float,
    m_max: int,
    keep: Iterable[int],
    u: Tensor | None = None,
    also: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All that the host is told of logits (k, V), without a question, and the log-probabilities (k, V).

    (k, 3 + n + 2 M) float32, which holds ids up to 2^24. Per slot: unusable, without a candidate, arg-max, the draws at
    uniforms u (k, n), then M tokens and their log-probabilities. Beside the ids of `keep` each slot keeps its one of
    `also` (k,).
    """
    if not 0 < tau_mass <= 1 or m_max < 1:
        raise DllmError(f"tau_mass must lie in (0, 1] and m_max be at least 1, got {tau_mass} and {m_max}")
    logits = logits.float()
    full = torch.log_softmax(logits, -1)
    vocab, low = full.shape[1], float("-inf")
    logp, tokens = full.topk(min(m_max, vocab), -1)  # (k, M)
    mass = logp.exp().cumsum(-1)
    kept = (mass - logp.exp() < tau_mass) & (logp > low)
    kept[:, :1] = True
    logp, tokens = logp.masked_fill(~kept, low), tokens.masked_fill(~kept, -1)
    kept_ids = tuple(sorted({t for t in keep if 0 <= t < vocab}))
    extra = [constant(kept_ids, tokens.device).expand(len(tokens), -1)] if kept_ids else []
    for ids in extra if also is None else [*extra, also[:, None]]:
        tokens, logp = _keep(tokens, logp, full, ids)
    best = logits.amax(-1, keepdim=True)
    unusable = logits.isnan().any(-1, keepdim=True) | (best == -low)
    some = [] if u is None else [draws(torch.softmax(full, -1), u)]
    return torch.cat([unusable, best == low, full.argmax(-1, keepdim=True), *some, tokens, logp], 1), full


def renamed(table: Tensor, n: int, name: Names) -> Tensor:
    """A table of `pruned` with n draws whose ids have other names; -1 is none."""
    end = 3 + n + (table.shape[1] - 3 - n) // 2
    return torch.cat([table[:, :2], name(table[:, 2:end].long()).to(table), table[:, end:]], 1)


def paired(
    table: Tensor,
    n: int,
    logits: Tensor,
    pairs: PairScores,
    warp: Callable[[Tensor], Tensor] | None,
    named: Names | None = None,
) -> Tensor:
    """What a head says of neighbours in a table of `pruned` with n draws, of logits (k, V) under `warp`: the token
    before the draft and M^2 log-probabilities, which stand behind the table."""
    columns = table[:, 3 + n :].chunk(2, 1)[0].long()
    logq = pairs.table(columns, logits, warp, named).flatten(1)
    return torch.cat([pairs.anchor.expand(len(table), 1).to(table), logq], 1)


def listed(table: Tensor, rows: Tensor | None, start: int, n: int = 0, pairs: bool = False) -> Lattice:
    """The lattice of a table of `pruned` with n draws, with `paired` behind it or not, on the host.

    Raises DraftFailure on NaN or +inf.
    """
    if bool(table[:, 0].any()):
        raise DraftFailure("the drafter returned NaN or infinite logits")
    table = table[: next((i for i, empty in enumerate(table[:, 1].tolist()) if empty), len(table))]
    some = table[:, 3 : 3 + n].long() if n else None
    rest = table[:, 3 + n :]
    m = isqrt(rest.shape[1]) - 1 if pairs else rest.shape[1] // 2  # 2 M + 1 + M^2, or 2 M
    tokens, logp = rest[:, :m].long(), rest[:, m : 2 * m]
    width = max(1, int((tokens >= 0).sum(-1).max())) if len(table) else 1
    tokens, logp = tokens[:, :width], logp[:, :width]
    found = None
    if pairs:
        logq = rest[:, 2 * m + 1 :].reshape(-1, m, m)[:, :width, :width]
        found = Pairs(before_of(tokens, rest[:1, 2 * m].long()), logq)
    rows = None if rows is None else rows[: len(table)]
    return Lattice(tokens, logp, table[:, 2].long(), start, rows, some, found)


def _keep(tokens: Tensor, logp: Tensor, full: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Append those of each slot's ids (k, n) that pruning dropped; sorting moves the padding behind them."""
    if not len(tokens):
        return tokens, logp
    extra = full.gather(1, ids)
    present = (tokens[:, :, None] == ids[:, None, :]).any(1) | (extra == float("-inf"))
    tokens = torch.cat([tokens, ids.masked_fill(present, -1)], 1)
    logp = torch.cat([logp, extra.masked_fill(present, float("-inf"))], 1)
    logp, order = logp.sort(dim=-1, descending=True, stable=True)
    return tokens.gather(1, order), logp
