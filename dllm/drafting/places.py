"""Keys and values that stand still: the slot of a key is its place in its row, so rows may accept different counts.

What a round feeds is written behind the row's text; to forget it the host counts fewer slots. Masks are built on the
device from small tables, so a round of one shape is pure over static tensors: `Graphs` may capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from dllm.drafting.proposal import sent


class Places:
    """Slots of every layer, and the tables that say what a round feeds. `cache` is what the model is given."""

    def __init__(self, config: PreTrainedConfig, batch: int, slots: int) -> None:
        self.slots = slots
        self.rows = torch.arange(batch)[:, None]
        self.cache = DynamicCache(config=config)
        self.layers = [Layer(self) for layer in self.cache.layers if isinstance(layer, DynamicLayer)]
        placed = iter(self.layers)  # since transformers 5.23 there are layers that store nothing
        self.cache.layers = [next(placed) if isinstance(old, DynamicLayer) else old for old in self.cache.layers]
        self.tables: dict[tuple[str, int], Tensor] = {}
        self.before = 0  # slots that the forward reads beside those that it writes
        self.where = self.rows  # (B, Q) slots that it writes

    def tell(self, name: str, numbers: list[list[int]] | Tensor, device: torch.device) -> Tensor:
        """Numbers (B, n) of the host in the static table of their name and width, on the device, without a wait."""
        table = sent(numbers, device)
        self.rows = self.rows.to(device)
        return self.tables.setdefault((name, table.shape[1]), table).copy_(table)

    def distance(self, past: Tensor) -> Tensor:
        """How far behind each row's text (B, 1) every slot is that the forward reads: (B, S), negative in the text."""
        return torch.arange(self.before + self.where.shape[1], device=past.device) - past

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy keys and values between slots, both (B, M)."""
        for kept in self._kept():
            kept[self.rows, :, target] = kept[self.rows, :, source]

    def take(self, other: Places) -> None:
        """What a store of fewer slots holds."""
        for layer, smaller in zip(self.layers, other.layers, strict=True):
            if smaller.is_initialized:
                layer.lazy_initialization(smaller.keys, smaller.values)
                layer.keys[:, :, : other.slots], layer.values[:, :, : other.slots] = smaller.keys, smaller.values

    def clear(self) -> None:
        """Zeros everywhere: what an earlier text left behind weighs nothing, but may not be NaN."""
        for kept in self._kept():
            kept.zero_()

    def _kept(self) -> list[Tensor]:
        return [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]


class Layer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values (B, H, S, D) of one layer."""

    keys: Tensor
    values: Tensor

    def __init__(self, places: Places) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places = places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for all slots, once the first states (B, H, Q, D) show their shape; it stays where it is."""
        both, slots = (key_states, value_states), self.places.slots
        if not self.is_initialized:
            self.keys, self.values = (new.new_zeros(*new.shape[:2], slots, new.shape[3]) for new in both)
            self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write states (B, H, Q, D); all that may be seen."""
        self.lazy_initialization(key_states, value_states)
        places, width = self.places, self.places.before + key_states.shape[2]
        self.keys[places.rows, :, places.where] = key_states.transpose(1, 2)
        self.values[places.rows, :, places.where] = value_states.transpose(1, 2)
        return self.keys[:, :, :width], self.values[:, :, :width]

    def get_seq_length(self) -> int:
        """As of a cache that the new states are appended to."""
        return self.places.before
