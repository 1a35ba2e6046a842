"""`dllm bench drafting-batches`: drafts of all rows of a batch in one ragged forward, against one forward a row.

Both decode the same prompts greedily, in turns, and have to give the same texts; a ratio is of their seconds, the
median over `repeats` turns behind one that does not count. Drafts of eight slots are the same on both sides; `cost`
drafts less where a draft is dear, so it has less to gain and no bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import dllm
from dllm.bench.drafting import TASKS, held_out, wall_row
from dllm.bench.runtime import Figure, seconds
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.registry import as_verifier
from dllm.drafting.request import SpecResult
from dllm.errors import DllmError
from dllm.models.native import NativeModel

ROWS, NEW = 8, 48


class Alone(DiffusionDrafter):
    """Each text by itself."""

    company = None


def run(repeats: int = 5) -> Iterator[Figure]:
    """The embedded pair, batches of eight."""
    v, model = as_verifier("tiny-ar"), dllm.load("tiny")
    assert isinstance(model, NativeModel)
    for task in TASKS:
        prompts = held_out(model, task, ROWS)
        for cache in ("none", "approx"):
            for length in ("fixed:k=8", "cost"):
                texts: dict[type, list[SpecResult]] = {}

                def decode(kind: type[DiffusionDrafter], made: DiffusionDrafter, *, length: str = length) -> None:
                    texts[kind] = dllm.speculate(v, made, prompts, max_new_tokens=NEW, length=length)  # noqa: B023

                kinds = {kind: kind(model, prefix_cache=cache) for kind in (DiffusionDrafter, Alone)}
                ratios = []
                for _ in range(1 + repeats):
                    together, alone = (seconds(partial(decode, *pair)) for pair in kinds.items())
                    ratios.append(alone / together)
                one, other = ([out.sequences for out in outs] for outs in texts.values())
                if one != other:
                    raise DllmError("drafts of a batch changed a text: this is a fault, please report it")
                bound = None if length == "cost" else 1.3
                yield wall_row(f"{task}, cache {cache}, {length}: {ROWS} rows", ratios[1:], bound, "a draft a row")
