"""LLaDA2.0 and 2.1, mini and flash (arXiv 2512.15745): block-causal, grouped router, shared expert, half rotary."""

from __future__ import annotations

from dllm.models import llada_moe
from dllm.models.config import Json, ModelConfig, MoEConfig
from dllm.models.family import MIXTURE, USUAL, Family, RawConfig, standard, write_standard
from dllm.models.layout import Names
from dllm.models.tokenizer import Message

BLOCK = 32  # not in the config: the published models are trained with it
NAMES = Names(
    embed="model.word_embeddings", qkv="attention.query_key_value", o="attention.dense",
    q_norm="attention.query_layernorm", k_norm="attention.key_layernorm",
)  # fmt: skip
KEYS = {
    **USUAL, **MIXTURE, "moe_intermediate_size": "moe.intermediate_size", "routed_scaling_factor": "moe.scale",
    "norm_topk_prob": "moe.renormalize", "n_group": "moe.n_groups", "topk_group": "moe.topk_groups",
    "moe_router_enable_expert_bias": "moe.expert_bias", "partial_rotary_factor": "rotary_fraction",
    "use_qk_norm": "qk_norm",
}  # fmt: skip


def read(raw: RawConfig) -> ModelConfig:
    """See `Family.read`."""
    raw.expect(
        use_rmsnorm=True, use_qkv_bias=False, score_function="sigmoid", norm_head=False, norm_softmax=False,
        using_split_qkv_in_self_attention=False,
    )  # fmt: skip
    if raw.get("use_bias", True):  # the class of the checkpoint defaults to true
        raw.expect(use_bias=False)
        raw.need("use_bias")
    width, top_k = raw.need("moe_intermediate_size"), raw.need("num_experts_per_tok")
    return standard(
        raw,
        "llada2",
        rotary_fraction=float(raw.get("partial_rotary_factor") or 0.5),
        qk_norm=bool(raw.get("use_qk_norm", True)),
        block_size=raw.get("block_size") or BLOCK,
        moe=MoEConfig(
            n_experts=raw.need("num_experts"),
            top_k=top_k,
            intermediate_size=width,
            score="sigmoid",
            renormalize=top_k > 1 and bool(raw.get("norm_topk_prob", True)),
            scale=float(raw.get("routed_scaling_factor") or 1),
            n_groups=raw.get("n_group") or 1,
            topk_groups=raw.get("topk_group") or 1,
            expert_bias=bool(raw.get("moe_router_enable_expert_bias", True)),
            shared_size=width * (raw.get("num_shared_experts") or 0),
            dense_layers=tuple(range(min(raw.get("first_k_dense_replace") or 0, raw.need("num_hidden_layers")))),
        ),
    )


def write(config: ModelConfig) -> Json:
    """See `Family.write`."""
    moe = config.moe
    assert moe is not None
    return write_standard(
        config,
        KEYS,
        model_type="llada2_moe",
        num_shared_experts=moe.shared_size // moe.intermediate_size,
        first_k_dense_replace=len(moe.dense_layers),
        score_function="sigmoid",
        rotary_dim=int(config.head_dim * config.rotary_fraction),
        use_qkv_bias=False,
        use_bias=False,
        **({} if config.block_size == BLOCK else {"block_size": config.block_size}),
    )


def chat(messages: list[Message]) -> str:
    """LLaDA-MoE's template behind a default system line."""
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "detailed thinking off"}, *messages]
    return llada_moe.chat(messages)


FAMILY = Family(
    name="llada2", architectures=("LLaDA2MoeModelLM",), read=read, write=write, names=NAMES, mask_id=156895,
    turn_end="<|role_end|>", chat=chat,
)  # fmt: skip
