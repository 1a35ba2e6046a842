"""The verifier: a transformers causal LM, one forward per round, and a cache that takes back what was not accepted.

A session holds the KV cache of the text. `verify` feeds the tokens that the cache lacks plus the drafted nodes and
returns the logits after the last emitted token and after every node; `commit` keeps the accepted path: a crop for a
chain, a gather for a tree. Afterwards the cache holds every token but the last, always.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dllm.drafting.proposal import Proposal
from dllm.errors import DllmError

log = logging.getLogger(__name__)
KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Pending:
    """One row of a round: the ids that the cache lacks (the last of them is the root of the proposal) and the draft."""

    ids: Sequence[int]
    proposal: Proposal


class Verifier:
    """Wraps a causal LM of transformers whose cache can be rolled back: full attention, sliding window, or a mix.

    Recurrent and hybrid models keep a running state that cannot be taken back, static and quantised caches have no
    rollback: both are refused with the reason. Trees and batches need an explicit mask: flash kernels take none, so
    such a model is switched to sdpa, with a warning.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.controllers: dict[Any, Any] = {}  # measured costs of this verifier, by drafter
        self.config = _text_config(model)
        check_rollback(model, DynamicCache(config=self.config))
        kinds = getattr(self.config, "layer_types", None) or ()
        window = getattr(self.config, "sliding_window", None)
        layers = DynamicCache(config=self.config).layers
        self.kinds = [KINDS[isinstance(layer, DynamicSlidingWindowLayer)] for layer in layers]
        self.window = window if KINDS[1] in self.kinds else None
        self.mixed = bool(kinds) and len(set(self.kinds)) > 1
        odd = next((kind for kind in kinds if kind not in KINDS), None)
        if odd is not None:
            raise DllmError(
                f"{type(model).__name__} has {odd!r} layers, which cannot be rolled back; "
                "use a full or sliding-window attention model"
            )

    def with_tokenizer(self, tokenizer: Any) -> Verifier:
        """The same verifier with another tokenizer; measurements are shared."""
        twin = copy.copy(self)
        twin.tokenizer = tokenizer
        return twin

    @property
    def vocab(self) -> int:
        """Rows of the input embedding: an id at or above it cannot be fed."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def max_positions(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def eos(self) -> frozenset[int]:
        """The end tokens at which the model's own `generate` would stop."""
        ids = getattr(getattr(self.model, "generation_config", self.config), "eos_token_id", None)
        if ids is None:
            return frozenset()
        return frozenset(ids if isinstance(ids, list | tuple) else [ids])

    def check_ids(self, ids: Sequence[int]) -> None:
        bad = next((t for t in ids if not 0 <= t < self.vocab), None)
        if bad is not None:
            raise DllmError(
                f"id {bad} is outside the verifier's vocabulary of {self.vocab}; tokenise with the verifier's tokenizer"
            )

    def open(self, batch: int = 1, cache: Any = None) -> Session:
        """A session over an empty cache, or (one row) over the cache of an earlier turn."""
        if batch == 1:
            if cache is None:
                cache = DynamicCache(config=self.config)
            check_rollback(self.model, cache)
            return Single(self, cache)
        if cache is not None and cache.get_seq_length() > 0:
            raise DllmError("a batch starts from an empty cache: generate row by row to continue from past_key_values")
        return Ragged(self, batch)

    def forward(self, ids: Tensor, **kw: Any) -> Tensor:
        with torch.inference_mode():
            logits = self.model(input_ids=ids, use_cache=True, return_dict=True, **kw).logits
        if logits.is_cuda:  # the host needs the result at once anyway; so its time is counted here
            torch.cuda.synchronize(logits.device)
        return logits

    def masks(self, allowed: dict[str, Tensor]) -> Any:
        """Boolean masks by layer kind -> what the model takes: additive floats, a dict only where the layers are mixed.

        (Booleans are added as 0 / 1 by the eager attention of transformers 5.23, silently.)
        """
        if "flash" in str(getattr(self.config, "_attn_implementation", "")):
            log.warning("flash attention takes no explicit mask: %s now uses sdpa", type(self.model).__name__)
            self.model.set_attn_implementation("sdpa")
        dtype = self.model.get_input_embeddings().weight.dtype
        low = torch.finfo(dtype).min
        add = {
            kind: torch.zeros(m.shape, dtype=dtype, device=m.device).masked_fill(~m, low) for kind, m in allowed.items()
        }
        return add if self.mixed else next(iter(add.values()))


class Session:
    """The cache of one decode. `verify` then `commit`, once a round."""

    cache: Any
    past = 0  # tokens in the cache when the session was opened

    def verify(self, rows: Sequence[Pending | None]) -> list[Tensor | None]:
        raise NotImplementedError

    def commit(self, paths: Sequence[Sequence[int] | None]) -> None:
        raise NotImplementedError


class Single(Session):
    """One row. Chains need no mask at all; trees bring their own and are compacted by a gather."""

    def __init__(self, verifier: Verifier, cache: Any) -> None:
        self.verifier, self.cache = verifier, cache
        self.past = cache.get_seq_length()
        self.last: Pending | None = None
        if hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()

    def verify(self, rows: Sequence[Pending | None]) -> list[Tensor | None]:
        (row,) = rows
        assert row is not None
        v, p, device = self.verifier, row.proposal, self.verifier.device
        self.last = row
        n = len(row.ids)
        ids = torch.tensor([[*row.ids, *p.tokens]], device=device)
        root = self.past + n - 1
        pos = torch.tensor([[*range(self.past, root + 1), *(root + d for d in p.depths)]], device=device)
        kw: dict[str, Any] = {} if p.is_chain else {"attention_mask": self._tree_mask(row, pos[0])}
        logits = v.forward(ids, past_key_values=self.cache, position_ids=pos, logits_to_keep=len(p) + 1, **kw)
        return [logits[0]]

    def _tree_mask(self, row: Pending, pos: Tensor) -> Any:
        """(1, 1, Q, S + Q): the text is causal, a node sees the text and its ancestors, a window applies to
        positions."""
        n, q, device = len(row.ids), len(pos), pos.device
        own = torch.ones(q, q, dtype=torch.bool, device=device).tril()
        own[n:, n:] = ancestors(row.proposal, device)
        allowed = {}
        for kind in dict.fromkeys(self.verifier.kinds):
            stored = _stored(self.cache, self.verifier.kinds.index(kind))
            key_pos = torch.cat([torch.arange(self.past - stored, self.past, device=device), pos])
            see = torch.cat([torch.ones(q, stored, dtype=torch.bool, device=device), own], 1)
            if kind == KINDS[1]:
                see &= pos[:, None] - key_pos[None] < (self.verifier.window or 0)
            allowed[kind] = see[None, None]
        return self.verifier.masks(allowed)

    def commit(self, paths: Sequence[Sequence[int] | None]) -> None:
        (path,) = paths
        assert self.last is not None and path is not None
        p, n = self.last.proposal, len(self.last.ids)
        drop = len(p) - len(path)
        if list(path) != list(range(len(path))):
            self._gather(path, len(p))
        else:
            self.cache.crop(-drop)  # crop(0) still trims a sliding window
        self.past += n + len(path)

    def _gather(self, path: Sequence[int], nodes: int) -> None:
        for layer in self.cache.layers:
            if not layer.is_initialized:
                continue
            stored = layer.keys.shape[-2] - nodes
            keep = torch.tensor([*range(stored), *(stored + i for i in path)], device=layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(-2, keep), layer.values.index_select(-2, keep)
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length -= nodes - len(path)
        self.cache.crop(0)


class Ragged(Session):
    """Several rows that accept different counts: right-padded rounds, then a gather that left-aligns every row again.

    Slots are storage, positions are explicit: a mask built from positions is right for full and sliding layers alike,
    so every layer stores everything (a cache without window trimming). Chains only. A finished row is frozen: it is fed
    padding that nobody reads and its cache does not grow.
    """

    def __init__(self, verifier: Verifier, batch: int) -> None:
        self.verifier, self.batch = verifier, batch
        self.cache = DynamicCache()
        self.lengths = [0] * batch  # tokens in the cache, per row
        self.fed: list[int] = []
        self.stored = 0
        self.nodes: list[int] = []

    def verify(self, rows: Sequence[Pending | None]) -> list[Tensor | None]:
        device = self.verifier.device
        if any(r is not None and not r.proposal.is_chain for r in rows):
            raise DllmError("trees are verified one row at a time: use a chain search for a batch, or call row by row")
        self.nodes = [0 if r is None else len(r.proposal) for r in rows]
        self.fed = [0 if r is None else len(r.ids) + len(r.proposal) for r in rows]
        width = max(self.fed)
        ids = torch.zeros(self.batch, width, dtype=torch.long)
        for b, r in enumerate(rows):
            if r is not None:
                ids[b, : self.fed[b]] = torch.tensor([*r.ids, *r.proposal.tokens])
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        pos = lengths + torch.arange(width, device=device)  # (B, Q)
        slots = torch.arange(self.stored, device=device).expand(self.batch, -1)
        key_pos = torch.cat([slots, pos], 1)  # (B, S + Q)
        real = torch.cat(
            [slots < lengths, torch.arange(width, device=device) < torch.tensor(self.fed, device=device)[:, None]], 1
        )
        gap = pos[:, :, None] - key_pos[:, None, :]
        see = (gap >= 0) & real[:, None, :]
        own = torch.eye(width, dtype=torch.bool, device=device)
        see[:, :, self.stored :] |= own  # a padding query sees itself: a softmax over nothing is NaN
        allowed = {
            kind: (see if kind == KINDS[0] else see & (gap < (self.verifier.window or 0)))[:, None]
            for kind in dict.fromkeys(self.verifier.kinds)
        }
        first = min(len(r.ids) - 1 for r in rows if r is not None)  # columns before it are text in every row
        logits = self.verifier.forward(
            ids.to(device), past_key_values=self.cache, position_ids=pos, attention_mask=self.verifier.masks(allowed),
            logits_to_keep=width - first,
        )  # fmt: skip
        return [
            None if r is None else logits[b, len(r.ids) - 1 - first : self.fed[b] - first] for b, r in enumerate(rows)
        ]

    def commit(self, paths: Sequence[Sequence[int] | None]) -> None:
        kept = [0 if path is None else self.fed[b] - self.nodes[b] + len(path) for b, path in enumerate(paths)]
        lengths = [a + n for a, n in zip(self.lengths, kept, strict=True)]
        width, total = max(lengths), self.stored + max(self.fed)
        index = torch.full((self.batch, width), total - 1)
        for b in range(self.batch):
            index[b, : lengths[b]] = torch.tensor([*range(self.lengths[b]), *range(self.stored, self.stored + kept[b])])
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = _take(layer.keys, index), _take(layer.values, index)
        self.lengths, self.stored = lengths, width


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Gather slots per row: x (B, H, S, D), index (B, W) -> (B, H, W, D)."""
    where = index.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, where)


def ancestors(p: Proposal, device: Any = None) -> Tensor:
    """(N, N) bool: row i marks node i and its ancestors."""
    see = torch.eye(len(p), dtype=torch.bool)
    for i, parent in enumerate(p.parents):
        if parent >= 0:
            see[i] |= see[parent]
    return see.to(device)


def _stored(cache: Any, layer: int) -> int:
    if layer >= len(cache.layers) or not cache.layers[layer].is_initialized:
        return 0
    return cache.layers[layer].keys.shape[-2]


def _text_config(model: Any) -> Any:
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise DllmError(f"a verifier is a causal LM of transformers, got {type(model).__name__}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise DllmError(f"{type(model).__name__} is an encoder-decoder: verifiers are decoder-only causal LMs")
    return model.config.get_text_config(decoder=True)


def check_rollback(model: Any, cache: Any) -> None:
    """Refuse a cache that cannot take tokens back, with the reason."""
    name = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise DllmError(
            f"{name} is recurrent: its state cannot be rolled back to before a rejected token; "
            "use an attention-only verifier"
        )
    for layer in getattr(cache, "layers", []):
        kind = type(layer)
        if kind in (DynamicLayer, DynamicSlidingWindowLayer):
            continue
        if "Static" in kind.__name__:
            raise DllmError("a static cache has no rollback: leave cache_implementation unset (dynamic)")
        if "Linear" in kind.__name__:
            raise DllmError(
                f"{name} has linear-attention or recurrent layers ({kind.__name__}): their state cannot be rolled back"
            )
        raise DllmError(f"{name} uses {kind.__name__}, which cannot be rolled back; use the default dynamic cache")
    if not hasattr(cache, "crop") or not hasattr(cache, "layers"):
        raise DllmError(f"{type(cache).__name__} cannot be rolled back; use transformers' DynamicCache")
