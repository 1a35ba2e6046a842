"""Low-rank adapters (arXiv 2106.09685) through peft, put into the backbone in place."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from dllm.errors import DllmError
from dllm.models.fused import Fused
from dllm.models.transformer import Transformer
from dllm.training.config import LoraSpec


class Apart(nn.Module):
    """The maps of a `Fused` as modules of their own, so that each can get an adapter."""

    def __init__(self, fused: Fused) -> None:
        super().__init__()
        weights, width = fused.apart(fused.weight.detach()), fused.in_features
        biases = {} if fused.bias is None else fused.apart(fused.bias.detach())
        for part, weight in weights.items():
            with torch.device("meta"):
                linear = nn.Linear(width, len(weight), bias=part in biases)
            for name, value in (("weight", weights), ("bias", biases)):
                if part in value:
                    setattr(linear, name, nn.Parameter(value[part]))
            self.add_module(part, linear)

    def each(self, x: Tensor) -> list[Tensor]:
        """See `Fused.each`."""
        return [linear(x) for linear in self.children()]

    def forward(self, x: Tensor) -> Tensor:
        """What `Fused` gives."""
        return torch.cat(self.each(x), -1)

    def fused(self) -> Fused:
        """The maps as one again, without adapters."""
        parts = {name: cast(nn.Linear, linear) for name, linear in self.named_children()}
        first = next(iter(parts.values()))
        with torch.device("meta"):
            fused = Fused(first.in_features, {n: m.out_features for n, m in parts.items()}, first.bias is not None)
        for name, _ in list(fused.named_parameters()):
            rows = [m.get_parameter(name).detach() for m in parts.values()]
            setattr(fused, name, nn.Parameter(torch.cat(rows)))
        return fused


def add_lora(model: Transformer, spec: LoraSpec) -> None:
    """Freeze the weights of `model` and add trainable adapters to the named layers."""
    try:
        import peft
    except ImportError as error:
        raise DllmError("LoRA needs peft: pip install 'dllm-toolkit[lora]'") from error
    settings = peft.LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout,
                               target_modules=list(spec.targets))  # fmt: skip
    for name, fused in [(n, m) for n, m in model.named_modules() if isinstance(m, Fused)]:
        model.set_submodule(name, Apart(fused))
    try:
        peft.inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise DllmError(f"lora.targets: {str(error).splitlines()[0]}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merge_lora(model: Transformer) -> Transformer:
    """A copy of `model` with its adapters added into the weights: an ordinary backbone again."""
    from peft.tuners.lora import LoraLayer

    merged = copy.deepcopy(model)
    for name, layer in [(n, m) for n, m in merged.named_modules() if isinstance(m, LoraLayer)]:
        layer.merge()
        merged.set_submodule(name, layer.get_base_layer())
    for name, apart in [(n, m) for n, m in merged.named_modules() if isinstance(m, Apart)]:
        merged.set_submodule(name, apart.fused())
    return merged.requires_grad_(True)
