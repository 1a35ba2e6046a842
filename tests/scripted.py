"""A model whose answers are written down: hand examples run through the real engine without weights.

    Scripted(table)                 the same logits (L, V) at every forward
    Scripted([table, table, ...])   one table for each forward; the last one repeats
    Scripted(function)              function(ids of one row, as a list) -> (L, V): the same alone and in a batch

Tables cover the generated columns of the canvas, `prompt` columns before them predict token 0. `probabilities` turns
rows of probabilities into logits; `peaks` makes rows from (token, confidence) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Scripted:
    """Stands where a `Model` stands: full forwards only, hidden states are the logits themselves."""

    supports_cache = False
    device = torch.device("cpu")
    dtype = torch.float64
    family = "scripted"
    shift = 0
    block_size = None
    bos_id = pad_id = tokenizer = None

    def __init__(
        self,
        script: Tensor | Sequence[Tensor] | Callable[[list[int]], Tensor],
        *,
        vocab: int | None = None,
        eos: int | None = None,
        prompt: int = 1,
        max_positions: int = 4096,
    ) -> None:
        if isinstance(script, Tensor):
            script = [script]
        self.script = script
        self.vocab_size = vocab or int(script[0].shape[-1]) + 1  # type: ignore[index]
        self.mask_id = self.vocab_size - 1  # one id beyond the tokens of the tables
        self.eos_ids = () if eos is None else (eos,)
        self.prompt = prompt
        self.max_positions = max_positions
        self.config = SimpleNamespace(embedding_rows=self.vocab_size)
        self.calls = 0

    def table(self, ids: list[int]) -> Tensor:
        if callable(self.script):
            return self.script(ids)
        return self.script[min(self.calls, len(self.script) - 1)]

    def forward(self, ids: Tensor, pos: Tensor | None = None, **_: Any) -> Tensor:
        hidden = torch.zeros(*ids.shape, self.vocab_size, dtype=torch.float64)
        hidden[..., 1:] = -30.0
        for row, tokens in enumerate(ids.tolist()):
            table = self.table(tokens)[: len(tokens) - self.prompt]
            hidden[row, self.prompt : self.prompt + len(table), : table.shape[-1]] = table
        self.calls += 1
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits = hidden.clone()
        logits[..., self.mask_id] = -torch.inf
        return logits

    def source(self, pos: Tensor) -> Tensor:
        return pos.clamp(min=0)


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
