"""Several linear maps of one input as one product, which know the name and the rows that each has alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fused(nn.Linear):
    """Linear maps of one input (..., inputs); their outputs lie side by side. `parts`: name -> width, in that order."""

    def __init__(self, inputs: int, parts: Mapping[str, int], bias: bool = False) -> None:
        super().__init__(inputs, sum(parts.values()), bias)
        self.parts = dict(parts)

    def each(self, x: Tensor) -> list[Tensor]:
        """The output of each map alone. On a CPU by a product for each, which is faster there where they are wide."""
        if x.device.type == "cpu" and type(self.weight.data) is Tensor and self.bias is None:
            return [F.linear(x, weight) for weight in torch.split(self.weight, list(self.parts.values()))]
        return list(torch.split(self(x), list(self.parts.values()), -1))

    def apart(self, rows: Tensor) -> dict[str, Tensor]:
        """What belongs to each map in `rows` (outputs, ...) of the weight, the bias or their gradients.

        Gathered from several processes, they hold all parts of one process before those of the next.
        """
        widths = list(self.parts.values())
        pieces = torch.split(rows.reshape(-1, sum(widths), *rows.shape[1:]), widths, 1)
        return {part: piece.flatten(0, 1) for part, piece in zip(self.parts, pieces, strict=True)}


def singles(network: nn.Module) -> Iterator[tuple[str, nn.Parameter, Fused | None, str]]:
    """Every parameter by the name it has where nothing is fused; where it is, with the module and the part."""
    modules = dict(network.named_modules())
    for name, value in network.named_parameters():
        path, _, leaf = name.rpartition(".")
        module, parent = modules[path], path.rpartition(".")[0]
        if isinstance(module, Fused):
            yield from ((f"{parent}.{part}.{leaf}", value, module, part) for part in module.parts)
        else:
            yield name, value, None, ""
