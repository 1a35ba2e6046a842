"""The processes of one run, as `accelerate launch` or `torchrun` starts them: each computes a share of every step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dllm.errors import DllmError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process, number `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls, device: str) -> Team:
        """The team that the environment describes; alone where it describes none."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise DllmError("several processes need accelerate: pip install 'dllm-toolkit[accelerate]'") from error
        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def device(self, device: str) -> str:
        """The device of this process, where the recipe leaves it open or names a kind."""
        own = device in ("auto", "cuda") and self.size > 1 and torch.cuda.is_available()
        return f"cuda:{self.rank % torch.cuda.device_count()}" if own else device

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of what all have."""
        return items[self.rank * len(items) // self.size : (self.rank + 1) * len(items) // self.size]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the processes."""
        if self.size > 1 and tensors:
            flat = torch.cat([t.flatten().float() for t in tensors])
            torch.distributed.all_reduce(flat)
            for t, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
                t.copy_(total.view_as(t))

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            torch.distributed.barrier()
