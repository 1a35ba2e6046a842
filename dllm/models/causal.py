"""Autoregressive Llama, Qwen2 and Qwen3 in the same backbone: twins and verifiers trained or tested beside a dLLM."""

from __future__ import annotations

from dllm.models.config import Json, ModelConfig
from dllm.models.family import Family, RawConfig, standard, write_standard

MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


def read(raw: RawConfig) -> ModelConfig:
    """See `Family.read`."""
    biased, normed = (raw.architecture == name for name in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"))
    if not biased:
        raw.expect(attention_bias=False)
    return standard(raw, "causal", causal=True, shift=1, mask_id=None, qkv_bias=biased, qk_norm=normed)


def write(config: ModelConfig) -> Json:
    """See `Family.write`."""
    return write_standard(config, model_type=MODEL_TYPES[config.architecture])


FAMILY = Family(name="causal", architectures=tuple(MODEL_TYPES), read=read, write=write)
