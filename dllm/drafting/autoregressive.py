"""A small causal LM as drafter: the classic of speculative decoding, here mostly as the baseline to beat."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from dllm.decoding.graphs import Graphs, obstacle
from dllm.drafting.drafters import Ask, Draft, Need, Ragged
from dllm.drafting.lattice import DraftFailure, uniforms
from dllm.drafting.places import Places, bucket
from dllm.drafting.proposal import EMPTY, Proposal, Rows, chain, drawn, fit, sent
from dllm.drafting.verifier import SLOTS, CausalLM, Verifier, bare, check_rollback, embedding
from dllm.errors import DllmError, first_line

LENGTH = 16  # the least that a captured draft has room for, so that those of most lengths share it
Logits = Callable[[Tensor, int], Tensor]  # of a table as `Verifier.placed` takes it: (B, keep, V) behind its last ids
Told = tuple[list[list[float]], Tensor | None]  # of a text: what its host is told (3, steps), and laws (steps, V)


@dataclass(eq=False)
class Tape:
    """Chains in the making, of B texts: what is fed next, and what came of it so far. K is the most tokens."""

    following: Tensor  # (B, 3) the token to feed, its position, and how many tokens come before it
    turn: Tensor  # (1,) of the next token in the tables below
    u: Tensor  # (B, K) uniforms of the draws, float64
    told: Tensor  # (B, 3, K) tokens, their probabilities, and whether their logits were finite, float64
    rows: Tensor | None  # (B, K, V) their laws, where they are drawn

    @classmethod
    def new(cls, texts: int, k: int, vocab: int, sampled: bool, device: torch.device) -> Tape:
        """An empty one."""
        following, turn = (torch.zeros(*shape, dtype=torch.long, device=device) for shape in ((texts, 3), (1,)))
        u, told = (torch.zeros(*n, k, dtype=torch.float64, device=device) for n in ((texts,), (texts, 3)))
        return cls(following, turn, u, told, torch.zeros(texts, k, vocab, device=device) if sampled else None)


class Job(NamedTuple):
    """What is drafted of one text."""

    drafter: ARDrafter
    ids: Sequence[int]
    k: int
    u: Tensor | None  # (1, k)


@dataclass(eq=False)
class Standing:
    """What stands still between captured drafts: the keys and values of each text, and a tape by length and law."""

    places: Places
    tapes: dict[tuple[int, int, int, bool], Tape]


class ARDrafter(Ragged):
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

    @property
    def company(self) -> Hashable:
        """Texts of a call that one model drafts for, by one law."""
        return id(self.model), id(self.need.loans), self.need.law

    @torch.inference_mode()
    def together(self, asks: Sequence[Ask]) -> list[Draft | DraftFailure]:
        """Chains of all texts, a ragged forward a token, on a CPU and for one text none behind an end token; less where
        the positions end. One text after the other where the model takes no such batch."""
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)  # foreign
        found, jobs = list[Draft | DraftFailure]([EMPTY] * len(asks)), dict[int, Job]()
        for i, a in enumerate(asks):
            k = a.k if limit is None else min(a.k, limit - len(a.ids))
            if k >= 1:
                u = uniforms(1, k, a.generator) if self.need.sampled else None
                assert isinstance(a.drafter, ARDrafter)
                jobs[i] = Job(a.drafter, a.ids, k, u)
        loans, network = self.need.loans, bare(self.model)
        graphs = None if loans is None else loans.drafting(network, self._obstacle)
        ragged = loans is not None and loans.lanes(network) > 1 and self._verifier().can("batches")
        if graphs is None and not ragged:
            told = {i: job.drafter._eager(job) for i, job in jobs.items()}
        else:
            told = dict(zip(jobs, self._placed(list(jobs.values()), graphs, limit), strict=True)) if jobs else {}
        for i, (numbers, laws) in told.items():
            try:
                found[i] = jobs[i].drafter._chain(jobs[i], numbers, laws)
            except DraftFailure as failure:
                found[i] = failure
        return found

    def _chain(self, job: Job, told: list[list[float]], rows: Tensor | None) -> Proposal:
        """The chain of a text by what its host is told (3, steps), and the laws of its tokens (steps, V)."""
        steps = len(told[0])
        self.forwards += steps
        self.known = [*job.ids, *map(int, told[0][:-1])]
        told = [numbers[: job.k] for numbers in told]
        n = next((i for i, finite in enumerate(told[2]) if not finite), len(told[2]))
        if n < len(told[2]):
            self._forget()
            self.standing = None
        if not n:
            raise DraftFailure("the drafter returned NaN or infinite logits")
        tokens = [int(t) for t in told[0][:n]]
        n = next((i + 1 for i, t in enumerate(tokens) if t in self.need.eos), n)
        if rows is None:
            return chain(tokens[:n], told[1][:n])
        return chain(tokens[:n], rows=Rows(rows[:n], sound=True))

    def _shared(self, ids: Sequence[int]) -> int:
        """Tokens that need not be fed: those that are known, but for the last of the text."""
        pairs = enumerate(zip(self.known, ids[:-1], strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.known), len(ids) - 1))

    # -- one after the other ------------------------------------------------------------------------------------------

    def _eager(self, job: Job) -> Told:
        """A chain over the text's own cache."""
        ids, device, same = job.ids, embedding(self.model).device, self._shared(job.ids)
        if same < len(self.known):  # a crop also trims a sliding window, after which nothing more can be taken back
            self.cache.crop(same - len(self.known))
        tape = Tape.new(1, job.k, self.need.vocab, self.need.sampled, device)
        if job.u is not None:
            tape.u = sent(job.u, device)
        self._first(tape, self._cached, sent([_fed(ids, same, len(ids) - same, 1)], device), 1)
        if not self.cache.is_croppable:  # a running state, which shows in the first forward
            raise DllmError(
                f"{type(self.model).__name__} is recurrent: its state cannot be rolled back; use another drafter"
            )
        steps = 1
        while steps < job.k and not (device.type == "cpu" and int(tape.following[0, 0]) in self.need.eos):
            self._next(tape, self._cached)
            steps += 1
        told = tape.told[0, :, :steps].tolist()  # the one wait for a draft
        return told, None if tape.rows is None else tape.rows[0]

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

    # -- over slots that stand, of a batch or captured -----------------------------------------------------------------

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

    def _placed(self, jobs: Sequence[Job], graphs: Graphs | None, limit: int | None) -> list[Told]:
        """Chains of texts: these in one piece of work, then one and the same piece for every token. All are as long as
        the longest, where the positions allow it."""
        need, verifier, device, loans = self.need, self._verifier(), embedding(self.model).device, self.need.loans
        assert loans is not None
        longest = max(len(job.ids) for job in jobs)
        k = max(job.k for job in jobs) if limit is None else min(max(job.k for job in jobs), limit - longest)
        lanes, network = loans.lanes(bare(self.model)), bare(self.model)
        least = [SLOTS if graphs is not None else 1]
        least += [job.drafter.standing.places.slots for job in jobs if job.drafter.standing is not None]
        slots = max(*least, 1 << (longest + max(k, LENGTH) - 1).bit_length())

        def make() -> Standing:
            return Standing(Places(verifier.config, lanes, slots), {})

        layout = "chain", lanes, slots
        standing = loans.kept(network, layout, make) if graphs is None else graphs.at(layout, make)
        places = standing.places
        for drafter in (job.drafter for job in jobs):
            if standing is not drafter.standing:  # another text had it
                drafter.standing, drafter.known = standing, []
                places.clear(drafter.lane)
        room, same = bucket(k, LENGTH), [job.drafter._shared(job.ids) for job in jobs]
        shape = len(jobs), room, need.vocab, need.sampled
        if shape not in standing.tapes:
            standing.tapes[shape] = Tape.new(*shape, device)
        tape = standing.tapes[shape]
        if need.sampled:
            us = [torch.nn.functional.pad(job.u, (0, room - job.k)) for job in jobs if job.u is not None]
            tape.u.copy_(sent(torch.cat(us), device))
        places.turn([job.drafter.lane for job in jobs], device)

        def placed(table: Tensor, keep: int) -> Tensor:
            places.before = slots - table.shape[1] // 2
            return verifier.placed(places, table, keep).logits

        def run(key: tuple[object, ...], work: Callable[[], None]) -> None:
            if graphs is None:
                work()
            else:
                graphs.run((*key, len(jobs), room, need.law), work, "drafting")

        news = max(len(job.ids) - n for job, n in zip(jobs, same, strict=True))
        width = bucket(news)
        captured = width <= LENGTH  # a prompt comes once
        width = width if captured else news
        numbers = [_fed(job.ids, n, width, width) for job, n in zip(jobs, same, strict=True)]
        fed = places.tell("fed", numbers, device) if captured else sent(numbers, device)
        first = partial(self._first, tape, placed, fed, width)
        run(("first", width), first) if captured else first()
        for _ in range(1, k):
            run(("next",), partial(self._next, tape, placed))
        told: list[list[list[float]]] = tape.told[:, :, :k].tolist()  # the one wait for all
        laws = [None] * len(jobs) if tape.rows is None else list(tape.rows[:, :k].clone())
        return list(zip(told, laws, strict=True))

    # -- the work ------------------------------------------------------------------------------------------------------

    def _first(self, tape: Tape, logits: Logits, fed: Tensor, keep: int) -> None:
        """Begin the tape behind the texts, see `_fed`."""
        table, at, last = fed[:, :-2], fed[:, -2:-1, None], fed[:, -1:]
        tape.following.copy_(last.expand(-1, 3))
        tape.turn.zero_()
        scores = logits(table, keep)
        self._take(tape, scores.gather(1, at.expand(-1, -1, scores.shape[-1]))[:, 0])

    def _next(self, tape: Tape, logits: Logits) -> None:
        """One more token of each."""
        self._take(tape, logits(tape.following, 1)[:, 0])

    def _take(self, tape: Tape, logits: Tensor) -> None:
        """The next tokens by logits (B, V_d): told, and to be fed."""
        logits = fit(logits.float(), self.need.vocab)
        if self.need.sampled and self.need.warp is not None:
            logits = self.need.warp(logits)
        row = torch.softmax(logits, -1)  # (B, V)
        if tape.rows is None:
            token = row.argmax(-1, keepdim=True)
        else:
            token = drawn(row, tape.u.index_select(1, tape.turn))
            tape.rows.index_copy_(1, tape.turn, row[:, None])
        told = [token, row.gather(1, token), row.isfinite().all(-1, keepdim=True)]
        tape.told.index_copy_(2, tape.turn, torch.stack([x.double() for x in told], 1))
        tape.following.copy_(torch.cat([token, tape.following[:, 1:] + 1], 1))
        tape.turn.add_(1)


def _fed(ids: Sequence[int], same: int, width: int, keep: int) -> list[int]:
    """What is fed of a text behind its first `same` tokens, padded to a width: ids, positions, `same`, the place of the
    last token among those whose logits are kept, and its position."""
    n, last = len(ids) - same, len(ids) - 1
    rest = width - n  # padding may not pass the last position
    return [*ids[same:], *[0] * rest, *range(same, len(ids)), *[last] * rest, same, n - 1 - (width - keep), last]
