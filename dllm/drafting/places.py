"""What stands still between forwards, so that `Graphs` may capture them: tables of what the host says, and keys and
values of a transformers model, where the slot of a key is its place in its row, so rows may accept different counts.

What a round feeds is written behind the row's text; to forget it the host counts fewer slots. Masks are built on the
device from small tables, so a round of one shape is pure over static tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from dllm.drafting.proposal import sent


def bucket(n: int, least: int = 1) -> int:
    """A width of at least n that forwards are padded to: few, so that each is captured soon and a long text needs but a
    few dozen. Powers of two up to 16, then steps of 16, above 128 of a quarter of a doubling."""
    width = 1 << (n - 1).bit_length() if n <= 16 else 0
    step = max(16, 1 << ((n - 1).bit_length() - 3)) if n > 16 else 1
    return max(least, width or -(-n // step) * step)


class Tables:
    """Numbers of the host where captured work finds them."""

    def __init__(self) -> None:
        self.tables: dict[tuple[str, torch.Size], Tensor] = {}

    def tell(self, name: str, numbers: list[list[int]] | Tensor, device: torch.device) -> Tensor:
        """Numbers (B, n) in the static table of their name and shape, on the device, without a wait."""
        table = sent(numbers, device)
        return self.tables.setdefault((name, table.shape), table).copy_(table)


class Places(Tables):
    """Slots of every layer, and the tables that say what a round feeds. `cache` is what the model is given.

    A forward is of all rows, or of those that `turn` names.
    """

    def __init__(self, config: PreTrainedConfig, batch: int, slots: int) -> None:
        super().__init__()
        self.batch, self.slots = batch, slots
        self.rows = torch.arange(batch)[:, None]
        self.whole = True  # the rows are all that there are
        self.cache = DynamicCache(config=config)
        self.layers = [Layer(self) for layer in self.cache.layers if isinstance(layer, DynamicLayer)]
        placed = iter(self.layers)  # since transformers 5.23 there are layers that store nothing
        self.cache.layers = [next(placed) if isinstance(old, DynamicLayer) else old for old in self.cache.layers]
        self.before = 0  # slots that the forward reads beside those that it writes
        self.where = self.rows  # (B, Q) slots that it writes

    def tell(self, name: str, numbers: list[list[int]] | Tensor, device: torch.device) -> Tensor:
        """See `Tables`."""
        self.rows = self.rows.to(device)
        return super().tell(name, numbers, device)

    def turn(self, rows: Sequence[int], device: torch.device) -> None:
        """Have the next forwards be of these rows."""
        self.whole = list(rows) == list(range(self.batch))
        self.rows = self.tell("row", [[row] for row in rows], device)

    def seen(self, kept: Tensor, width: int) -> Tensor:
        """The first slots of the rows of a forward, (B, H, width, D)."""
        first = kept[:, :, :width]
        return first if self.whole else first.index_select(0, self.rows[:, 0])

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

    def clear(self, row: int | None = None) -> None:
        """Zeros in a row, or in all: what an earlier text left behind weighs nothing, but may not be NaN."""
        for kept in self._kept():
            (kept if row is None else kept[row]).zero_()

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
            batch = self.places.batch
            self.keys, self.values = (new.new_zeros(batch, new.shape[1], slots, new.shape[3]) for new in both)
            self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write states (B, H, Q, D); all that may be seen."""
        self.lazy_initialization(key_states, value_states)
        places, width = self.places, self.places.before + key_states.shape[2]
        self.keys[places.rows, :, places.where] = key_states.transpose(1, 2)
        self.values[places.rows, :, places.where] = value_states.transpose(1, 2)
        return places.seen(self.keys, width), places.seen(self.values, width)

    def get_seq_length(self) -> int:
        """As of a cache that the new states are appended to."""
        return self.places.before
