"""What FreeDave's released code does besides (arXiv 2510.00294): its presets ask for it, and nobody else has to pay.

Both change what a call costs or says: see `Lookahead.relax` and `Lookahead.restart`.
"""

from __future__ import annotations

import torch

from dllm.decoding.canvas import State
from dllm.decoding.graphs import index
from dllm.lookahead.memo import Group, RowMemo


def subset(group: Group, after: State) -> State:
    """relax="subset": each step cut down to the largest guess inside it, where there is one."""
    before, canvas = group.part.state.canvas, after.canvas
    for i, row in enumerate(group.rows):
        new = before.masked[i] & ~canvas.masked[i]
        guesses = [a.branch.ids for a in row.answers.values() if not a.old]
        inside = [g for g in guesses if bool(((g == canvas.ids[i]) | (new & (g == canvas.mask_id))).all())]
        ids = max(inside, key=lambda g: int((g != before.ids[i]).sum()), default=canvas.ids[i])
        if torch.equal(ids, canvas.ids[i]) or torch.equal(ids, before.ids[i]):
            continue
        row.stats.cuts += 1
        at = index([i], canvas.ids.device)
        own, no = after.take(at), torch.zeros_like(at, dtype=torch.bool)
        less = own.canvas.write((new & (ids == canvas.mask_id))[None], ids[None])
        after = after.put(at, own._replace(canvas=less, done=no, closing=no))
    return after


def restart(row: RowMemo, block: int, fresh: bool) -> None:
    """restart=True: a row in another block than the one that it began with has nothing to draft from.

    block: first column of its window; fresh: the forward had no guesses, since there was no prediction to draft from.
    """
    row.home = block if fresh else row.home
    if block != row.home:
        row.recent = []
