"""LLaDA-8B, LLaDA-1.5 (arXiv 2502.09992, 2505.19223): Llama without a causal mask, OLMo-like keys and names."""

from __future__ import annotations

from typing import Any

from dllm.models.config import ModelConfig
from dllm.models.family import Family, RawConfig, special_ids, write_special_ids
from dllm.models.layout import Names
from dllm.models.tokenizer import Message

NAMES = Names(
    embed="model.transformer.wte",
    norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    layer="model.transformer.blocks.{}",
    input_norm="attn_norm",
    mlp_norm="ff_norm",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    o="attn_out",
    gate="ff_proj",
    up="up_proj",
    down="ff_out",
)


def read(raw: RawConfig) -> ModelConfig:
    raw.expect(
        block_type="llama", block_group_size=1, activation_type="silu", layer_norm_type="rms", include_bias=False,
        attention_layer_norm=False, bias_for_layer_norm=False, alibi=False, rope=True, scale_logits=False,
        input_emb_norm=False,
    )  # fmt: skip
    hidden, heads = raw.need("d_model"), raw.need("n_heads")
    kv = 1 if raw.get("multi_query_attention") else heads
    return ModelConfig(
        family="llada",
        architecture=raw.architecture,
        vocab_size=raw.need("vocab_size"),
        embedding_rows=raw.get("embedding_size") or raw.need("vocab_size"),
        hidden_size=hidden,
        n_layers=raw.need("n_layers"),
        n_heads=heads,
        n_kv_heads=raw.get("n_kv_heads") or kv,
        head_dim=hidden // heads,
        intermediate_size=raw.get("mlp_hidden_size") or int(raw.need("mlp_ratio") * hidden),
        norm_eps=float(raw.need("rms_norm_eps")),
        rope_theta=raw.rope_theta,
        rope_full_precision=bool(raw.get("rope_full_precision", True)),
        qkv_bias=bool(raw.get("include_qkv_bias", False)),
        tied=bool(raw.get("weight_tying", False)),
        max_positions=raw.need("max_sequence_length"),
        raw=dict(raw),
        **special_ids(raw),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "block_type": "llama",
        "block_group_size": 1,
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "attention_layer_norm": False,
        "rope": True,
        "include_bias": False,
        "use_cache": False,
        "d_model": config.hidden_size,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "mlp_hidden_size": config.intermediate_size,
        "mlp_ratio": 4,
        "vocab_size": config.raw.get("vocab_size", config.vocab_size),
        "embedding_size": config.embedding_rows,
        "max_sequence_length": config.max_positions,
        "rope_theta": config.rope_theta,
        "rope_full_precision": config.rope_full_precision,
        "rms_norm_eps": config.norm_eps,
        "include_qkv_bias": config.qkv_bias,
        "weight_tying": config.tied,
        **write_special_ids(config),
    }


def chat(messages: list[Message]) -> str:
    """The published template: it opens the assistant's turn whatever the last message is."""
    turns = "".join(
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|eot_id|>" for m in messages
    )
    return f"<|startoftext|>{turns}<|start_header_id|>assistant<|end_header_id|>\n\n"


FAMILY = Family(
    name="llada",
    architectures=("LLaDAModelLM",),
    read=read,
    write=write,
    names=NAMES,
    mask_id=126336,
    turn_end="<|eot_id|>",
    turn_end_id=126348,
    chat=chat,
)
