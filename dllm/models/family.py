"""What a family is: names of its classes, a config reader and writer, tensor names, special tokens, chat text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeGuard

from dllm.errors import DllmError
from dllm.models.config import Json, ModelConfig, is_id, is_ids
from dllm.models.layout import Layout, Names, layout
from dllm.models.tokenizer import Message


@dataclass(frozen=True)
class Family:
    """One family of checkpoints; `mask_id` and `turn_end_id` are those of its published vocabulary."""

    name: str
    architectures: tuple[str, ...]
    read: Callable[[RawConfig], ModelConfig]
    write: Callable[[ModelConfig], Json]
    names: Names = field(default_factory=Names)
    mask_id: int | None = None
    mask_by_constant: bool = False  # the published tokenizer contradicts itself: the constant decides
    turn_end: str | None = None
    turn_end_id: int | None = None
    chat: Callable[[list[Message]], str] | None = None  # text of a conversation where the tokenizer has no template

    def layout(self, config: ModelConfig) -> Layout:
        """Every official tensor with its place in the backbone."""
        return layout(config, self.names)


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


Kind = tuple[Callable[[object], bool], str]
SIZE: Kind = (lambda v: is_id(v) and v > 0, "a positive whole number")
LAYERS: Kind = (lambda v: is_id(v) and 0 < v <= 10_000, "a positive whole number, at most 10 000")
COUNT: Kind = (lambda v: is_id(v) and v >= 0, "a whole number, 0 or more")
FACTOR: Kind = (lambda v: _number(v) and v > 0, "a positive number")
FLAG: Kind = (lambda v: isinstance(v, bool) or v in (0, 1), "true or false")

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
    **dict.fromkeys(("mask_token_id", "pad_token_id", "bos_token_id"), (is_id, "a whole number")),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (lambda v: isinstance(v, dict), "an object")),
    "attention_block_size": SIZE,
    "logits_shift": (lambda v: is_id(v) and v in (0, 1), "0 or 1"),
    "eos_token_id": (is_ids, "an id or a list of ids"),
    "mlp_only_layers": (lambda v: isinstance(v, list) and is_ids(v), "a list of layers"),
    "moe_layer_freq": (lambda v: is_ids(v) and v not in ([], -1), "a whole number, or a list of 0 and 1"),
}


class RawConfig(dict[str, Any]):
    """config.json with errors that say which key is missing, of another kind, or cannot be honoured."""

    name = ""  # id or folder the checkpoint came from; some families write the block size there

    @property
    def architecture(self) -> str:
        """The class of the official code, empty where none is named."""
        named = self.get("architectures") or ""
        named = named[0] if isinstance(named, list) else named
        return named if isinstance(named, str) else ""

    def check(self) -> None:
        """Errors: a value of another kind than its key has."""
        for key, value in self.items():
            fits, what = KINDS.get(key, (None, ""))
            if fits is not None and value is not None and not fits(value):
                raise DllmError(f"config.json of this {self.architecture} checkpoint: {key} is {what}, not {value!r}")

    def need(self, key: str) -> Any:  # of the kind that `check` saw
        """The value of a key. Errors: it is absent or null."""
        if self.get(key) is None:
            raise DllmError(f"config.json of this {self.architecture} checkpoint lacks {key!r}")
        return self[key]

    def qualify_code(self) -> None:
        """Name the repository in front of each class that comes from its code, so that a saved copy still finds it."""
        if isinstance(classes := self.get("auto_map"), dict):
            named = {k: v if "--" in v else f"{self.name}--{v}" for k, v in classes.items() if isinstance(v, str)}
            self["auto_map"] = {**classes, **named}

    def expect(self, **values: object) -> None:
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
        theta = rope.get("rope_theta", self.get("rope_theta"))
        if not _number(theta) or theta <= 0:
            raise DllmError(f"config.json of this {self.architecture} checkpoint lacks 'rope_theta'")
        return float(theta)


# keys of config.json as transformers has them -> fields of `ModelConfig`; those of a mixture
USUAL = {
    "vocab_size": "embedding_rows", "hidden_size": "hidden_size", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "head_dim": "head_dim",
    "intermediate_size": "intermediate_size", "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta",
    "tie_word_embeddings": "tied", "max_position_embeddings": "max_positions", "attention_bias": "qkv_bias",
}  # fmt: skip
MIXTURE = {"num_experts": "moe.n_experts", "num_experts_per_tok": "moe.top_k"}


def standard(raw: RawConfig, family: str, keys: Mapping[str, str] = USUAL, **switches: Any) -> ModelConfig:
    """Read a config.json by its `keys` (key -> field); `switches` override what is read."""
    raw.expect(hidden_act="silu", use_sliding_window=False, mlp_bias=False)
    key = {field: name for name, field in keys.items()}
    heads, hidden = raw.need(key["n_heads"]), raw.need(key["hidden_size"])
    values = special_ids(raw) | {
        "vocab_size": raw.need("vocab_size"),
        "embedding_rows": raw.get(key["embedding_rows"]) or raw.need("vocab_size"),
        "hidden_size": hidden,
        "n_layers": raw.need(key["n_layers"]),
        "n_heads": heads,
        "n_kv_heads": raw.get(key["n_kv_heads"]) or heads,
        "head_dim": raw.get("head_dim") or hidden // heads,
        "intermediate_size": switches.get("intermediate_size") or raw.need(key["intermediate_size"]),
        "norm_eps": float(raw.need("rms_norm_eps")),
        "rope_theta": raw.rope_theta,
        "tied": bool(raw.get(key["tied"], False)),
        "max_positions": raw.need(key["max_positions"]),
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


def written(config: ModelConfig, keys: Mapping[str, str], **others: object) -> Json:
    """The inverse of `standard`, with other keys beside; a field may be one of the mixture's ("moe.top_k").

    config.json keeps the end-of-text id that it had; the whole set goes to generation_config.json.
    """
    eos = config.raw.get("eos_token_id")
    known = set(eos if isinstance(eos, list) else [eos]) <= set(config.eos_ids)
    return {
        "architectures": [config.architecture],
        **{key: attrgetter(field)(config) for key, field in keys.items()},
        **({} if config.causal else {"mask_token_id": config.mask_id}),
        "eos_token_id": eos if known else next(iter(config.eos_ids), None),
        "pad_token_id": config.pad_id,
        "bos_token_id": config.bos_id,
        **others,
    }


def write_standard(config: ModelConfig, keys: Mapping[str, str] = USUAL, **others: object) -> Json:
    """config.json of a family that has the keys of transformers."""
    return written(config, keys, hidden_act="silu", **others)
