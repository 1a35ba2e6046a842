"""What an engine takes of a device beside the weights: bytes for keys and values, the positions of a tick, and less of
both where memory runs out all the same (`Room`)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from dllm.models.model import Model
from dllm.models.native import NativeModel

GIB = 1 << 30
GROUP = Path("/sys/fs/cgroup")  # of this process, where it is in a container
LOGITS = 4  # tables (positions, V) in float32 at once: logits, their softmax, and a copy of both
COLUMNS = 512  # of the canvas that a description counts in
CALM = 256  # ticks until twice as much is tried again: a try that fails costs a forward, and this many hide it


class Shares(NamedTuple):
    """Of the bytes that are left beside the weights; the rest is for what nobody counts."""

    stored: float  # keys and values
    forwards: float


OWN = Shares(0.7, 0.2)  # an accelerator's memory is one program's
COMMON = Shares(0.35, 0.15)  # on the host others allocate, too


@dataclass
class Room:
    """How much is tried at a time: half of what memory ran out at, and twice as much again after a calm."""

    most: int
    now: int = field(init=False)
    calm: int = field(init=False, default=0)  # ticks since it last changed

    def __post_init__(self) -> None:
        self.now = self.most

    def short(self, tried: int) -> None:
        """Memory ran out at so much; to say the same again changes nothing."""
        self.now, self.calm = max(1, min(self.now, tried // 2)), 0

    def ticked(self) -> None:
        """A tick is over."""
        self.calm += 1
        if self.calm >= CALM:
            self.now, self.calm = min(self.most, 2 * self.now), 0


class Budget(NamedTuple):
    """What is left on a device, and what of it is taken."""

    device: torch.device
    free: int  # bytes beside the weights
    kv_bytes: int
    positions: int  # that a tick may compute
    stored_bytes: int  # keys and values of a position; 0: the model stores none
    forward_bytes: int  # that a position needs while it is computed

    def describe(self) -> str:
        """The arithmetic, in one line."""
        lanes = "no store"
        if self.stored_bytes:
            rows = self.kv_bytes // (COLUMNS * self.stored_bytes)
            lanes = f"{self.stored_bytes / 1024:.4g} KiB a position: {rows} rows of {COLUMNS} columns"
        return (
            f"{self.device}: {self.free / GIB:.2f} GiB left beside the weights; keys and values "
            f"{self.kv_bytes / GIB:.2f} GiB, {lanes}; a tick {self.positions} positions, "
            f"{self.forward_bytes / 1024:.4g} KiB each, {self.positions * self.forward_bytes / GIB:.2f} GiB"
        )


def budget(model: Model, kv_bytes: int | None = None, positions: int | None = None) -> Budget:
    """The budget of an engine for a model that is loaded; what is given stands, the rest is a share of what is left."""
    device = model.device
    free, shares = left(device), OWN if device.type == "cuda" else COMMON
    kv_bytes = int(free * shares.stored) if kv_bytes is None else kv_bytes
    stored = model.new_store(1, 1).nbytes // 2 if model.supports_cache else 0
    each = forward_bytes(model)
    positions = max(1, int(free * shares.forwards) // each) if positions is None else positions
    return Budget(device, free, kv_bytes, positions, stored, each)


def left(device: torch.device) -> int:
    """Bytes of memory that nobody has taken: a device's, or those of this machine and of the group of this process.
    What is kept for reuse alone, by the allocator or as a cache of files, is nobody's."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    known = hasattr(os, "sysconf")  # foreign
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if known else [4 * GIB]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")] or found
        names = "memory.max", "memory.current", "memory.stat"
        most, used, told = ((GROUP / name).read_text(encoding="ascii") for name in names)
        files = [
            int(line.split()[1]) for line in told.splitlines() if line.startswith(("active_file", "inactive_file"))
        ]
        found.append(max(0, int(most) - int(used) + sum(files)))
    except (OSError, ValueError):  # another system, or a group without a bound
        pass
    return min(found)


def forward_bytes(model: Model) -> int:
    """Bytes that a position needs at most while it is computed: the tensors of one layer, or its logits."""
    logits = LOGITS * 4 * model.vocab_size
    if not isinstance(model, NativeModel):
        return logits
    c = model.config
    heads = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    layer = (6 * c.hidden_size + 2 * heads + 3 * c.intermediate_size) * model.dtype.itemsize
    return logits + layer
