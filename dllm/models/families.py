"""The families known here. A checkpoint is recognised by `architectures`: different models share a `model_type`."""

from __future__ import annotations

from dllm.errors import DllmError
from dllm.models import causal, dream, fast_dllm, illada, llada, llada2, llada_moe, sdar
from dllm.models.config import ModelConfig
from dllm.models.family import Family, RawConfig

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (llada, llada_moe, llada2, illada, dream, sdar, fast_dllm, causal)
}


def family_of(raw: RawConfig) -> Family:
    """The family of a config.json; a class seen for the first time is an error that names the other backend."""
    for family in FAMILIES.values():
        if raw.architecture in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    what = repr(raw.architecture) if raw.architecture else "no architecture"
    raise DllmError(
        f'config.json names {what}, which has no native family here; try backend="transformers" (known: {known})'
    )


def read_config(raw: RawConfig) -> ModelConfig:
    return family_of(raw).read(raw)
