"""Drafts from the verifier's own probabilities behind the grams of texts that it has read (STAND, arXiv 2506.04708)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.drafting.drafters import Drafter, Need
from dllm.drafting.lattice import draws, uniforms
from dllm.drafting.proposal import EMPTY, Proposal, Rows, sent
from dllm.drafting.retrieval import retrieved
from dllm.drafting.store import BEST, Grams, Seen
from dllm.spec import check, param


@dataclass(eq=False)
class StandDrafter(Drafter):
    """What the verifier said the last times behind the longest known end of the text, up to three tokens, averaged.

    Where the search samples, tokens are drawn from these rows under the verifier's own warpers, and the rows are handed
    over: the ratio test is exact. Of a tree the first tokens are drawn without replacement, each goes on as a chain.
    Otherwise the drafts are points: the best chain, or the tree of the most probable prefixes. Without a store the rows
    are those of the text alone. It needs the verifier's logits, which only `dllm.speculate` and the transformers hook
    hand out.
    """

    name = "stand"
    lattices = False
    successors = True

    width: int = param(BEST, "the loop hands out so many", low=1)

    def __post_init__(self) -> None:
        check(self, "drafter 'stand'")
        self.grams = Grams(1)

    def reset(self, ids: Sequence[int], need: Need) -> None:
        """Rows on top of the store's."""
        super().reset(ids, need)
        store = need.store
        self.grams = Grams(store.grams.limit, store.grams) if store else Grams(1 << 16)

    def observe(self, ids: Sequence[int], emitted: Sequence[int], successors: Sequence[Seen]) -> None:
        """Average in what the verifier said."""
        self.grams.learn(ids[: len(ids) - len(emitted)], successors)

    def lessons(self) -> Sequence[Grams]:
        """The rows."""
        return (self.grams,)

    def _after(self, ids: Sequence[int], path: Sequence[int]) -> list[tuple[int, float]]:
        row = self.grams.after([*ids[-Grams.ORDER :], *path])
        return [*zip(row.best, row.prob, strict=True)][: self.width] if row else []

    def draft(self, ids: Sequence[int], k: int, *, generator: torch.Generator | None = None) -> Proposal:
        """Draws where the search samples, else the most probable."""
        if not self.need.sampled:
            return retrieved(lambda path: self._after(ids, path), k, self.need)
        heads = max(1, min(self.need.draws, k)) if self.need.tree else 1
        depth = max(1, min(k, self.need.tree // heads)) if self.need.tree else k
        tokens, parents = list[int](), list[int]()
        index, prob = list[Tensor](), list[Tensor]()

        def drawn(path: Sequence[int], parent: int, n: int) -> list[int]:
            found = self._law(self._after(ids, path))
            if found is None:
                return []
            names, law = found
            picked = draws(law, sent(uniforms(1, n, generator), law.device))[0].tolist()
            picked = [i for i in picked if i >= 0]
            for i in picked:
                tokens.append(int(names[i]))
                parents.append(parent)
                index.append(names)
                prob.append(law[0])
            return list(range(len(tokens) - len(picked), len(tokens)))

        for head in drawn((), -1, heads):
            path, node = [tokens[head]], head
            while len(path) < depth and path[-1] not in self.need.eos and (more := drawn(path, node, 1)):
                node = more[0]
                path.append(tokens[node])
        if not tokens:
            return EMPTY
        return Proposal(tuple(tokens), tuple(parents), "sampled", Rows(torch.stack(prob), torch.stack(index)))

    def _law(self, row: Sequence[tuple[int, float]]) -> tuple[Tensor, Tensor] | None:
        """Ids (BEST,), -1 padded, and the law (1, BEST) float64 that tokens are drawn from: a row under the warpers."""
        if not row:
            return None
        names, prob = torch.full((BEST,), -1), torch.zeros(1, BEST)
        names[: len(row)] = torch.tensor([t for t, _ in row])
        prob[0, : len(row)] = torch.tensor([p for _, p in row])
        scores = prob.log()
        if self.need.warp is not None:
            scores = self.need.warp(scores)
        return names, torch.softmax(scores.double(), -1)
