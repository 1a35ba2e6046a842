"""Tokens of a verifier that are several of a drafter's: the cache of n-grams of OmniDraft (arXiv 2507.02659).

What a verifier said is tokenised by the drafter, token by token: where one of them is d_1 .. d_n there, a draft that
holds d_1 .. d_n is read as that token. In a draft of laws q_1, q_2, ... it gets the chance q_1(d_1) ... q_n(d_n), which
d_1 alone loses, and an n-gram to a longer one. The paper samples by these chances, which is no law of the verifier;
here they order point proposals alone, so that the text stays the verifier's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dllm.drafting.proposal import Proposal, best_first, chain
from dllm.models.tokenizer import Tokenizer

Slot = Mapping[int, float]  # the drafter's best ids of a slot with their probabilities


@dataclass(eq=False)
class Bridge:
    """The n-grams of a pair of tokenizers, filled from texts; `direct` are ids of the verifier by those of the drafter
    that are the same string."""

    drafter: Tokenizer
    verifier: Tokenizer
    direct: Mapping[int, int]
    grams: dict[int, dict[tuple[int, ...], int]] = field(default_factory=dict)  # by the first id
    seen: set[int] = field(default_factory=set)  # the verifier's ids that were looked at

    def learn(self, ids: Sequence[int], n: int) -> None:
        """Take in the last n tokens of a verifier's text."""
        for at in range(max(0, len(ids) - n), len(ids)):
            if ids[at] not in self.seen:
                self.seen.add(ids[at])
                self._add(ids[max(0, at - 1) : at], ids[at])

    def _add(self, before: Sequence[int], token: int) -> None:
        """The token behind another one, as a text begins otherwise with some tokenizers."""
        lead = self.verifier.decode(list(before))
        text = self.verifier.decode([*before, token])
        text = text[len(lead) :] if text.startswith(lead) else ""
        pieces = tuple(self.drafter(text, add_special_tokens=False)["input_ids"]) if text else ()
        if len(pieces) > 1 and self.drafter.decode(list(pieces)) == text:  # a part of a sign is no text
            self.grams.setdefault(pieces[0], {})[pieces] = token

    def following(self, slots: Sequence[Slot], at: int) -> list[tuple[int, float, int]]:
        """What may stand at a slot: a token of the verifier, its chance, and the slot behind it. A draft is read as the
        longest n-gram that it begins with, so an n-gram loses what longer ones take of it."""
        found = list[tuple[int, float, int]]()
        for first, chance in slots[at].items() if at < len(slots) else ():
            held: dict[tuple[int, ...], tuple[int | None, float]] = {(first,): (self.direct.get(first), chance)}
            for gram, token in sorted(self.grams.get(first, {}).items(), key=lambda one: len(one[0])):
                if at + len(gram) <= len(slots) and all(d in slots[at + j] for j, d in enumerate(gram)):
                    whole = float(np.prod([slots[at + j][d] for j, d in enumerate(gram)]))
                    shorter = next(gram[:n] for n in range(len(gram) - 1, 0, -1) if gram[:n] in held)
                    held[shorter] = held[shorter][0], held[shorter][1] - whole
                    held[gram] = token, whole
            found += [(token, p, at + len(gram)) for gram, (token, p) in held.items() if token is not None]
        return _distinct(found)

    def proposal(self, slots: Sequence[Slot], budget: int, banned: frozenset[int]) -> Proposal:
        """The best tree of at most `budget` nodes over the slots, or, of 0, the chain that takes what is most likely at
        every step; of tokens that are not banned."""

        def behind(at: int, _depth: int, _chance: float) -> Iterator[tuple[int, float, int]]:
            return (one for one in self.following(slots, at) if one[0] not in banned and one[1] > 0)

        if budget:
            return best_first(0, behind, budget)[0]
        tokens, conf, at = list[int](), list[float](), 0
        while best := max(behind(at, 0, 1.0), key=lambda one: one[1], default=None):
            tokens.append(best[0])
            conf.append(best[1])
            at = best[2]
        return chain(tokens, conf)

    def merged(self, draft: Sequence[int]) -> list[int]:
        """A finished draft of the drafter's ids as the verifier's, up to the first that has none."""
        return list(self.proposal([{d: 1.0} for d in draft], 0, frozenset()).tokens)


def _distinct(found: Iterable[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """One of each token, the most likely; where its slots end differs with how it came about."""
    best: dict[int, tuple[int, float, int]] = {}
    for one in found:
        if one[0] not in best or one[1] > best[one[0]][1]:
            best[one[0]] = one
    return list(best.values())
