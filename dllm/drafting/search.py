"""From a lattice to a proposal.

Every search sees the same edge weights, w(s, t) = q(t | s)^lam g(t | s)^(1 - lam): the drafter's marginal, or its law
given the token before where the lattice has pairs, tempered by the causal proxy. An unknown context gives the proxy no
weight (trust 0), so without text it changes nothing.

The confidence of a *sampled* node is a property of its row, never of the token drawn, and a sampled search draws every
slot, also behind an end token (the loop cuts there once the length is decided): a length that depended on the draws
would bias what remains, and the ratio test with it.

| search | objective | result |
|---|---|---|
| argmax | best token per slot, given the one before | point chain |
| cps | sum of log w, beam (DiffuSpec) | point chain |
| viterbi | sum of log w, exact | point chain |
| eal | expected accepted length, exact | point chain |
| sample | draws from the rows (DEER), with pairs left to right | sampled chain |
| cps_sample | draws from the normalised edge weights, left to right | sampled chain |
| tree | the B most probable prefixes | point tree |
| sample_tree | siblings drawn without replacement, at the first slot or (RSD) at several | sampled tree |
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm.drafting.lattice import Lattice, uniforms, without
from dllm.drafting.ngram import NgramTable, Tempered
from dllm.drafting.pairs import Scores, State
from dllm.drafting.proposal import EMPTY, Proposal, Rows, best_first, chain, sent
from dllm.errors import DllmError
from dllm.spec import check, param

Path = tuple[State, ...]  # what each source of weights keeps of the path so far
Edge = tuple[int, float, Path]  # token, log weight, next state
Law = tuple[list[Edge], Tensor]  # the edges of a draw, and their probabilities
Node = tuple[int, int, float]  # token, parent, confidence
LAM = param(0.5, "DiffuSpec's", low=0, high=1)


class PathSearch:
    """Base of all searches: choose what to verify, a lattice becomes a proposal. A search writes `find`, or `__call__`
    where the graph is of no use to it; it holds no state of a text. Its settings are the fields of a frozen dataclass.

    sampled   whether tokens are drawn: then the proposal is "sampled", and the lattice comes with full rows.
    draws     of `Lattice.draw`: how many tokens it asks of each slot; a drafter may make them with the rows. 0: none.
    tree      whether proposals branch.
    lam       weight of the drafter's own probabilities, in [0, 1]; the rest is the n-gram table's. 1: none is made.
    budget    most nodes of a tree where the call names no `tree=`; 0: the search sees to it itself.
    """

    sampled: ClassVar[bool] = False
    tree: ClassVar[bool] = False
    lam: float = 1.0
    budget: int = 0

    @property
    def draws(self) -> int:
        """See the class."""
        return 0

    def __post_init__(self) -> None:
        """The settings of one that is a dataclass. Errors: another kind, out of range."""
        check(self, type(self).__name__)

    def __call__(
        self,
        lat: Lattice,
        ctx: Sequence[int],
        *,
        eos: frozenset[int] = frozenset(),
        proxy: NgramTable | None = None,
        generator: Generator | None = None,
    ) -> Proposal:
        """At most `lat.k` tokens deep, every token a candidate of its slot; nothing of an empty lattice.

        ctx         ids of the text before slot 0.
        eos         end tokens: a point path has no successor behind one. A sampled one draws every slot all the same:
                    its length must not depend on the draws.
        proxy       what the text so far says of the next token; None: nothing.
        generator   the only source of randomness.
        """
        return self.find(Edges(lat, ctx, proxy, self.lam), eos, generator) if lat.k else EMPTY

    def find(self, edges: Edges, eos: frozenset[int], generator: Generator | None) -> Proposal:
        """The same of the weighted graph behind a lattice of at least one slot."""
        raise NotImplementedError


class Edges:
    """The weighted graph behind a lattice: `out(i, s)` lists the edges of slot `i` from state `s`, cached.

    What weighs them, one after the other: the lattice's own marginals, its pairs, and the proxy.
    """

    def __init__(self, lat: Lattice, ctx: Sequence[int], proxy: NgramTable | None, lam: float) -> None:
        self.lat = lat
        pairs: list[Scores] = [] if lat.pairs is None else [lat.pairs]
        self.scores = pairs if proxy is None or lam >= 1 else [*pairs, Tempered(proxy, lam)]
        self.root: Path = tuple(s.state(ctx) for s in self.scores)
        self.cache: dict[tuple[int, Path], list[Edge]] = {}

    def out(self, i: int, state: Path) -> list[Edge]:
        """The edges of slot `i` from `state`, in the order of the lattice's column."""
        key = (i, state)
        if key not in self.cache:
            self.cache[key] = self._weigh(i, state)
        return self.cache[key]

    def _weigh(self, i: int, state: Path) -> list[Edge]:
        tokens, logw = self._weights(i, state)
        return list(zip(tokens, logw, self.behind(state, tokens), strict=True))

    def _weights(self, i: int, state: Path) -> tuple[Sequence[int], Sequence[float]]:
        """Candidates of slot `i`, and their log weights behind `state`."""
        tokens: Sequence[int]
        logw: Sequence[float]
        tokens, logw = zip(*self.lat.columns[i], strict=True)
        for scores, known in zip(self.scores, state, strict=True):
            logw = scores.weigh(i, known, tokens, logw)
        return tokens, logw

    def behind(self, state: Path, tokens: Sequence[int]) -> list[Path]:
        """The state behind each of these tokens."""
        if not self.scores:
            return [()] * len(tokens)
        each = [scores.steps(known, tokens) for scores, known in zip(self.scores, state, strict=True)]
        return list(zip(*each, strict=True))

    def layers(self, eos: frozenset[int]) -> list[Layer]:
        """The graph as arrays, slot by slot, as far as a path goes on."""
        out, states, forget = list[Layer](), [self.root], all(scores.span <= 1 for scores in self.scores)
        for i in range(self.lat.k):
            rows, behind, index = list[Sequence[float]](), list[list[int]](), dict[Path, int]()
            for state in states:
                tokens, logw = self._weights(i, state)
                rows.append(logw)
                if not (forget and behind):  # else the states behind are those of the tokens alone
                    paths = zip(self.behind(state, tokens), tokens, strict=True)
                    behind.append([-1 if t in eos else index.setdefault(path, len(index)) for path, t in paths])
            out.append(Layer(tokens, np.array(rows), np.array(behind)))
            if not index:  # every path has ended
                break
            states = list(index)
        return out


class Layer(NamedTuple):
    """A slot of the graph: candidates, log weights (A, M) behind each of A states, and the place of the state behind
    each among those of the next slot, -1 behind an end token: (A, M), or (1, M) where all have the same."""

    tokens: Sequence[int]
    logw: NDArray[np.float64]
    behind: NDArray[np.int64]


def _weight(edge: Edge) -> float:
    return edge[1]


def _conf(edges: Edges, tokens: Sequence[int]) -> list[float]:
    """The weight of each step of a path: the estimate of its acceptance."""
    state, out = edges.root, []
    for i, token in enumerate(tokens):
        weight, state = next((w, s) for t, w, s in edges.out(i, state) if t == token)
        out.append(math.exp(min(weight, 0.0)))
    return out


@dataclass(frozen=True)
class Argmax(PathSearch):
    """The most probable token of every slot, left to right: with pairs, the greedy walk over them."""

    def find(self, edges: Edges, eos: frozenset[int], generator: Generator | None) -> Proposal:
        """The best token of each slot behind those before, up to an end token."""
        tokens, conf, state = list[int](), list[float](), edges.root
        for i in range(edges.lat.k):
            token, weight, state = max(edges.out(i, state), key=_weight)
            tokens.append(token)
            conf.append(math.exp(min(weight, 0.0)))
            if token in eos:
                break
        return chain(tokens, conf)


@dataclass(frozen=True)
class CPSBeam(PathSearch):
    """Causal-consistency path search (DiffuSpec, arXiv 2510.02358): beam over the sum of log weights.

    Defaults of the paper: lam 0.5, beam 3. Ties go to the smaller token tuple. Sums of logs compare hypotheses of
    unequal length, so an early end token is favoured; `eal` has no such bias.
    """

    lam: float = LAM
    beam: int = param(3, "the paper's", low=1)

    def find(self, edges: Edges, eos: frozenset[int], generator: Generator | None) -> Proposal:
        """The path with the largest sum of log weights that the beam finds."""
        beams: list[tuple[float, tuple[int, ...], Path, bool]] = [(0.0, (), edges.root, False)]
        for i in range(edges.lat.k):
            grown = [b for b in beams if b[3]]
            for score, tokens, state, done in beams:
                if not done:
                    grown += [(score + w, (*tokens, t), s, t in eos) for t, w, s in edges.out(i, state)]
            beams = heapq.nsmallest(self.beam, grown, key=lambda b: (-b[0], b[1]))
            if all(b[3] for b in beams):
                break
        tokens = beams[0][1]
        return chain(tokens, _conf(edges, tokens))


@dataclass(frozen=True)
class Viterbi(PathSearch):
    """The exact maximum of the beam's objective: dynamic programming over the proxy's states, any order."""

    lam: float = LAM

    def find(self, edges: Edges, eos: frozenset[int], generator: Generator | None) -> Proposal:
        """The path with the largest sum of log weights."""
        live: dict[Path, tuple[float, tuple[int, ...]]] = {edges.root: (0.0, ())}
        done: list[tuple[float, tuple[int, ...]]] = []
        for i in range(edges.lat.k):
            grown: dict[Path, tuple[float, tuple[int, ...]]] = {}
            for state, (score, tokens) in live.items():
                for t, w, s in edges.out(i, state):
                    new = (score + w, (*tokens, t))
                    if t in eos:
                        done.append(new)
                    elif s not in grown or (-new[0], new[1]) < (-grown[s][0], grown[s][1]):
                        grown[s] = new
            live = grown
        _, tokens = min([*live.values(), *done], key=lambda h: (-h[0], h[1]))
        return chain(tokens, _conf(edges, tokens))


@dataclass(frozen=True)
class EAL(PathSearch):
    """The path with the largest expected accepted length, sum_i prod_{j<=i} w_j, exactly.

    Backward recursion U_i(s) = max_t w(s, t) (1 + U_{i+1}(s')), U = 0 behind the lattice and behind an end token.
    Longer lattices never lower the value, early end tokens win only when they are likely, and the first slots weigh
    most: what a verifier rewards. `power` sharpens (> 1) or softens the weights towards acceptance probabilities.
    """

    lam: float = LAM
    power: float = param(1.0, "weights are acceptance probabilities", above=0)

    def find(self, edges: Edges, eos: frozenset[int], generator: Generator | None) -> Proposal:
        """The path of `solve`."""
        return self.solve(edges, eos)[0]

    def solve(self, edges: Edges, eos: frozenset[int] = frozenset()) -> tuple[Proposal, float]:
        """The path and its value U_0, in tokens."""
        layers, value, choice = edges.layers(eos), np.zeros(1), list[NDArray[np.int64]]()
        weights = [np.exp(np.minimum(self.power * layer.logw, 0.0)) for layer in layers]
        for layer, w in zip(reversed(layers), reversed(weights), strict=True):
            value = value if choice else np.zeros(layer.behind.max() + 2)  # the last: behind an end token
            gain = w * (1.0 + value[layer.behind])  # (A, M)
            choice.append(gain.argmax(1))
            value = np.append(gain.max(1), 0.0)
        tokens, conf, state = list[int](), list[float](), 0
        for layer, w, best in zip(layers, weights, reversed(choice), strict=True):
            at = best[state]
            tokens.append(layer.tokens[at])
            conf.append(float(w[state, at]))
            state = layer.behind[state if len(layer.behind) > 1 else 0, at]
            if state < 0:
                break
        return chain(tokens, conf), float(value[0])


@dataclass(frozen=True)
class Sample(PathSearch):
    """Draws from the rows of the lattice: DEER's draft (arXiv 2512.15176), exact under the ratio test.

    They are independent and from the full rows when the lattice has them, else from the kept candidates, renormalised.
    With pairs each is drawn from the candidates given the one before. Whatever is drawn from is what is handed over.
    """

    sampled = True

    @property
    def draws(self) -> int:
        """One a slot."""
        return 1

    def find(self, edges: Edges, eos: frozenset[int], generator: Generator | None) -> Proposal:
        """A draw a slot."""
        if edges.lat.pairs is not None:
            return _drawn_along(edges, generator)
        tokens = edges.lat.draw(1, generator)[:, 0].tolist()
        return chain(tokens, edges.lat.confidence, Rows(*edges.lat.law))


@dataclass(frozen=True)
class CPSSample(PathSearch):
    """Causal consistency and exactness at T > 0: draw left to right from r(t) ~ q(t)^lam g(t | state)^(1 - lam).

    The row handed over is the true law of the token given the tokens before it, so the ratio test is exact.
    """

    lam: float = LAM
    sampled = True

    def find(self, edges: Edges, eos: frozenset[int], generator: Generator | None) -> Proposal:
        """A draw a slot, each given the ones before."""
        return _drawn_along(edges, generator)


def _drawn_along(edges: Edges, generator: Generator | None) -> Proposal:
    """A chain of draws, left to right, each from the normalised edges behind the ones before."""
    tokens, laws, state = list[int](), list[Law](), edges.root
    for i in range(edges.lat.k):
        laws.append(_law(edges.out(i, state)))
        token, state = _draw(laws[-1], generator)
        tokens.append(token)
    return chain(tokens, edges.lat.confidence, _rows(laws))


def _law(out: list[Edge]) -> Law:
    """The edges, and their normalised weights (n,)."""
    return out, torch.softmax(torch.tensor([w for _, w, _ in out]), 0)


def _draw(law: Law, generator: Generator | None) -> tuple[int, Path]:
    """A token, and the state behind it."""
    out, prob = law
    token, _, state = out[int(torch.multinomial(prob, 1, generator=generator))]
    return token, state


def _rows(laws: Sequence[Law]) -> Rows:
    """The laws of as many nodes."""
    index, prob = ([torch.tensor([t for t, _, _ in out]) for out, _ in laws], [p for _, p in laws])
    return Rows(pad_sequence(prob, batch_first=True), pad_sequence(index, batch_first=True, padding_value=-1))


@dataclass(frozen=True)
class BestFirstTree(PathSearch):
    """The `budget` most probable prefixes of the lattice, found best first (DDTree, arXiv 2604.12989, when lam = 1).

    As weights are at most one the set is closed under parents, optimal, and grows with the budget: how many children a
    slot or a node deserves follows. `fanout` caps them, as the rest is never likely.
    """

    budget: int = param(32, "a verify of 33 tokens costs little more than one", low=1)
    lam: float = LAM
    fanout: int = param(8, "further children are never likely", low=1)
    tree = True

    def find(self, edges: Edges, eos: frozenset[int], generator: Generator | None) -> Proposal:
        """The most probable prefixes, most probable first."""

        @cache
        def children(depth: int, state: Path) -> list[tuple[int, float, Path | None]]:
            best = sorted(edges.out(depth, state), key=lambda e: (-e[1], e[0]))[: self.fanout]
            return [(t, math.exp(min(w, 0.0)), None if t in eos else s) for t, w, s in best]

        def following(state: Path | None, depth: int, chance: float) -> list[tuple[int, float, Path | None]]:
            return [] if state is None or depth == edges.lat.k else children(depth, state)

        root: Path | None = edges.root
        return best_first(root, following, self.budget)[0]


@dataclass(frozen=True)
class SampleTree(PathSearch):
    """`width` first tokens drawn without replacement, each continued by draws of its own, with pairs each given the one
    before: recursive rejection is exact.

    deeper   children of a node at the slots behind the first, such as "2-2", without replacement too (RSD-C, arXiv
             2402.14160); behind these slots, and by default at once, each node has one.
    """

    width: int = param(3, "the fourth is tried only after three rejections", low=1)
    depth: int = param(8, "pays with most pairs", low=1)
    deeper: str | int = param("", "chains behind the first slot")
    sampled = True
    tree = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deeper != "" and not all(b.isdecimal() and int(b) for b in str(self.deeper).split("-")):
            raise DllmError(f"sample_tree: deeper={self.deeper!r} names children by slot, such as '2-2'")

    @property
    def draws(self) -> int:
        """Each chain has its own; a tree that branches again draws level by level."""
        return 0 if self.deeper else self.width

    @property
    def branching(self) -> list[int]:
        """Children of a node, slot by slot."""
        some = [self.width, *map(int, str(self.deeper).split("-") if self.deeper else ())]
        return [*some, *[1] * (self.depth - len(some))][: self.depth]

    def within(self, budget: int) -> SampleTree:
        """The same with as many whole slots as a node budget has room for."""
        fitting = replace(self, width=min(self.width, budget))
        sizes = np.cumsum(np.cumprod(fitting.branching))
        return replace(fitting, depth=max(1, int((sizes <= budget).sum())))

    def find(self, edges: Edges, eos: frozenset[int], generator: Generator | None) -> Proposal:
        """The heads, each with its chain or its tree."""
        lat = edges.lat
        if self.deeper:
            nodes, rows = (self._given if lat.pairs is not None else self._free)(edges, generator)
            tokens, parents, confs = zip(*nodes, strict=True)
            tree = Proposal(tokens, parents, "sampled", rows, confs)
            survival = tree.survival()
            return tree.pick(sorted(range(len(tree)), key=lambda i: -survival[i]))
        nodes = list[Node]()
        chains, rows = self._along(edges, generator) if lat.pairs is not None else self._apart(lat, generator)
        for rank, path in enumerate(chains):
            for slot, token in enumerate(path):
                conf = lat.confidence[slot] / (rank + 1 if slot == 0 else 1)
                nodes.append((token, len(nodes) - 1 if slot else -1, conf))
        tokens, parents, confs = zip(*nodes, strict=True)
        return Proposal(tokens, parents, "sampled", rows, confs)

    def _free(self, edges: Edges, generator: Generator | None) -> tuple[list[Node], Rows]:
        """Nodes of independent draws, level by level, and their rows; the host waits once for all levels."""
        lat, n = edges.lat, 1
        (prob, index), levels = lat.law, list[Tensor]()
        branching = self.branching[: lat.k]
        for slot, b in enumerate(branching):
            u = sent(uniforms(n, b, generator), prob.device)
            found = without(prob[slot].expand(n, -1), u).flatten()
            levels.append(found if index is None else index[slot][found.clamp_min(0)].where(found >= 0, -1))
            n *= b
        told, nodes, slots, above = torch.cat(levels).tolist(), list[Node](), list[int](), [-1]
        for slot, b in enumerate(branching):
            level, told, here = told[: len(above) * b], told[len(above) * b :], list[int]()
            for i, token in enumerate(level):
                parent, alive = above[i // b], token >= 0 and above[i // b] > -2
                here.append(len(nodes) if alive else -2)  # fewer tokens than children: some are missing
                if alive:
                    nodes.append((token, parent, lat.confidence[slot] / (i % b + 1)))
                    slots.append(slot)
            above = here
        return nodes, Rows(prob, index).pick(slots)

    def _given(self, edges: Edges, generator: Generator | None) -> tuple[list[Node], Rows]:
        """Nodes drawn given the one before, level by level, and their rows."""
        nodes, laws, above = list[Node](), list[Law](), [(-1, edges.root)]
        for slot, b in enumerate(self.branching[: edges.lat.k]):
            here = list[tuple[int, Path]]()
            for parent, state in above:
                out, prob = _law(edges.out(slot, state))
                some = torch.multinomial(prob, min(b, int((prob > 0).sum())), generator=generator).tolist()
                for rank, at in enumerate(some):
                    here.append((len(nodes), out[at][2]))
                    nodes.append((out[at][0], parent, edges.lat.confidence[slot] / (rank + 1)))
                    laws.append((out, prob))
            above = here
        return nodes, _rows(laws)

    def _apart(self, lat: Lattice, generator: Generator | None) -> tuple[list[list[int]], Rows]:
        """Chains of independent draws, and the rows of all nodes."""
        drawn = lat.draw(self.width, generator)[: self.depth].T.tolist()  # of each chain, by slot
        chains = [tokens for tokens in drawn if tokens[0] >= 0]  # the first row may have fewer tokens
        return chains, Rows(*lat.law).pick([*range(len(chains[0]))] * len(chains))

    def _along(self, edges: Edges, generator: Generator | None) -> tuple[list[list[int]], Rows]:
        """Chains of draws given the one before, and the rows of all nodes."""
        out, prob = _law(edges.out(0, edges.root))
        n = min(self.width, int((prob > 0).sum()))
        chains, laws = list[list[int]](), list[Law]()
        for head in torch.multinomial(prob, n, generator=generator).tolist():
            token, _, state = out[head]
            chains.append([token])
            laws.append((out, prob))
            for i in range(1, min(self.depth, edges.lat.k)):
                laws.append(_law(edges.out(i, state)))
                token, state = _draw(laws[-1], generator)
                chains[-1].append(token)
        return chains, _rows(laws)


def union(proposals: Iterable[Proposal], budget: int) -> Proposal:
    """Trie union of point proposals: the `budget` nodes that are most likely to be reached."""
    return _merged(proposals).head(budget)


def _merged(proposals: Iterable[Proposal]) -> Proposal:
    """The trie of point proposals, nodes by decreasing survival (a parent is never less likely than its child), so that
    `head` keeps the best."""
    where: dict[tuple[int, int], int] = {}  # (parent, token) -> node, in the order of the nodes
    conf: list[float] = []
    for p in proposals:
        place = {-1: -1}
        for i, (token, parent) in enumerate(zip(p.tokens, p.parents, strict=True)):
            node = place[i] = where.setdefault((place[parent], token), len(where))
            conf += [0.0] * (len(where) - len(conf))
            conf[node] = max(conf[node], p.conf[i] if p.conf else 0.0)
    raw = Proposal(tuple(t for _, t in where), tuple(parent for parent, _ in where), conf=tuple(conf))
    survival = raw.survival()
    return raw.pick(sorted(range(len(raw)), key=lambda i: (-survival[i], raw.depths[i], i)))


SEARCHES: dict[str, type[PathSearch]] = {
    "argmax": Argmax,
    "cps": CPSBeam,
    "viterbi": Viterbi,
    "eal": EAL,
    "sample": Sample,
    "cps_sample": CPSSample,
    "tree": BestFirstTree,
    "sample_tree": SampleTree,
}
