"""End-of-text prediction: drop what lies behind the end of the text and go on with the shorter canvas (Learn2PD)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm.decoding.columns import indices
from dllm.errors import DllmError
from dllm.samplers import Bundle, Constant, Context, Decision, Method, Needs, Prediction, View, param


@dataclass(frozen=True)
class EoTP(Method):
    """Cut the canvas right behind an end-of-text token. Cuts are final and change what the model sees: not lossless.

    `accepted`: behind the first one that was committed. `eager`, the released code: where none is committed yet, behind
    the masked column that predicts it most confidently, accepted or not, as far as the forward covers them.
    """

    mode: str = param(
        "accepted",
        "the paper's description; a stray early prediction cannot truncate an answer",
        choices=("accepted", "eager"),
    )

    name: ClassVar[str] = "eotp"
    source: ClassVar[str] = "Learn2PD, arXiv 2509.25188, section on end-of-text prediction"

    def bundle(self, context: Context) -> Bundle:
        """A link that cuts rows. Errors: a block-causal model, a model without an end token."""
        if context.block_size is not None:
            raise DllmError("eotp: a block-causal model sees nothing behind its block: there is nothing to cut")
        if not context.eos_ids:
            raise DllmError("eotp needs an end-of-text token: pass eos=")
        constant = Constant(torch.tensor(context.eos_ids).to)

        def amend(view: View, pred: Prediction, d: Decision) -> Decision:
            canvas, length = view.canvas, view.canvas.length
            eos = constant.on(length.device)
            ids = torch.where(d.write & ~canvas.frozen, d.token, canvas.ids)
            cols = torch.arange(ids.shape[1], device=ids.device)
            body = (cols >= canvas.start[:, None]) & (cols < length[:, None])
            ends = torch.isin(ids, eos) & body & ~canvas.frozen
            first = torch.where(ends, cols, ids.shape[1]).amin(1)
            if self.mode == "eager":
                first = torch.where(ends.any(1), first, predicted(view, pred, d, eos))
            cut = [
                (row, at + 1, end - at - 1, ())
                for row, (at, end) in enumerate(zip(first.tolist(), length.tolist(), strict=True))
                if at + 1 < end
            ]
            return d._replace(edits=(*d.edits, *cut))

        return Bundle(amend=(amend,), needs=Needs(edits_length=True))


def predicted(view: View, pred: Prediction, d: Decision, eos: Tensor) -> Tensor:
    """(B,) the masked column that predicts end-of-text most confidently, leftmost on ties; L where none does."""
    masked, width = view.canvas.masked, view.canvas.ids.shape[1]
    cols = indices(masked, max(int(masked.sum(1).max()), 1))
    wide = pred.at(cols)
    if wide is None:  # a cached window: only its own columns
        wide, cols = pred, torch.where(view.masked, view.cols, -1)
    left = (cols >= 0) & ~d.write.gather(1, cols.clamp(min=0))
    ends = torch.isin(wide.token, eos) & left
    best = wide.log_confidence.masked_fill(~ends, -torch.inf).argmax(1, keepdim=True)
    return torch.where(ends.any(1), cols.gather(1, best)[:, 0], width)
