"""`dllm bench attention`: what a forward costs more where a sampler reads its attention weights.

The forwards of a decode are recorded and run again, with the weights and without, in turn. What a sampler then does
with them is its own work: `dllm bench own-work`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Unpack

import torch
from torch import Tensor

import dllm
from dllm.bench.runtime import Figure, Work, random_model, side_by_side
from dllm.errors import DllmError
from dllm.models.model import ForwardOptions
from dllm.models.native import NativeModel
from dllm.models.transformer import Outputs, Rows

SAMPLERS = ("clad", "dapd", "dawn", "dawn:anchors=current")
CACHES = ("none", "dual")
FORWARDS = 8  # of a decode: the opening of a block and steps of it


class Watched(NativeModel):
    """A model that remembers the forwards whose attention weights were asked for, with them and without."""

    def __init__(self, model: NativeModel) -> None:
        vars(self).update(vars(model))
        self.read: list[Work] = []
        self.bare: list[Work] = []
        self.rows = 0  # of weights

    def forward_with(
        self,
        ids: Tensor,
        pos: Tensor | None = None,
        *,
        rows: Rows | None = None,
        kv: bool = False,
        **options: Unpack[ForwardOptions],
    ) -> Outputs:
        """That of the model, remembered where somebody reads the weights."""
        if rows is None:
            return super().forward_with(ids, pos, kv=kv, **options)
        self.read.append(partial(super().forward_with, ids, pos, rows=rows, kv=kv, **options))
        self.bare.append(partial(super().forward_with, ids, pos, kv=kv, **options))
        self.rows += int((rows.at >= 0).sum())
        return super().forward_with(ids, pos, rows=rows, kv=kv, **options)


@torch.inference_mode()
def again(calls: Sequence[Work]) -> None:
    """Every call, and nothing between them."""
    for call in calls:
        call()


def run(
    names: Sequence[str] | None = None,
    repeats: int = 5,
    *,
    model: NativeModel | None = None,
    prompt: int = 256,
    new: int = 256,
) -> Iterator[Figure]:
    """Forwards with attention weights divided by the same without, for each sampler that reads some and each cache.

    names: samplers; None: those of the package. model: that of the bench of the loop.
    """
    model = model or random_model()
    for cache in CACHES:
        for name in names or SAMPLERS:
            what = f"{name}, {cache}, length {prompt + new}: forwards with attention weights / without"
            watched = Watched(model)
            try:
                dllm.generate(
                    watched, list(range(1, 1 + prompt)), sampler=name, cache=cache, max_new_tokens=new,
                    max_nfe=FORWARDS, early_stop=False,
                )  # fmt: skip
            except DllmError as reason:  # not every sampler goes with every cache
                yield Figure(what, None, note=str(reason))
                continue
            read, bare = (partial(again, calls) for calls in (watched.read, watched.bare))
            mine, base = side_by_side(read, bare, repeats)
            n = len(watched.read)
            note = f"{1e3 * mine / n:.1f} and {1e3 * base / n:.1f} ms a forward, {watched.rows / n:.0f} rows of weights"
            yield Figure(what, mine / base, note=note)
