"""What a family is: names of its classes, a config reader and writer, tensor names, special tokens, chat text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dllm.errors import DllmError
from dllm.models.config import ModelConfig
from dllm.models.layout import Layout, Names, layout
from dllm.models.tokenizer import Message


@dataclass(frozen=True)
class Family:
    """One family of checkpoints; `mask_id` and `turn_end_id` are those of its published vocabulary."""

    name: str
    architectures: tuple[str, ...]
    read: Callable[[RawConfig], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    names: Names = field(default_factory=Names)
    mask_id: int | None = None
    mask_by_constant: bool = False  # the published tokenizer contradicts itself: the constant decides
    turn_end: str | None = None
    turn_end_id: int | None = None
    chat: Callable[[list[Message]], str] | None = None  # text of a conversation where the tokenizer has no template

    def layout(self, config: ModelConfig) -> Layout:
        return layout(config, self.names)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_ids(value: Any) -> bool:
    """Whether a value of a configuration is an id or a list of ids."""
    return _whole(value) or (isinstance(value, list) and all(map(_whole, value)))


Kind = tuple[Callable[[Any], bool], str]
SIZE: Kind = (lambda v: _whole(v) and v > 0, "a positive whole number")
LAYERS: Kind = (lambda v: _whole(v) and 0 < v <= 10_000, "a positive whole number, at most 10 000")
COUNT: Kind = (lambda v: _whole(v) and v >= 0, "a whole number, 0 or more")
FACTOR: Kind = (lambda v: _number(v) and v > 0, "a positive number")
FLAG: Kind = (lambda v: isinstance(v, bool) or v in (0, 1), "true or false")
ID: Kind = (_whole, "a whole number")
OBJECT: Kind = (lambda v: isinstance(v, dict), "an object")

# what the values of config.json may be, besides null
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("vocab_size", "embedding_size", "hidden_size", "d_model"), SIZE),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_key_value_heads", "n_kv_heads", "head_dim"), SIZE),
    **dict.fromkeys(("intermediate_size", "mlp_hidden_size", "block_size", "bd_size"), SIZE),
    **dict.fromkeys(("max_position_embeddings", "max_sequence_length"), SIZE),
    **dict.fromkeys(("num_experts", "num_experts_per_tok", "num_shared_experts", "first_k_dense_replace"), COUNT),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size", "dense_intermediate_size"), COUNT),
    **dict.fromkeys(("n_group", "topk_group", "decoder_sparse_step"), COUNT),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "partial_rotary_factor", "routed_scaling_factor"), FACTOR),
    **dict.fromkeys(("clip_qkv", "mlp_ratio"), FACTOR),
    **dict.fromkeys(("tie_word_embeddings", "weight_tying", "include_qkv_bias", "rope_full_precision"), FLAG),
    **dict.fromkeys(("qk_layernorm", "use_qk_norm", "use_bias", "norm_topk_prob", "multi_query_attention"), FLAG),
    **dict.fromkeys(("moe_router_enable_expert_bias",), FLAG),
    **dict.fromkeys(("mask_token_id", "pad_token_id", "bos_token_id"), ID),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), OBJECT),
    "logits_shift": (lambda v: _whole(v) and v in (0, 1), "0 or 1"),
    "eos_token_id": (is_ids, "an id or a list of ids"),
    "mlp_only_layers": (lambda v: isinstance(v, list) and is_ids(v), "a list of layers"),
    "moe_layer_freq": (lambda v: is_ids(v) and v not in ([], -1), "a whole number, or a list of 0 and 1"),
}


class RawConfig(dict[str, Any]):
    """config.json with errors that say which key is missing, of another kind, or cannot be honoured."""

    name = ""  # id or folder the checkpoint came from; some families write the block size there

    @property
    def architecture(self) -> str:
        named = self.get("architectures") or ""
        named = named[0] if isinstance(named, list) else named
        return named if isinstance(named, str) else ""

    def check(self) -> None:
        """Errors: a value of another kind than its key has."""
        for key, value in self.items():
            fits, what = KINDS.get(key, (None, ""))
            if fits is not None and value is not None and not fits(value):
                raise DllmError(f"config.json of this {self.architecture} checkpoint: {key} is {what}, not {value!r}")

    def need(self, key: str) -> Any:
        if self.get(key) is None:
            raise DllmError(f"config.json of this {self.architecture} checkpoint lacks {key!r}")
        return self[key]

    def qualify_code(self) -> None:
        """Name the repository in front of each class that comes from its code, so that a saved copy still finds it."""
        if isinstance(classes := self.get("auto_map"), dict):
            named = {k: v if "--" in v else f"{self.name}--{v}" for k, v in classes.items() if isinstance(v, str)}
            self["auto_map"] = {**classes, **named}

    def expect(self, **values: Any) -> None:
        """Switches that the backbone does not have must be off: each key absent, null or equal to the given value."""
        for key, value in values.items():
            if self.get(key) not in (None, value):
                raise DllmError(
                    f"config.json has {key}={self[key]!r}, supported for {self.architecture}: {value!r}; "
                    'backend="transformers" may run this checkpoint'
                )

    @property
    def rope_theta(self) -> float:
        """Rotary base; scaled rotary embeddings (YaRN, NTK, llama3 ...) are refused, not ignored."""
        rope = self.get("rope_parameters") or {}
        scaling = self.get("rope_scaling") or rope
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise DllmError(f'rope scaling {kind!r} is not supported; backend="transformers" may run this checkpoint')
        theta: Any = rope.get("rope_theta", self.get("rope_theta"))
        if not _number(theta) or theta <= 0:
            raise DllmError(f"config.json of this {self.architecture} checkpoint lacks 'rope_theta'")
        return float(theta)


def standard(raw: RawConfig, family: str, **switches: Any) -> ModelConfig:
    """Read the usual transformers keys (hidden_size, num_hidden_layers ...); `switches` override what is read."""
    raw.expect(hidden_act="silu", use_sliding_window=False, mlp_bias=False)
    heads = raw.need("num_attention_heads")
    hidden = raw.need("hidden_size")
    values: dict[str, Any] = {
        "vocab_size": raw.need("vocab_size"),
        "embedding_rows": raw.need("vocab_size"),
        "hidden_size": hidden,
        "n_layers": raw.need("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or hidden // heads,
        "intermediate_size": switches.get("intermediate_size") or raw.need("intermediate_size"),
        "norm_eps": float(raw.need("rms_norm_eps")),
        "rope_theta": raw.rope_theta,
        "tied": bool(raw.get("tie_word_embeddings", False)),
        "max_positions": raw.need("max_position_embeddings"),
        **special_ids(raw),
    }
    return ModelConfig(family=family, architecture=raw.architecture, raw=dict(raw), **{**values, **switches})


def special_ids(raw: RawConfig) -> dict[str, Any]:
    """Ids that config.json itself names; the hub adds the other sources. Errors: values that are no ids."""
    RawConfig({k: v for k, v in raw.items() if k.endswith("_token_id") or k == "architectures"}).check()
    eos = raw.get("eos_token_id")
    return {
        "mask_id": raw.get("mask_token_id"),
        "eos_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "pad_id": raw.get("pad_token_id"),
        "bos_id": raw.get("bos_token_id"),
    }


def write_special_ids(config: ModelConfig) -> dict[str, Any]:
    """config.json keeps the end-of-text id that it had; the whole set goes to generation_config.json."""
    eos = config.raw.get("eos_token_id")
    known = set(eos if isinstance(eos, list) else [eos]) <= set(config.eos_ids)
    return {
        "mask_token_id": config.mask_id,
        "eos_token_id": eos if known else next(iter(config.eos_ids), None),
        "pad_token_id": config.pad_id,
        "bos_token_id": config.bos_id,
    }


def write_standard(config: ModelConfig) -> dict[str, Any]:
    """The usual transformers keys of a config; the inverse of `standard`."""
    return {
        "architectures": [config.architecture],
        "vocab_size": config.embedding_rows,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        "attention_bias": config.qkv_bias,
        **write_special_ids(config),
    }
