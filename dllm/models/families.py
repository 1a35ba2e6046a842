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
    if not raw.architecture:
        raise DllmError('config.json names no architecture (the key "architectures"); try backend="transformers"')
    raise DllmError(
        f"config.json names {raw.architecture!r}, which has no native family here; "
        f'try backend="transformers" (known: {known})'
    )


def read_config(raw: RawConfig) -> tuple[Family, ModelConfig]:
    """The family and the configuration of a config.json. Errors: keys that are missing, or hold what they cannot."""
    family = family_of(raw)
    try:
        return family, family.read(raw)
    except DllmError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise DllmError(f"config.json of this {raw.architecture} checkpoint holds a wrong value: {error}") from error
