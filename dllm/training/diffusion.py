"""The forward process and the losses of masked diffusion (LLaDA, arXiv 2502.09992; MDLM, arXiv 2406.07524)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["uniform", "elbo"]


def noise_levels(n: int, generator: torch.Generator) -> Tensor:
    """`n` masking rates in (0, 1], one in every n-th of the interval (low discrepancy), in random order: (n,)."""
    u = torch.rand((), generator=generator)
    t = (torch.arange(n) + u) / n
    return 1 - t[torch.randperm(n, generator=generator)]


def reading_rows(first: Tensor, answer: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """First maskable column (B,) when the `chosen` rows are what a left-to-right or blockwise decoder meets.

    Up to a random column of their answer everything is clean (cf. arXiv 2508.19529). In randomly masked rows a result
    that is used again later can often be copied from there; in these it has to be worked out.
    first (B,) first column of the window, answer (B,) tokens in it, chosen (B,) bool.
    """
    cut = first + (torch.rand(len(first), generator=generator) * answer).long()
    return torch.where(chosen, cut, first)


def mask_hard(ids: Tensor, first: Tensor, t: Tensor, difficulty: Tensor, generator: torch.Generator) -> Tensor:
    """Mask a share t of the tokens from column `first` on, one value after another, in proportion to difficulty.

    A decoder that commits what is certain first leaves the hard tokens for the end, among easy ones that stand already;
    random masks hardly ever show that state. All copies of a value are masked together: a result whose copy stands in
    the next line would be copied from there, and never worked out. The order is Plackett-Luce: log-weights plus Gumbel
    noise, sorted.
    ids (B, T), first (B,), t (B,), difficulty (V,) non-negative weight of each id. Returns the mask (B, T).
    """
    uniform = torch.rand(ids.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
    leader = (ids[:, :, None] == ids[:, None, :]).int().argmax(2)  # (B, T) first column with the same id
    window = torch.arange(ids.shape[1]) >= first[:, None]  # (B, T)
    score = (difficulty[ids] + 1e-4).log() - (-uniform.gather(1, leader).log()).log()
    score = score.masked_fill(~window, -torch.inf)
    n = (t * window.sum(1)).ceil().long().clamp(min=1)  # (B,)
    last = score.sort(1, descending=True).values.gather(1, (n - 1)[:, None])
    return window & (score >= last)


def mask_window(
    ids: Tensor, first: Tensor, mask_id: int, t: Tensor, generator: torch.Generator, skip_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Mask every token from column `first` on with probability t, and at least one.

    ids (B, T), first (B,), t (B,). Returns the noisy ids and the mask, both (B, T).
    `skip_first`: position 0 stays (a shifted model cannot predict it).
    """
    column = torch.arange(ids.shape[1])
    window = column >= first[:, None].clamp(min=int(skip_first))  # (B, T)
    u = torch.rand(ids.shape, generator=generator).masked_fill(~window, 2.0)
    masked = u < t[:, None]
    masked |= window & (u <= u.amin(1, keepdim=True))
    return torch.where(masked, mask_id, ids), masked


def weighted(nats: Tensor, t: Tensor, tokens: Tensor, weighting: Weighting) -> Tensor:
    """One number from the cross-entropies of the masked positions, in nats per token.

    nats (M,) of the M masked positions, t (M,) the masking rate of their rows, tokens () the number of tokens that
    could have been masked in the whole batch. `elbo`: weight 1/t over all tokens, the likelihood bound (LLaDA eq. 3);
    `uniform`: the plain mean over masked tokens, so that every rate counts by its masks.
    """
    return (nats / t).sum() / tokens if weighting == "elbo" else nats.mean()
