"""Dream's own schedule (arXiv 2508.15487): linear time, confidences under the filtered law, optional random order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dllm.decoding import noise
from dllm.samplers import Blocks, Bundle, Constant, Context, Method, Needs, Prediction, View, param, quota, rank

SCORES = {"maskgit_plus": quota.confidence, "topk_margin": quota.margin, "entropy": quota.entropy}


@dataclass(frozen=True)
class Dream(Method):
    """At step i of T commit int(m (1 - t[i+1] / t[i])) of the m masks, t = linspace(1, eps, T + 1); the last step all.

    `origin` instead commits each mask with probability 1 - t[i+1] / t[i]. The whole window is decoded at once unless
    another sampler owns the window. A step may commit nothing, as in the reference.
    """

    alg: str | None = param(
        None,
        "None: entropy, of Dream's published scores, or the score of a sampler composed with it",
        choices=(None, "origin", *SCORES),
    )
    alg_temp: float = param(
        0.0, "0 takes the best columns; above, columns are drawn from softmax(score / alg_temp)", low=0
    )
    eps: float = param(1e-3, "Dream's generation config", low=0, high=1)

    name: ClassVar[str] = "dream"
    source: ClassVar[str] = "Dream, arXiv 2508.15487"

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection; the whole window and entropy where nobody brings others."""
        budgets = Constant(torch.tensor(context.budgets).to)
        grids = [torch.linspace(1, self.eps, n + 1) for n in context.budgets]  # float32, as the reference
        times = Constant(nn.utils.rnn.pad_sequence(grids, batch_first=True).to)  # (budgets, T + 1)

        def count(view: View) -> Tensor:
            """(B, 1) the share of the masks that this step transfers; 1 at the last step."""
            steps, device = context.budget(view.state), view.cols.device
            i = torch.minimum(view.state.step, steps - 1)
            t = times.on(device)[torch.searchsorted(budgets.on(device), steps)]  # (B, T + 1)
            now, then = (t.gather(1, (i + n)[:, None]) for n in (0, 1))
            return torch.where((i >= steps - 1)[:, None], 1.0, 1 - then / now)

        def select(view: View, soft: Prediction, score: Tensor) -> Tensor:
            share = count(view)
            if self.alg == "origin":
                return view.uniform(noise.TRANSFER) < share
            n = (view.live.sum(1, keepdim=True) * share).long()
            if self.alg_temp > 0:
                score = score / self.alg_temp - torch.log(-torch.log(view.uniform(noise.ORDER)))
            return rank(score, view.live) < n

        return Bundle(
            score=None if self.alg is None else SCORES.get(self.alg, quota.confidence),
            select=select,
            assumes={"window": Blocks(context.max_new_tokens, whole=True), "score": quota.entropy},
            needs=Needs(filtered=True, may_idle=True, stochastic=self.alg == "origin" or self.alg_temp > 0),
        )
