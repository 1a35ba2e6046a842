"""What samplers that take tokens back share: which tokens are theirs to take, how sure the model still is of them, and
the bound that keeps a row moving."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm.samplers import Decision, Prediction, View, rank


def decoded(view: View) -> Tensor:
    """(B, W) bool: columns of the window that were written before this step. Given tokens are never among them."""
    return view.inside & ~view.masked & ~view.gather(view.canvas.frozen)


def committed_here(view: View, d: Decision) -> Tensor:
    """(B, W) bool: masks that this decision writes a token to."""
    return view.masked & view.gather(d.write & (d.token != view.canvas.mask_id))


def stored_probability(view: View, pred: Prediction) -> Tensor:
    """(B, W) raw probability, now, of the token that stands in each column."""
    token = view.gather(view.canvas.ids)
    return pred.probability_of(pred.logits.gather(-1, token[..., None])[..., 0])


def remask(view: View, d: Decision, value: Tensor, among: Tensor, limit: Tensor) -> Decision:
    """Mask the columns of `among` (B, W) again, at most `limit` (B,) a row: lowest value, then position, first."""
    again = among & (rank(-value, among) < limit[:, None])  # a limit may exceed the columns of the step
    back = view.scatter(torch.zeros_like(d.write), again, again)
    return d._replace(write=d.write | back, token=torch.where(back, view.canvas.mask_id, d.token))
