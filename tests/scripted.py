"""The models of tests. `tiny` has random weights; `Scripted` has its answers written down, for hand examples that run
through the real engine:

    Scripted(table)                 the same logits (L, V) at every forward
    Scripted([table, table, ...])   one table for each forward; the last one repeats
    Scripted(function)              function(ids of one row, as a list) -> (L, V): the same alone and in a batch

Tables cover the generated columns of the canvas, `prompt` columns before them predict token 0. `probabilities` turns
rows of probabilities into logits; `peaks` makes rows from (token, confidence) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dllm.decoding.canvas import Span, State
from dllm.decoding.slots import Sampler
from dllm.models.config import ModelConfig
from dllm.models.model import Model
from dllm.models.native import NativeModel


def open_window(sampler: Sampler, state: State) -> tuple[State, Span]:
    """The window of a step, with no more reads than its widest row has: so the engine hands it to the step."""
    state, window = sampler.window.open(state)
    return state, window._replace(reads=window.reads[:, : int((window.reads >= 0).sum(1).max())])


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


def tiny(layers: int = 2, std: float = 0.3, block_size: int | None = None, **switches: Any) -> NativeModel:
    """A random model with real weights in float64: 40 ids, of which 39 is the mask; block-causal with a block_size."""
    torch.manual_seed(3)
    family = ("llada", "LLaDAModelLM") if block_size is None else ("sdar", "SDARForCausalLM")
    switches |= {"mask_id": 39, "block_size": block_size}
    model = NativeModel(ModelConfig(*family, 40, 40, 32, layers, 4, 2, 8, 48, **switches))
    for parameter in model.transformer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.to(dtype=torch.float64)


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
