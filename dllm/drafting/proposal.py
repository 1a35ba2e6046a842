"""What a drafter hands to the verifier: a tree of tokens and how they came about.

Losslessness is a property of (how the tokens were chosen, how they are accepted), never of the drafter. So the kind is
part of the type: `point` tokens are a deterministic function of the text so far (argmax, beam, retrieval, any tree),
`sampled` tokens were drawn from rows that travel with them. There is no third kind.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from operator import index
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dllm.errors import DllmError

Kind = Literal["point", "sampled"]
S = TypeVar("S")  # what a tree that grows knows of a node
TOLERANCE = 1e-3  # of a sum of probabilities in float32, over vocabularies of 10^5


@dataclass(frozen=True)
class Rows:
    """The laws the nodes of a sampled proposal were drawn from.

    `prob` is (N, M) and sums to one along M; `index` (N, M) names the token of each entry, or is None when M is the
    whole vocabulary. Row `i` is the law of node `i` given everything before it; siblings carry the same row. `sound`
    says that the tokens were drawn from just these, so that nobody asks the device whether they are laws.
    """

    prob: Tensor
    index: Tensor | None = None
    sound: bool = False

    def dense(self, i: int, vocab: int) -> Tensor:
        """Row `i` over the verifier's vocabulary: (V,) float64."""
        return self.pick([i]).laws(vocab)[0]

    def laws(self, vocab: int) -> Tensor:
        """All rows over the verifier's vocabulary: (N, V) float64."""
        prob = self.prob.double()
        if self.index is None:
            return fit(prob, vocab, 0.0)
        empty = prob.new_zeros(len(prob), vocab)
        return empty.scatter_add_(1, self.index.clamp_min(0), prob * (self.index >= 0))

    def pick(self, nodes: Sequence[int]) -> Rows:
        """The laws of these nodes."""
        first = list(nodes) == list(range(len(nodes)))
        kept = slice(len(nodes)) if first else sent(nodes, self.prob.device)
        return Rows(self.prob[kept], None if self.index is None else self.index[kept])


def drawn(prob: Tensor, u: Tensor) -> Tensor:
    """Tokens (n, m) of probabilities (n, V) at uniforms (n, m), by the inverse CDF in float64; a zero entry is never
    drawn."""
    cdf = prob.double().cumsum(-1)
    index = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
    last = (cdf < cdf[:, -1:]).sum(-1, keepdim=True)  # u may be rounded up to the total
    return torch.minimum(index, last)


def fit(rows: Tensor, vocab: int, fill: float = float("-inf")) -> Tensor:
    """Rows (..., V) cut or padded to the verifier's vocabulary: embedding padding differs between checkpoints of one
    tokenizer."""
    if rows.shape[-1] >= vocab:
        return rows[..., :vocab]
    return torch.nn.functional.pad(rows, (0, vocab - rows.shape[-1]), value=fill)


def sent(numbers: ArrayLike | Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, or whole numbers as one of int64, on a device, without a wait."""
    held = numbers if isinstance(numbers, Tensor) else torch.from_numpy(np.asarray(numbers, dtype=np.int64))
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.to(device)


class Spread(NamedTuple):
    """How sure a row is, in nats."""

    margin: float  # between its two best
    entropy: float


@dataclass(frozen=True)
class Proposal:
    """N drafted tokens, parents before children.

    `parents[i]` is the node before node `i`, -1 for the last emitted token; a chain is -1, 0, 1, … `conf[i]` estimates
    the probability that node `i` is accepted once its parent was (the length controllers read it), `spread[i]` is of
    the row of its slot, where that is known. Siblings of a sampled proposal are listed in the order in which they were
    drawn, without replacement.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    kind: Kind = "point"
    rows: Rows | None = None
    conf: tuple[float, ...] = ()
    spread: tuple[Spread, ...] = ()

    def __post_init__(self) -> None:
        try:
            for name, number in (("tokens", index), ("parents", index), ("conf", float)):
                object.__setattr__(self, name, tuple(map(number, vars(self)[name])))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DllmError("tokens and parents of a proposal are whole numbers, its confidences numbers") from error
        if self.kind not in ("point", "sampled"):
            raise DllmError(
                f"a proposal is 'point' or 'sampled', not {self.kind!r}: no other kind can be verified exactly"
            )
        if len(self.parents) != len(self.tokens) or any(not -1 <= p < i for i, p in enumerate(self.parents)):
            raise DllmError("a proposal needs one parent per token, parents before children, -1 at the root")
        if (self.kind == "sampled") != (self.rows is not None):
            raise DllmError("a sampled proposal carries the rows it was drawn from, a point proposal carries none")
        if self.rows is not None and len(self.rows.prob) != len(self.tokens):
            raise DllmError(f"{len(self.tokens)} sampled tokens came with {len(self.rows.prob)} rows")
        if self.conf and len(self.conf) != len(self.tokens):
            raise DllmError(f"{len(self.tokens)} tokens came with {len(self.conf)} confidences")
        if not all(0 <= c <= 1 + TOLERANCE for c in self.conf):
            raise DllmError("the confidences of a proposal are probabilities, each in [0, 1]")

    def check(self) -> None:
        """Raises DllmError where the rows cannot be the laws that the tokens were drawn from."""
        if self.rows is None or self.rows.sound or not len(self):
            return
        prob, ids = self.rows.prob, self.rows.index
        if prob.dim() != 2 or not bool(((prob >= 0).all(-1) & ((prob.sum(-1) - 1).abs() < TOLERANCE)).all()):
            raise DllmError("every row of a sampled proposal holds probabilities that sum to one (float32 at least)")
        ids = torch.arange(prob.shape[1], device=prob.device).expand_as(prob) if ids is None else ids
        tokens = torch.tensor(self.tokens, device=prob.device)[:, None]
        if ids.shape != prob.shape or not bool(((prob > 0) & (ids == tokens)).any(-1).all()):
            raise DllmError("a sampled token has no probability in its row: rows are the laws of the draws")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def is_chain(self) -> bool:
        """Whether every node follows the one before."""
        return self.parents == tuple(range(-1, len(self.tokens) - 1))

    @property
    def told_by_text(self) -> bool:
        """Whether the text that follows says what would have been accepted, also of nodes that nobody verifies: points
        of a chain stay where the text says the same."""
        return self.kind == "point" and self.is_chain

    @cached_property
    def children(self) -> dict[int, list[int]]:
        """node -> its children in order; the root is -1."""
        table: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            table.setdefault(parent, []).append(node)
        return table

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance from the root: 1 for a child of the last emitted token."""
        out: list[int] = []
        for parent in self.parents:
            out.append(1 if parent < 0 else out[parent] + 1)
        return tuple(out)

    @property
    def told(self) -> list[tuple[int, float, Spread | None]]:
        """Slot, confidence and spread of every node: what an `Estimator` reads."""
        conf = self.conf or [0.5] * len(self)
        spread = self.spread or [None] * len(self)
        return [(d - 1, c, s) for d, c, s in zip(self.depths, conf, spread, strict=True)]

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The tokens that lead to the root, which are none, and then to each node."""
        out: list[tuple[int, ...]] = [()]
        for token, parent in zip(self.tokens, self.parents, strict=True):
            out.append((*out[parent + 1], token))
        return tuple(out)

    def survival(self, conf: Sequence[float] | None = None) -> list[float]:
        """Probability that each node is reached and accepted: the product of `conf` along its path."""
        out: list[float] = []
        for parent, c in zip(self.parents, self.conf if conf is None else conf, strict=True):
            out.append(c if parent < 0 else c * out[parent])
        return out

    def pick(self, nodes: Sequence[int]) -> Proposal:
        """These nodes in this order, parents before children."""
        place = {old: new for new, old in enumerate(nodes)} | {-1: -1}
        return Proposal(
            tuple(self.tokens[i] for i in nodes),
            tuple(place[self.parents[i]] for i in nodes),
            self.kind,
            None if self.rows is None else self.rows.pick(nodes),
            tuple(self.conf[i] for i in nodes) if self.conf else (),
            tuple(self.spread[i] for i in nodes) if self.spread else (),
        )

    def head(self, n: int) -> Proposal:
        """The first `n` nodes (closed under parents because parents come first)."""
        return self if n >= len(self) else self.pick(range(n))

    def within(self, room: int, eos: frozenset[int] = frozenset()) -> Proposal:
        """The nodes at most `room` deep and not behind an end token."""
        keep: list[int] = []
        open_ended = {-1}
        for i, (token, parent, depth) in enumerate(zip(self.tokens, self.parents, self.depths, strict=True)):
            if depth <= room and parent in open_ended:
                keep.append(i)
                if token not in eos:
                    open_ended.add(i)
        return self if len(keep) == len(self) else self.pick(keep)

    def then(self, other: Proposal) -> Proposal:
        """This chain followed by a chain that was drafted after it (chunked drafting)."""
        if not len(self):
            return other
        if not len(other):
            return self
        if not (self.is_chain and other.is_chain and self.kind == other.kind):
            raise DllmError("only chains of one kind can be joined")
        n, rows = len(self), _stack(self.rows, other.rows) if self.rows and other.rows else None
        return Proposal(
            self.tokens + other.tokens,
            self.parents + tuple(p + n for p in other.parents),
            self.kind,
            rows,
            self.conf + other.conf if self.conf and other.conf else (),
            self.spread + other.spread if self.spread and other.spread else (),
        )


def _stack(a: Rows, b: Rows) -> Rows:
    if a.index is None and b.index is None:
        return Rows(torch.cat([a.prob, b.prob]))
    if a.index is None or b.index is None:
        raise DllmError("dense and sparse rows cannot be joined")
    width = max(a.prob.shape[1], b.prob.shape[1])
    return Rows(
        torch.cat([fit(rows, width, 0) for rows in (a.prob, b.prob)]),
        torch.cat([fit(ids, width, -1) for ids in (a.index, b.index)]),
    )


def chain(tokens: Sequence[int], conf: Sequence[float] = (), rows: Rows | None = None) -> Proposal:
    """A deterministic chain, or one that was drawn from `rows`."""
    kind: Kind = "point" if rows is None else "sampled"
    return Proposal(tuple(tokens), tuple(range(-1, len(tokens) - 1)), kind, rows, tuple(conf))


EMPTY = chain(())


def best_first(
    root: S, following: Callable[[S, int, float], Iterable[tuple[int, float, S]]], budget: int
) -> tuple[Proposal, list[S]]:
    """The at most `budget` nodes of a tree of points that are most likely to be reached, best first, and their states.

    `following(state, depth, chance)` says what may stand behind a node that is `depth` deep and reached with `chance`:
    tokens, their confidences given the node, and their states. A node is at most as likely as its parent, so best first
    is optimal among all trees of the budget, and a larger budget holds the smaller. Ties go to what was offered first.
    """
    nodes: list[tuple[int, int, float]] = []  # token, parent, confidence
    states: list[S] = []
    order = count()
    heap: list[tuple[float, int, int, int, float, int, S]] = []

    def offer(state: S, depth: int, chance: float, parent: int) -> None:
        for token, conf, behind in following(state, depth, chance):
            heapq.heappush(heap, (-chance * conf, next(order), token, parent, conf, depth + 1, behind))

    offer(root, 0, 1.0, -1)
    while heap and len(nodes) < budget:
        minus, _, token, parent, conf, depth, state = heapq.heappop(heap)
        nodes.append((token, parent, conf))
        states.append(state)
        offer(state, depth, -minus, len(nodes) - 1)
    tokens, parents, confs = zip(*nodes, strict=True) if nodes else ((), (), ())
    return Proposal(tokens, parents, conf=confs), states
