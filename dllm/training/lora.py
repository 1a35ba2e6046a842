"""Low-rank adapters (arXiv 2106.09685) through peft, put into the backbone in place."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dllm.errors import DllmError
from dllm.models.adapter import CONFIG, PREFIX, WEIGHTS
from dllm.models.config import ModelConfig
from dllm.models.family import Family
from dllm.models.files import write_json
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
        if "lora_" in name:
            parameter.data = parameter.data.float()  # small steps would vanish in bfloat16


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


def save_adapter(
    model: Transformer, spec: LoraSpec, family: Family, config: ModelConfig, base: str, folder: Path
) -> None:
    """The adapters alone in peft's format, in bfloat16, under the official names of the base `config`'s family."""
    from peft.tuners.lora import LoraLayer

    modules = dict(model.named_modules())
    official: dict[str, list[str]] = defaultdict(list)  # of a module of the backbone, as a whole or map by map
    for name, piece in family.layout(replace(config, n_layers=model.config.n_layers)).items():
        official[piece.parameter.removesuffix(".weight")].append(name.removesuffix(".weight"))
    tensors = {}
    for module, names in official.items():
        found = modules.get(module)
        layers = list(found.children()) if isinstance(found, Apart) else [found]
        for layer, name in zip(layers, names, strict=False):
            for matrix in ("lora_A", "lora_B") if isinstance(layer, LoraLayer) else ():
                weight = getattr(layer, matrix)["default"].weight.detach()
                tensors[f"{PREFIX}{name}.{matrix}.weight"] = weight.to("cpu", torch.bfloat16).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": spec.rank, "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout, "target_modules": list(spec.targets), "bias": "none", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    write_json(folder / CONFIG, settings)
