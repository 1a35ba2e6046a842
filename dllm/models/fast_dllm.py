"""Fast-dLLM v2 1.5B and 7B (arXiv 2509.26328): Qwen2, block-causal in blocks of 32 and logits shifted by one."""

from __future__ import annotations

from functools import partial

from dllm.models.config import ModelConfig
from dllm.models.dream import chatml
from dllm.models.family import USUAL, Family, RawConfig, standard, write_standard


def read(raw: RawConfig) -> ModelConfig:
    """See `Family.read`."""
    return standard(raw, "fast_dllm", qkv_bias=True, shift=1, block_size=raw.get("bd_size") or 32)


# the mask id is in the published code, not in the config
FAMILY = Family(
    name="fast_dllm", architectures=("Fast_dLLM_QwenForCausalLM",), read=read,
    write=partial(write_standard, keys={**USUAL, "bd_size": "block_size"}, model_type="Fast_dLLM_Qwen"),
    mask_id=151665, turn_end="<|im_end|>", turn_end_id=151645, chat=chatml,
)  # fmt: skip
