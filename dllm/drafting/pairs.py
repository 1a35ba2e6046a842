"""Pair scores: what a token says of its neighbour in a lattice.

A lattice has marginals q_j(b) for its candidates b in C_j. A pair head (DSpark, DFlash 2, one trained for any drafter)
adds w_j(a, b) for neighbours, a at slot j - 1, and a law makes of both the weight of an edge:

    s_j(b | a) = log q_j(b) + w_j(a, b)
    q_j(b | a) = softmax over C_j of s_j(. | a)                  "candidates"
               = the same times m_j, the sum of q_j over C_j     "mass"
               = softmax over the whole vocabulary of s_j(. | a) "full"

All searches and draws read such weights through one interface, `Scores`, which an n-gram table has as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.errors import DllmError

State = tuple[int, ...]  # what a source of weights keeps of the tokens before a slot
Law: TypeAlias = Literal["candidates", "mass", "full"]
Scorer = Callable[[Tensor, Tensor], Tensor]  # ids before (k, A), columns (k, M) -> w (k, A, M); none is negative
Names = Callable[[Tensor], Tensor]  # ids of columns; -1 stays


class Scores(Protocol):
    """A source of edge weights: it weighs the candidates of a slot by at most `span` tokens before them."""

    @property
    def span(self) -> int:
        """See the class."""

    def state(self, ids: Sequence[int]) -> State:
        """What it keeps of a text `ids`; texts of one state weigh alike."""

    def steps(self, state: State, tokens: Sequence[int]) -> list[State]:
        """The state behind one more token, for each of these."""

    def weigh(self, slot: int, state: State, tokens: Sequence[int], logw: Sequence[float]) -> Sequence[float]:
        """New log weights of the candidates `tokens` of a slot, from those so far, in the same order."""


@dataclass(frozen=True)
class Pairs:
    """log q_j(b | a) of the candidates b of a lattice of k slots: `Scores` that look at one token before.

    before (k, A) int64, -1 padded: the ids a, the token before the draft at slot 0, candidates of the slot before
    elsewhere; logq (k, A, M), -inf padded, M as the lattice has it; both on the host. Behind a token that is none of
    `before`, a slot keeps the weights it has without a pair.
    """

    before: Tensor
    logq: Tensor
    span: ClassVar[int] = 1

    @cached_property
    def _rows(self) -> list[dict[int, list[float]]]:
        return [dict(zip(a, q, strict=True)) for a, q in zip(self.before.tolist(), self.logq.tolist(), strict=True)]

    def state(self, ids: Sequence[int]) -> State:
        """The last token."""
        return tuple(ids[-1:])

    def steps(self, state: State, tokens: Sequence[int]) -> list[State]:
        """The tokens."""
        return [(t,) for t in tokens]

    def weigh(self, slot: int, state: State, tokens: Sequence[int], logw: Sequence[float]) -> Sequence[float]:
        """log q_j(. | a)."""
        row = self._rows[slot].get(state[0]) if state else None
        return logw if row is None else row[: len(tokens)]

    def cut(self, slots: slice) -> Pairs:
        """Those of these slots."""
        return Pairs(self.before[slots], self.logq[slots])

    def check(self, tokens: Tensor) -> None:
        """Raises DllmError where these are no pairs of a lattice of `tokens` (k, M)."""
        k, width = tokens.shape
        if self.before.shape[:1] != (k,) or self.logq.shape != (k, self.before.shape[1], width):
            raise DllmError(
                f"pairs of {k} slots with {width} candidates are before (k, A) and logq (k, A, {width}), got "
                f"{tuple(self.before.shape)} and {tuple(self.logq.shape)}"
            )
        mass = self.logq.exp().sum(-1)  # (k, A); NaN compares to nothing
        if not bool(((mass <= 1.01) | (self.before < 0)).all()):
            raise DllmError("every row of pairs holds log-probabilities, together at most one")


@dataclass(frozen=True)
class PairScores:
    """What a head says of one draft, where its forward was. Columns are those of the draft's logits.

    score    w of ids before and columns: (k, A), (k, M) -> (k, A, M).
    anchor   (1,) int64: the token before slot 0.
    law      how scores become weights, see above.
    walk     (k,) columns, one a slot, that are candidates however small their marginal: the head's own greedy path.
    """

    score: Scorer
    anchor: Tensor
    law: Law = "mass"
    walk: Tensor | None = None

    def __post_init__(self) -> None:
        if self.law not in get_args(Law):
            raise DllmError(f"the law of pair scores is one of {', '.join(get_args(Law))}, not {self.law!r}")

    def table(
        self,
        columns: Tensor,
        logits: Tensor,
        warp: Callable[[Tensor], Tensor] | None = None,
        named: Names | None = None,
    ) -> Tensor:
        """log q_j(b | a) of the candidates (k, M), -1 padded, of logits (k, V), for a in `before` them: (k, M, M).

        Nothing is asked of the device. `warp` (of rows (n, M): temperature, ...) comes before the law, which is then
        "candidates": what is drawn from. `named`: what the columns of the logits are; None: their ids.
        """
        width = columns.shape[1]
        ids, tokens = columns.clamp_min(0), columns if named is None else named(columns)
        before = before_of(tokens, self.anchor).clamp_min(0)
        logq = torch.log_softmax(logits.float(), -1)  # (k, V)
        own = logq.gather(1, ids).masked_fill(columns < 0, float("-inf"))  # (k, M)
        s = own[:, None] + self.score(before, ids).float()  # (k, M, M)
        if warp is not None:
            return torch.log_softmax(warp(s.view(-1, width)).view_as(s), -1)
        if self.law == "full":
            every = torch.arange(logq.shape[1], device=ids.device).expand_as(logq)
            return s - (logq[:, None] + self.score(before, every).float()).logsumexp(-1, keepdim=True)
        return conditional(own, s, self.law)


def conditional(own: Tensor, s: Tensor, law: Law) -> Tensor:
    """log q_j(b | a) over the candidates alone, by marginals log q_j (k, M) and scores s_j(b | a) (k, A, M)."""
    logq = torch.log_softmax(s, -1)
    return logq + own.logsumexp(-1)[:, None, None] if law == "mass" else logq


def before_of(tokens: Tensor, anchor: Tensor) -> Tensor:
    """The ids that may stand before each slot of candidates (k, M), -1 padded, behind `anchor` (1,): (k, M)."""
    first = F.pad(anchor[None].long(), (0, tokens.shape[1] - 1), value=-1)
    return torch.cat([first, tokens[:-1].long()])
