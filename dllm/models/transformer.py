"""The one backbone: a Llama-like transformer with switches, and the one forward that every cache policy uses.

A forward takes tokens with their positions and says of each whether its keys and values are `fresh` (replace the stored
ones for this forward), are to be `keep`-t (and stay), or are private to the forward. A position is also the store slot
of its token; keys are stored rotated, which is right as long as a token does not move.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dllm.models.config import ModelConfig
from dllm.models.moe import MLP, MoE, wide

KeysValues = tuple[Tensor, Tensor]  # what a layer computed for the queries, each (N, Q, n_kv_heads, head_dim)
WithKV = tuple[Tensor, list[KeysValues]]  # hidden states, and those of every layer


class KVStore(NamedTuple):
    """Keys and values of every layer, each (lanes, n_kv_heads, slots, head_dim); slot = position, keys are rotated."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(t.nbytes for side in self for t in side)


class RMSNorm(nn.Module):
    """Mean square and scaling in `wide` precision, cast back, then times the weight (the order of Llama and LLaDA)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        if x.dtype == self.weight.dtype == wide(x.dtype):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.to(wide(x.dtype)), self.weight.shape, None, self.eps).to(x.dtype)


@lru_cache(maxsize=32)
def inverse_frequencies(theta: float, dim: int, device: torch.device) -> Tensor:
    """Rotary frequencies (dim/2,) in float32, as every reference computes them; never part of a checkpoint."""
    with torch.inference_mode(False):
        return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


class Rotation(NamedTuple):
    """cos and sin of the angles, (N|1, Q, 1, rotary/2); the first `rotary` dimensions turn, halves paired."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:  # (N, Q, heads, head_dim)
        half = self.cos.shape[-1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat([t.to(x.dtype) for t in turned] + [rest] * bool(rest.shape[-1]), -1)


class Access(NamedTuple):
    """How this forward's keys and values meet the stored ones; index pairs are (rows, columns) of the query grid."""

    store: KVStore
    slots: int  # the first `slots` of the store are read
    lanes: slice | Tensor  # lanes read, one per row
    rows: Tensor  # (N, Q) lane of every query
    pos: Tensor  # (N, Q) slot of every query
    kept: tuple[Tensor, Tensor] | slice | None  # written for good; a slice of slots when all rows agree; None: nothing
    lent: tuple[Tensor, Tensor] | None  # replace the stored ones for this forward only
    private: bool  # one more key column for every query
    new: list[KeysValues] | None = None  # where given, collects what each layer computes

    def to(self, device: torch.device) -> Access:
        """The indices on another device; the store stays where its layers are."""
        return Access(self.store, self.slots, *_move(self[2:], device))

    def __call__(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New (N, Q, kv_heads, head_dim) -> all that can be seen (N, kv_heads, slots[+Q], head_dim)."""
        if self.new is not None:
            self.new.append((keys, values))
        return self._merge(self.store.keys[layer], keys), self._merge(self.store.values[layer], values)

    def _merge(self, stored: Tensor, new: Tensor) -> Tensor:
        if isinstance(self.kept, slice):
            stored[self.lanes, :, self.kept] = new.transpose(1, 2)
        elif self.kept is not None:
            stored[self.rows[self.kept], :, self.pos[self.kept]] = new[self.kept]
        seen = stored[self.lanes, :, : self.slots]  # a view when `lanes` is a slice
        if self.lent is not None:
            seen = seen.clone() if isinstance(self.lanes, slice) else seen
            seen[self.lent[0], :, self.pos[self.lent]] = new[self.lent]
        return torch.cat([seen, new.transpose(1, 2)], 2) if self.private else seen


class Attention(nn.Module):
    """Grouped-query attention with optional biases, per-head norms and clamping of queries, keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.clip = config.head_dim, config.clip_qkv
        self.gqa = config.n_heads != config.n_kv_heads
        inner, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, rotate: Rotation, mask: Tensor | None, causal: bool, access: Access | None, layer: int
    ) -> Tensor:
        """(N, Q, D) -> (N, Q, D). mask: bool (N, 1, 1|Q, K); access: where keys and values of `layer` are stored."""
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (N, Q, h, d)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q), rotate(k)
        keys, values = (k.transpose(1, 2), v.transpose(1, 2)) if access is None else access(layer, k, v)
        out: Tensor = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=mask, is_causal=causal, enable_gqa=self.gqa
        )
        out = self.o_proj(rearrange(out, "n h q d -> n q (h d)"))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        x = x if self.clip is None else x.clamp(-self.clip, self.clip)
        heads: Tensor = rearrange(x, "n q (h d) -> n q h d", d=self.head_dim)
        return heads


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        moe, hidden = config.moe if config.is_moe_layer(index) else None, config.hidden_size
        self.mlp = MLP(hidden, config.intermediate_size) if moe is None else MoE(hidden, moe)

    def forward(
        self, x: Tensor, rotate: Rotation, mask: Tensor | None, causal: bool, access: Access | None, layer: int
    ) -> Tensor:
        """(N, Q, D) -> (N, Q, D); arguments as those of `Attention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), rotate, mask, causal, access, layer)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Transformer(nn.Module):
    """Embedding, layers, final norm and head of every family. Built with random weights (std 0.02)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.spread = False  # layers on several devices
        self.embed_tokens = nn.Embedding(config.embedding_rows, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.embedding_rows, bias=False)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        ids: Tensor,
        pos: Tensor | None = None,
        *,
        fresh: Tensor | None = None,
        keep: Tensor | None = None,
        visible: Tensor | None = None,
        lane: Tensor | None = None,
        store: KVStore | None = None,
        kv: bool = False,
    ) -> Tensor | WithKV:
        """Hidden states (N, Q, D) after the final norm of tokens `ids` (N, Q) at positions `pos` (N, Q).

        The keywords are those of `dllm.models.model.Model.forward`. kv: return the new keys and values of each layer as
        well (with a store).
        """
        config, (n, q), new = self.config, ids.shape, list[KeysValues]() if kv else None
        padded = pos is not None and bool((pos < 0).any())
        given, pos = pos, torch.arange(q, device=ids.device)[None] if pos is None else pos  # (N|1, Q)
        if store is None:
            mask, access = self._mask(visible, pos, pos, padded), None
        else:
            pos = pos.expand(n, q)
            access = _access(store, pos, fresh, keep, lane, visible, padded)._replace(new=new)
            columns = torch.arange(access.slots, device=ids.device).expand(n, -1)
            columns = torch.cat([columns, pos], 1) if access.private else columns
            mask = self._mask(visible, pos, columns, padded)
        causal = config.causal and store is None and visible is None and given is None
        x = self.embed_tokens(ids)  # (N, Q, D)
        rotate = self._rotation(pos, x.dtype)
        mask = None if mask is None or causal else mask[:, None]  # (N, 1, 1|Q, K)
        for i, layer in enumerate(self.layers):
            if self.spread:
                x, rotate, mask, access = _move((x, rotate, mask, access), next(layer.parameters()).device)
            x = layer(x, rotate, mask, causal, access, i)
        hidden = self.norm(x.to(self.norm.weight.device) if self.spread else x)
        return hidden if new is None else (hidden, new)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., D); padding rows of the vocabulary are not computed."""
        rows = self.config.vocab_size
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        hidden = hidden.to(weight.device) if self.spread else hidden
        if self.lm_head is None or type(weight.data) is Tensor:
            return F.linear(hidden, weight[:rows])
        hidden = self.lm_head(hidden)  # split over processes: a slice of rows is not one of its shards
        return hidden[..., :rows]

    def new_store(self, lanes: int, slots: int) -> KVStore:
        """An empty store for `lanes` rows of at most `slots` positions, each layer's where it computes.

        Allocated once a call, and zero, so never NaN. Where the heads are split over processes: for those of this one.
        """
        shape, dtype = (lanes, self.config.n_kv_heads, slots, self.config.head_dim), self.norm.weight.dtype
        places = [next(layer.parameters()).device for layer in self.layers]
        keys, values = (tuple(torch.zeros(shape, dtype=dtype, device=place) for place in places) for _ in range(2))
        return KVStore(keys, values)

    def _rotation(self, pos: Tensor, dtype: torch.dtype) -> Rotation:
        config = self.config
        frequencies = inverse_frequencies(config.rope_theta, int(config.head_dim * config.rotary_fraction), pos.device)
        angles = (pos[..., None].float() * frequencies)[:, :, None]  # (N, Q, 1, rotary/2)
        kind = wide(dtype) if config.rope_full_precision else dtype
        return Rotation(angles.cos().to(kind), angles.sin().to(kind))

    def _mask(self, visible: Tensor | None, pos: Tensor, columns: Tensor, padded: bool) -> Tensor | None:
        """`visible` and the model's own rule: (N, 1|Q, K), or None when every token sees every key."""
        block = 1 if self.config.causal else self.config.block_size
        mask = None if visible is None or bool(visible.all()) else visible
        if block is not None:
            rule = columns[:, None, :] // block <= pos[:, :, None] // block  # (N, Q, K)
            mask = rule if mask is None else mask & rule
        if padded:  # nobody sees padding, padding sees everything: a row without any key would be NaN
            real = (columns >= 0)[:, None, :]
            mask = (real if mask is None else mask & real) | (pos < 0)[:, :, None]
        return mask


def _access(
    store: KVStore,
    pos: Tensor,
    fresh: Tensor | None,
    keep: Tensor | None,
    lane: Tensor | None,
    visible: Tensor | None,
    padded: bool,
) -> Access:
    """Turn the per-token flags into index pairs, once a forward."""
    n, q = pos.shape
    slots = store.keys[0].shape[2]
    real = pos >= 0 if padded else None
    private = fresh is not None and not bool((fresh | (pos < 0)).all())
    width = slots if visible is None else visible.shape[-1] - q * private
    rows = torch.arange(n, device=pos.device) if lane is None else lane
    reads: slice | Tensor = slice(0, n) if lane is None else _run(lane)
    lent = None
    if fresh is None and keep is None and real is None:
        kept = _everything(pos, reads)
    else:
        take = torch.ones_like(pos, dtype=torch.bool) if fresh is None else fresh
        take = take if real is None else take & real
        stay = take if keep is None else keep & take
        kept = _everything(pos, reads) if bool(stay.all()) else _pairs(stay)
        lent = None if keep is None else _pairs(take & ~stay)
    return Access(store, width, reads, rows[:, None].expand(n, q), pos, kept, lent, private)


def _run(lane: Tensor) -> slice | Tensor:
    """Consecutive lanes as a slice, so that the store is viewed and not gathered."""
    first, *others = lane.tolist()
    return slice(first, first + len(lane)) if others == list(range(first + 1, first + len(lane))) else lane


def _everything(pos: Tensor, reads: slice | Tensor) -> tuple[Tensor, Tensor] | slice | None:
    """All queries are written: one slice when every row writes the same consecutive slots, else all index pairs."""
    if isinstance(reads, slice):
        first, q = int(pos[0, 0]), pos.shape[1]
        if bool((pos == torch.arange(first, first + q, device=pos.device)).all()):
            return slice(first, first + q)
    return _pairs(torch.ones_like(pos, dtype=torch.bool))


def _pairs(chosen: Tensor) -> tuple[Tensor, Tensor] | None:
    rows, columns = chosen.nonzero(as_tuple=True)
    return (rows, columns) if len(rows) else None


def _move(value: Any, device: torch.device) -> Any:
    """Tensors inside nested tuples on `device`."""
    if isinstance(value, (Tensor, Access)):
        return value.to(device)
    if isinstance(value, Rotation):
        return Rotation(*_move(tuple(value), device))
    return tuple(_move(v, device) for v in value) if isinstance(value, tuple) else value
