"""The one backbone: a Llama-like transformer with switches, and the one forward that every cache policy uses.

A forward takes tokens with their positions and says of each whether its keys and values are `fresh` (replace the stored
ones for this forward), are to be `keep`-t (and stay), or are private to the forward. A position is also the store slot
of its token; keys are stored rotated, which is right as long as a token does not move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm.errors import DllmError
from dllm.models.config import ModelConfig
from dllm.models.fused import Fused
from dllm.models.moe import MLP, MoE, wide

KINDS = 64  # of forwards that are compiled before torch gives up: each of the optional tensors is there or not
SCORES = 1 << 26  # attention weights that are held at once, over all rows and some heads: 256 MiB in float32
KeysValues = tuple[Tensor, Tensor]  # what a layer computed for the queries, each (N, Q, n_kv_heads, head_dim)
Attended = tuple[Tensor, KeysValues, Tensor | None]  # what a layer makes of x, those, and attention weights (N, R, K)


class KVStore(NamedTuple):
    """Keys and values of every layer, each (lanes, n_kv_heads, slots, head_dim); slot = position, keys are rotated."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def slots(self) -> int:
        """Positions that can be stored; one spare slot behind them takes what is kept nowhere, and is never read."""
        return self.keys[0].shape[2] - 1

    def layer(self, index: int, lanes: slice | None) -> KeysValues:
        """Keys and values of one layer, of a run of lanes or of all."""
        keys, values = self.keys[index], self.values[index]
        return (keys, values) if lanes is None else (keys[lanes], values[lanes])

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(t.nbytes for side in self for t in side)


class Known(NamedTuple):
    """What the host knows of a forward's tensors: with it the forward asks the device nothing."""

    padded: bool = False  # some pos is -1
    private: bool = False  # some token is neither fresh nor kept
    lanes: slice | None = None  # the lanes as one run of rows of the store; None: those of `lane`, or all from 0
    write: slice | None = None  # consecutive slots that the queries of every row fill for good; empty: nothing is kept;
    # None: by `pos`, `fresh` and `keep`
    slots: int = 0  # slots of the store that are read


class Flags(NamedTuple):
    """The optional tensors of a forward, see `dllm.models.model.Model.forward`; None where one says nothing."""

    fresh: Tensor | None
    keep: Tensor | None
    visible: Tensor | None


class Rows(NamedTuple):
    """Whose attention weights a forward returns."""

    layers: frozenset[int]  # over which they are averaged
    at: Tensor  # (N, R) queries, -1 for padding
    width: int  # positions that the weights are laid out over


class Weights(NamedTuple):
    """Attention weights, the mean over some layers and all of their heads, in float32 at least.

    A row sums to 1. A key's weight stands at its position, whether it came from the store or from this forward.
    """

    cols: Tensor  # (N, R) position of each query, -1 for padding
    table: Tensor  # (N, R, L) over positions; 0 at what the query does not see, and in rows that are padding


class Said(NamedTuple):
    """What a forward says of its tokens."""

    hidden: Tensor  # (N, Q, D)
    weights: Weights | None = None  # None: nobody asked


class Outputs(NamedTuple):
    """What a forward says, and what it computed for the store."""

    said: Said
    layers: list[KeysValues]  # of each layer; none where nobody asked


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


def inverse_frequencies(theta: float, dim: int, device: torch.device) -> Tensor:
    """Rotary frequencies (dim/2,) in float32, as every reference computes them; never part of a checkpoint."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


class Rotation(NamedTuple):
    """Tables (N|1, Q, 1, head_dim) of cos and signed sin; the first `turned` dimensions turn, halves paired."""

    cos: Tensor  # 1 behind the turned dimensions
    sin: Tensor  # negative in the first half, 0 behind the turned dimensions
    turned: int

    def __call__(self, x: Tensor) -> Tensor:  # (N, Q, heads, head_dim)
        half = self.turned // 2
        swapped = torch.cat([x[..., half : self.turned], x[..., :half], x[..., self.turned :]], -1)
        return (x * self.cos + swapped * self.sin).to(x.dtype)


class Access(NamedTuple):
    """How this forward's keys and values meet those that a layer has stored."""

    slots: int  # the first `slots` are read
    private: bool  # one more key column for every query
    lane: Tensor | None  # (N,) the stored row of each row; None: they are the same
    rows: Tensor  # (N, 1) the same
    kept: Tensor | slice | None  # slots written for good: (N, Q), the spare one for a token that does not stay
    lent: tuple[Tensor, Tensor] | None  # rows (N, 1) and columns (N, Q) replaced in what is read, for this forward only

    def __call__(self, stored: Tensor, new: Tensor) -> Tensor:
        """Write new (N, Q, kv_heads, head_dim) into stored; all that can be seen (N, kv_heads, slots[+Q], head_dim)."""
        turned = new.transpose(1, 2)
        if isinstance(self.kept, Tensor):
            stored[self.rows, :, self.kept] = new
        elif self.kept is not None:
            stored[self._lanes, :, self.kept] = turned
        if self.lent is None:
            seen = stored[self._lanes, :, : self.slots]  # a view where the rows are the same
            return torch.cat([seen, turned], 2) if self.private else seen
        if self.private:
            seen = torch.cat([stored[self._lanes, :, : self.slots], turned], 2)
        else:  # one column more, for what is not lent
            seen = stored[self._lanes, :, : self.slots + 1]
            seen = seen.clone(memory_format=torch.contiguous_format) if self.lane is None else seen
        rows, columns = self.lent
        seen[rows, :, columns] = new
        return seen if self.private else seen[:, :, : self.slots]

    @property
    def _lanes(self) -> Tensor | slice:
        return slice(None) if self.lane is None else self.lane


class Attention(nn.Module):
    """Grouped-query attention with optional biases, per-head norms and clamping of queries, keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.clip = config.head_dim, config.clip_qkv
        self.gqa = config.n_heads != config.n_kv_heads
        self.heads = [config.n_heads, config.n_kv_heads]
        inner, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.qkv_proj = Fused(config.hidden_size, {"q_proj": inner, "k_proj": kv, "v_proj": kv}, config.qkv_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rotate: Rotation,
        mask: Tensor | None,
        causal: bool,
        stored: KeysValues | None,
        access: Access | None,
        rows: Tensor | None,
    ) -> Attended:
        """(N, Q, D) -> (N, Q, D), the keys and values of the queries, (N, Q, kv_heads, head_dim) each, and the weights
        of the queries `rows` (N, R), (N, R, K).

        mask: bool (N, 1, 1|Q, K). stored: of this layer, (lanes, kv_heads, slots, head_dim) each, see `Access`.
        """
        qkv = self.qkv_proj(x) if self.clip is None else self.qkv_proj(x).clamp(-self.clip, self.clip)
        heads = qkv.unflatten(-1, (-1, self.head_dim))  # (N, Q, heads + 2 kv_heads, head_dim)
        turning, v = torch.split(heads, [sum(self.heads), self.heads[1]], 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = torch.split(turning, self.heads, 2)
            q, k = rotate(self.q_norm(q)), rotate(self.k_norm(k))
        else:
            q, k = torch.split(rotate(turning), self.heads, 2)
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        if stored is not None and access is not None:
            keys, values = access(stored[0], k), access(stored[1], v)
        out = self._attend(q.transpose(1, 2), keys, values, mask, causal)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        return out, (k, v), None if rows is None else self._weights(q, keys, mask, rows)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """(N, heads, Q, head_dim). The heads that share keys stand in line as queries: every kernel takes that, while
        few take groups together with a mask."""
        if causal or not self.gqa:
            return F.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=self.gqa
            )
        line, group = q.reshape(len(q), keys.shape[1], -1, q.shape[-1]), q.shape[1] // keys.shape[1]
        if mask is not None and mask.shape[2] > 1:
            mask = mask.repeat(1, 1, group, 1)
        return F.scaled_dot_product_attention(line, keys, values, attn_mask=mask).view(q.shape)

    def _weights(self, q: Tensor, keys: Tensor, mask: Tensor | None, rows: Tensor) -> Tensor:
        """(N, R, K) the softmax of the queries at `rows` (N, R) over all that they see, mean over heads. q is
        (N, Q, heads, head_dim), keys are those of the kernel."""
        n, (kv, size), at = len(q), (keys.shape[1], keys.shape[2]), rows[:, :, None, None]
        group, length = q.shape[2] // kv, rows.shape[1]
        q = q.gather(1, at.expand(-1, -1, *q.shape[2:]))
        q = q.view(n, length, kv, group, -1).movedim(1, 3)  # (N, kv, group, R, d)
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, 0].expand(n, -1, -1).gather(1, rows[..., None].expand(-1, -1, size))[:, None]  # (N, 1, R, K)
        total = torch.zeros(n, length, size, dtype=wide(q.dtype), device=q.device)
        share = max(1, SCORES // max(1, n * group * length * size))  # key heads at once
        for first in range(0, kv, share):
            part = slice(first, first + share)
            line = q[:, part].flatten(2, 3).to(total.dtype) * q.shape[-1] ** -0.5
            scores = line @ keys[:, part].to(total.dtype).mT
            scores = scores.view(n, -1, group, length, size)  # (N, kv, group, R, K)
            scores = scores if mask is None else scores.masked_fill(~mask[:, :, None], -torch.inf)
            total += scores.softmax(-1).sum((1, 2))
        return total / (kv * group)


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
        self,
        x: Tensor,
        rotate: Rotation,
        mask: Tensor | None,
        causal: bool,
        stored: KeysValues | None,
        access: Access | None,
        rows: Tensor | None = None,
    ) -> Attended:
        """(N, Q, D) -> (N, Q, D); arguments and further results as those of `Attention.forward`."""
        attended, new, weights = self.self_attn(self.input_layernorm(x), rotate, mask, causal, stored, access, rows)
        x = x + attended
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, new, weights


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Transformer(nn.Module):
    """Embedding, layers, final norm and head of every family. Built with random weights (std 0.02)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.spread = False  # layers on several devices
        self.step: Callable[..., Attended] | None = None  # what `compile` made of a layer's forward
        self.embed_tokens = Embedding(config.embedding_rows, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.embedding_rows, bias=False)
        for name, parameter in self.named_parameters():
            if "norm" not in name and not parameter.is_meta:  # torch imports its compiler to draw nothing there
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
        known: Known | None = None,
    ) -> Tensor:
        """Hidden states (N, Q, D) after the final norm of tokens `ids` (N, Q) at positions `pos` (N, Q).

        The keywords are those of `dllm.models.model.Model.forward`.
        """
        flags = Flags(fresh, keep, visible)
        return self.outputs(ids, pos, flags, lane, store, known).said.hidden

    def outputs(
        self,
        ids: Tensor,
        pos: Tensor | None,
        flags: Flags,
        lane: Tensor | None,
        store: KVStore | None,
        known: Known | None,
        rows: Rows | None = None,
        kv: bool = False,
    ) -> Outputs:
        """All that a forward may be asked for; kv: the new keys and values of each layer (with a store)."""
        n, q = ids.shape
        if known is None:
            known, flags = _asked(ids, pos, flags, lane, store)
        compiled = self.step is not None and not torch.is_grad_enabled()
        if compiled and known.write != slice(0, 0):
            known = known._replace(write=None)  # where it begins would be compiled in
        causal = self.config.causal and store is None and flags.visible is None and pos is None and rows is None
        pos = torch.arange(q, device=ids.device)[None] if pos is None else pos  # (N|1, Q)
        lanes, access, columns = None, None, pos
        if store is not None:
            pos = pos.expand(n, q)
            lanes = slice(0, n) if known.lanes is None and lane is None else known.lanes
            access = _access(store, pos, flags, lane, lanes, known)
            columns = torch.arange(known.slots, device=ids.device).expand(n, -1)
            columns = torch.cat([columns, pos], 1) if known.private else columns
        mask = None if causal else self._mask(flags.visible, pos, columns)
        if known.padded and (mask is not None or access is None or access.private):
            mask = _without_padding(mask, pos, columns)
        x = self.embed_tokens(ids)  # (N, Q, D)
        rotate = self._rotation(pos, x.dtype)
        mask = None if mask is None else mask[:, None]  # (N, 1, 1|Q, K)
        made, run = list[KeysValues](), self._compiled if compiled else Layer.__call__
        reader = None if rows is None else _Reader(rows, pos, columns)
        for i, layer in enumerate(self.layers):
            if self.spread:
                x, rotate, mask, access = _move((x, rotate, mask, access), next(layer.parameters()).device)
            stored = None if store is None else store.layer(i, lanes)
            read = None if reader is None or i not in reader.rows.layers else reader.at.to(x.device)
            # how many heads are read at once depends on the shape, so a layer that is read is not compiled
            x, new, weights = (run if read is None else Layer.__call__)(
                layer, x, rotate, mask, causal, stored, access, read
            )
            if reader is not None and weights is not None:
                reader.add(weights)
            if kv:
                made.append(new)
        hidden = self.norm(x.to(self.norm.weight.device) if self.spread else x)
        return Outputs(Said(hidden, None if reader is None else reader.mean()), made)

    def compile_layers(self, backend: str | Callable[..., object] = "inductor") -> None:
        """Decode with one compiled function, which all layers share; lengths may vary. Training stays as it is.

        Every kind of forward (with a store, with padding, ...) is compiled when it first comes up.
        """
        from torch._dynamo import config

        config.recompile_limit = max(KINDS, config.recompile_limit)
        self.step = torch.compile(Layer.forward, fullgraph=True, dynamic=True, backend=backend)

    def _compiled(self, *arguments: object) -> Attended:
        from torch._dynamo.exc import TorchDynamoException

        assert self.step is not None
        try:
            return self.step(*arguments)
        except TorchDynamoException as error:
            said = " ".join(str(error).split("\n\n")[0].split())  # the first line only names the backend
            raise DllmError(f"torch cannot compile this model here, leave compile= out: {said}") from error

    @property
    def head_weight(self) -> Tensor:
        """(rows, D) of the head, the embedding's where they are one."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., D); padding rows of the vocabulary are not computed."""
        rows, weight = self.config.vocab_size, self.head_weight
        hidden = hidden.to(weight.device) if self.spread else hidden
        if self.lm_head is None or type(weight.data) is Tensor:
            return F.linear(hidden, weight[:rows])
        hidden = self.lm_head(hidden)  # split over processes: a slice of rows is not one of its shards
        return hidden[..., :rows]

    def new_store(self, lanes: int, slots: int) -> KVStore:
        """An empty store for `lanes` rows of at most `slots` positions, each layer's where it computes.

        Zero at first, so never NaN; with the spare slot. Where the heads are split over processes:
        for those of this one.
        """
        shape, dtype = (lanes, self.config.n_kv_heads, slots + 1, self.config.head_dim), self.norm.weight.dtype
        places = [next(layer.parameters()).device for layer in self.layers]
        keys, values = (tuple(torch.zeros(shape, dtype=dtype, device=place) for place in places) for _ in range(2))
        return KVStore(keys, values)

    def _rotation(self, pos: Tensor, dtype: torch.dtype) -> Rotation:
        config = self.config
        turned = int(config.head_dim * config.rotary_fraction)
        frequencies = inverse_frequencies(config.rope_theta, turned, pos.device)
        angles = (pos[..., None].float() * frequencies)[:, :, None]  # (N, Q, 1, turned/2)
        kind, rest = wide(dtype) if config.rope_full_precision else dtype, config.head_dim - turned
        cos, sin = angles.cos().to(kind), angles.sin().to(kind)
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return (
            Rotation(F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest)), turned)
            if rest
            else Rotation(cos, sin, turned)
        )

    def _mask(self, visible: Tensor | None, pos: Tensor, columns: Tensor) -> Tensor | None:
        """`visible` and the model's own rule: (N, 1|Q, K), or None when every token sees every key."""
        block = 1 if self.config.causal else self.config.block_size
        if block is None:
            return visible
        rule = columns[:, None, :] // block <= pos[:, :, None] // block  # (N, Q, K)
        return rule if visible is None else visible & rule


class _Reader:
    """Adds up the attention weights of some queries, layer by layer."""

    def __init__(self, rows: Rows, pos: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns  # (N|1, K) positions of the keys
        self.at = rows.at.clamp(min=0)
        self.cols = torch.where(rows.at < 0, -1, pos.expand(len(rows.at), -1).gather(1, self.at))
        self.total: Tensor | None = None  # (N, R, K)

    def add(self, weights: Tensor) -> None:
        """Those of a further layer."""
        self.total = weights if self.total is None else self.total + weights.to(self.total.device)

    def mean(self) -> Weights:
        """The mean of the layers, by position."""
        assert self.total is not None, "Rows names no layer of this model"
        weights = self.total.to(self.cols.device) / len(self.rows.layers)
        weights = weights.masked_fill((self.cols < 0)[..., None], 0.0)
        n, r, k = weights.shape
        places = torch.where(self.columns < 0, self.rows.width, self.columns)[:, None].expand(n, r, k)
        table = weights.new_zeros(n, r, self.rows.width + 1)  # the last column takes what padding weighs: nothing
        return Weights(self.cols, table.scatter_add_(2, places, weights)[..., :-1])


def _without_padding(mask: Tensor | None, pos: Tensor, columns: Tensor) -> Tensor:
    """Nobody sees padding, padding sees everything: a row without any key would be NaN. (N, Q, K)"""
    real = (columns >= 0)[:, None, :]
    return (real if mask is None else mask & real) | (pos < 0)[:, :, None]


def _access(
    store: KVStore, pos: Tensor, flags: Flags, lane: Tensor | None, lanes: slice | None, known: Known
) -> Access:
    """Turn the flags of the tokens into places in the store and in what is read of it, once a forward."""
    (n, q), device = pos.shape, pos.device
    row = torch.arange(n, device=device)
    lane = lane if lanes is None else None
    take = pos >= 0 if flags.fresh is None else flags.fresh & (pos >= 0)
    kept: slice | Tensor | None = known.write
    if kept is None:
        kept = torch.where(take if flags.keep is None else take & flags.keep, pos, store.slots)
    elif known.write == slice(0, 0):
        kept = None
    lent = None
    if flags.keep is not None:  # a token that is not lent has a column of its own, or the one that nobody reads
        own = torch.arange(q, device=device) if known.private else 0
        columns = torch.where(take & ~flags.keep, pos, own + known.slots)
        lent = row[:, None], columns
    return Access(known.slots, known.private, lane, (row if lane is None else lane)[:, None], kept, lent)


def _asked(
    ids: Tensor, pos: Tensor | None, flags: Flags, lane: Tensor | None, store: KVStore | None
) -> tuple[Known, Flags]:
    """What the device answers about the tensors, and the flags without those that say nothing."""
    n, q = ids.shape
    fresh, keep, visible = flags
    padded = pos is not None and bool((pos < 0).any())
    seen = None if visible is None or bool(visible.all()) else visible
    if store is None:
        return Known(padded), Flags(None, None, seen)
    pos = torch.arange(q, device=ids.device)[None] if pos is None else pos
    private = fresh is not None and not bool((fresh | (pos < 0)).all())
    slots = store.slots if visible is None else visible.shape[-1] - q * private
    lanes, write = slice(0, n) if lane is None else _run(lane), None
    real = pos >= 0
    take = real if fresh is None or not private else fresh & real
    if keep is not None:
        stay = take & keep
        write = None if bool(stay.any()) else slice(0, 0)
        keep = None if bool((take == stay).all()) else keep
    if keep is None and write is None and lanes is not None and bool(take.all()):
        write = _columns(pos)
    return Known(padded, private, lanes, write, slots), Flags(fresh if private else None, keep, seen)


def _run(lane: Tensor) -> slice | None:
    """Consecutive lanes as a slice, so that the store is viewed and not gathered."""
    first, *others = lane.tolist()
    return slice(first, first + len(lane)) if others == list(range(first + 1, first + len(lane))) else None


def _columns(pos: Tensor) -> slice | None:
    """The consecutive slots that all rows write, if they do."""
    first, q = int(pos[0, 0]), pos.shape[1]
    return slice(first, first + q) if bool((pos == torch.arange(first, first + q, device=pos.device)).all()) else None


def _move(value: Any, device: torch.device) -> Any:
    """Tensors inside nested tuples on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [_move(v, device) for v in value]
        return type(value)(*moved) if isinstance(value, (Access, Rotation)) else tuple(moved)
    return value
