"""The loss of one batch: masked diffusion for every family, or next-token prediction for a causal twin."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.models.transformer import Transformer
from dllm.training.config import MaskSpec
from dllm.training.data import Batch
from dllm.training.diffusion import Weighting, mask_hard, mask_window, noise_levels, reading_rows, weighted


class Loss(NamedTuple):
    """`value` in nats per supervised token; `correct` of `tokens` were predicted."""

    value: Tensor
    correct: Tensor
    tokens: int


class Diffusion:
    """Predict the masked tokens of the answer window from everything else.

    Shares of the rows are masked from a random column on (`reading_rows`) or by difficulty (`mask_hard`; half of these
    behind a random column too), the rest at random. Difficulty is a running mean of the loss of each id; it is part of
    the state of a run.
    """

    def __init__(self, mask_id: int, vocab_size: int, weighting: Weighting, masks: MaskSpec = MaskSpec()) -> None:
        self.mask_id, self.weighting, self.masks = mask_id, weighting, masks
        self.difficulty = torch.ones(vocab_size)

    def __call__(self, model: Transformer, batch: Batch, generator: torch.Generator) -> Loss:
        noisy, masked, t = self.noise(batch, generator, bool(model.config.shift))
        device = model.embed_tokens.weight.device
        ids, noisy, masked = batch.ids.to(device), noisy.to(device), masked.to(device)
        rows, columns = masked.nonzero(as_tuple=True)  # (M,) each
        logits = model.head(_hidden(model, noisy, ids, rows, columns))  # (M, V)
        window = (batch.ids.shape[1] - batch.prompt).sum().to(device)
        targets = ids[rows, columns]
        nats = F.cross_entropy(logits.float(), targets, reduction="none")
        if self.masks.hard:
            self._learn(nats.detach().cpu(), targets.cpu())
        return _loss(weighted(nats, t.to(device)[rows], window, self.weighting), logits, targets)

    def noise(self, batch: Batch, generator: torch.Generator, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy ids and mask, both (B, T), and the masking rate (B,) of every row."""
        ids, t = batch.ids, noise_levels(len(batch.ids), generator) ** self.masks.power
        if not (self.masks.reading or self.masks.hard):
            return *mask_window(ids, batch.prompt, self.mask_id, t, generator, shifted), t
        kind = torch.rand(len(ids), generator=generator)  # (B,)
        reading, half = kind < self.masks.reading, kind < self.masks.reading + self.masks.hard / 2
        first = reading_rows(batch.prompt, batch.answer, half, generator)
        t = torch.where(reading, 1.0, t)
        _, masked = mask_window(ids, first, self.mask_id, t, generator, shifted)
        hard = ~reading & (kind < self.masks.reading + self.masks.hard)
        chosen = mask_hard(ids, first.clamp(min=int(shifted)), t, self.difficulty, generator)
        masked = torch.where(hard[:, None], chosen, masked)
        return torch.where(masked, self.mask_id, ids), masked, t

    def _learn(self, nats: Tensor, targets: Tensor) -> None:
        """Move the difficulty of the ids of this batch towards their mean loss, faster for the frequent ones."""
        total = torch.zeros_like(self.difficulty).scatter_add_(0, targets, nats)
        count = torch.bincount(targets, minlength=len(total)).float()
        self.difficulty += (0.01 * count).clamp(max=0.1) * (total / count.clamp(min=1) - self.difficulty)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it: the difficulty of each id, (V,)."""
        return {"difficulty": self.difficulty.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self.difficulty = state["difficulty"].clone()


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

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: it learns nothing of its own."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """There is nothing to load."""


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
        hidden: Tensor = model(noisy)
        return hidden[rows, source]
    n = noisy.shape[1]
    pos = torch.arange(n, device=noisy.device)
    own = pos[:, None] // block == pos // block  # (T, T)
    past = pos // block < pos[:, None] // block
    none = torch.zeros_like(own)
    visible = torch.cat([torch.cat([own, past], 1), torch.cat([none, own | past], 1)])  # (2T, 2T)
    hidden = model(torch.cat([noisy, clean], 1), pos.repeat(2)[None], visible=visible[None])
    finished = source // block < columns // block
    return hidden[rows, source + n * finished]
