"""Drafts of several sources in one tree under one budget, or the best chain of what they say.

At every node each source that knows the way there says what comes next: a finished proposal by its branches, a lattice
by the candidates of its slot, whatever led there. The nodes most likely to be reached are taken, whoever proposed them,
by what the word of just these sources has been worth. One rule, three methods: branches that were retrieved and that
the drafter does not have among its candidates fall behind (RASD's pruning by its marginals), the places of a drafter
that is unsure go to what was retrieved (Graft), and of several drafters the confident one gets the room (TAPS's merging
and routing).

All nodes are points, so the walk over the tree is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from dllm.drafting.proposal import Proposal, best_first
from dllm.drafting.search import Edges
from dllm.errors import DllmError

Path = tuple[int, ...]
Reached = tuple[Path, str, float]  # a node, who proposed it, and what they give it together


class Voice(Protocol):
    """One source of a tree."""

    name: str

    def says(self, path: Path) -> dict[int, float]:
        """Tokens behind a path of drafted tokens, with their probabilities; none where it does not know the way."""


class Branches:
    """A finished proposal, which knows its own paths. Errors: one that was sampled."""

    def __init__(self, name: str, proposal: Proposal) -> None:
        if proposal.kind != "point":
            raise DllmError(
                "only point proposals can be merged: rows of a sampled tree would no longer describe its siblings"
            )
        self.name = name
        self.behind: dict[Path, dict[int, float]] = {}
        for path, conf in zip(proposal.paths[1:], proposal.conf or [0.5] * len(proposal), strict=True):
            self.behind.setdefault(path[:-1], {})[path[-1]] = conf

    def says(self, path: Path) -> dict[int, float]:
        """Its branches there."""
        return self.behind.get(path, {})


class Slots:
    """A lattice as a search weighs it, which has a say of every path as long as its slots go."""

    def __init__(self, name: str, edges: Edges) -> None:
        self.name, self.edges = name, edges
        self.states: dict[Path, tuple[tuple[int, ...], ...]] = {(): edges.root}  # as the sources of weights keep a path

    def says(self, path: Path) -> dict[int, float]:
        """The candidates of the slot, given the path."""
        if len(path) >= self.edges.lat.k:
            return {}
        if path not in self.states:
            before = self.states[path[:-1]]
            (self.states[path],) = self.edges.behind(before, path[-1:])
        return {token: math.exp(min(weight, 0.0)) for token, weight, _ in self.edges.out(len(path), self.states[path])}


def pooled(said: Sequence[dict[int, float]]) -> dict[int, float]:
    """Of what several give a token the most: who is sure counts. What agreement is worth is learned, see `Trust`."""
    out: dict[int, float] = {}
    for some in said:
        for token, p in some.items():
            out[token] = max(p, out.get(token, 0.0))
    return out


class Merged(NamedTuple):
    """A tree, and of every node who proposed it and what they give it together."""

    proposal: Proposal
    origin: dict[Path, tuple[str, float]]


def best_chain(tree: Proposal) -> Proposal:
    """The path of a tree of points from which most tokens are to be expected."""
    hoped = list[float]()
    for parent, chance in zip(tree.parents, tree.survival(), strict=True):
        hoped.append(chance + (hoped[parent] if parent >= 0 else 0.0))
    node, path = max(range(len(tree)), key=hoped.__getitem__, default=-1), list[int]()
    while node >= 0:
        path.append(node)
        node = tree.parents[node]
    return tree.pick(path[::-1])


def merge(
    voices: Sequence[Voice],
    budget: int,
    depth: int,
    trust: Callable[[str, int, float], float] = lambda who, slot, conf: min(conf, 1.0),
    eos: frozenset[int] = frozenset(),
) -> Merged:
    """The at most `budget` nodes, `depth` deep, that are most likely to be reached, best first; nothing behind `eos`.

    A node's confidence is what `trust` makes of it; its chance to be reached is the product along its path. Nodes are
    at most as likely as their parents, so best first is optimal among all trees of the budget.
    """

    def following(node: Reached, deep: int, chance: float) -> Iterator[tuple[int, float, Reached]]:
        path = node[0]
        if deep == depth or (path and path[-1] in eos):
            return
        said = [(voice.name, some) for voice in voices if (some := voice.says(path))]
        for token, conf in sorted(pooled([some for _, some in said]).items()):
            who = "+".join(name for name, some in said if token in some)
            yield token, trust(who, deep, conf), ((*path, token), who, conf)

    root: Reached = ((), "", 1.0)
    tree, reached = best_first(root, following, budget)
    return Merged(tree, {path: (who, conf) for path, who, conf in reached})
