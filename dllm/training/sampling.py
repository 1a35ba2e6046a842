"""A causal model's answers to many prompts, in lanes: whoever is done makes room for the next, so that every forward is
full whatever the lengths (continuous batching, as Orca has it).

An answer depends on its prompt, law and seed: token t is drawn with the uniform of (seed, t), whatever shares a forward
with it. What the backbone of this package is not is asked by `generate` of transformers, batch by batch, with the same
draws.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm.decoding.prediction import Law, Prediction
from dllm.drafting.front import own_processors
from dllm.drafting.proposal import sent
from dllm.drafting.verifier import Verifier
from dllm.errors import DllmError, first_line, out_of_memory
from dllm.models.hub import rebuilt
from dllm.models.native import NativeModel
from dllm.models.transformer import Known, KVStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
REFILL = 8  # lanes are filled when one in so many is empty: prompts are read a few at a time
FORWARD = 1024  # tokens of a forward that reads prompts, padding included
STEP = 32  # slots that are read grow by so many
ROOM = 128  # slots that are there do
GREEDY = Law()


@dataclass(frozen=True)
class Ask:
    """A prompt (ids, at least one) to be continued by at most `limit` tokens under a law."""

    prompt: tuple[int, ...]
    limit: int
    law: Law = GREEDY
    seed: int = 0


A = TypeVar("A", bound=Ask)
More = Callable[[int], Sequence[A]]  # up to so many prompts; none, with nothing under way: there are no more


class Answerer(Protocol):
    """What continues prompts."""

    def answers(self, more: More[A]) -> Iterator[tuple[A, list[int]]]:
        """Prompts with their answers, each up to its end token and with it, as they are done. What an answer leads to
        may be asked next: `more` is called after it was handed out."""


def answerer(verifier: Verifier, width: int) -> Answerer:
    """Lanes where the verifier is a model that the backbone can be and adds nothing to its greedy law, or else its own
    `generate`; `width` prompts at once."""
    network = cast("PreTrainedModel", verifier.model)
    try:
        if any(own_processors(verifier, [[0]], 1)):
            raise DllmError("its generation config has processors of its own")
        model = rebuilt(network, type(network).__name__)
        if not model.config.causal:
            raise DllmError("it is not autoregressive")
    except DllmError as error:
        log.info("answers come from transformers' generate, batch by batch: %s", error)
        return Generated(network, verifier.eos, width)
    return Lanes(model, verifier.eos, width)


@dataclass
class Lane(Generic[A]):
    """A prompt under way: its ids and those of the answer so far."""

    ask: A
    ids: list[int]


class Lanes:
    """`width` prompts at once, each in a lane of one store. Memory that runs out halves the width."""

    def __init__(self, model: NativeModel, ends: frozenset[int], width: int) -> None:
        self.model, self.ends, self.width = model, ends, width
        self.begun, self.head = list[int](), model.new_store(1, 0)  # what the first prompts began with

    def answers(self, more: More[A]) -> Iterator[tuple[A, list[int]]]:
        """See `Answerer`. Errors: not even one prompt fits into memory."""
        lanes, new, again = list[Lane[A] | None](), list[Lane[A]](), list[A]()  # by lane; not yet in one; begun in vain
        store = self.model.new_store(0, 0)
        while True:
            try:
                busy = [i for i, lane in enumerate(lanes) if lane is not None]
                if (len(lanes) - len(busy)) * REFILL >= len(lanes):
                    room = self.width - len(busy)
                    new = [Lane(ask, list(ask.prompt)) for ask in again[:room] or more(room)]
                    del again[:room]
                    if not new and not busy:
                        return
                    lanes, store, at = self._placed(lanes, store, new)
                    new = []
                    yield from self._read(lanes, store, at)
                if any(lanes):
                    yield from self._next(lanes, store)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.width == 1:
                    raise DllmError(f"not even one answer fits on {self.model.device}: {first_line(error)}") from error
                again = [lane.ask for lane in (*lanes, *new) if lane is not None] + again
                log.warning("%d answers at once do not fit on %s: going on with %d (sampling_batch)", self.width,
                            self.model.device, self.width // 2)  # fmt: skip
                lanes, new, store, self.width = [], [], self.model.new_store(0, 0), self.width // 2

    def _placed(
        self, lanes: list[Lane[A] | None], store: KVStore, new: Sequence[Lane[A]]
    ) -> tuple[list[Lane[A] | None], KVStore, list[int]]:
        """Lanes and store with the new prompts, and where these are; a store of another size where that is needed."""
        busy, slots = [i for i, lane in enumerate(lanes) if lane is not None], store.slots
        need = max((len(lane.ask.prompt) + lane.ask.limit for lane in new), default=0)
        if len(busy) + len(new) != len(lanes) or need > slots:
            made = self.model.new_store(len(busy) + len(new), max(slots, -(-need // ROOM) * ROOM))
            for old, copy in zip(store.keys + store.values, made.keys + made.values, strict=True):
                copy[: len(busy), :, :slots] = old[busy, :, :slots]
            lanes, store = [*(lanes[i] for i in busy), *[None] * len(new)], made
        at = [i for i, lane in enumerate(lanes) if lane is None]
        for i, lane in zip(at, new, strict=True):
            lanes[i] = lane
        return lanes, store, at

    def _read(self, lanes: list[Lane[A] | None], store: KVStore, at: list[int]) -> Iterator[tuple[A, list[int]]]:
        """Read the prompts of some lanes, and take the first token of their answers."""
        rest = sorted(((i, lane) for i in at if (lane := lanes[i]) is not None), key=lambda of: len(of[1].ids))
        device = self.model.device
        while rest:
            begin = self._begin([row.ids[:-1] for _, row in rest])
            width = len(rest[-1][1].ids)  # the longest
            some = [rest.pop() for _ in range(min(len(rest), max(1, FORWARD // (width - begin))))]
            ids = [torch.tensor(row.ids[begin:]) for _, row in some]
            pos = pad_sequence([begin + torch.arange(len(x)) for x in ids], batch_first=True, padding_value=-1)
            place, last = sent([i for i, _ in some], device), sent([[len(x) - 1] for x in ids], device)[..., None]
            for known, mine in zip(self.head.keys + self.head.values, store.keys + store.values, strict=True):
                mine[place, :, :begin] = known[:, :, :begin]
            hidden = self.model.forward(
                sent(pad_sequence(ids, batch_first=True), device), sent(pos, device), store=store, lane=place,
                known=Known(padded=True, slots=width),
            )  # fmt: skip
            hidden = hidden.gather(1, last.expand(-1, -1, hidden.shape[-1]))
            yield from self._take(lanes, [i for i, _ in some], hidden[:, 0])

    def _begin(self, texts: Sequence[list[int]]) -> int:
        """How many tokens these texts begin with that need not be read: a chat template's, which were read once."""
        if not self.begun and len(texts) > 1 and (n := _common(texts)):
            self.begun, self.head = texts[0][:n], self.model.new_store(1, n)
            known = Known(lanes=slice(0, 1), write=slice(0, n), slots=n)
            self.model.forward(sent([self.begun], self.model.device), store=self.head, known=known)
        return _common([self.begun, *texts])

    def _next(self, lanes: list[Lane[A] | None], store: KVStore) -> Iterator[tuple[A, list[int]]]:
        """One more token of every lane; an empty one reads a token that nobody sees."""
        told = [[lane.ids[-1], len(lane.ids) - 1] if lane is not None else [0, 0] for lane in lanes]
        slots = min(store.slots, -(-(max(place for _, place in told) + 1) // STEP) * STEP)
        ids, pos = sent(told, self.model.device).chunk(2, 1)
        hidden = self.model.forward(ids, pos, store=store, known=Known(lanes=slice(0, len(lanes)), slots=slots))
        yield from self._take(lanes, range(len(lanes)), hidden[:, 0])

    def _take(self, lanes: list[Lane[A] | None], at: Sequence[int], hidden: Tensor) -> Iterator[tuple[A, list[int]]]:
        """Append the tokens that hidden states (n, D) of some lanes say, and empty those that are done."""
        places = [j for j, i in enumerate(at) if lanes[i] is not None]
        some = [(at[j], lane) for j in places if (lane := lanes[at[j]]) is not None]
        logits = self.model.logits(hidden if len(places) == len(hidden) else hidden[places])
        tokens = drawn(logits, [lane.ask for _, lane in some], [len(lane.ids) for _, lane in some]).tolist()
        done = list[tuple[A, list[int]]]()
        for (i, lane), token in zip(some, tokens, strict=True):
            lane.ids.append(token)
            begin = len(lane.ask.prompt)
            if token in self.ends or len(lane.ids) == begin + lane.ask.limit:
                lanes[i] = None
                done.append((lane.ask, lane.ids[begin:]))
        yield from done


def _common(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with."""
    same = (len({*column}) == 1 for column in zip(*texts, strict=False))
    return sum(takewhile(bool, same))


class Generated:
    """The verifier's own `generate`, `width` prompts a batch, which takes as long as the longest answer."""

    def __init__(self, network: PreTrainedModel, ends: frozenset[int], width: int) -> None:
        self.network, self.ends, self.width = network, ends, width

    def answers(self, more: More[A]) -> Iterator[tuple[A, list[int]]]:
        """See `Answerer`."""
        while some := more(self.width):
            yield from zip(some, self._made(some), strict=True)

    def _made(self, asks: Sequence[Ask]) -> Iterator[list[int]]:
        device, pad = self.network.device, self.network.generation_config.pad_token_id or 0
        width = max(len(ask.prompt) for ask in asks)
        short = [width - len(ask.prompt) for ask in asks]
        ids = torch.tensor([[pad] * n + list(ask.prompt) for n, ask in zip(short, asks, strict=True)], device=device)
        real = torch.tensor([[0] * n + [1] * (width - n) for n in short], device=device)

        def draw(texts: Tensor, scores: Tensor) -> Tensor:
            tokens = drawn(scores, asks, [texts.shape[1] - n for n in short])
            return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

        law = {} if all(ask.law.greedy for ask in asks) else {"logits_processor": [draw]}
        limit = max(ask.limit for ask in asks)
        texts = self.network.generate(  # type: ignore[operator]
            ids, attention_mask=real, max_new_tokens=limit, pad_token_id=pad, do_sample=False, **law
        )[:, width:].tolist()
        for ask, text in zip(asks, texts, strict=True):
            end = next((n + 1 for n, t in enumerate(text) if t in self.ends), len(text))
            yield text[: min(end, ask.limit)]


def drawn(logits: Tensor, asks: Sequence[Ask], lengths: Sequence[int]) -> Tensor:
    """(n,) the next token of texts that have so many tokens, by logits (n, V)."""
    tokens = torch.zeros(len(asks), dtype=torch.long, device=logits.device)
    for law in dict.fromkeys(ask.law for ask in asks):
        rows = [i for i, ask in enumerate(asks) if ask.law == law]
        seeds, cols = sent([[asks[i].seed, lengths[i]] for i in rows], logits.device).chunk(2, 1)
        some = logits if len(rows) == len(asks) else logits[rows]
        tokens[rows] = Prediction(some[:, None], cols, law=law, seed=seeds[:, 0]).token[:, 0]
    return tokens
