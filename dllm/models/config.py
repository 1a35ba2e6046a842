"""What the backbone needs to know about a checkpoint: sizes, switches and special ids, resolved once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, TypeAlias, TypeGuard

Json: TypeAlias = Mapping[str, object]  # an object of a JSON file


def is_id(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; True and False are none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_ids(value: object) -> TypeGuard[int | list[int] | tuple[int, ...]]:
    """Whether a value is an id or a list of ids."""
    return is_id(value) or (isinstance(value, list | tuple) and all(map(is_id, value)))


@dataclass(frozen=True)
class MoEConfig:
    """A mixture-of-experts MLP: `top_k` of `n_experts` experts, each `intermediate_size` wide."""

    n_experts: int
    top_k: int
    intermediate_size: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False  # divide the weights of the chosen experts by their sum
    scale: float = 1.0  # factor on the weights of the chosen experts
    n_groups: int = 1  # sigmoid router: the choice is limited to `topk_groups` of `n_groups` groups of experts
    topk_groups: int = 1
    expert_bias: bool = False  # added to the scores for the choice, not for the weights
    shared_size: int = 0  # width of the expert that every token passes; 0: none
    dense_layers: tuple[int, ...] = ()  # layers with an ordinary MLP


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one checkpoint. `shift`: row `i - shift` of the head predicts position `i`.

    `vocab_size` counts the ids that may be predicted, `embedding_rows` the rows stored (LLaDA pads its vocabulary).
    `block_size` makes attention block-causal (a token sees its own block and earlier ones, blocks counted from
    absolute position 0); `causal` is the autoregressive rule; neither: every token sees every token.
    `raw` is the config.json the values came from; `save` writes its other keys back unchanged.
    """

    family: str
    architecture: str
    vocab_size: int
    embedding_rows: int
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rotary_fraction: float = 1.0
    rope_full_precision: bool = False  # rotate queries and keys in float32 whatever the model's dtype (LLaDA)
    qkv_bias: bool = False
    qk_norm: bool = False
    clip_qkv: float | None = None
    tied: bool = False
    max_positions: int = 2048
    shift: int = 0
    block_size: int | None = None
    causal: bool = False
    mask_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    bos_id: int | None = None
    moe: MoEConfig | None = None
    raw: Json = field(default_factory=dict, compare=False, repr=False)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture."""
        return self.moe is not None and layer not in self.moe.dense_layers
