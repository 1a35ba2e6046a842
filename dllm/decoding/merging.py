"""Forwards of several batches as one: rows are independent, so it does not matter whose they are.

    asks -> together -> merged -> model.forward -> said of each

Plans with a store stay apart: keys and values of a batch lie in a store of its own. So do plans that ask for attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.decoding.canvas import Plan
from dllm.models.transformer import Known, Said

# Padding that is taken beside what is computed anyway: rows of few columns must not pay for those of many. On a CPU a
# forward costs what its queries do, while on an accelerator most of it is reading the weights, once for all.
WASTE, HOST_WASTE = 0.25, 0.1


def together(plans: Sequence[Plan], most: int) -> list[list[int]]:
    """Which plans are one forward of at most so many positions, by their places. A plan in no list has a forward of its
    own."""
    sizes = [plan.pos.numel() for plan in plans]
    waste = HOST_WASTE if plans and plans[0].pos.device.type == "cpu" else WASTE
    free = [i for i, plan in enumerate(plans) if not plan.stored and plan.rows is None]
    runs = list[list[int]]()
    for i in sorted(free, key=lambda i: plans[i].pos.shape[1], reverse=True):
        run = [*runs[-1], i] if runs else [i]
        rows, width = sum(len(plans[j].pos) for j in run), plans[run[0]].pos.shape[1]
        if runs and rows * width <= min(most, (1 + waste) * sum(sizes[j] for j in run)):
            runs[-1] = run
        else:
            runs.append([i])
    return [run for run in runs if len(run) > 1]


def merged(plans: Sequence[Plan]) -> Plan:
    """One plan for the rows of all, (N, Q) in all and of the widest, without a store."""
    width = max(plan.pos.shape[1] for plan in plans)
    ids, pos = (
        torch.cat([_wide(x, width, value) for x in tables])
        for tables, value in (([p.ids for p in plans], 0), ([p.pos for p in plans], -1))
    )
    padded = any(p.known is None or p.known.padded or p.pos.shape[1] < width for p in plans)
    visible = None
    if any(p.visible is not None for p in plans):
        visible = torch.cat([_seen(p, width) for p in plans])
    return Plan(ids, pos, None, None, visible, None, Known(padded), refresh=False, stored=False)


def parted(said: Said, plans: Sequence[Plan]) -> list[Said]:
    """What a forward of `merged` plans said to each of them."""
    parts = torch.split(said.hidden, [len(plan.pos) for plan in plans])
    return [Said(hidden[:, : plan.pos.shape[1]]) for hidden, plan in zip(parts, plans, strict=True)]


def _wide(x: Tensor, width: int, value: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[1]), value=value)


def _seen(plan: Plan, width: int) -> Tensor:
    """(N, Q, Q) what its queries see; the model adds that nobody sees padding."""
    rows, queries = plan.pos.shape
    seen = plan.pos.new_ones(1, 1, 1, dtype=torch.bool) if plan.visible is None else plan.visible
    more = width - queries
    return F.pad(seen.expand(rows, queries, queries), (0, more, 0, more))
