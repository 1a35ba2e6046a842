"""Drafts without a model: what followed the last time the text said this. All of them are point proposals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from dllm.drafting.drafters import Drafter, Need
from dllm.drafting.lattice import Lattice
from dllm.drafting.proposal import EMPTY, Proposal, best_first, chain
from dllm.drafting.search import union
from dllm.drafting.store import BEST, Lesson, Seen, Successors
from dllm.drafting.suffixes import counted, longest
from dllm.errors import DllmError
from dllm.spec import check, param


class SuffixAutomaton:
    """All substrings of a growing id sequence in O(1) amortised per token (Blumer et al. 1985).

    `match` is the length of the longest suffix of the text that occurred before, `end` the index after that
    occurrence: the most recent one known when the state was last matched.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.position = [-1], [0], [0]
        self.last = self.state = 0
        self.match = self.end = 0

    def append(self, token: int) -> None:
        """One more token of the text; `match` and `end` follow it."""
        self._follow(token)
        self._extend(token)
        while self.match and self.length[self.link[self.state]] >= self.match:
            self.state = self.link[self.state]  # the extension may have split the matched state
        self.end = self.position[self.state] if self.match else 0
        if self.match:
            self.position[self.state] = len(self.text)

    def _follow(self, token: int) -> None:
        """Move the match over the automaton of the text *before* the token."""
        while self.state and token not in self.next[self.state]:
            self.state = self.link[self.state]
            self.match = self.length[self.state]
        if token in self.next[self.state]:
            self.state = self.next[self.state][token]
            self.match += 1
        else:
            self.state = self.match = 0

    def _extend(self, token: int) -> None:
        self.text.append(token)
        new = self._add(self.length[self.last] + 1, {}, len(self.text))
        p = self.last
        while p >= 0 and token not in self.next[p]:
            self.next[p][token] = new
            p = self.link[p]
        if p < 0:
            self.link[new] = 0
        else:
            q = self.next[p][token]
            self.link[new] = q if self.length[p] + 1 == self.length[q] else self._split(p, q, token)
        self.last = new

    def _split(self, p: int, q: int, token: int) -> int:
        clone = self._add(self.length[p] + 1, dict(self.next[q]), self.position[q])
        self.link[clone] = self.link[q]
        while p >= 0 and self.next[p].get(token) == q:
            self.next[p][token] = clone
            p = self.link[p]
        self.link[q] = clone
        return clone

    def _add(self, length: int, following: dict[int, int], position: int) -> int:
        self.next.append(following)
        self.link.append(0)
        self.length.append(length)
        self.position.append(position)
        return len(self.next) - 1

    def continuations(self, k: int, least: int = 1) -> Iterator[tuple[int, list[int]]]:
        """The length (at least `least`) of the match and of those of its suffixes that also occurred elsewhere, longest
        first, and the `k` tokens that followed there."""
        length, end, state = self.match, self.end, self.state
        while length >= least and state > 0:
            yield length, self._after(end, k)
            state = self.link[state]
            length, end = self.length[state], self.position[state]

    def _after(self, end: int, k: int) -> list[int]:
        """The text from `end` on; it may run into itself, as a period does."""
        out: list[int] = []
        n = len(self.text)
        for i in range(end, end + k):
            out.append(self.text[i] if i < n else out[i - n])
        return out


@dataclass(eq=False)
class SuffixDrafter(Drafter):
    """Copy what followed the longest repeated suffix of prompt and output (in the manner of SAM-Decoding), and what
    followed most often in the texts of a store and a corpus (SuffixDecoding, arXiv 2411.04975).

    `min_match` tokens must agree, else there is no draft. A longer match is trusted more: confidence m / (m + 1) within
    the text, c / (n + 1 / m) for what followed c times of n in others. `min_prob` ends what is read from others: a node
    that is reached with less is not drafted, so the longer the match, the longer the draft. A chain is the one from
    which more tokens are to be expected; a tree holds the continuations of shorter matches as well.
    """

    name = "suffix"
    lattices = False
    free = True
    min_match: int = param(2, "one token is no evidence", low=1)
    min_prob: float = param(0.1, "SuffixDecoding's", above=0, high=1)

    def __post_init__(self) -> None:
        check(self, "drafter 'suffix'")
        self.automaton = SuffixAutomaton()
        self.shared = 0  # tokens of the match in other texts

    @property
    def match(self) -> int:
        """Tokens of the longest match behind the last draft."""
        return max(self.automaton.match, self.shared)

    def reset(self, ids: Sequence[int], need: Need) -> None:
        """The automaton of the prompt."""
        super().reset(ids, need)
        self.automaton, self.shared = SuffixAutomaton(), 0

    def _catch_up(self, ids: Sequence[int]) -> None:
        if self.automaton.text != [*ids[: len(self.automaton.text)]]:  # it had gone on to a chunk that was rejected
            self.automaton = SuffixAutomaton()
        for token in ids[len(self.automaton.text) :]:
            self.automaton.append(token)
        self.shared = longest(self.need.texts, ids)

    def draft(self, ids: Sequence[int], k: int, *, generator: torch.Generator | None = None) -> Proposal:
        """The chain from which most is to be expected; a tree of all."""
        self._catch_up(ids)
        own = (_copied(m, tokens, self.need) for m, tokens in self.automaton.continuations(k, self.min_match))
        others = self._counted(ids, k)
        if self.need.tree:
            return union([*own, *others], self.need.tree)
        return max([*islice(own, 1), *others], key=lambda p: sum(p.survival()), default=EMPTY)

    def _counted(self, ids: Sequence[int], k: int) -> Iterator[Proposal]:
        """What followed in other texts, behind the longest match and behind halves of it."""
        match, need = self.shared, self.need
        budget, width = (need.tree, None) if need.tree else (k, 1)
        while match >= self.min_match:
            yield counted(
                need.texts, ids, match, k, budget, width=width, least=self.min_prob, ends=need.eos.__contains__
            )
            match //= 2


@dataclass(eq=False)
class PromptLookup(Drafter):
    """Copy what followed the last occurrence of the final n-gram, n from `max_ngram` down to `min_ngram` (PLD).

    A tree holds what followed each of these n-grams.
    """

    name = "lookup"
    lattices = False
    free = True

    max_ngram: int = param(4, "longer ones are rare", low=1)
    min_ngram: int = param(1, "a wrong draft costs little", low=1)

    def __post_init__(self) -> None:
        check(self, "drafter 'lookup'")
        if self.min_ngram > self.max_ngram:
            raise DllmError(f"prompt lookup needs min_ngram <= max_ngram, got {self.min_ngram} and {self.max_ngram}")
        self.where: dict[tuple[int, ...], int] = {}
        self.done = 0

    def reset(self, ids: Sequence[int], need: Need) -> None:
        """No n-gram is known yet."""
        super().reset(ids, need)
        self.where, self.done = {}, 0

    def draft(self, ids: Sequence[int], k: int, *, generator: torch.Generator | None = None) -> Proposal:
        """What followed the longest n-gram that is known; a tree what followed each."""
        for end in range(self.done + 1, len(ids)):  # an n-gram counts once it has a successor
            for n in range(self.min_ngram, min(self.max_ngram, end) + 1):
                self.where[tuple(ids[end - n : end])] = end
        self.done = max(self.done, len(ids) - 1)
        found = self._found(ids, k)
        return union(found, self.need.tree) if self.need.tree else next(found, EMPTY)

    def _found(self, ids: Sequence[int], k: int) -> Iterator[Proposal]:
        for n in range(min(self.max_ngram, len(ids)), self.min_ngram - 1, -1):
            end = self.where.get(tuple(ids[len(ids) - n :]))
            if end is not None:
                yield _copied(n, ids[end : end + k], self.need)


@dataclass(eq=False)
class TokenRecycling(Drafter):
    """A table of the verifier's best successors of every token, filled at every verified node, also rejected ones.

    Drafts are trees (or the best chain) over the table, best first by what is known of each rank (in the manner of
    arXiv 2408.08696). Without a store the table belongs to one text and begins empty. It needs the verifier's logits,
    which only `dllm.speculate` and the transformers hook hand out.
    """

    name = "recycle"
    lattices = False
    free = True
    successors = True

    width: int = param(BEST, "the loop hands out so many", low=1)

    def __post_init__(self) -> None:
        check(self, "drafter 'recycle'")
        self.table = Successors()

    def reset(self, ids: Sequence[int], need: Need) -> None:
        """A table on top of the store's."""
        super().reset(ids, need)
        self.table = Successors(None if need.store is None else need.store.successors)

    def observe(self, ids: Sequence[int], emitted: Sequence[int], successors: Sequence[Seen]) -> None:
        """Renew the successors of the verified tokens."""
        before = ids[-len(emitted) - 1]
        self.table.learn(before, emitted, {(node.path or (before,))[-1]: node.best for node in successors})

    def lessons(self) -> Sequence[Successors]:
        """The table."""
        return (self.table,)

    def draft(self, ids: Sequence[int], k: int, *, generator: torch.Generator | None = None) -> Proposal:
        """The best chain of successors, or the tree of the most probable ones."""
        ranks = self.table.ranks()[: self.width if self.need.tree else 1]

        def following(path: tuple[int, ...]) -> list[tuple[int, float]]:
            return list(zip(self.table.after((path or ids)[-1]), ranks, strict=False))

        return retrieved(following, k, self.need)


class Fallback(Drafter):
    """Retrieval where the text repeats itself (a match of `min_match` tokens), else the model: retrieval costs no
    forward."""

    def __init__(self, model: Drafter, retrieval: SuffixDrafter | None = None, min_match: int = 6) -> None:
        self.model, self.retrieval, self.min_match = model, retrieval or SuffixDrafter(min_match), min_match
        self.name = f"{self.retrieval.name}+{model.name}"
        self.successors, self.taps = model.successors, model.taps

    @property
    def chains_only(self) -> bool:
        """As the model says."""
        return self.model.chains_only

    @property
    def lattices(self) -> bool:
        """As the model says; what is retrieved stays as it is."""
        return self.model.lattices

    def fork(self) -> Fallback:
        """Both drafters forked."""
        return Fallback(self.model.fork(), copy(self.retrieval), self.min_match)

    def reset(self, ids: Sequence[int], need: Need) -> None:
        """Both begin the text."""
        super().reset(ids, need)
        self.model.reset(ids, need)
        self.retrieval.reset(ids, need)

    def draft(self, ids: Sequence[int], k: int, *, generator: torch.Generator | None = None) -> Lattice | Proposal:
        """What was retrieved where the match is long enough, else the model's draft."""
        found = self.retrieval.draft(ids, k)
        if len(found) and self.retrieval.match >= self.min_match:
            return found
        try:
            return self.model.draft(ids, k, generator=generator)
        finally:
            self.forwards = self.model.forwards

    def observe(self, ids: Sequence[int], emitted: Sequence[int], successors: Sequence[Seen]) -> None:
        """The model learns; retrieval reads the text itself."""
        self.model.observe(ids, emitted, successors)

    def take(self, states: Tensor, start: int) -> None:
        """The model's."""
        self.model.take(states, start)

    def lessons(self) -> Sequence[Lesson]:
        """The model's."""
        return self.model.lessons()


def retrieved(following: Callable[[tuple[int, ...]], list[tuple[int, float]]], k: int, need: Need) -> Proposal:
    """The chain of `k` tokens, or the tree of the nodes most likely to be reached, of what `following` says of a path:
    tokens with their probabilities, best first."""

    def behind(path: tuple[int, ...], depth: int, chance: float) -> list[tuple[int, float, tuple[int, ...]]]:
        if depth == k or (path and path[-1] in need.eos):
            return []
        return [(token, conf, (*path, token)) for token, conf in following(path)[: None if need.tree else 1]]

    root: tuple[int, ...] = ()
    return best_first(root, behind, need.tree or k)[0]


def _copied(match: int, tokens: Sequence[int], need: Need) -> Proposal:
    """What followed a match, cut behind the first end token: the longer the match, the more it is trusted."""
    n = next((i + 1 for i, t in enumerate(tokens) if t in need.eos), len(tokens))
    return chain(tokens[:n], [match / (match + 1)] * n)
