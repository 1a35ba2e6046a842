"""Low-rank adapters (arXiv 2106.09685) through peft, put into the backbone in place."""

from __future__ import annotations

import copy

from dllm.errors import DllmError
from dllm.models.transformer import Transformer
from dllm.training.config import LoraSpec


def add_lora(model: Transformer, spec: LoraSpec) -> None:
    """Freeze the weights of `model` and add trainable adapters to the named layers."""
    try:
        import peft
    except ImportError as error:
        raise DllmError("LoRA needs peft: pip install 'dllm-toolkit[lora]'") from error
    settings = peft.LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout,
                               target_modules=list(spec.targets))  # fmt: skip
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
        parent, _, child = name.rpartition(".")
        setattr(merged.get_submodule(parent), child, layer.get_base_layer())
    return merged.requires_grad_(True)
