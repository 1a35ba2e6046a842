"""The verifier: a transformers causal LM, one forward per round, and a cache that takes back what was not accepted.

A session holds the KV cache of the text. `verify` feeds the tokens that the cache lacks plus the drafted nodes and
returns the logits after the last emitted token and after every node; `commit` keeps the accepted path: a crop for a
chain, a gather for a tree. Afterwards the cache holds every token but the last, always. Where a drafter taps layers,
`commit` returns their states at the tokens that stay.

A chain asks little of a model: that several tokens at once continue its cache, and that the cache takes tokens back.
Trees and batches store keys out of order, so they are right only where a key stands where `position_ids` says and sees
what the mask says (`Verifier.can`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from dllm.decoding.graphs import Graphs, granted, obstacle
from dllm.drafting.control import Controller
from dllm.drafting.loans import Loans
from dllm.drafting.places import Places, bucket
from dllm.drafting.proposal import EMPTY, Proposal, chain, sent
from dllm.errors import DllmError
from dllm.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)
T = TypeVar("T")
SLOTS = 1024  # to begin with: short texts share captures, and to read so many costs next to nothing
ROOM = 128  # where nothing is captured: zeros cost time
KINDS = ("full_attention", "sliding_attention")
# what a gather by slots rearranges completely; since transformers 5.23 layers that store nothing have a class
STORED = (DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer))  # foreign
# their attention counts slots behind the mask's back, and only in texts longer than a window, which no rehearsal sees
BY_SLOT = {"gpt_neo": "chains", "moshi": "nothing"}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the spread of the logits; half precision: 0.1


class CausalLM(Protocol):
    """What is asked of a causal LM; those of transformers have it. Beside it, configuration and classes are read."""

    config: Any  # each model has its own names there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward: an object with `.logits` (B, L, V)."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Its own decoding loop: ids (B, L) in, ids (B, L + new) out."""

    def get_input_embeddings(self) -> Any:
        """The module whose `weight` is (V, D)."""

    def get_output_embeddings(self) -> Any:
        """The module that makes logits of the last states."""

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Switch the attention kernel."""


Controllers = dict[tuple[object, ...], Controller]  # measured costs, by drafter and settings
# of a model, whatever verifiers are made of it: its controllers, and what `Verifier.can` has found out
_KNOWN: WeakKeyDictionary[CausalLM, tuple[Controllers, dict[str, bool]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Pending:
    """One row of a round: the ids that the cache lacks (the last of them is the root of the proposal) and the draft."""

    ids: Sequence[int]
    proposal: Proposal


@dataclass(frozen=True)
class PaddedPrompt:
    """A padded text as `generate` gets it: ids, what of it is text (over the cache of an earlier turn as well, where
    `ids` has only the new ones), and position ids that are not the usual ones."""

    ids: Sequence[int]
    real: Sequence[bool]
    positions: Sequence[int] | None = None


class Outputs(NamedTuple):
    """What a forward gives."""

    logits: Tensor  # (B, keep, V) of the last positions
    states: Tensor | None  # (B, L, T, H) of the tapped layers at all positions; None: no layer is tapped


class Verifier:
    """A causal LM of transformers whose cache can be rolled back: what its assisted decoding serves. It fixes the text;
    drafters only make it faster. What was measured of a model is shared by all verifiers of it.

    Recurrent models keep a running state that cannot be taken back, static and quantised caches have no rollback: both
    are refused with the reason. Trees and batches need an explicit mask: flash kernels take none, so such a model is
    switched to sdpa, with a warning.

    model, tokenizer   as given; without a tokenizer prompts are ids and results have no text.
    Errors: DllmError for what is no such model.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config = text_config(model)
        self.controllers, self.found = _KNOWN.setdefault(model, ({}, {}))
        self.takes = frozenset(inspect.signature(type(bare(model)).forward).parameters)
        cache = DynamicCache(config=self.config)
        check_rollback(model, cache)
        kinds = getattr(self.config, "layer_types", None)  # foreign
        windows = {layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)}
        self.layers = [type(layer) for layer in cache.layers]
        self.kinds = list(kinds or [KINDS[layer is DynamicSlidingWindowLayer] for layer in self.layers])
        self.window = windows.pop() if len(windows) == 1 else None
        self.odd = set(self.kinds) - set(KINDS) or set(self.layers) - set(STORED) or windows
        self.mixed = bool(kinds) and len(set(self.kinds)) > 1
        self.rope: dict[str, Any] = getattr(self.config, "rope_parameters", None) or {}  # foreign
        if not self.can("chains"):
            raise DllmError(
                f"{type(model).__name__} cannot verify several tokens at once: its cache is not continued or taken "
                "back as a causal LM's is; use another verifier"
            )

    def can(self, what: str) -> bool:
        """Whether "chains", "trees" or "batches" give the model's own text: by what the model is, and where that does
        not settle it by one rehearsal against forwards without a cache."""
        if what not in self.found:
            known = self._known(what)
            self.found[what] = rehearse(self, what) if known is None else known
        return self.found[what]

    def _known(self, what: str) -> bool | None:
        """The standard decoder of transformers turns keys by `position_ids` and leaves the mask to its caller."""
        if "past_key_values" not in self.takes or BY_SLOT.get(self.config.model_type) == "nothing":
            return False
        inner = bare(self.model)
        rotary = hasattr(getattr(inner, "base_model", inner), "rotary_emb")  # foreign
        standard = rotary and bool(getattr(inner, "_supports_attention_backend", False))  # foreign
        if what == "chains":
            return True if standard and not self.odd else None
        if "position_ids" not in self.takes or self.odd or self.config.model_type in BY_SLOT:
            return False
        if getattr(self.config, "alibi", False):  # foreign
            return False
        if what == "batches" and self.rope.get("rope_type") in ("dynamic", "longrope"):
            return False  # the longest row decides how all rows are turned
        return True if standard else None

    @property
    def vocab(self) -> int:
        """Rows of the input embedding: an id at or above it cannot be fed."""
        return embedding(self.model).shape[0]

    @property
    def device(self) -> torch.device:
        """Where ids are expected."""
        return embedding(self.model).device

    @property
    def max_positions(self) -> int | None:
        """Positions there are, prompt and output together; None: no such limit."""
        limit: int = getattr(self.config, "max_position_embeddings", None) or 0  # foreign
        return limit if limit > 0 else None

    @property
    def stretches(self) -> bool:
        """Whether positions of all rows are stretched by the longest text so far (dynamic RoPE)."""
        return bool(self.rope.get("rope_type") == "dynamic")

    @property
    def turn(self) -> int | None:
        """The length from which LongRoPE turns keys by other factors: a forward with one token behind it uses them for
        all of its tokens, so no draft may cross it."""
        long = self.rope.get("rope_type") == "longrope"
        return self.rope.get("original_max_position_embeddings") if long else None

    @property
    def restarts(self) -> bool:
        """Whether `generate` computes the cache anew at the turn (Phi-3 and its kin)."""
        return self.turn is not None and hasattr(self.config, "original_max_position_embeddings")  # foreign

    @property
    def eos(self) -> frozenset[int]:
        """The end tokens at which the model's own `generate` would stop."""
        ids = getattr(getattr(self.model, "generation_config", self.config), "eos_token_id", None)  # foreign
        if ids is None:
            return frozenset()
        return frozenset(ids if isinstance(ids, list | tuple) else [ids])

    def check_ids(self, ids: Sequence[int]) -> None:
        """Errors: an id that cannot be fed."""
        bad = next((t for t in ids if not 0 <= t < self.vocab), None)
        if bad is not None:
            raise DllmError(
                f"id {bad} is outside the verifier's vocabulary of {self.vocab}; tokenise with the verifier's tokenizer"
            )

    def open(
        self,
        batch: int = 1,
        cache: Cache | None = None,
        prompts: Sequence[PaddedPrompt] | None = None,
        graphs: Graphs | None = None,
    ) -> Session:
        """A session over an empty cache or (one row) that of an earlier turn; `prompts` where they are padded; `graphs`
        where rounds of it may be captured."""
        if graphs is not None:
            return Placed(self, batch, graphs)
        if cache is not None:
            check_rollback(self.model, cache)
        if batch == 1:
            cache = DynamicCache(config=self.config) if cache is None else cache
            return Single(self, cache, prompts[0] if prompts else None)
        if cache is not None and cache.get_seq_length() > 0:
            raise DllmError("a batch starts from an empty cache: generate row by row to continue from past_key_values")
        if self.can("batches"):
            return Placed(self, batch, graphs)
        log.info("%s places keys by slot: its rows are verified one after the other", type(self.model).__name__)
        return Separate([self.open(1, None, prompts and prompts[i : i + 1]) for i in range(batch)])

    def forward(self, ids: Tensor, keep: int, taps: Sequence[int] = (), **kw: Any) -> Outputs:
        """Logits of the last `keep` positions, and the states behind the layers `taps` (-1: the embedding).

        Errors: a model that does not give them.
        """
        kw.setdefault("position_ids", torch.arange(ids.shape[1], device=ids.device)[None])
        kw = {name: value for name, value in kw.items() if name in self.takes or name != "position_ids"}
        if "logits_to_keep" in self.takes:
            kw["logits_to_keep"] = keep
        if taps:
            kw["output_hidden_states"] = [tap + 1 for tap in taps]
        with torch.inference_mode():
            out = self.model(input_ids=ids, use_cache=True, return_dict=True, **kw)
            return Outputs(out.logits[:, -keep:], self._tapped(out, taps) if taps else None)

    def _tapped(self, out: Any, taps: Sequence[int]) -> Tensor:
        found = getattr(out, "hidden_states", None) or ()  # foreign
        if len(found) <= max(taps) + 1 or any(found[tap + 1] is None for tap in taps):
            raise DllmError(
                f"{type(self.model).__name__} does not give the hidden states of layers {', '.join(map(str, taps))}, "
                "which this drafter reads: use another verifier, or a drafter that reads the text"
            )
        return torch.stack([found[tap + 1] for tap in taps], 2)

    def graphs(self, loans: Loans) -> Graphs | None:
        """Graphs for one decode, as asked, or where nothing is and they can be. Errors: asked for where they cannot."""
        return loans.of(bare(self.model)) if granted(loans.asked, self.obstacle) else None

    @property
    def obstacle(self) -> str:
        """Why forwards of the model cannot be captured; "" if they can."""
        why = obstacle(bare(self.model), self.device)
        if not why and "flash" in str(getattr(self.config, "_attn_implementation", "")):  # foreign
            why = "captured rounds bring their own mask, which flash attention takes none of: load with sdpa"
        if not why and not self.can("batches"):
            why = f"{type(self.model).__name__} does not place keys by position_ids alone"
        return why

    def masks(self, allowed: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Boolean masks by layer kind -> what the model takes: additive floats, a dict only where the layers are mixed.

        (Booleans are added as 0 / 1 by the eager attention of transformers 5.23, silently.)
        """
        if "flash" in str(getattr(self.config, "_attn_implementation", "")):  # foreign
            kernel = "sdpa" if getattr(self.model, "_supports_sdpa", True) else "eager"  # foreign
            log.warning("flash attention takes no explicit mask: %s now uses %s", type(self.model).__name__, kernel)
            self.model.set_attn_implementation(kernel)
        dtype = embedding(self.model).dtype
        low = torch.finfo(dtype).min
        add = {
            kind: torch.zeros(m.shape, dtype=dtype, device=m.device).masked_fill(~m, low) for kind, m in allowed.items()
        }
        return add if self.mixed else next(iter(add.values()))

    def placed(
        self,
        places: Places,
        table: Tensor,
        keep: int,
        seen: Tensor | None = None,
        causal: bool = False,
        taps: Sequence[int] = (),
    ) -> Outputs:
        """A forward over slots, straight-line code over static tensors. table (B, 2 Q + 1): ids, positions, and how
        many slots of each row come before. seen: see `_allowed`; causal: the model's own mask is right."""
        ids, pos, past = table[:, : table.shape[1] // 2], table[:, table.shape[1] // 2 : -1], table[:, -1:]
        places.where = past + torch.arange(ids.shape[1], device=past.device)
        masks = {} if causal else {"attention_mask": self.masks(self._allowed(places.distance(past), pos, past, seen))}
        return self.forward(ids, keep, taps, past_key_values=places.cache, position_ids=pos, **masks)

    def _allowed(self, away: Tensor, pos: Tensor, past: Tensor, seen: Tensor | None) -> dict[str, Tensor]:
        """Per kind of layer (B, 1, Q, S): the text, and of this forward what is before a token, or what its row of
        `seen` (B, Q Q) marks; a window counts as if every path were the text. away (B, S): how far behind the text."""
        b, q = pos.shape
        own = torch.ones(1, q, q, dtype=torch.bool, device=past.device).tril() if seen is None else seen.view(-1, q, q)
        new = away.clamp(0, q - 1)
        see = own.expand(b, -1, -1).gather(2, new[:, None].expand(-1, q, -1))
        see = (away < 0)[:, None] | (see & (away < q)[:, None])
        key_pos = torch.where(away < 0, away + past, pos.gather(1, new))
        near = pos[:, :, None] - key_pos[:, None] < (self.window or 0)
        return {kind: (see if kind == KINDS[0] else see & near)[:, None] for kind in dict.fromkeys(self.kinds)}


class Session:
    """The cache of one decode. `verify` then `commit`, once a round."""

    cache: Cache | None = None  # as `generate` leaves it, where there is one such
    past = 0  # tokens in the cache when the session was opened

    def verify(self, rows: Sequence[Pending | None], taps: Sequence[int] = ()) -> list[Tensor | None]:
        """Logits (1 + N, V) of each row: after the last of its ids, then after every drafted node. None for None."""
        raise NotImplementedError

    def commit(self, paths: Sequence[Sequence[int] | None]) -> list[Tensor | None]:
        """Keep the ids that were fed and the nodes on each row's path, forget the other nodes. Returns the states
        (n, T, H) of what was kept of each row, where `verify` tapped layers; they hold until the next `verify`."""
        raise NotImplementedError

    def restart(self, row: int) -> None:
        """Forget the cache of a row."""
        raise NotImplementedError

    def replay(self, ids: Sequence[int], taps: Sequence[int]) -> Tensor:
        """The states (n, T, H) of what was in the cache when the session was opened, the text `ids` (n,), read once
        more: a cache does not hold them."""
        raise NotImplementedError


class Single(Session):
    """One row. Chains need no mask but the prompt's; trees bring their own and are compacted by a gather.

    Padding is stored as `generate` stores it, so that the cache fits the padded ids afterwards.
    """

    cache: Cache

    def __init__(self, verifier: Verifier, cache: Cache, prompt: PaddedPrompt | None = None) -> None:
        self.verifier, self.cache = verifier, cache
        self.slots = cache.get_seq_length() if cache.layers else 0  # stored, padding included
        self.real = [True] * self.slots  # per slot: text or padding
        self.fed: list[int] | None = None  # the padded rest of the prompt, until it is fed
        self.position = self.slots  # of the next token
        self.past = self.slots
        self.earlier: PaddedPrompt | None = None  # what the cache held, where it was padded
        self.placed: list[int] = []
        if prompt is not None:
            self._place(prompt)
        self.last: tuple[Proposal, int] = EMPTY, 0
        self.states: Tensor | None = None  # (L, T, H) of the round
        if hasattr(cache, "activate_past_recording"):  # foreign
            cache.activate_past_recording()  # type: ignore[no-untyped-call]

    def restart(self, row: int) -> None:
        """An empty cache."""
        vars(self).update(vars(Single(self.verifier, DynamicCache(config=self.verifier.config))))

    def _place(self, prompt: PaddedPrompt) -> None:
        before = len(prompt.real) - len(prompt.ids)  # of an earlier turn, whose ids are not given again
        rest = prompt.ids[self.slots - before :]
        if not rest or before not in (0, self.slots):
            raise DllmError(
                f"past_key_values holds {self.slots} tokens, the prompt has {len(prompt.real)}: pass at least one new "
                "token, behind the whole text or with an attention_mask over the whole text"
            )
        real = list(prompt.real)
        usual = [max(0, n - 1) for n in accumulate(map(int, real))]
        own = prompt.positions or ()
        positions = [*usual[: len(usual) - len(own)], *own]
        self.fed, self.placed = list(rest), positions[len(positions) - len(rest) :]
        self.real = real[: self.slots]
        self.pending = real[self.slots :]
        self.past = sum(self.real[before:])
        if not before:
            self.earlier = PaddedPrompt(prompt.ids[: self.slots], self.real, positions[: self.slots])

    def replay(self, ids: Sequence[int], taps: Sequence[int]) -> Tensor:
        """One forward over what each slot held, padding included, into a cache of its own."""
        session = Single(self.verifier, DynamicCache(config=self.verifier.config), self.earlier)
        session.verify([Pending(ids, EMPTY)], taps)
        (states,) = session.commit([()])
        assert states is not None
        return states

    def verify(self, rows: Sequence[Pending | None], taps: Sequence[int] = ()) -> list[Tensor | None]:
        """One forward of the ids and the nodes; the prompt's padding is fed with it."""
        (row,) = rows
        assert row is not None
        v, p = self.verifier, row.proposal
        feed = row.ids if self.fed is None else self.fed
        where = self.placed or list(range(self.position, self.position + len(feed)))
        self.real += [True] * len(feed) if self.fed is None else self.pending
        self.position, self.fed, self.placed = where[-1] + 1, None, []
        ids = torch.tensor([[*feed, *p.tokens]], device=v.device)
        pos = torch.tensor([[*where, *(where[-1] + d for d in p.depths)]], device=v.device)
        kw: dict[str, Any] = {"past_key_values": self.cache, "position_ids": pos}
        if not p.is_chain:
            kw["attention_mask"] = self._tree_mask(p, len(feed))
        elif not all(self.real):
            kw["attention_mask"] = torch.tensor([[*self.real, *([True] * len(p))]], device=v.device).long()
        logits, states = v.forward(ids, len(p) + 1, taps, **kw)
        self.last, self.states = (p, len(feed)), None if states is None else states[0]
        if not self.cache.is_croppable:  # known only now: a convolution can be taken back, a running state cannot
            raise DllmError(f"{type(v.model).__name__} has recurrent layers: their state cannot be rolled back")
        return [logits[0]]

    def _tree_mask(self, p: Proposal, n: int) -> Tensor | dict[str, Tensor]:
        """(1, 1, Q, S + Q): the text is causal, a node sees the text and its ancestors, a window counts as if every
        path were the text."""
        v, device = self.verifier, self.verifier.device
        root = self.slots + n - 1
        at = torch.tensor([*range(self.slots, root + 1), *(root + d for d in p.depths)], device=device)
        q, real = len(at), torch.tensor(self.real, device=device)
        own = torch.ones(q, q, dtype=torch.bool, device=device).tril()
        own[n:, n:] = ancestors(p, device)
        own[:, :n] &= real[self.slots :]
        own |= torch.eye(q, dtype=torch.bool, device=device)  # padding sees itself: a softmax over nothing is NaN
        allowed = {}
        for kind in dict.fromkeys(v.kinds):
            stored = _stored(self.cache, v.kinds.index(kind))
            key_at = torch.cat([torch.arange(self.slots - stored, self.slots, device=device), at])
            old = real[self.slots - stored : self.slots].expand(q, -1)
            see = torch.cat([old, own], 1)
            if kind == KINDS[1]:
                see = see & (at[:, None] - key_at[None] < (v.window or 0))
            allowed[kind] = see[None, None]
        return v.masks(allowed)

    def commit(self, paths: Sequence[Sequence[int] | None]) -> list[Tensor | None]:
        """A crop for a chain, a gather for a tree."""
        (path,) = paths
        assert path is not None
        p, n = self.last
        text = [i for i, real in enumerate(self.real[self.slots :]) if real]
        states, self.states = _picked(self.states, [*text, *(n + i for i in path)]), None
        drop = len(p) - len(path)
        if list(path) != list(range(len(path))):
            self._gather(path, len(p))
        else:
            self.cache.crop(-drop)  # crop(0) still trims a sliding window
        self.past += len(text) + len(path)
        self.real += [True] * len(path)
        self.slots += n + len(path)
        self.position += len(path)
        return [states]

    def _gather(self, path: Sequence[int], nodes: int) -> None:
        def take(x: Tensor) -> Tensor:
            stored = x.shape[-2] - nodes
            return x.index_select(-2, torch.tensor([*range(stored), *(stored + i for i in path)], device=x.device))

        for layer in _rearranged(self.cache, take):
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length -= nodes - len(path)
        self.cache.crop(0)


class Placed(Session):
    """Rows that accept different counts, each a chain or a tree. A finished row is fed padding that nobody reads.

    Masks are built from slots and positions, right for full and sliding layers alike, so every layer stores everything.
    A round of no more than drafts is padded to a bucket and captured where there are graphs: it then reads all slots.
    """

    def __init__(self, verifier: Verifier, batch: int, graphs: Graphs | None = None) -> None:
        self.verifier, self.batch, self.graphs = verifier, batch, graphs
        self.lengths = [0] * batch  # tokens in the cache, per row
        self.fed: list[int] = []  # ids of this round, without the nodes
        self.width, self.captured = 0, False  # this round
        self.states: Tensor | None = None  # (B, L, T, H) of this round
        self.places = self._places(ROOM if graphs is None else SLOTS)
        with torch.inference_mode():
            self.places.clear()

    def _places(self, slots: int) -> Places:
        return self._lent(slots, partial(Places, self.verifier.config, self.batch, slots))

    def _lent(self, slots: int, make: Callable[[], Places]) -> Places:
        return make() if self.graphs is None else self.graphs.at(("verify", self.batch, slots), make)

    def _run(self, key: tuple[object, ...], work: Callable[[], T]) -> T:
        if self.graphs is None or not self.captured:
            return work()
        self._lent(self.places.slots, lambda: self.places)  # a drafter that is the same model has others
        return self.graphs.run(key, work, "verifying")

    @torch.inference_mode()
    def verify(self, rows: Sequence[Pending | None], taps: Sequence[int] = ()) -> list[Tensor | None]:
        """One forward of all rows, right-padded."""
        shown = [Pending((), EMPTY) if r is None else r for r in rows]
        self.fed, sizes = [len(r.ids) for r in shown], [len(r.ids) + len(r.proposal) for r in shown]
        captured = self.captured = self.graphs is not None and max(self.fed) == 1
        width = self.width = bucket(max(sizes)) if captured else max(sizes)
        self._grow(width)
        self.places.before = self.places.slots - width if captured else max(self.lengths)
        table = self.places.tell("fed", self._table(shown), self.verifier.device)
        trees = not all(r.proposal.is_chain for r in shown)
        seen = self.places.tell("seen", self._seen(shown), self.verifier.device) if trees else None
        causal = not (captured or trees or any(self.lengths))  # then the model's own mask is right
        first = 0 if captured else min(len(r.ids) - 1 for r in shown if r.ids)  # before it are texts in every row
        work = partial(self.verifier.placed, self.places, table, width - first, seen, causal, taps)
        logits, self.states = self._run(("verify", width, trees, tuple(taps)), work)
        return [None if r is None else logits[b, len(r.ids) - 1 - first : sizes[b] - first] for b, r in enumerate(rows)]

    def _grow(self, width: int) -> None:
        """Twice the slots, until those of this round are among them."""
        slots = self.places.slots
        while slots < max(self.lengths) + width:
            slots *= 2
        if slots > self.places.slots:
            smaller, self.places = self.places, self._places(slots)
            self.places.clear()
            self.places.take(smaller)

    def _table(self, rows: Sequence[Pending]) -> list[list[int]]:
        """Per row its ids, their positions, and the length of the text in the cache."""
        table = []
        for r, past in zip(rows, self.lengths, strict=True):
            n, root = len(r.ids), past + len(r.ids) - 1
            ids, at = [*r.ids, *r.proposal.tokens], [*range(past, past + n), *(root + d for d in r.proposal.depths)]
            rest = self.width - len(ids)
            # padding may not pass the last position
            table.append([*ids, *[0] * rest, *at, *[max(at, default=max(0, root))] * rest, past])
        return table

    def _seen(self, rows: Sequence[Pending]) -> Tensor:
        """(B, Q Q) what each token of a round sees of the others: those before it, a node its ancestors only."""
        seen = torch.ones(len(rows), self.width, self.width, dtype=torch.bool).tril()
        for see, r in zip(seen, rows, strict=True):
            nodes = slice(len(r.ids), len(r.ids) + len(r.proposal))
            see[nodes, nodes] = ancestors(r.proposal)
        return seen.flatten(1)

    @torch.inference_mode()
    def commit(self, paths: Sequence[Sequence[int] | None]) -> list[Tensor | None]:
        """The paths of trees are moved together; a chain's is there already."""
        states = [self._kept(b, path) for b, path in enumerate(paths)]
        self.states = None
        if any(list(path) != list(range(len(path))) for path in paths if path is not None):
            self._move([path or () for path in paths])
        kept = (0 if path is None else n + len(path) for n, path in zip(self.fed, paths, strict=True))
        self.lengths = [a + n for a, n in zip(self.lengths, kept, strict=True)]
        return states

    def _kept(self, row: int, path: Sequence[int] | None) -> Tensor | None:
        """The states of what is kept of a row; captured work that follows would write over a view of them."""
        if self.states is None or path is None:
            return None
        n = self.fed[row]
        kept = _picked(self.states[row], [*range(n), *(n + i for i in path)])
        return kept if kept is None or not self.captured else kept.clone()

    def _move(self, paths: Sequence[Sequence[int]]) -> None:
        """Slots of the accepted nodes, then slots where they belong; each other one is moved onto itself."""
        rows = []
        for past, n, path in zip(self.lengths, self.fed, paths, strict=True):
            places = list(range(past, past + self.width))
            rows.append([*places[:n], *(places[n + i] for i in path), *places[n + len(path) :], *places])
        moves = self.places.tell("moves", rows, self.verifier.device)
        self._run(("commit", self.width), lambda: self.places.move(*moves.chunk(2, 1)))


class Separate(Session):
    """Rows of a model that cannot batch ragged ones: a session each, verified one after the other."""

    def __init__(self, rows: Sequence[Session]) -> None:
        self.rows = rows

    def verify(self, rows: Sequence[Pending | None], taps: Sequence[int] = ()) -> list[Tensor | None]:
        """Row by row."""
        return [None if p is None else row.verify([p], taps)[0] for row, p in zip(self.rows, rows, strict=True)]

    def commit(self, paths: Sequence[Sequence[int] | None]) -> list[Tensor | None]:
        """Row by row."""
        return [None if path is None else row.commit([path])[0] for row, path in zip(self.rows, paths, strict=True)]

    def restart(self, row: int) -> None:
        """An empty cache for one row."""
        self.rows[row].restart(0)


def rehearse(verifier: Verifier, what: str) -> bool:
    """Verify a made-up text in the way that `what` names, with rejected tokens in between, and compare its logits with
    forwards without a cache."""
    v = verifier
    text = [3 + i * 5 % max(1, v.vocab - 3) for i in range(9)]
    wrong = [1 + (t * 2) % max(1, v.vocab - 1) for t in text]
    short = text[4:7]
    try:
        if what == "batches":
            session: Session = Placed(v, 2)
            session.verify([Pending(text[:3], chain(wrong[:4])), Pending(short[:1], EMPTY)])
            session.commit([(), ()])
            pairs = [(text, Pending(text[3:], EMPTY)), (short, Pending(short[1:], chain(wrong[:1])))]
        else:
            session = Single(v, DynamicCache(config=v.config))
            tree = Proposal((wrong[0], text[3], wrong[1], text[4], wrong[2]), (-1, -1, 0, 1, 3))
            session.verify([Pending(text[:3], chain(wrong[:4]) if what == "chains" else tree)])
            session.commit([() if what == "chains" else (1, 3)])
            pairs = [(text, Pending(text[session.past :], EMPTY))]
        verified = session.verify([pending for _, pending in pairs])
        return all(
            after is not None and _close(after[0], v.forward(torch.tensor([ids], device=v.device), 1).logits[0, 0])
            for (ids, _), after in zip(pairs, verified, strict=True)
        )
    except (torch.OutOfMemoryError, DllmError):
        raise
    except Exception as error:  # whatever a foreign model raises where it is given what it does not take
        log.debug("%s: no %s: %s", type(v.model).__name__, what, error)
        return False


def _picked(states: Tensor | None, kept: list[int]) -> Tensor | None:
    """These positions of states (L, T, H)."""
    if states is None or kept == list(range(len(kept))):
        return None if states is None else states[: len(kept)]
    return states.index_select(0, sent(kept, states.device))


def _close(a: Tensor, b: Tensor) -> bool:
    """(V,) logits that differ by rounding alone."""
    gap = float((a.double() - b.double()).abs().max())
    return gap <= TOLERANCE.get(b.dtype, 0.1) * float(b.double().std())


def _rearranged(cache: Cache, take: Callable[[Tensor], Tensor]) -> list[CacheLayerMixin]:
    """The layers that hold something, after `take` has picked slots of their keys and values (B, H, S, D)."""
    filled = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin) and layer.is_initialized]
    for layer in filled:
        if layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = take(layer.keys), take(layer.values)
    return filled


def ancestors(p: Proposal, device: torch.device | None = None) -> Tensor:
    """(N, N) bool: row i marks node i and its ancestors."""
    see = torch.eye(len(p), dtype=torch.bool)
    for i, parent in enumerate(p.parents):
        if parent >= 0:
            see[i] |= see[parent]
    return see.to(device)


def _stored(cache: Cache, index: int) -> int:
    """Slots of a layer; one that is no layer of keys, or not filled yet, has none."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    return layer.keys.shape[-2] if isinstance(layer, CacheLayerMixin) and layer.keys is not None else 0


def embedding(model: CausalLM) -> Tensor:
    """The table (V, D) of the model's input ids."""
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def text_config(model: CausalLM) -> PreTrainedConfig:
    """The configuration of the model's decoder. Errors: no causal LM of transformers, an encoder-decoder."""
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):  # foreign
        raise DllmError(f"a verifier is a causal LM of transformers, got {type(model).__name__}")
    if getattr(model.config, "is_encoder_decoder", False):  # foreign
        raise DllmError(f"{type(model).__name__} is an encoder-decoder: verifiers are decoder-only causal LMs")
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    return config


def bare(model: CausalLM) -> Any:
    """The model inside the wrappers of torch.compile and PEFT."""
    inner = getattr(model, "_orig_mod", model)  # foreign
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # foreign


def check_rollback(model: CausalLM, cache: Cache) -> None:
    """Refuse a cache that cannot take tokens back, with the reason."""
    name = type(model).__name__
    if getattr(model, "_is_stateful", False):  # foreign
        raise DllmError(
            f"{name} is recurrent: its state cannot be rolled back to before a rejected token; "
            "use an attention-only verifier"
        )
    for layer in getattr(cache, "layers", []):  # foreign
        kind = type(layer).__name__
        if "Static" in kind:
            raise DllmError("a static cache has no rollback: leave cache_implementation unset (dynamic)")
        if "Quantized" in kind or not hasattr(layer, "crop"):  # foreign
            raise DllmError(f"{name} uses {kind}, which cannot be rolled back; use the default dynamic cache")
    if not hasattr(cache, "crop") or not hasattr(cache, "layers"):  # foreign
        raise DllmError(f"{type(cache).__name__} cannot be rolled back; use transformers' DynamicCache")
