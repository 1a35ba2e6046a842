"""SDAR 1.7B to 30B-A3B (arXiv 2510.06303) and TraDo: Qwen3 or Qwen3-MoE, block-causal with small blocks, no shift."""

from __future__ import annotations

import logging
import re

from dllm.models.config import Json, ModelConfig, MoEConfig
from dllm.models.dream import turns
from dllm.models.family import MIXTURE, USUAL, Family, RawConfig, standard, write_standard

log = logging.getLogger(__name__)
BLOCK = 4  # of the main release; other variants carry theirs in the name (-b8 ... -b64)
KEYS = {**USUAL, "block_size": "block_size"}
MOE_KEYS = {**KEYS, **MIXTURE, "moe_intermediate_size": "moe.intermediate_size", "norm_topk_prob": "moe.renormalize"}


def read(raw: RawConfig) -> ModelConfig:
    """See `Family.read`."""
    moe = _moe(raw) if raw.architecture == "SDARMoeForCausalLM" or raw.get("num_experts") else None
    raw.expect(attention_bias=False)
    return standard(raw, "sdar", qk_norm=True, block_size=_block(raw), moe=moe)


def _block(raw: RawConfig) -> int:
    """From the config, else from the name, else the released default, which is said."""
    if raw.get("block_size"):
        return int(raw["block_size"])
    if named := re.search(r"-b(\d+)(?!\w)", raw.name):
        return int(named[1])
    log.warning("config.json has no block_size: assuming %d; pass block_size= for another variant", BLOCK)
    return BLOCK


def _moe(raw: RawConfig) -> MoEConfig:
    step, layers = raw.get("decoder_sparse_step") or 1, raw.need("num_hidden_layers")
    dense = {i for i in range(layers) if (i + 1) % step} | set(raw.get("mlp_only_layers") or ())
    return MoEConfig(
        n_experts=raw.need("num_experts"),
        top_k=raw.need("num_experts_per_tok"),
        intermediate_size=raw.need("moe_intermediate_size"),
        renormalize=bool(raw.get("norm_topk_prob", True)),
        dense_layers=tuple(sorted(dense)),
    )


def write(config: ModelConfig) -> Json:
    """See `Family.write`."""
    if config.moe is None:
        return write_standard(config, KEYS, model_type="sdar")
    dense = list(config.moe.dense_layers)
    return write_standard(config, MOE_KEYS, model_type="sdar_moe", decoder_sparse_step=1, mlp_only_layers=dense)


FAMILY = Family(
    name="sdar", architectures=("SDARForCausalLM", "SDARMoeForCausalLM"), read=read, write=write, mask_id=151669,
    mask_by_constant=True, turn_end="<|im_end|>", turn_end_id=151645, chat=turns,
)  # fmt: skip
