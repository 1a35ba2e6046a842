"""EB-Sampler: commit as many columns as an entropy bound allows (arXiv 2505.24857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dllm.samplers import Bundle, Context, Method, Prediction, View, param, quota, rank

PROXIES = {"entropy": quota.entropy, "confidence": quota.confidence, "margin": quota.margin}


@dataclass(frozen=True)
class EB(Method):
    """Sort the candidates by an error proxy; commit the longest prefix U with sum H - max H <= gamma, at least one.

    H is the entropy in nats. The dependence between the columns of U is at most that sum.
    """

    gamma: float = param(0.1, "nats; the released function's default (0.01 and 0.001 are used in scripts)", low=0)
    proxy: str | None = param(
        None,
        "None: entropy, the paper's order, or that of a sampler composed with it",
        choices=(None, *PROXIES),
    )

    name: ClassVar[str] = "eb"
    source: ClassVar[str] = "EB-Sampler, arXiv 2505.24857"

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection, and the score where a proxy is named."""
        proxy = PROXIES[self.proxy or "entropy"]
        if self.proxy is None:
            return Bundle(select=self.select, assumes={"score": proxy})
        return Bundle(score=proxy, select=self.select)

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: the longest prefix within the bound."""
        order = rank(score, view.live)
        sorted_columns = order.argsort(dim=1, stable=True)
        h = (-soft.negative_entropy).masked_fill(~view.live, 0).gather(1, sorted_columns)
        bound = h.cumsum(1) - h.cummax(1).values
        allowed = (bound <= self.gamma).cumprod(1).bool()
        return allowed.gather(1, order.clamp(max=order.shape[1] - 1)) & view.live
