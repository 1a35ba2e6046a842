"""iLLaDA-8B: LLaDA with grouped-query attention, tied embeddings and the usual names. Its config has no mask id."""

from __future__ import annotations

from typing import Any

from dllm.models.config import ModelConfig
from dllm.models.family import Family, RawConfig, standard, write_standard


def read(raw: RawConfig) -> ModelConfig:
    raw.expect(attention_bias=False, layer_norm_eps=None)
    return standard(raw, "illada")


def write(config: ModelConfig) -> dict[str, Any]:
    return {**write_standard(config), "model_type": "illada"}


FAMILY = Family(name="illada", architectures=("ILLaDAForCausalLM",), read=read, write=write, mask_id=5)
