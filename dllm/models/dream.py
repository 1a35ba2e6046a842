"""Dream-7B, Dream-Coder, DiffuCoder (arXiv 2508.15487, 2506.20639): Qwen2, bidirectional, logits shifted by one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from dllm.models.config import ModelConfig
from dllm.models.family import USUAL, Family, RawConfig, standard, write_standard
from dllm.models.tokenizer import Message

BLOCK = 32  # of the reasoner, where its config does not say


def read(raw: RawConfig) -> ModelConfig:
    """See `Family.read`."""
    return standard(raw, "dream", qkv_bias=True, shift=1)


def read_reasoner(raw: RawConfig) -> ModelConfig:
    """The block-causal variant without a shift: alignment belongs to the checkpoint."""
    return standard(raw, "dream_reasoner", qkv_bias=True, block_size=raw.get("block_size") or BLOCK)


def chatml(messages: list[Message]) -> str:
    """Qwen2.5's template with its default system line."""
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    return turns(messages)


def turns(messages: list[Message]) -> str:
    """Qwen's turns as they are (Qwen3 adds no system line), and the opening of the answer."""
    said = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return f"{said}<|im_start|>assistant\n"


FAMILY = Family(
    name="dream", architectures=("DreamModel",), read=read, write=partial(write_standard, model_type="Dream"),
    mask_id=151666, turn_end="<|im_end|>", turn_end_id=151645, chat=chatml,
)  # fmt: skip
REASONER = replace(
    FAMILY, name="dream_reasoner", architectures=("DreamForCausalLM",), read=read_reasoner, mask_id=151669,
    write=partial(write_standard, keys={**USUAL, "block_size": "block_size"}, model_type="Dream"),
)  # fmt: skip
