"""LocalLeap: a confident column lowers the bar for its neighbours (arXiv 2510.07081)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from dllm.samplers import OFF, Bundle, Context, Method, Prediction, Presets, View, param


@dataclass(frozen=True)
class LocalLeap(Method):
    """Anchors are the candidates with confidence kappa or more; within `radius` columns of one, tau is enough.

    Always commits the best candidate. Columns that were committed before are no anchors. Without anchors, with radius 0
    or with tau >= kappa this is `threshold` at kappa.
    """

    kappa: float = param(0.9, "the paper's bar for anchors, LLaDA and Dream", low=0, high=OFF)
    tau: float = param(0.75, "the paper's relaxed bar for LLaDA; accuracy falls markedly below it", low=0, high=OFF)
    radius: int = param(4, "the paper's neighbourhood, columns to each side", low=0)

    name: ClassVar[str] = "localleap"
    source: ClassVar[str] = "LocalLeap, arXiv 2510.07081"
    presets: ClassVar[Presets] = {"dream": {"tau": 0.8}}  # DAWN's re-implementation for Dream

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection."""
        return Bundle(select=self.select)

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: anchors, and what is sure enough near one."""
        conf = soft.confidence  # (B, W)
        anchors = view.live & (conf >= self.kappa)
        width = 2 * min(self.radius, view.canvas.ids.shape[1]) + 1
        table = view.scatter(conf.new_zeros(view.canvas.ids.shape), anchors, anchors)  # (B, L): absolute distances
        near = view.gather(F.max_pool1d(table[:, None], width, stride=1, padding=width // 2)[:, 0]) > 0
        return anchors | (near & (conf >= min(self.tau, self.kappa)))
