"""Which drafted tokens stay. Three exact rules, one walk from the root; none of them needs to know the drafter.

* point (chain or tree): draw the verifier's own token and follow the edge if it was drafted. For any set of children
  this accepts with the largest probability a lossless rule can have; greedy decoding is the case where the draw is the
  argmax.
* sampled chain: accept with min(1, p / q), else emit from norm([p - q]+) (Leviathan et al., arXiv 2211.17192).
* sampled siblings without replacement: the same test one sibling after the other, on the residual (recursive
  rejection).

Only nodes that are reached are looked at: behind a rejection the logits are conditioned on a token that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm.drafting.proposal import Proposal

Target = Callable[[int, Sequence[int]], Tensor]  # (node, tokens since the root) -> the verifier's scores or law (V,)
Processors = Callable[..., Tensor]  # (ids (1, L), scores (1, V)) -> scores (1, V), as transformers calls them


@dataclass(frozen=True)
class Acceptance:
    """`emitted` = the tokens of the accepted `path` and one more (a correction, or the bonus behind a leaf)."""

    emitted: tuple[int, ...]
    path: tuple[int, ...]

    @property
    def accepted(self) -> int:
        """Tokens of the draft that stay."""
        return len(self.path)


def walk_sample(proposal: Proposal, prob: Target, generator: torch.Generator | None = None) -> Acceptance:
    """Sample-and-match for point proposals: exact at any temperature with p alone."""
    return _match(proposal, lambda node, since: draw(prob(node, since), generator))


def _match(proposal: Proposal, token_at: Callable[[int, Sequence[int]], int]) -> Acceptance:
    """Follow the verifier's own tokens, computed only where the walk comes by."""

    def step(node: int, since: Sequence[int]) -> tuple[int, int | None]:
        token = token_at(node, since)
        return token, next((c for c in proposal.children.get(node, ()) if proposal.tokens[c] == token), None)

    return _walk(step)


def _walk(step: Callable[[int, Sequence[int]], tuple[int, int | None]]) -> Acceptance:
    """From the root as long as a step, (node, tokens since the root) -> (token, its node), stays in the draft."""
    emitted: list[int] = []
    path = [-1]
    while True:
        token, node = step(path[-1], emitted)
        emitted.append(token)
        if node is None:
            return Acceptance(tuple(emitted), tuple(path[1:]))
        path.append(node)


def reject(proposal: Proposal, prob: Target, generator: torch.Generator | None = None) -> Acceptance:
    """The ratio test for sampled chains and its recursive form for siblings drawn without replacement."""
    assert proposal.rows is not None
    rows = proposal.rows

    def step(node: int, since: Sequence[int]) -> tuple[int, int | None]:
        left, q = prob(node, since).double(), None
        for child in proposal.children.get(node, ()):
            token = proposal.tokens[child]
            q = rows.dense(child, len(left)).to(left.device) if q is None else q
            if float(torch.rand((), generator=generator, dtype=torch.float64)) * float(q[token]) < float(left[token]):
                return token, child
            left = _normalise((left - q).clamp_min(0), left)
            q = q.clone()
            q[token] = 0
            q = _normalise(q, q)
        return draw(left, generator), None

    return _walk(step)


def _normalise(x: Tensor, otherwise: Tensor) -> Tensor:
    """x / sum(x); a vanishing residual means p = q up to rounding, where the law before it is the right one."""
    total = x.sum()
    return x / total if float(total) > 1e-12 else otherwise


def draw(prob: Tensor, generator: torch.Generator | None = None) -> int:
    """One token from (V,) probabilities by the inverse CDF in float64; a zero entry is never drawn."""
    cdf = prob.double().cumsum(0)
    u = torch.rand((), generator=generator, dtype=torch.float64).to(cdf.device) * cdf[-1]
    index = int(torch.searchsorted(cdf, u, right=True))
    if index < len(cdf):
        return index
    return int((prob > 0).nonzero()[-1])  # u rounded up to the total


def judge(
    proposal: Proposal,
    logits: Tensor,
    prefix: Sequence[int],
    processors: Processors | None,
    do_sample: bool,
    generator: torch.Generator | None = None,
) -> Acceptance:
    """Verify a proposal against raw logits (N + 1, V): row 0 after the root, row i + 1 after node i.

    `processors` is called as transformers calls it, on (1, L) ids and (1, V) float32 scores, with the prefix of the
    node itself: drafted tokens that a processor forbids are rejected by construction.
    """
    if not do_sample and not processors:
        best = logits.float().argmax(-1).tolist()
        return _match(proposal, lambda node, _: int(best[node + 1]))
    text = torch.tensor([*prefix], device=logits.device)

    def scores(node: int, since: Sequence[int]) -> Tensor:
        row = logits[node + 1].float()[None]
        if processors:
            ids = torch.cat([text, text.new_tensor(list(since))]) if since else text
            row = processors(ids[None], row.clone())
        return row[0]

    if not do_sample:
        return _match(proposal, lambda node, since: int(scores(node, since).argmax()))

    def prob(node: int, since: Sequence[int]) -> Tensor:
        return torch.softmax(scores(node, since), -1).cpu()  # the draws are made on the host, in float64

    if proposal.kind == "sampled":
        return reject(proposal, prob, generator)
    return walk_sample(proposal, prob, generator)
