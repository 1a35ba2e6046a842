"""`dllm bench tail`: what a token costs under `dual` where most of the masked tail is left out.

One prompt, a long window of which the answer fills a part (the row stops early at its EOS) or all of it, and the same
number of tokens a forward everywhere. Positions are counted, so they do not change from run to run; seconds are paired.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

import dllm
from dllm.bench.runtime import Figure, random_model
from dllm.call.output import Output
from dllm.eval.records import Decoding
from dllm.models.model import ForwardOptions
from dllm.models.native import NativeModel

BASE, NEAR, RECENT = "dual", "dual:near={near},tail=1", "dual:near={near},tail=1,recent=0"
BARS = {(NEAR, True): 0.40, (RECENT, True): 0.30, (NEAR, False): 0.75, (RECENT, False): 0.30}  # positions; early stop
CERTAIN = 100.0  # logit of a planted EOS


class Shape(NamedTuple):
    """Columns of a decode, and the forwards of a block."""

    prompt: int = 100
    new: int = 1024
    block: int = 32
    forwards: int = 8
    answer: int = 160  # tokens before the EOS of the row that stops early
    near: int = 96  # columns of the tail that are kept; the last one, too
    judged: bool = True

    def model(self) -> NativeModel:
        """A random model: that of the bench of the loop, or a tiny one."""
        return random_model() if self.judged else random_model(width=64, layers=2, vocabulary=600, positions=128)

    def call(self, stops: bool) -> Decoding:
        """The decode that is measured, its cache apart."""
        steps = self.new // self.block * self.forwards
        return {
            "sampler": "confidence", "max_new_tokens": self.new, "block_length": self.block, "steps": steps,
            "early_stop": stops,
        }  # fmt: skip


FULL, SMALL = Shape(), Shape(prompt=6, new=64, block=8, forwards=4, answer=16, near=12, judged=False)


class Ending(NativeModel):
    """A model whose answers end: what it computes for one column is replaced by what the head reads EOS from."""

    def __init__(self, model: NativeModel, column: int) -> None:
        vars(self).update(vars(model))
        self.at = column - model.shift
        head = torch.eye(model.config.hidden_size, dtype=model.dtype, device=model.device)
        eos = model.logits(head)[:, model.eos_ids[0]]  # (D,) the head's row of EOS
        self.end = CERTAIN * eos.to(model.dtype) / eos.square().sum()

    def forward(self, ids: Tensor, pos: Tensor | None = None, **options: Unpack[ForwardOptions]) -> Tensor:
        """That of the model, but at the column before which the answer ends."""
        hidden = super().forward(ids, pos, **options)
        pos = torch.arange(ids.shape[1], device=ids.device) if pos is None else pos
        return torch.where((pos == self.at)[..., None], self.end, hidden)


def run(repeats: int = 3, shape: Shape = FULL, model: NativeModel | None = None) -> Iterator[Figure]:
    """Positions and seconds a token with the near tail, and with `recent`, divided by those of `dual`.

    First of a row that stops at its EOS, then of one whose window is decoded whole. model: None for the shape's own.
    """
    model = model or shape.model()
    prompt = list(range(1, 1 + shape.prompt))
    for stops in (True, False):
        ends = Ending(model, shape.prompt + shape.answer) if stops else model
        outs: dict[str, list[Output]] = {cache: [] for cache in (BASE, NEAR, RECENT)}
        for _ in range(repeats):
            for cache, done in outs.items():
                done.append(dllm.generate(ends, prompt, cache=cache.format(near=shape.near), **shape.call(stops)))
        for cache in (NEAR, RECENT):
            bars = (BARS[cache, stops], 1.0) if shape.judged else (None, None)
            name, end = cache.format(near=shape.near), "early stop" if stops else "all decoded"
            what = f"{name} / {BASE}, window {shape.new}, {end}"
            yield from costs(what, outs[cache], outs[BASE], *bars)


def costs(
    what: str, ours: list[Output], base: list[Output], positions: float | None, seconds: float | None
) -> Iterator[Figure]:
    """A decoded token's positions and seconds, divided by the base's; the last two are what is asked of them."""
    mine, theirs = (out[0].positions / out[0].decoded for out in (ours, base))
    note = f"{mine:.1f} and {theirs:.1f}; {ours[0].nfe} and {base[0].nfe} forwards, {len(ours[0].tokens)} tokens"
    yield Figure(f"{what}: positions a token", mine / theirs, positions, note=note)
    pairs = [(a.seconds / a.decoded, b.seconds / b.decoded) for a, b in zip(ours, base, strict=True)]
    mine, theirs = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    note = f"{mine:.1f} and {theirs:.1f} ms"
    yield Figure(f"{what}: seconds a token", statistics.median(a / b for a, b in pairs), seconds, note=note)
