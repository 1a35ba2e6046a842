"""LLaDA-MoE-7B-A1B (arXiv 2509.24389): bidirectional, per-head q/k norms, softmax router that is not renormalised.

Its config says model_type "llada" like the dense model: recognised by its class.
"""

from __future__ import annotations

from dllm.models.config import Json, ModelConfig, MoEConfig
from dllm.models.family import MIXTURE, USUAL, Family, RawConfig, standard, write_standard
from dllm.models.layout import Names
from dllm.models.tokenizer import Message

KEYS = {
    **{key: field for key, field in USUAL.items() if key != "intermediate_size"},
    **MIXTURE, "dense_intermediate_size": "intermediate_size", "expert_intermediate_size": "moe.intermediate_size",
    "qk_layernorm": "qk_norm", "partial_rotary_factor": "rotary_fraction", "clip_qkv": "clip_qkv",
    "moe_router_enable_expert_bias": "moe.expert_bias", "moe_router_score_function": "moe.score",
}  # fmt: skip


def read(raw: RawConfig) -> ModelConfig:
    """See `Family.read`."""
    raw.expect(
        attention_bias=False, moe_router_score_function="softmax", router_num_group=1, router_topk_group=1,
        shared_expert_intermediate_size=0, routed_scaling_factor=1, hidden_act="silu",
    )  # fmt: skip
    layers = raw.need("num_hidden_layers")
    frequency = raw.get("moe_layer_freq") or 1
    sparse = frequency if isinstance(frequency, list) else [int(i % frequency == 0) for i in range(layers)]
    return standard(
        raw,
        "llada_moe",
        intermediate_size=raw.get("dense_intermediate_size") or raw.need("expert_intermediate_size"),
        rotary_fraction=float(raw.get("partial_rotary_factor") or 1),
        qk_norm=bool(raw.get("qk_layernorm", True)),
        clip_qkv=raw.get("clip_qkv"),
        moe=MoEConfig(
            n_experts=raw.need("num_experts"),
            top_k=raw.need("num_experts_per_tok"),
            intermediate_size=raw.need("expert_intermediate_size"),
            renormalize=False,  # whatever norm_topk_prob says: the published code switches it off
            expert_bias=bool(raw.get("moe_router_enable_expert_bias")),
            dense_layers=tuple(i for i, on in enumerate(sparse) if not on),
        ),
    )


def write(config: ModelConfig) -> Json:
    """See `Family.write`."""
    sparse = [int(config.is_moe_layer(i)) for i in range(config.n_layers)]
    return write_standard(config, KEYS, model_type="llada", moe_layer_freq=sparse)


ROLES = {"system": "SYSTEM", "user": "HUMAN", "assistant": "ASSISTANT"}


def chat(messages: list[Message]) -> str:
    """The published template."""
    turns = "".join(f"<role>{ROLES.get(m['role'], m['role'])}</role>{m['content']}<|role_end|>" for m in messages)
    return f"{turns}<role>ASSISTANT</role>"


FAMILY = Family(
    name="llada_moe", architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"), read=read, write=write,
    names=Names(router_bias="mlp.expert_bias"), mask_id=156895, turn_end="<|role_end|>", chat=chat,
)  # fmt: skip
