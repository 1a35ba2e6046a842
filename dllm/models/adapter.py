"""LoRA adapter folders (peft): read with the base that they name, and merged into its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dllm.errors import DllmError, first_line
from dllm.models.checkpoint import opened, part
from dllm.models.config import ModelConfig
from dllm.models.family import Family
from dllm.models.files import optional_json
from dllm.models.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# what changes the meaning of the matrices, with the value that leaves it as it is
PLAIN = {"use_dora": False, "bias": "none", "lora_bias": False, "fan_in_fan_out": False, "megatron_config": None}


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter and no whole model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """The name or folder of the model that an adapter belongs to."""
    base = optional_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise DllmError(f"{folder / CONFIG} names no base model (the key 'base_model_name_or_path')")
    return base


def merge_adapter(model: Transformer, family: Family, config: ModelConfig, folder: Path) -> None:
    """Add the low-rank updates of `folder` to the weights in place, and put the weights that it holds whole in theirs.

    Names are those of the official code, as peft writes them. Errors: another kind of adapter, layers that the model
    does not have, wrong shapes.
    """
    settings, tensors = optional_json(folder / CONFIG), _tensors(folder)
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise DllmError(f"{folder} holds an adapter of the kind {kind!r}; only LORA can be merged here")
    if bent := [k for k, plain in PLAIN.items() if settings.get(k) not in (None, plain)]:
        raise DllmError(f"{folder} has {bent[0]}={settings[bent[0]]!r}, which cannot be merged here")
    table, parameters = family.layout(config), dict(model.named_parameters())
    for name, value in tensors.items():
        stem, low_rank, _ = name.removeprefix(PREFIX).rpartition(".lora_A.")
        if ".lora_B." in name:
            continue
        official = f"{stem}.weight" if low_rank else name.removeprefix(PREFIX)
        if official not in table:
            raise DllmError(f"the adapter {folder} changes {official}, which this model does not have")
        update = _scale(settings, stem, len(value), folder) * _product(tensors, name, folder) if low_rank else value
        target = part(parameters, table[official])
        if update.shape != target.shape:
            shape, expected = tuple(update.shape), tuple(target.shape)
            raise DllmError(
                f"the adapter {folder} is of another base: its {official} has shape {shape}, not {expected}"
            )
        target.copy_(target.cpu().double() + update if low_rank else update)


def _product(tensors: Mapping[str, Tensor], name: str, folder: Path) -> Tensor:
    """B A of the A that is called `name`, (out, in) float64."""
    other = name.replace(".lora_A.", ".lora_B.")
    if other not in tensors:
        raise DllmError(f"the adapter {folder} lacks {other}")
    a, b = tensors[name], tensors[other]
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise DllmError(f"the adapter {folder}: {name} {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit")
    return b.double() @ a.double()


def _tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if not file.is_file():
        raise DllmError(f"{folder} holds {CONFIG}, but no {WEIGHTS}")
    with opened(file) as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def _scale(settings: Mapping[str, Any], module: str, rank: int, folder: Path) -> float:
    """alpha / r, or alpha / sqrt(r); a pattern may give a layer an alpha of its own."""
    try:
        patterns = dict(settings.get("alpha_pattern") or {})
        own = next((a for pattern, a in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), None)
    except (TypeError, ValueError, re.error) as error:
        raise DllmError(f"{folder / CONFIG}: alpha_pattern cannot be read: {first_line(error)}") from error
    alpha = own if own is not None else settings.get("lora_alpha", 8)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise DllmError(f"{folder / CONFIG}: lora_alpha is a number, not {alpha!r}")
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def merge_by_peft(network: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The same for a transformers model, by peft itself."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise DllmError("an adapter needs peft: pip install 'dllm-toolkit[lora]'") from error
    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(network, str(folder)).merge_and_unload()
        return merged
    except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
        raise DllmError(f"peft cannot merge the adapter {folder}: {first_line(error)}") from error
