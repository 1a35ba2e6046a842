"""iLLaDA-8B: LLaDA with grouped-query attention, tied embeddings and the usual names. Its config has no mask id."""

from __future__ import annotations

from functools import partial

from dllm.models.config import ModelConfig
from dllm.models.family import Family, RawConfig, standard, write_standard


def read(raw: RawConfig) -> ModelConfig:
    """See `Family.read`."""
    raw.expect(attention_bias=False, layer_norm_eps=None)
    return standard(raw, "illada")


FAMILY = Family(
    name="illada", architectures=("ILLaDAForCausalLM",), read=read,
    write=partial(write_standard, model_type="illada"), mask_id=5,
)  # fmt: skip
