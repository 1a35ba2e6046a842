"""The loss of one batch: masked diffusion for every family, or next-token prediction for a causal twin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.transformer import Transformer
from .data import Batch
from .diffusion import Weighting, mask_window, masked_loss, noise_levels, reading_rows


class Loss(NamedTuple):
    """`value` in nats per supervised token; `correct` of `tokens` were predicted."""

    value: Tensor
    correct: Tensor
    tokens: int


@dataclass(frozen=True)
class Diffusion:
    """Predict the masked tokens of the answer window from everything else."""

    mask_id: int
    weighting: Weighting
    reading: float = 0.0  # share of rows masked from a random column on, see `reading_rows`

    def __call__(self, model: Transformer, batch: Batch, generator: torch.Generator) -> Loss:
        t = noise_levels(len(batch.ids), generator)
        first, t = reading_rows(batch.prompt, batch.answer, t, self.reading, generator)
        noisy, masked = mask_window(batch.ids, first, self.mask_id, t, generator, bool(model.config.shift))
        device = model.embed_tokens.weight.device
        ids, noisy, masked = batch.ids.to(device), noisy.to(device), masked.to(device)
        rows, columns = masked.nonzero(as_tuple=True)  # (M,) each
        logits = model.head(_hidden(model, noisy, ids, rows, columns))  # (M, V)
        window = (batch.ids.shape[1] - batch.prompt).sum().to(device)
        targets = ids[rows, columns]
        value = masked_loss(logits, targets, t.to(device)[rows], window, self.weighting)
        return _loss(value, logits, targets)


@dataclass(frozen=True)
class Autoregressive:
    """Predict every token of the answer, its first EOS included, from those before it."""

    def __call__(self, model: Transformer, batch: Batch, generator: torch.Generator) -> Loss:
        device = model.embed_tokens.weight.device
        column = torch.arange(batch.ids.shape[1])
        supervised = (column >= batch.prompt[:, None]) & (column < (batch.prompt + batch.answer)[:, None])
        ids, rows = batch.ids.to(device), supervised[:, 1:].to(device)
        logits = model.head(model(ids[:, :-1])[rows])  # (M, V)
        targets = ids[:, 1:][rows]
        return _loss(F.cross_entropy(logits.float(), targets), logits, targets)


def _loss(value: Tensor, logits: Tensor, targets: Tensor) -> Loss:
    return Loss(value, (logits.argmax(-1) == targets).sum(), len(targets))


def _hidden(model: Transformer, noisy: Tensor, clean: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The hidden states (M, D) that predict the given tokens: row i - shift predicts position i.

    A block-causal model reads finished blocks clean, so the noisy and the clean row pass side by side and a noisy block
    sees itself and the clean blocks before it (arXiv 2503.09573). A shifted one predicts the first token of a block
    from the last of the block before it, which is finished by then.
    """
    block, shift = model.config.block_size, model.config.shift
    source = (columns - shift).clamp(min=0)
    if block is None:
        return model(noisy)[rows, source]
    n = noisy.shape[1]
    pos = torch.arange(n, device=noisy.device)
    own = pos[:, None] // block == pos // block  # (T, T)
    past = pos // block < pos[:, None] // block
    none = torch.zeros_like(own)
    visible = torch.cat([torch.cat([own, past], 1), torch.cat([none, own | past], 1)])  # (2T, 2T)
    hidden = model(torch.cat([noisy, clean], 1), pos.repeat(2)[None], visible=visible[None])
    finished = source // block < columns // block
    return hidden[rows, source + n * finished]
