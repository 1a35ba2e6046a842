"""A model whose answers are written down: hand examples run through the real engine without weights.

    Scripted(table)                 the same logits (L, V) at every forward
    Scripted([table, table, ...])   one table for each forward; the last one repeats
    Scripted(function)              function(ids of one row, as a list) -> (L, V): the same alone and in a batch

Tables cover the generated columns of the canvas, `prompt` columns before them predict token 0. `probabilities` turns
rows of probabilities into logits; `peaks` makes rows from (token, confidence) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dllm.models.model import Model


class Scripted(Model):
    """Full forwards only; the hidden states are the logits themselves."""

    device, dtype = torch.device("cpu"), torch.float64
    family = "scripted"

    def __init__(
        self,
        script: Tensor | Sequence[Tensor] | Callable[[list[int]], Tensor],
        *,
        vocab: int | None = None,
        eos: int | None = None,
        mask: int | None = None,
        prompt: int = 1,
        max_positions: int = 4096,
    ) -> None:
        self.script = [script] if isinstance(script, Tensor) else script
        if vocab is None:
            assert not callable(self.script)
            vocab = self.script[0].shape[-1] + 1
        self.vocab_size = self.embedding_rows = vocab
        self.mask_id = vocab - 1 if mask is None else mask  # one id beyond the tokens of the tables
        self.eos_ids = () if eos is None else (eos,)
        self.prompt = prompt
        self.max_positions = max_positions
        self.seen: list[list[list[int]]] = []  # by forward and row: what was fed

    @property
    def calls(self) -> int:
        """Forwards so far."""
        return len(self.seen)

    def table(self, ids: list[int]) -> Tensor:
        if callable(self.script):
            return self.script(ids)
        return self.script[min(self.calls, len(self.script) - 1)]

    def forward(self, ids: Tensor, pos: Tensor | None = None, **_: object) -> Tensor:
        rows = ids.tolist()
        hidden = torch.zeros(*ids.shape, self.vocab_size, dtype=torch.float64)
        hidden[..., 1:] = -30.0
        for row, tokens in enumerate(rows):
            table = self.table(tokens)[: len(tokens) - self.prompt]
            hidden[row, self.prompt : self.prompt + len(table), : table.shape[-1]] = table
        self.seen.append(rows)
        return hidden


def probabilities(rows: Sequence[Sequence[float]]) -> Tensor:
    """(L, V) logits whose softmax are these rows."""
    return torch.tensor(rows, dtype=torch.float64).log()


def peaks(pairs: Sequence[tuple[int, float]], vocab: int) -> Tensor:
    """(L, V) logits: in each row one token has the given probability, the others share the rest."""
    table = torch.empty(len(pairs), vocab, dtype=torch.float64)
    for row, (token, confidence) in enumerate(pairs):
        table[row] = (1 - confidence) / (vocab - 1)
        table[row, token] = confidence
    return table.log()
