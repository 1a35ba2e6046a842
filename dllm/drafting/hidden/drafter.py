"""A head over the verifier's hidden states as drafter: one forward over a block of masks behind the newest token.

States are projected to keys and values when a draft needs them, so that rounds without one cost a copy; of a text
longer than the layers see only its end is kept. The block always has its full width, as every mask of it is seen by the
others; fewer slots of it are used where fewer are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm.drafting.drafters import Ask, Draft, Need, Ragged
from dllm.drafting.hidden.backbone import Text
from dllm.drafting.hidden.config import HeadConfig
from dllm.drafting.hidden.head import Head
from dllm.drafting.hidden.order import PairHead
from dllm.drafting.lattice import DraftFailure, listed, uniforms
from dllm.drafting.pairs import PairScores
from dllm.drafting.proposal import EMPTY, Rows, chain, drawn, sent
from dllm.drafting.trim import kept
from dllm.drafting.verifier import CausalLM, embedding, text_config
from dllm.drafting.vocabulary import Vocabulary
from dllm.errors import DllmError
from dllm.models.linear import linear
from dllm.models.model import rows_of

ROOM = 256  # tokens of a store to begin with


class Trimmed(NamedTuple):
    """A head of some ids alone."""

    vocabulary: Vocabulary
    weight: Tensor | None  # (n, H); None: all logits are computed, and these taken
    bias: Tensor | None  # (n,)
    right: Tensor | None  # (n, r) of the order head


# of a head and the layer that gives its logits: by the ids that are kept
_TRIMMED: WeakKeyDictionary[Head, WeakKeyDictionary[nn.Module, dict[frozenset[int], Trimmed]]] = WeakKeyDictionary()


class Context:
    """What is known of the text: the states of its tokens up to `end`, as keys and values (layers, G, S, D) those from
    `first` to `made`. No more than `reach` are ever seen."""

    def __init__(self, reach: int | None = None) -> None:
        self.reach, self.first, self.made = reach, 0, 0
        self.stored: list[Tensor] = []
        self.waiting: list[Tensor] = []  # states (n, T, H) of the newest tokens
        self.held = 0  # tokens of these
        self.end = 0

    def take(self, states: Tensor, start: int) -> None:
        """States (n, T, H) of the tokens from `start` on; what was known of these is forgotten. Errors: something is
        missing before them."""
        if start > self.end:
            raise DllmError(f"the states of tokens {self.end} to {start - 1} were not handed over")
        self._back(start)
        self.end = start + len(states)
        self._hold(states if self.reach is None else states[max(0, len(states) - self.reach) :])
        while self.reach is not None and self.held - len(self.waiting[0]) >= self.reach:
            self.held -= len(self.waiting.pop(0))

    def _hold(self, states: Tensor) -> None:
        self.waiting.append(states.clone())
        self.held += len(states)

    def _back(self, start: int) -> None:
        """Forget what is behind the first `start` tokens."""
        surplus, self.end = self.end - start, start
        while surplus and self.waiting:
            last = self.waiting.pop()
            self.held -= len(last)
            if len(last) > surplus:
                self._hold(last[: len(last) - surplus])
            surplus -= min(surplus, len(last))
        self.made = min(self.made, start)
        self.first = min(self.first, start)

    def catch_up(self, project: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """Keys and values of what waits; `project` makes them of states (n, T, H) at positions (n,)."""
        if not self.waiting:
            return
        states = torch.cat(self.waiting) if len(self.waiting) > 1 else self.waiting[0]
        pos = torch.arange(self.end - len(states), self.end, device=states.device)
        keys, values = project(states, pos)
        self.waiting, self.held = [], 0
        self._append(keys, values)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Keys and values (layers, G, n, D) of the newest tokens."""
        n = keys.shape[2]
        if self.end - n > self.made:  # what lies between is never seen
            self.first = self.end - n
        old = self.end - n - self.first
        if not self.stored or old + n > self.stored[0].shape[2]:
            kept = old if self.reach is None else min(old, self.reach)
            layers, groups, _, width = keys.shape
            larger = [keys.new_zeros(layers, groups, max(ROOM, 2 * (kept + n)), width) for _ in range(2)]
            for new, held in zip(larger, self.stored, strict=False):
                new[:, :, :kept] = held[:, :, old - kept : old]
            self.stored, self.first, old = larger, self.end - n - kept, kept
        for held, new in zip(self.stored, (keys, values), strict=True):
            held[:, :, old : old + n] = new
        self.made = self.end

    def seen(self) -> tuple[Tensor, Tensor]:
        """Keys and values (layers, G, end - begin, D)."""
        keys, values = (held[:, :, self.begin - self.first : self.end - self.first] for held in self.stored)
        return keys, values

    @property
    def begin(self) -> int:
        """The first token that is seen."""
        return self.first if self.reach is None else max(self.first, self.end - self.reach)


def text_of(contexts: Sequence[Context]) -> Text:
    """What drafts for several texts see of them."""
    lengths = [context.end - context.begin for context in contexts]
    width, device = max(lengths), contexts[0].stored[0].device
    pairs = zip(*(context.seen() for context in contexts), strict=True)
    keys, values = (
        torch.stack([F.pad(x, (0, 0, 0, width - x.shape[2])) for x in some], 1) if len(some) > 1 else some[0][:, None]
        for some in pairs
    )
    slots, known = torch.arange(width, device=device), sent([[c.begin, c.end] for c in contexts], device)
    pos = slots + known[:, :1]  # (B, S)
    return Text(keys, values, pos.where(pos < known[:, 1:], -1), min(lengths) < width)


class Planned(NamedTuple):
    """What a draft feeds and reads."""

    ask: Ask
    drafter: HiddenDrafter
    block: list[int]  # ids of the anchor, a path, and masks
    first: int  # slot that proposes
    k: int


class HiddenDrafter(Ragged):
    """A head as its folder or class says (`read_head`), over all of the text or the last tokens of a window. Heads
    without an order of their own, and those whose logits depend on the token just before alone, give a lattice; the
    others a chain, drafted left to right.

    The mask id is not banned, as no public code bans it.
    """

    bounds: tuple[str, ...] = ("trim", "window")

    def __init__(self, head: Head) -> None:
        self.made, self.head, config = head, head, head.config  # as it was loaded, and where the verifier is
        self.name, self.taps = config.form, config.taps
        self.longest: int | None = config.slots[1] - config.slots[0]
        self.context = Context()
        self.model: Any = None  # the verifier's, for its embedding and head
        self.mask = 0

    @property
    def chains_only(self) -> bool:
        """Whether drafts are chains: a state over the block fits no lattice."""
        return self.head.order is not None and not isinstance(self.head.order, PairHead)

    def reset(self, ids: Sequence[int], need: Need) -> None:
        """No states yet. Errors: DllmError for a verifier that the head was not made for."""
        super().reset(ids, need)
        if need.model is None:
            raise DllmError(f"a {self.name} head drafts with its verifier's own states: use dllm.speculate")
        check(self.head.config, need.model, need.vocab)
        self.model, self.mask = need.model, self._mask(need)
        self.context = Context(self._reach())
        weight, stored = embedding(need.model), self.made.backbone.norm.weight.dtype
        half = stored.itemsize < 4  # then it stays so: a draft is mostly reading weights
        self.head = self.made.at(weight.device, weight.dtype if weight.dtype.is_floating_point and not half else stored)
        known, order = self.head.to_verifier, self.head.order
        few = None if need.trim is None else kept(need.trim, need.vocab, need.eos)
        if known is not None and self.head.config.rows is not None:  # of the verifier's ids those that it learned
            own = frozenset[int](known.tolist())
            known, few = None if self.head.lm_head is None else known, own if few is None else own & few
        self.vocabulary = Vocabulary("ids" if known is None else "strings", need.vocab, known)
        self.trimmed = None if few is None else self._trimmed(few)
        whole = None if order is None else order.right
        self.right = whole if self.trimmed is None or whole is None else self.trimmed.right

    def _reach(self) -> int | None:
        """How much of the text is ever seen."""
        window, reach = self.need.window, self.head.config.reach
        if window is not None and (window.sinks or window.recall or window.tokens is None):
            raise DllmError(f"a {self.name} head sees the end of a text: give window= a number, no sinks nor recall")
        far = [n for n in (reach, None if window is None else window.tokens) if n is not None]
        return min(far, default=None)

    @property
    def _dtype(self) -> torch.dtype:
        return self.head.backbone.norm.weight.dtype

    @property
    def _last(self) -> nn.Linear:
        """The layer that gives logits: the head's own, or the verifier's."""
        return self.head.lm_head or cast(nn.Linear, self.model.get_output_embeddings())

    def _trimmed(self, ids: frozenset[int]) -> Trimmed:
        last, order = self._last, self.head.order
        known = _TRIMMED.setdefault(self.head, WeakKeyDictionary()).setdefault(last, {})
        if ids not in known:
            vocabulary = self.vocabulary.trimmed(ids, len(last.weight))
            shared = vocabulary.shared
            assert shared is not None
            own = shared.drafter.on(last.weight.device)
            bias = getattr(last, "bias", None)  # foreign
            weight, bias = (None if x is None else rows_of(x, own) for x in (last.weight, bias))
            right = None if order is None else order.right[shared.verifier.on(order.right.device)]
            kept_rows = (None if x is None else x.to(self._dtype) for x in (weight, bias, right))
            known[ids] = Trimmed(vocabulary, *kept_rows)
        self.vocabulary = known[ids].vocabulary
        return known[ids]

    def _mask(self, need: Need) -> int:
        mask = self.head.config.mask
        if isinstance(mask, str):
            if need.tokenizer is None:
                raise DllmError(f"the {self.name} head names its mask {mask!r}: give the verifier's tokenizer")
            mask = need.tokenizer.get_vocab().get(mask, -1)
        if not 0 <= mask < need.vocab:
            raise DllmError(
                f"the {self.name} head's mask {self.head.config.mask!r} is no id of the verifier's {need.vocab}"
            )
        return mask

    @torch.inference_mode()
    def take(self, states: Tensor, start: int) -> None:
        """Keep them until a draft is asked for."""
        self.context.take(states, start)

    def _project(self, states: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.head.backbone.keys(states.to(self.head.backbone.norm.weight), pos)
        return keys, values

    @property
    def company(self) -> Hashable:
        """Texts that one head drafts for, with one verifier."""
        return self.head, self.model, None if self.trimmed is None else self.trimmed.vocabulary

    @torch.inference_mode()
    def together(self, asks: Sequence[Ask]) -> list[Draft | DraftFailure]:
        """One forward over the blocks of all texts; nothing before the first states of a text are there, nor behind a
        path that it does not hold yet, unless the head is causal: then the path stands in place of the first masks."""
        plans = [a.drafter.plan(a) for a in asks if isinstance(a.drafter, HiddenDrafter)]
        some = [p for p in plans if p is not None]
        if not some:
            return [EMPTY] * len(asks)
        hidden = self.hidden([p.block for p in some], [p.drafter.context for p in some])
        slots = [states[p.first : p.first + p.k] for p, states in zip(some, hidden, strict=True)]
        logits = torch.split(self.logits(torch.cat(slots)), [p.k for p in some])
        begun = [p.drafter.begin(p.ask, h, scores) for p, h, scores in zip(some, slots, logits, strict=True)]
        found = iter(begun)  # the device has all of its work before the host waits for the first
        return [EMPTY if p is None else _finished(next(found)) for p in plans]

    def plan(self, a: Ask) -> Planned | None:
        """What a draft takes; None: there is nothing to say."""
        c, n = self.head.config, self.context.end
        path = len(a.ids) - n - 1
        k = min(a.k, (self.longest or 0) - path)
        if not n or k < 1 or (path and not c.conditions):
            return None
        self.forwards += 1
        return Planned(a, self, [*a.ids[n:], *[self.mask] * (c.block - 1 - path)], c.slots[0] + path, k)

    def begin(self, a: Ask, hidden: Tensor, logits: Tensor) -> Callable[[], Draft]:
        """All work of the device for a draft by the states (k, H) and logits (k, n) of its slots; what is returned
        waits for it."""
        order, shared = self.head.order, self.vocabulary.shared
        if isinstance(order, PairHead):
            return self._paired(order, logits, hidden, a.ids)
        if order is not None:
            return self._chained(logits, hidden, a)
        u = self.need.uniforms(len(logits), a.generator)
        table, rows = self.need.told(logits, None, None if u is None else sent(u, logits.device), shared=shared)
        return lambda: listed(table.cpu(), rows, len(a.ids), 0 if u is None else u.shape[1])

    def hidden(self, blocks: Sequence[Sequence[int]], contexts: Sequence[Context]) -> Tensor:
        """States (B, block, H) of the slots of blocks behind their texts."""
        for context in contexts:
            context.catch_up(self._project)
        text = text_of(contexts)
        pos = [list(range(c.end, c.end + len(block))) for c, block in zip(contexts, blocks, strict=True)]
        ids, at = sent([list(block) for block in blocks], text.pos.device), sent(pos, text.pos.device)
        out: Tensor = self.head.backbone(self._embedded(ids) * self.head.config.scale, at, text)
        return out

    def _embedded(self, ids: Tensor) -> Tensor:
        embed = self.head.embed_tokens or self.model.get_input_embeddings()
        out: Tensor = embed(ids).to(self._dtype)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """(k, H) -> (k, n) of the ids that drafts are made of, see `Vocabulary.chosen`; scaled and capped."""
        c, cut = self.head.config, self.trimmed
        hidden = hidden if self.head.lm_head_down is None else self.head.lm_head_down(hidden)
        if cut is not None and cut.weight is not None:
            logits = linear(hidden, cut.weight, cut.bias)
        else:
            kind = self._last.weight.dtype
            logits = self.vocabulary.chosen(self._last(hidden.to(kind) if kind.is_floating_point else hidden))
        logits = logits * c.multiplier
        return c.cap * torch.tanh(logits / c.cap) if c.cap else logits

    def _paired(self, order: PairHead, logits: Tensor, hidden: Tensor, ids: Sequence[int]) -> Callable[[], Draft]:
        """A lattice with the scores of neighbours. The greedy path of the head over all of its ids is in it."""
        anchor = sent([ids[-1]], logits.device)
        walk = None if order.top else self._walk(logits, hidden, anchor, None)[0]
        assert self.right is not None
        pairs = PairScores(partial(order.scores, hidden, self.right), anchor, order.law, walk)
        need = replace(self.need, m_max=order.top, eos=frozenset()) if order.top else self.need
        table, rows = need.told(logits, pairs=pairs, shared=self.vocabulary.shared)
        return lambda: listed(table.cpu(), rows, len(ids), pairs=True)

    def _chained(self, logits: Tensor, hidden: Tensor, a: Ask) -> Callable[[], Draft]:
        """A chain, each slot by all tokens before it: greedy, or drawn from the rows of the walk."""
        need, k = self.need, len(logits)
        u = sent(uniforms(1, k, a.generator), logits.device) if need.sampled else None
        anchor = sent([a.ids[-1]], logits.device)
        columns, scores = self._walk(logits, hidden, anchor, u)
        tokens, shared = self._named(columns), self.vocabulary.shared
        rows = torch.softmax(scores.double(), -1)
        sure = self.confidence(hidden, torch.cat([anchor, tokens[:-1]]))
        conf = rows.gather(1, columns[:, None])[:, 0] if sure is None else torch.sigmoid(sure)
        told = torch.stack([tokens.double(), conf.double(), rows.isfinite().all(-1).double()])

        def finish() -> Draft:
            drafted, confs, usable = told.tolist()
            if not all(usable):
                raise DraftFailure("the drafter returned NaN or infinite logits")
            ids = [int(t) for t in drafted]
            if u is not None:
                index = None if shared is None else shared.verifier.on(rows.device).expand_as(rows)
                return chain(ids, rows=Rows(rows, index, sound=True))
            end = next((i + 1 for i, t in enumerate(ids) if t in need.eos), k)
            return chain(ids[:end], confs[:end])

        return finish

    def _walk(self, logits: Tensor, hidden: Tensor, anchor: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
        """Columns (k,) left to right behind an anchor (1,), the best of each slot given those before, or the draws at
        uniforms u (1, k) under the verifier's warpers; and the scores (k, n) that they were taken by."""
        order, state, prev = self.head.order, None, anchor
        assert order is not None and self.right is not None
        columns, rows = list[Tensor](), list[Tensor]()
        for j in range(len(logits)):
            row = logits[j : j + 1]
            left, state = order.step(prev, self._embedded(prev), hidden[j : j + 1], state)
            row = row + linear(left, self.right) if j >= order.skip else row
            if u is None:
                columns.append(row.argmax(-1))
            else:
                row = row if self.need.warp is None else self.need.warp(row.float())
                columns.append(drawn(torch.softmax(row.double(), -1), u[:, j : j + 1])[0])
            prev = self._named(columns[-1])
            rows.append(row)
        return torch.cat(columns), torch.cat(rows)

    def _named(self, columns: Tensor) -> Tensor:
        """The verifier's ids of columns of the logits."""
        shared = self.vocabulary.shared
        return columns if shared is None else shared.named(columns)

    def confidence(self, hidden: Tensor, before: Tensor) -> Tensor | None:
        """Logits (k,) that each drafted token is taken, by its slot's state and the token before it."""
        head, order = self.head.confidence, self.head.config.order
        if head is None or order is None:
            return None
        if order.confidence == "hidden+token":
            hidden = torch.cat([hidden, self.head.order.markov_w1(before)], -1)  # type: ignore[union-attr, operator]
        out: Tensor = head(hidden)[:, 0]
        return out


def _finished(finish: Callable[[], Draft]) -> Draft | DraftFailure:
    try:
        return finish()
    except DraftFailure as failure:
        return failure


def check(c: HeadConfig, model: CausalLM, vocab: int) -> None:
    """Refuse a verifier that a head was not made for, with the first reason."""
    config = text_config(model)
    depth: int = config.num_hidden_layers
    width = embedding(model).shape[1]
    why = ""
    if width != c.hidden_size:
        why = f"states of {c.hidden_size}, the verifier has {width}"
    elif c.depth is not None and c.depth != depth:
        why = f"{c.depth} layers, the verifier has {depth}"
    elif min(c.taps) < -1 or max(c.taps) >= depth - 1:
        why = f"layers {', '.join(map(str, c.taps))}, the verifier's may lie in -1 to {depth - 2}"
    elif c.vocab is not None and c.vocab != vocab:
        why = f"a vocabulary of {c.vocab}, the verifier has {vocab}"
    elif c.columns is None and model.get_output_embeddings() is None:
        why = "the verifier's head, which it does not show"
    if why:
        raise DllmError(f"this {c.form} head is for another verifier: it reads {why}")
