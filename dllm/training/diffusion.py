"""The forward process and the losses of masked diffusion (LLaDA, arXiv 2502.09992; MDLM, arXiv 2406.07524)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Weighting = Literal["uniform", "elbo"]


def noise_levels(n: int, generator: torch.Generator) -> Tensor:
    """`n` masking rates in (0, 1], one in every n-th of the interval (low discrepancy), in random order: (n,)."""
    u = torch.rand((), generator=generator)
    t = (torch.arange(n) + u) / n
    return 1 - t[torch.randperm(n, generator=generator)]


def reading_rows(
    first: Tensor, answer: Tensor, t: Tensor, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Turn a `share` of the rows into what a left-to-right or blockwise decoder meets (cf. arXiv 2508.19529).

    Up to a random column of the answer everything is clean, behind it everything is masked. In randomly masked rows
    a result that is used again later can often be copied from there; in these it has to be worked out.
    first (B,) first column of the window, answer (B,) tokens in it, t (B,): returns the new `first` and `t`.
    """
    chosen = torch.rand(len(t), generator=generator) < share
    cut = first + (torch.rand(len(t), generator=generator) * answer).long()
    return torch.where(chosen, cut, first), torch.where(chosen, 1.0, t)


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


def masked_loss(logits: Tensor, targets: Tensor, t: Tensor, tokens: Tensor, weighting: Weighting) -> Tensor:
    """Cross-entropy in nats per token of the masked positions.

    logits (M, V) and targets (M,) of the M masked positions, t (M,) the masking rate of their rows, tokens () the
    number of tokens that could have been masked in the whole batch.
    `elbo`: weight 1/t over all tokens, the likelihood bound; `uniform`: the plain mean over masked tokens, every
    rate alike.
    """
    nats = F.cross_entropy(logits.float(), targets, reduction="none")
    return (nats / t).sum() / tokens if weighting == "elbo" else nats.mean()
