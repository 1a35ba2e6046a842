"""A small causal LM as drafter: the classic of speculative decoding, here mostly as the baseline to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from dllm.decoding.graphs import Graphs, obstacle
from dllm.drafting.drafters import Drafter, Need
from dllm.drafting.lattice import DraftFailure, uniforms
from dllm.drafting.places import Places, bucket
from dllm.drafting.proposal import EMPTY, Proposal, Rows, chain, drawn, fit, sent
from dllm.drafting.verifier import SLOTS, CausalLM, Verifier, bare, check_rollback, embedding
from dllm.errors import DllmError, first_line

LENGTH = 16  # the least that a captured draft has room for, so that those of most lengths share it
Logits = Callable[[Tensor, int], Tensor]  # of a table as `Verifier.placed` takes it: (1, keep, V) behind its last ids


@dataclass(eq=False)
class Tape:
    """A chain in the making: what is fed next, and what came of it so far. K is the most tokens."""

    following: Tensor  # (1, 3) the token to feed, its position, and how many tokens come before it
    turn: Tensor  # (1,) of the next token in the tables below
    u: Tensor  # (1, K) uniforms of the draws, float64
    told: Tensor  # (3, K) tokens, their probabilities, and whether their logits were finite, float64
    rows: Tensor | None  # (K, V) their laws, where they are drawn

    @classmethod
    def new(cls, k: int, vocab: int, sampled: bool, device: torch.device) -> Tape:
        """An empty one."""
        following, turn = (torch.zeros(*shape, dtype=torch.long, device=device) for shape in ((1, 3), (1,)))
        u, told = (torch.zeros(n, k, dtype=torch.float64, device=device) for n in (1, 3))
        return cls(following, turn, u, told, torch.zeros(k, vocab, device=device) if sampled else None)


@dataclass(eq=False)
class Standing:
    """What stands still between captured drafts: the keys and values of each text, and a tape by length and law."""

    places: Places
    tapes: dict[tuple[int, int, bool], Tape]


class ARDrafter(Drafter):
    """Draft k tokens one by one with a transformers causal LM of the same vocabulary; its cache is rolled back each
    round.

    Greedy chains as point proposals, draws as sampled ones (each row is the law of its token given the tokens before
    it). A token goes from forward to forward on the device: the host reads the chain once it is whole. On a CPU, where
    a question costs nothing, it looks at each, and none is drafted behind an end token.
    """

    name = "ar"
    chains_only = True

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.cache = DynamicCache()
        self.standing: Standing | None = None
        self.lane = 0  # of this text among those that stand
        self.verifier: Verifier | None = None
        self.known: list[int] = []  # what was fed of the text

    def reset(self, ids: Sequence[int], need: Need) -> None:
        """An empty cache. Errors: another vocabulary, a cache that cannot be rolled back."""
        super().reset(ids, need)
        size = embedding(self.model).shape[0]
        if min(size, need.vocab) < 0.9 * max(size, need.vocab):
            raise DllmError(f"drafter ({size} ids) and verifier ({need.vocab} ids) share no vocabulary")
        check_rollback(self.model, self._forget())
        self.standing = None
        if need.loans is not None:
            self.lane = need.loans.lane(bare(self.model))

    def _forget(self) -> DynamicCache:
        self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self.cache.activate_past_recording()  # type: ignore[no-untyped-call]
        self.known = []
        return self.cache

    @torch.inference_mode()
    def draft(self, ids: Sequence[int], k: int, *, generator: torch.Generator | None = None) -> Proposal:
        """`k` forwards, on a CPU fewer behind an end token; less where the positions end."""
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)  # foreign
        k = k if limit is None else min(k, limit - len(ids))
        if k < 1:
            return EMPTY
        loans, network = self.need.loans, bare(self.model)
        graphs = None if loans is None else loans.drafting(network, self._obstacle)
        u = uniforms(1, k, generator) if self.need.sampled else None
        tape, steps = self._replayed(graphs, ids, k, u) if graphs is not None else self._eager(ids, k, u)
        self.forwards += steps
        told = tape.told[:, :steps].tolist()  # the one wait for a draft
        self.known = [*ids, *map(int, told[0][:-1])]
        n = next((i for i, finite in enumerate(told[2]) if not finite), steps)
        if n < steps:
            self._forget()
            self.standing = None
        if not n:
            raise DraftFailure("the drafter returned NaN or infinite logits")
        tokens = [int(t) for t in told[0][:n]]
        n = next((i + 1 for i, t in enumerate(tokens) if t in self.need.eos), n)
        if tape.rows is None:
            return chain(tokens[:n], told[1][:n])
        return chain(tokens[:n], rows=Rows(tape.rows[:n] if graphs is None else tape.rows[:n].clone(), sound=True))

    def _shared(self, ids: Sequence[int]) -> int:
        """Tokens that need not be fed: those that are known, but for the last of the text."""
        pairs = enumerate(zip(self.known, ids[:-1], strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.known), len(ids) - 1))

    # -- one after the other ------------------------------------------------------------------------------------------

    def _eager(self, ids: Sequence[int], k: int, u: Tensor | None) -> tuple[Tape, int]:
        """The tape of a chain, and its forwards."""
        device, same = embedding(self.model).device, self._shared(ids)
        if same < len(self.known):  # a crop also trims a sliding window, after which nothing more can be taken back
            self.cache.crop(same - len(self.known))
        tape = Tape.new(k, self.need.vocab, self.need.sampled, device)
        if u is not None:
            tape.u = sent(u, device)
        self._first(tape, self._cached, sent([_fed(ids, same, len(ids) - same, 1)], device), 1)
        if not self.cache.is_croppable:  # a running state, which shows in the first forward
            raise DllmError(
                f"{type(self.model).__name__} is recurrent: its state cannot be rolled back; use another drafter"
            )
        for steps in range(1, k):
            if device.type == "cpu" and int(tape.following[0, 0]) in self.need.eos:
                return tape, steps
            self._next(tape, self._cached)
        return tape, k

    def _cached(self, table: Tensor, keep: int) -> Tensor:
        width = table.shape[1] // 2
        out = self.model(
            input_ids=table[:, :width],
            position_ids=table[:, width:-1],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = out.logits[:, -keep:]
        return logits

    # -- captured ------------------------------------------------------------------------------------------------------

    def _obstacle(self) -> str:
        """Why chains cannot be captured; "" if they can."""
        why = obstacle(bare(self.model), embedding(self.model).device)
        try:
            return why or self._verifier().obstacle
        except DllmError as error:
            return first_line(error)

    def _verifier(self) -> Verifier:
        """What knows how the model reads slots that stand still."""
        self.verifier = self.verifier or Verifier(self.model)
        return self.verifier

    def _replayed(self, graphs: Graphs, ids: Sequence[int], k: int, u: Tensor | None) -> tuple[Tape, int]:
        """The same: the text in one piece of work, then one and the same piece for every token."""
        need, verifier, device = self.need, self._verifier(), embedding(self.model).device
        lanes = 1 if need.loans is None else need.loans.lanes(bare(self.model))
        least = SLOTS if self.standing is None else self.standing.places.slots
        slots = max(least, 1 << (len(ids) + max(k, LENGTH) - 1).bit_length())
        standing = graphs.at(("chain", lanes, slots), lambda: Standing(Places(verifier.config, lanes, slots), {}))
        places = standing.places
        if standing is not self.standing:  # another text had it
            self.standing, self.known = standing, []
            places.clear(self.lane)
        room, same = bucket(k, LENGTH), self._shared(ids)
        shape = room, need.vocab, need.sampled
        if shape not in standing.tapes:
            standing.tapes[shape] = Tape.new(*shape, device)
        tape = standing.tapes[shape]
        if u is not None:
            tape.u.copy_(sent(torch.nn.functional.pad(u, (0, room - k)), device))
        places.turn(self.lane, device)

        def placed(table: Tensor, keep: int) -> Tensor:
            places.before = slots - table.shape[1] // 2
            return verifier.placed(places, table, keep).logits

        width, law = bucket(len(ids) - same), (room, need.law)
        if width <= LENGTH:
            fed = places.tell("fed", [_fed(ids, same, width, width)], device)
            graphs.run(("first", width, law), partial(self._first, tape, placed, fed, width), "drafting")
        else:  # a prompt comes once
            fed = sent([_fed(ids, same, len(ids) - same, 1)], device)
            self._first(tape, placed, fed, 1)
        for _ in range(1, k):
            graphs.run(("next", law), partial(self._next, tape, placed), "drafting")
        return tape, k

    # -- the work ------------------------------------------------------------------------------------------------------

    def _first(self, tape: Tape, logits: Logits, fed: Tensor, keep: int) -> None:
        """Begin the tape behind the text, see `_fed`."""
        table, at, last = fed[:, :-2], fed[0, -2:-1], fed[:, -1:]
        tape.following.copy_(last.expand(-1, 3))
        tape.turn.zero_()
        self._take(tape, logits(table, keep)[0].index_select(0, at))

    def _next(self, tape: Tape, logits: Logits) -> None:
        """One more token."""
        self._take(tape, logits(tape.following, 1)[0])

    def _take(self, tape: Tape, logits: Tensor) -> None:
        """The next token by logits (1, V_d): told, and to be fed."""
        logits = fit(logits.float(), self.need.vocab)
        if self.need.sampled and self.need.warp is not None:
            logits = self.need.warp(logits)
        row = torch.softmax(logits, -1)  # (1, V)
        if tape.rows is None:
            token = row.argmax(-1, keepdim=True)
        else:
            token = drawn(row, tape.u.index_select(1, tape.turn))
            tape.rows.index_copy_(0, tape.turn, row)
        told = [token, row.gather(1, token), row.isfinite().all(-1, keepdim=True)]
        tape.told.index_copy_(1, tape.turn, torch.cat([x.double() for x in told]))
        tape.following.copy_(torch.cat([token, tape.following[:, 1:] + 1], 1))
        tape.turn.add_(1)


def _fed(ids: Sequence[int], same: int, width: int, keep: int) -> list[int]:
    """What is fed of a text behind its first `same` tokens, padded to a width: ids, positions, `same`, the place of the
    last token among those whose logits are kept, and its position."""
    n, last = len(ids) - same, len(ids) - 1
    rest = width - n  # padding may not pass the last position
    return [*ids[same:], *[0] * rest, *range(same, len(ids)), *[last] * rest, same, n - 1 - (width - keep), last]
