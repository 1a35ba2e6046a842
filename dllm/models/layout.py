"""Where each official tensor lives in the backbone: one table a family, used in both directions (load and save)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from dllm.models.config import ModelConfig


class Piece(NamedTuple):
    """What an official tensor holds of a parameter of the backbone."""

    parameter: str
    part: tuple[int | slice, ...] = ()  # of the parameter; () = all of it
    turned: bool = False  # the parameter holds the transpose


Layout = dict[str, Piece]  # by official name


@dataclass(frozen=True)
class Names:
    """Official names of the parts; the defaults are those of Llama, Qwen2, Qwen3 and Qwen3-MoE in transformers."""

    embed: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}"
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str | None = None  # one fused projection, rows ordered queries, keys, values
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    router_bias: str = "mlp.gate.expert_bias"
    expert: str = "mlp.experts.{}"
    shared: str = "mlp.shared_experts"


def layout(config: ModelConfig, names: Names) -> Layout:
    """Every official tensor of a checkpoint with the parts of the backbone that it fills."""
    table: Layout = {f"{names.embed}.weight": Piece("embed_tokens.weight")}
    for i in range(config.n_layers):
        official, own = names.layer.format(i), f"layers.{i}"
        parts = {
            **_attention(config, names),
            **(_moe(config, names) if config.is_moe_layer(i) else _dense(config, names)),
        }
        for name, piece in parts.items():
            table[f"{official}.{name}"] = piece._replace(parameter=f"{own}.{piece.parameter}")
    table[f"{names.norm}.weight"] = Piece("norm.weight")
    if not config.tied:
        table[f"{names.head}.weight"] = Piece("lm_head.weight")
    return table


def _attention(config: ModelConfig, names: Names) -> Layout:
    norms = {names.input_norm: "input_layernorm", names.mlp_norm: "post_attention_layernorm"}
    if config.qk_norm:
        norms |= {names.q_norm: "self_attn.q_norm", names.k_norm: "self_attn.k_norm"}
    table = _weights({**norms, names.o: "self_attn.o_proj"})
    for kind in ["weight", "bias"] if config.qkv_bias else ["weight"]:
        own = f"self_attn.qkv_proj.{kind}"
        if names.qkv is not None:
            table[f"{names.qkv}.{kind}"] = Piece(own)
        else:
            heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
            table |= _side_by_side(own, [h * config.head_dim for h in heads], [names.q, names.k, names.v], kind)
    return table


def _weights(whole: Mapping[str, str]) -> Layout:
    """Official modules whose weights are those of the backbone as they are, with its names."""
    return {f"{official}.weight": Piece(f"{own}.weight") for official, own in whole.items()}


def _side_by_side(own: str, widths: list[int], modules: list[str], kind: str) -> Layout:
    """Official tensors that are consecutive rows of one parameter."""
    ends = list(accumulate(widths))
    return {
        f"{module}.{kind}": Piece(own, (slice(end - width, end),))
        for module, width, end in zip(modules, widths, ends, strict=True)
    }


def _dense(config: ModelConfig, names: Names) -> Layout:
    return _mlp(config.intermediate_size, names.gate, names.up, names.down)


def _mlp(width: int, gate: str, up: str, down: str, *, own: str = "mlp") -> Layout:
    fused = _side_by_side(f"{own}.gate_up_proj.weight", [width, width], [gate, up], "weight")
    return {**fused, **_weights({down: f"{own}.down_proj"})}


def _moe(config: ModelConfig, names: Names) -> Layout:
    assert config.moe is not None
    width = config.moe.intermediate_size
    table: Layout = {f"{names.router}.weight": Piece("mlp.gate.weight")}
    if config.moe.expert_bias:
        table[names.router_bias] = Piece("mlp.gate.expert_bias")
    for e in range(config.moe.n_experts):
        expert = names.expert.format(e)
        gate, up = (slice(None), slice(0, width)), (slice(None), slice(width, 2 * width))
        table[f"{expert}.gate_proj.weight"] = Piece("mlp.gate_up_proj", (e, *gate), turned=True)
        table[f"{expert}.up_proj.weight"] = Piece("mlp.gate_up_proj", (e, *up), turned=True)
        table[f"{expert}.down_proj.weight"] = Piece("mlp.down_proj", (e,), turned=True)
    if config.moe.shared_size:
        parts = (f"{names.shared}.{part}_proj" for part in ("gate", "up", "down"))
        table |= _mlp(config.moe.shared_size, *parts, own="mlp.shared_experts")
    return table
