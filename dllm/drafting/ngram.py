"""A causal proxy over token ids: what the n-gram statistics of the text so far say about the next token.

A one-forward draft predicts its slots independently; the proxy restores some left-to-right consistency at the price of
a dictionary lookup. It is built online from prompt and output (optionally from a user's corpus) over *ids*, never over
strings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dllm.drafting.pairs import State

SEEN, FED = 16.0, 1.0  # observations that give a trust of 1/2: of a text, and of a verifier's own probabilities


class NgramTable:
    """Interpolated absolute discounting over token ids.

    g(t | c) = max(n(c, t) - D, 0) / n(c) + D N(c) / n(c) g(t | c without its oldest token), down to 1 / V.
    A state is the longest suffix of the text (at most order - 1 tokens) that was seen as a context: longer ones say the
    same, which keeps the state space of the exact searches small.

    `order` 3 as in DiffuSpec; `discount` 0.75 is the usual value for small counts; `kappa` observations give a trust of
    1/2: a context that was seen once or twice in a prompt is a weak witness against a model. The text's own counts
    fade by `decay` per token. `base` is a table fitted on a corpus, shared and never written: the two are mixed by
    their trust.
    """

    def __init__(
        self,
        vocab: int,
        order: int = 3,
        discount: float = 0.75,
        decay: float = 1.0,
        kappa: float = SEEN,
        base: NgramTable | None = None,
    ) -> None:
        self.vocab, self.order, self.discount, self.decay, self.kappa = vocab, order, discount, decay, kappa
        self.base = base
        self.counts: dict[State, dict[int, float]] = {}
        self.total: dict[State, float] = {}
        self.taken: dict[State, float] = {}  # observations that the discount takes from, where nothing fades
        self.unit = 1.0  # weight of a new observation: growing it is the same as fading the old ones
        self.tail: State = ()

    def update(self, ids: Sequence[int]) -> None:
        """Append `ids` to the text and count them."""
        for token in ids:
            for n in range(min(len(self.tail), self.order - 1) + 1):
                self._count(self.tail[len(self.tail) - n :], token)
            self.tail = (*self.tail, token)[-(self.order - 1) :] if self.order > 1 else ()
            self.age(1)

    def fit(self, corpus: Iterable[Sequence[int]]) -> NgramTable:
        """Count the documents of a corpus; the text starts empty again afterwards."""
        for ids in corpus:
            self.tail = ()
            self.update(ids)
        self.tail = ()
        return self

    def age(self, tokens: int) -> None:
        """The text grew by so many tokens: all counts fade."""
        self.unit /= self.decay**tokens
        if self.unit > 1e9:
            self._rescale()

    def feed(self, ids: Sequence[int], tokens: Sequence[int], prob: Sequence[float]) -> None:
        """Count what a verifier says behind the text `ids` (ADED, arXiv 2407.12021): each token by its probability."""
        tail = tuple(ids[-(self.order - 1) :]) if self.order > 1 else ()
        for n in range(len(tail) + 1):
            for token, share in zip(tokens, prob, strict=True):
                self._count(tail[len(tail) - n :], token, share)

    def _count(self, context: State, token: int, share: float = 1.0) -> None:
        row = self.counts.setdefault(context, {})
        n = row.get(token, 0.0)
        row[token] = n + share * self.unit
        self.total[context] = self.total.get(context, 0.0) + share * self.unit
        self.taken[context] = self.taken.get(context, 0.0) + min(n + share, 1.0) - min(n, 1.0)

    def _rescale(self) -> None:
        for context, row in self.counts.items():
            self.counts[context] = {t: n / self.unit for t, n in row.items()}
            self.total[context] /= self.unit
        self.unit = 1.0

    def state(self, ids: Sequence[int]) -> State:
        """What the table knows the text `ids` by: its longest suffix that was seen as a context."""
        context = tuple(ids[-(self.order - 1) :]) if self.order > 1 else ()
        while context and context not in self.counts and not (self.base and context in self.base.counts):
            context = context[1:]
        return context

    def step(self, state: State, token: int) -> State:
        """The state behind one more token."""
        return self.state((*state, token))

    def trust(self, state: State) -> float:
        """n / (n + kappa) of the longest known context; unigrams say nothing about order and get none."""
        own = self._trust(state)
        return own if self.base is None else max(own, self.base.trust(self.base.state(state)))

    def _trust(self, state: State) -> float:
        while state and state not in self.total:
            state = state[1:]
        n = self.total[state] / self.unit if state else 0.0
        return n / (n + self.kappa)

    def logp(self, state: State, tokens: Sequence[int]) -> list[float]:
        """log g of each token; always finite."""
        own = [self._prob(state, t) for t in tokens]
        if self.base is None:
            return [math.log(p) for p in own]
        known = self.base.state(state)
        mine, theirs = self._trust(state), self.base.trust(known)
        share = mine / (mine + theirs) if mine + theirs else 0.0
        return [math.log(share * p + (1 - share) * self.base._prob(known, t)) for p, t in zip(own, tokens, strict=True)]

    def _prob(self, context: State, token: int) -> float:
        lower = 1.0 / self.vocab if not context else self._prob(context[1:], token)
        row = self.counts.get(context)
        if not row:
            return lower
        d, unit = self.discount, self.unit  # a faded count is worth less than one observation and loses less
        n = row.get(token, 0.0)
        taken = sum(min(n, unit) for n in row.values()) if self.decay < 1 else self.taken[context]
        return (n - d * min(n, unit) + d * taken * lower) / self.total[context]


@dataclass(frozen=True)
class Tempered:
    """The edge weights of a drafter tempered by a table, as `Scores`: w^(1 - mix) g^mix, mix = (1 - lam) trust."""

    table: NgramTable
    lam: float

    @property
    def span(self) -> int:
        """Tokens of a context."""
        return self.table.order - 1

    def state(self, ids: Sequence[int]) -> State:
        """The table's."""
        return self.table.state(ids)

    def steps(self, state: State, tokens: Sequence[int]) -> list[State]:
        """The table's."""
        return [self.table.step(state, t) for t in tokens]

    def weigh(self, slot: int, state: State, tokens: Sequence[int], logw: Sequence[float]) -> Sequence[float]:
        """(1 - mix) log w + mix log g; log w where the table does not know the context."""
        mix = (1 - self.lam) * self.table.trust(state)
        if mix == 0:
            return logw
        return [(1 - mix) * w + mix * g for w, g in zip(logw, self.table.logp(state, tokens), strict=True)]
