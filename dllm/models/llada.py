"""LLaDA-8B, LLaDA-1.5 (arXiv 2502.09992, 2505.19223): Llama without a causal mask, OLMo-like keys and names."""

from __future__ import annotations

from dllm.models.config import Json, ModelConfig
from dllm.models.family import Family, RawConfig, standard, written
from dllm.models.layout import Names
from dllm.models.tokenizer import Message

NAMES = Names(
    embed="model.transformer.wte", norm="model.transformer.ln_f", head="model.transformer.ff_out",
    layer="model.transformer.blocks.{}", input_norm="attn_norm", mlp_norm="ff_norm", q="q_proj", k="k_proj",
    v="v_proj", o="attn_out", gate="ff_proj", up="up_proj", down="ff_out",
)  # fmt: skip
# keys of config.json -> fields of `ModelConfig`
KEYS = {
    "embedding_size": "embedding_rows", "d_model": "hidden_size", "n_layers": "n_layers", "n_heads": "n_heads",
    "n_kv_heads": "n_kv_heads", "mlp_hidden_size": "intermediate_size", "max_sequence_length": "max_positions",
    "rope_theta": "rope_theta", "rope_full_precision": "rope_full_precision", "rms_norm_eps": "norm_eps",
    "include_qkv_bias": "qkv_bias", "weight_tying": "tied",
}  # fmt: skip
# what the backbone has no switch for
FIXED = dict(
    block_type="llama", block_group_size=1, activation_type="silu", layer_norm_type="rms", attention_layer_norm=False,
    rope=True, include_bias=False,
)  # fmt: skip


def read(raw: RawConfig) -> ModelConfig:
    """See `Family.read`."""
    raw.expect(**FIXED, bias_for_layer_norm=False, alibi=False, scale_logits=False, input_emb_norm=False)
    return standard(
        raw,
        "llada",
        KEYS,
        n_kv_heads=raw.get("n_kv_heads") or (1 if raw.get("multi_query_attention") else raw.need("n_heads")),
        intermediate_size=raw.get("mlp_hidden_size") or int(raw.need("mlp_ratio") * raw.need("d_model")),
        rope_full_precision=bool(raw.get("rope_full_precision", True)),
        qkv_bias=bool(raw.get("include_qkv_bias", False)),
    )


def write(config: ModelConfig) -> Json:
    """See `Family.write`."""
    rows = config.raw.get("vocab_size", config.vocab_size)
    others = {"model_type": "llada", "layer_norm_with_affine": True, "use_cache": False, "mlp_ratio": 4}
    return written(config, KEYS, **FIXED, **others, vocab_size=rows)


def chat(messages: list[Message]) -> str:
    """The published template: it opens the assistant's turn whatever the last message is."""
    turns = "".join(
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|eot_id|>" for m in messages
    )
    return f"<|startoftext|>{turns}<|start_header_id|>assistant<|end_header_id|>\n\n"


FAMILY = Family(
    name="llada", architectures=("LLaDAModelLM",), read=read, write=write, names=NAMES, mask_id=126336,
    turn_end="<|eot_id|>", turn_end_id=126348, chat=chat,
)  # fmt: skip
