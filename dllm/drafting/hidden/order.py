"""Parts of a head that make a slot's logits depend on the tokens drafted before it.

DSpark's vanilla and gated heads and DFlash 2's selector depend on the token just before: pair scores, the product of a
row for that token and one for the next. DSpark's recurrent head and Domino carry a state along the block.

Shapes: prev (m,) tokens of the verifier, hidden (m, H) states of the slot, V the head's vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm.drafting.hidden.config import HeadConfig, Order
from dllm.drafting.pairs import Law
from dllm.models.linear import linear
from dllm.models.moe import wide


def raised(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(wide(x.dtype))


def widely(layer: nn.Linear, x: Tensor) -> Tensor:
    """What the layer makes of x, likewise."""
    return linear(raised(x), raised(layer.weight), None if layer.bias is None else raised(layer.bias))


class OrderHead(nn.Module):
    """A bias on a slot's logits, slot after slot: <left, right[b]> for every id b, so that some ids cost what their
    rows do. `prefix` begins the names of its tensors."""

    prefix: str = ""
    skip: int = 0  # first slots that have none
    top: int = 0  # candidates that a slot is restricted to; 0: all

    def step(
        self, prev: Tensor, embedded: Tensor, hidden: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """left (m, r) and the next state; the state of slot 0 is None. embedded (m, H): of prev, by the verifier."""
        raise NotImplementedError

    @property
    def right(self) -> Tensor:
        """(V, r)."""
        raise NotImplementedError


class PairHead(OrderHead):
    """A bias of the token just before alone: w(a, b) = <left(a), right[b]>. `law`: how such scores become weights."""

    law: Law = "mass"

    def left(self, prev: Tensor, hidden: Tensor) -> Tensor:
        """(m, r), float32 at least."""
        raise NotImplementedError

    def scores(self, hidden: Tensor, right: Tensor, before: Tensor, columns: Tensor) -> Tensor:
        """w of slots (k, H): ids before (k, A), and rows `columns` (k, M) of right (n, r) -> (k, A, M).

        It is float32 at least: a bfloat16 is up to 0.06 from a score of 16, and so would be the law of a slot.
        """
        left = self.left(before.flatten(), hidden.repeat_interleave(before.shape[1], 0)).view(*before.shape, -1)
        return torch.einsum("kar,kmr->kam", left, raised(right[columns]))

    def step(
        self, prev: Tensor, embedded: Tensor, hidden: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `OrderHead`."""
        return self.left(prev, hidden).to(hidden.dtype), None


class Markov(PairHead):
    """DSpark: <W2[b], W1[a]>, gated by the slot where there is a gate (arXiv 2607.05147)."""

    prefix = "markov_head."

    def __init__(self, vocab: int, hidden: int, rank: int, gated: bool) -> None:
        super().__init__()
        self.markov_w1, self.markov_w2 = nn.Embedding(vocab, rank), nn.Linear(rank, vocab, False)
        self.gated = gated
        if gated:
            self.gate_proj = nn.Linear(hidden + rank, rank)

    def left(self, prev: Tensor, hidden: Tensor) -> Tensor:
        """W1[a], or sigmoid(gate [h; W1[a]]) W1[a]."""
        w1: Tensor = self.markov_w1(prev)
        gate = torch.sigmoid(widely(self.gate_proj, torch.cat([hidden, w1], -1))) if self.gated else 1.0
        return gate * raised(w1)

    @property
    def right(self) -> Tensor:
        """W2."""
        weight: Tensor = self.markov_w2.weight
        return weight


class Recurrent(OrderHead):
    """DSpark's recurrent head: s <- g s + (1 - g) tanh(c), bias W2 tanh(o), (g, c, o) = joint [s; W1[a]; h]."""

    prefix = "markov_head."

    def __init__(self, vocab: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.markov_w1, self.markov_w2 = nn.Embedding(vocab, rank), nn.Linear(rank, vocab, False)
        self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def step(
        self, prev: Tensor, embedded: Tensor, hidden: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `OrderHead`."""
        w1 = self.markov_w1(prev)
        state = torch.zeros_like(w1) if state is None else state
        g, c, o = self.joint_proj(torch.cat([state, w1, hidden], -1)).chunk(3, -1)
        g = torch.sigmoid(g)
        return torch.tanh(o), g * state + (1 - g) * torch.tanh(c)

    @property
    def right(self) -> Tensor:
        """W2."""
        weight: Tensor = self.markov_w2.weight
        return weight


class Selector(PairHead):
    """DFlash 2: sum_r P[a]_r (U h)_r S[b]_r among the best `top` of a slot."""

    prefix = "candidate_selector."
    law = "candidates"

    def __init__(self, vocab: int, hidden: int, rank: int, top: int) -> None:
        super().__init__()
        self.top = top
        self.predecessor_codebook, self.successor_codebook = (nn.Parameter(torch.zeros(vocab, rank)) for _ in range(2))
        self.hidden_projection = nn.Linear(hidden, rank, False)

    def left(self, prev: Tensor, hidden: Tensor) -> Tensor:
        """P[a] (U h)."""
        return raised(self.predecessor_codebook[prev]) * widely(self.hidden_projection, hidden)

    @property
    def right(self) -> Tensor:
        """S."""
        return self.successor_codebook


class Domino(OrderHead):
    """Domino: a GRU over the verifier's embeddings of the drafted tokens, and a projection of [h; its state]."""

    def __init__(self, hidden: int, vocab: int, order: Order) -> None:
        super().__init__()
        self.skip = order.skip
        self.prefix_gru = GRU(hidden, order.state)
        self.embed_proj = nn.Sequential(
            nn.Linear(hidden + order.state, order.rank, False), nn.SiLU(), nn.Linear(order.rank, vocab, False)
        )

    def step(
        self, prev: Tensor, embedded: Tensor, hidden: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `OrderHead`."""
        state = self.prefix_gru(embedded, state)
        left: Tensor = self.embed_proj[:-1](torch.cat([hidden, state], -1))
        return left, state

    @property
    def right(self) -> Tensor:
        """The last layer of the projection."""
        weight: Tensor = cast(nn.Linear, self.embed_proj[-1]).weight
        return weight


class GRU(nn.Module):
    """One step of torch's `nn.GRU` without biases, under its names."""

    def __init__(self, size: int, state: int) -> None:
        super().__init__()
        self.weight_ih_l0, self.weight_hh_l0 = (nn.Parameter(torch.zeros(3 * state, n)) for n in (size, state))

    def forward(self, x: Tensor, state: Tensor | None) -> Tensor:
        """x (m, size), state (m, n) -> (m, n)."""
        state = x.new_zeros(len(x), self.weight_hh_l0.shape[1]) if state is None else state
        a, b = F.linear(x, self.weight_ih_l0).chunk(3, -1), F.linear(state, self.weight_hh_l0).chunk(3, -1)
        r, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
        new: Tensor = (1 - z) * torch.tanh(a[2] + r * b[2]) + z * state
        return new


def order_head(c: HeadConfig, vocab: int) -> OrderHead | None:
    """The order head of a configuration."""
    order, hidden = c.order, c.hidden_size
    if order is None:
        return None
    if order.kind == "selector":
        return Selector(vocab, hidden, order.rank, order.top)
    if order.kind == "domino":
        return Domino(hidden, vocab, order)
    if order.kind == "rnn":
        return Recurrent(vocab, hidden, order.rank)
    return Markov(vocab, hidden, order.rank, order.kind == "gated")
