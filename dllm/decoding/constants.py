"""What a slot goes by and no step changes: it is on the device once, for a copy from the host is a wait."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from functools import cache, cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Constant(Generic[T]):
    """Something that stays as it is, made once a device. Nobody writes into it.

    delimiters = Constant(table.to)  # in `bundle`
    delimiters.on(view.cols.device)  # in a step
    """

    def __init__(self, make: Callable[[torch.device], T]) -> None:
        cpu = torch.device("cpu")
        self._make, self._made = make, {cpu: make(cpu)}

    def on(self, device: torch.device) -> T:
        """The thing on this device."""
        if device not in self._made:
            self._made[device] = self._make(device)
        return self._made[device]

    @cached_property
    def value(self) -> Hashable:
        """What it holds: equal tables are equal, and anything else equals itself alone."""
        made = self._made[torch.device("cpu")]
        if not isinstance(made, Tensor):
            return id(self)
        content = made.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return made.dtype, tuple(made.shape), hashlib.blake2b(content).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


@cache  # none is ever dropped: captured work reads them where they lie
def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers that stay the same, on the device once; nobody writes into them."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)
