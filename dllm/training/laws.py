"""How far the drafter's law of a slot is from the verifier's, and how much of a draft the verifier accepts.

Laws are log-probabilities (N, V) of N slots: p the verifier's behind the text before each, q the drafter's, which
gradients reach. Nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each slot, (N,): q covers all that the verifier may say."""
    return (p.exp() * (p - q).masked_fill(p.isneginf(), 0.0)).sum(-1)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(q || p) of each slot, (N,): q settles on what the verifier likes."""
    return forward_kl(q, p)


def jsd(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each slot, (N,): symmetric, at most log 2."""
    middle = torch.logaddexp(p, q) - math.log(2)
    return (forward_kl(p, middle) + forward_kl(q, middle)) / 2


def tvd(p: Tensor, q: Tensor) -> Tensor:
    """Total variation of each slot, (N,): the chance that a token drawn from q is rejected."""
    return (p.exp() - q.exp()).abs().sum(-1) / 2


DIVERGENCES: Mapping[str, Divergence] = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "jsd": jsd,
    "tvd": tvd,
}


def tvd_plus(p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
    """TVD++ (arXiv 2403.00858): the total variation (N,), whose gradient is that of a policy with rewards.

    The tokens (N, S) are drawn from q. The total variation falls where q grows on tokens with p > q: these have reward
    1, the others 0. The gradient is that of log q at the draws, times minus the reward, standardised over the batch.
    """
    drawn = q.gather(-1, tokens)  # (N, S)
    reward = (p.gather(-1, tokens) > drawn).to(q.dtype)
    advantage = (reward - reward.mean()) / reward.std(correction=0).clamp_min(1e-6)
    policy = -(drawn * advantage).mean(-1)
    return tvd(p, q).detach() + policy - policy.detach()


def kept(gap: Tensor, share: float) -> Tensor:
    """1 for the share of the tokens with the largest gaps (N,), at least one, and 0 for the others; ties go to the
    first."""
    n = max(1, round(share * len(gap)))
    return torch.zeros_like(gap).index_fill(0, gap.argsort(descending=True, stable=True)[:n], 1.0)


def folded(q: Tensor, best: Tensor) -> Tensor:
    """The law of the tokens `best` (N, K), and of all others as one: (N, K + 1)."""
    rest = q.scatter(-1, best, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([q.gather(-1, best), rest], -1)


def accepted(p: Tensor, q: Tensor, draws: int = 1) -> Tensor:
    """Probability of each token to be drafted and accepted, (N, V), where a slot has `draws` independent draws.

    One draw is a chain's: min(p, q). Of several, siblings in a tree, each is judged by what the verifier's law has left
    once those before it were rejected (SpecInfer, arXiv 2305.09781).
    """
    left, draft, open_, mass = p.exp(), q.exp(), torch.ones_like(p[..., :1]), torch.zeros_like(p)
    for i in range(draws):
        taken = torch.minimum(left, draft)
        mass = mass + open_ * taken
        if i + 1 < draws:
            rest = left - taken
            total = rest.sum(-1, keepdim=True)
            left, open_ = rest / total.clamp_min(torch.finfo(p.dtype).tiny), open_ * total
    return mass


def expected_length(
    p: Tensor, q: Tensor, tokens: Tensor, row: Tensor, column: Tensor, shape: tuple[int, int], draws: int = 1
) -> Tensor:
    """Expected number of accepted tokens, (B,), of drafts whose slots stand at (row, column) of a table of `shape`.

    sum_i (prod_{j < i} c_j) a_i: a_i is the chance that a draw of slot i is accepted, c_j that `tokens` (N,), the
    verifier's own, were. In the mean over such tokens this is the expectation itself. The slots of a masked-diffusion
    drafter do not see each other's draws, so with several draws a slot it is that of a tree over its slots.
    """
    mass = accepted(p, q, draws)
    at = tokens[:, None]
    chance = (mass.gather(-1, at) / p.exp().gather(-1, at).clamp_min(torch.finfo(p.dtype).tiny))[:, 0].clamp(max=1.0)
    table = torch.ones(shape, dtype=q.dtype, device=q.device).index_put((row, column), chance)
    before = torch.cat([torch.ones_like(table[:, :1]), table.cumprod(1)[:, :-1]], 1)[row, column]  # (N,)
    lengths = torch.zeros(shape[0], dtype=q.dtype, device=q.device)
    return lengths.index_add(0, row, before * mass.sum(-1))
