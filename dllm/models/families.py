"""The families known here. A checkpoint is recognised by `architectures`: different models share a `model_type`."""

from __future__ import annotations

from dataclasses import replace

from dllm.errors import DllmError
from dllm.models import causal, dream, fast_dllm, illada, llada, llada2, llada_moe, sdar
from dllm.models.config import ModelConfig
from dllm.models.family import Family, RawConfig

SHIFT = "logits_shift"  # our own key of config.json, written where a checkpoint is aligned otherwise than its family
BLOCKS = "attention_block_size"  # the same for attention in blocks, where the family has none
MODULES = (llada, llada_moe, llada2, illada, dream, sdar, fast_dllm, causal)
FAMILIES: dict[str, Family] = {f.name: f for f in (*(m.FAMILY for m in MODULES), dream.REASONER)}
BY_CLASS = {name: family for family in FAMILIES.values() for name in family.architectures}


def family_of(raw: RawConfig) -> Family:
    """The family of a config.json; a class seen for the first time is an error that names the other backend."""
    if raw.architecture in BY_CLASS:
        return BY_CLASS[raw.architecture]
    if not raw.architecture:
        raise DllmError('config.json names no architecture (the key "architectures"); try backend="transformers"')
    raise DllmError(
        f"config.json names {raw.architecture!r}, which has no native family here; "
        f'try backend="transformers" (known: {", ".join(BY_CLASS)})'
    )


def read_config(raw: RawConfig) -> tuple[Family, ModelConfig]:
    """The family and the configuration of a config.json. Errors: keys that are missing, or hold what they cannot."""
    family = family_of(raw)
    raw.check()
    try:
        config = family.read(raw)
    except DllmError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise DllmError(f"config.json of this {raw.architecture} checkpoint holds a wrong value: {error}") from error
    if wrong := _impossible(config):
        raise DllmError(f"config.json of this {raw.architecture} checkpoint is impossible: {wrong}")
    config = config if raw.get(SHIFT) is None else replace(config, shift=raw[SHIFT])
    return family, config if raw.get(BLOCKS) is None else replace(config, block_size=raw[BLOCKS])


def _impossible(config: ModelConfig) -> str:
    """What the sizes of a configuration contradict each other in; empty if they do not."""
    moe, rotated = config.moe, config.head_dim * config.rotary_fraction
    checks = [
        (config.n_heads % config.n_kv_heads == 0, f"{config.n_heads} heads share {config.n_kv_heads} of keys"),
        (rotated >= 2 and rotated % 2 == 0, f"{rotated:g} of {config.head_dim} columns of a head are rotated"),
        (rotated <= config.head_dim, f"{rotated:g} of {config.head_dim} columns of a head are rotated"),
        (config.vocab_size <= config.embedding_rows,
         f"{config.vocab_size} tokens have {config.embedding_rows} rows of the embedding"),
    ]  # fmt: skip
    if moe is not None:
        groups = f"{moe.topk_groups} of {moe.n_groups} groups of {moe.n_experts} experts"
        checks += [
            (1 <= moe.top_k <= moe.n_experts, f"a token takes {moe.top_k} of {moe.n_experts} experts"),
            (moe.intermediate_size > 0, "the experts have no width"),
            (moe.n_experts % moe.n_groups == 0 and moe.topk_groups <= moe.n_groups, groups),
        ]
    return next((wrong for fine, wrong in checks if not fine), "")
