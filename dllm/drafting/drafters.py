"""What a drafter is. One method matters: `draft(ids, k)` returns a lattice (one forward of a dLLM) or a finished
proposal. Everybody who drafts asks through `ask`, which checks what comes back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from dllm.drafting.lattice import DraftFailure, Lattice, listed, paired, pruned, renamed, uniforms
from dllm.drafting.loans import Loans
from dllm.drafting.pairs import PairScores
from dllm.drafting.proposal import Proposal, fit
from dllm.drafting.store import Lesson, Seen, Store
from dllm.drafting.suffixes import SuffixArray
from dllm.drafting.trim import Keep
from dllm.drafting.verifier import CausalLM
from dllm.drafting.vocabulary import Shared
from dllm.drafting.window import Window
from dllm.errors import DllmError, first_line, out_of_memory
from dllm.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Need:
    """What the loop asks of a draft: fixed for one text."""

    vocab: int  # of the verifier
    eos: frozenset[int] = frozenset()
    sampled: bool = False  # the search draws: hand over full rows
    warp: Callable[[Tensor], Tensor] | None = None  # of those rows (k, V): temperature, top-k, top-p as the verifier's
    tau_mass: float = 0.8
    m_max: int = 15
    tree: int = 0  # node budget, 0 = chain
    tokenizer: Tokenizer | None = None  # of the verifier, where it is known
    draws: int = 0  # tokens that the search asks of each slot, see `PathSearch`
    model: CausalLM | None = None  # the verifier's, for drafters that share its embedding and head
    loans: Loans | None = None  # where models of the call find their graphs; None: nothing is captured
    store: Store | None = None  # what outlives the text; as it is when the call begins
    texts: tuple[SuffixArray, ...] = ()  # of others: those of the store, then the user's corpus
    trim: Keep | None = None  # ids that drafts are made of, for drafters that say so; None: as the drafter has it
    window: Window | None = None  # what of the text a drafter reads, for those that say so; None: likewise

    @property
    def law(self) -> Hashable:
        """All that `told` depends on, by value: work that was captured for one text serves the others."""
        warp = self.warp if self.sampled else None
        return self.vocab, self.eos, self.sampled, warp, self.tau_mass, self.m_max, self.draws

    def lattice(
        self, logits: Tensor, start: int, banned: Tensor | None = None, pairs: PairScores | None = None
    ) -> Lattice:
        """The lattice of logits (k, V) in verifier ids: bans, then the verifier's own warpers where the search
        samples; with pair scores, the `m_max` best candidates of each slot, whatever their mass."""
        table, rows = self.told(logits, banned, pairs=pairs)
        return listed(table.cpu(), rows, start, pairs=pairs is not None)  # the one wait for a draft

    def uniforms(self, k: int, generator: torch.Generator | None) -> Tensor | None:
        """What the draws of k slots take, (k, n) float64 on the host; None where the search draws from no rows."""
        return uniforms(k, self.draws, generator) if self.draws else None

    def told(
        self,
        logits: Tensor,
        banned: Tensor | None = None,
        u: Tensor | None = None,
        pairs: PairScores | None = None,
        shared: Shared | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The table that `listed` makes a lattice of, with draws at `uniforms` u, and the full rows where the search
        samples; on the device, which is asked nothing.

        shared   what the columns of the logits and of `banned` are; None: the verifier's ids.
        """
        logits = fit(logits, self.vocab) if shared is None else logits
        if banned is not None:
            logits = logits.masked_fill(banned, float("-inf"))
        warp = self.warp if self.sampled else None
        warped, n = logits if warp is None else warp(logits.float()), 0 if u is None else u.shape[1]
        eos, named = (self.eos, None) if shared is None else (shared.columns(self.eos), shared.named)
        mass, also = (self.tau_mass, None) if pairs is None else (1.0, pairs.walk)
        table, rows = pruned(warped, mass, self.m_max, eos, u, also)
        beside = [] if pairs is None else [paired(table, n, logits, pairs, warp, named)]
        if shared is not None:
            table = renamed(table, n, shared.named)
            rows = shared.spread(rows, self.vocab) if self.sampled else rows
        table = torch.cat([table, *beside], 1) if beside else table
        return table, rows if self.sampled else None


Draft: TypeAlias = Lattice | Proposal


class Ask(NamedTuple):
    """A draft that a text wants of its drafter, see `Drafter.draft`."""

    drafter: Drafter
    ids: Sequence[int]
    k: int
    generator: torch.Generator | None = None


class Drafter:
    """Base of all drafters. Ids are the verifier's everywhere.

    A drafter writes `draft`; everything else has a default. The loop forks it for every text, then calls `reset` once,
    and `draft`, `observe` and, for one that taps layers, `take` in turn, at last `finish`. Whatever it drafts, the text
    stays the verifier's own.

    name         what errors call it.
    forwards     model forwards since `reset`, counted by the drafter.
    successors   whether the loop hands `observe` what the verifier said behind every verified node.
    taps         layers of the verifier whose output `take` is handed, 0-based; -1 is the embedding.
    longest      most slots that one draft can have; None: no such limit.
    banned       ids that must never reach the verifier (mask, pad, drafter-only specials): drafting one is an error.
    need         what the loop asks of the drafts of this text.
    bounds       which of `Need.trim` and `Need.window` it goes by: "trim", "window".
    free         whether a draft takes no forward, next to nothing beside a model's.
    owner        what measured costs belong to and live with; None: this object. A drafter that is made anew for every
                 call names what outlives it.
    """

    name: str = "drafter"
    forwards: int = 0
    successors: bool = False
    taps: tuple[int, ...] = ()
    longest: int | None = None
    banned: frozenset[int] = frozenset()
    need: Need = Need(0)
    bounds: tuple[str, ...] = ()
    free: bool = False
    owner: object | None = None

    @property
    def chains_only(self) -> bool:
        """Whether a tree budget would do nothing, so that it is refused."""
        return False

    @property
    def lattices(self) -> bool:
        """Whether drafts are lattices, which a pair head can weigh; else it is refused."""
        return not self.chains_only

    def fork(self) -> Drafter:
        """A drafter for one more text, sharing what may be shared (weights)."""
        return copy.copy(self)

    def reset(self, ids: Sequence[int], need: Need) -> None:
        """A new text that starts with the prompt `ids`."""
        self.need = need
        self.forwards = 0

    @property
    def company(self) -> Hashable:
        """Drafters of equal company make the drafts of their texts `together`; None: each by itself."""
        return None

    def together(self, asks: Sequence[Ask]) -> list[Draft | DraftFailure]:
        """Drafts for several texts, each of a drafter of this company: a ragged batch where the model takes one."""
        return [_one(a) for a in asks]

    def draft(self, ids: Sequence[int], k: int, *, generator: torch.Generator | None = None) -> Draft:
        """At most `k` tokens after `ids` (k nodes for a tree); `EMPTY` where there is nothing to say.

        generator   for draws, if `need.sampled`. Errors: DraftFailure where the model's logits are unusable: the round
                    is then a plain step.
        """
        raise NotImplementedError

    def observe(self, ids: Sequence[int], emitted: Sequence[int], successors: Sequence[Seen]) -> None:
        """A round is over: `ids` ends with the `emitted` tokens. `successors` is of all nodes of the round, also those
        that were rejected; empty unless it was asked for."""

    def finish(self, ids: Sequence[int]) -> None:
        """The text is over, and so are all others of the call: `ids` is all of it, prompt and output."""

    def lessons(self) -> Sequence[Lesson]:
        """What the text taught that a store may keep; asked for when all texts of a call are done."""
        return ()

    def take(self, states: Tensor, start: int) -> None:
        """Hidden states (n, len(taps), H) of the text's tokens from `start` on: of what entered the verifier's cache in
        a round, so all but the newest token. They are the drafter's only during the call. Where `start` is not behind
        what it had, the verifier has read the text anew."""


class Ragged(Drafter):
    """Base of drafters whose drafts are made for several texts at once: they write `company` and `together`."""

    def draft(self, ids: Sequence[int], k: int, *, generator: torch.Generator | None = None) -> Draft:
        """The draft of one text, see `together`."""
        (draft,) = self.together([Ask(self, ids, k, generator)])
        if isinstance(draft, DraftFailure):
            raise draft
        return draft


def ask(drafter: Drafter, ids: Sequence[int], k: int, generator: torch.Generator | None = None) -> Draft:
    """A draft for one text, checked: a lattice or a proposal whose numbers are probabilities.

    Raises DraftFailure where the model's logits are unusable, DllmError for everything else that is wrong.
    """
    (draft,) = asked([Ask(drafter, ids, k, generator)])
    if isinstance(draft, DraftFailure):
        raise draft
    return draft


def asked(asks: Sequence[Ask]) -> list[Draft | DraftFailure]:
    """The same for several texts whose drafters are of one company; a failure stands where its draft would."""
    drafter = asks[0].drafter
    with blamed(drafter):
        drafts = drafter.together(asks)
    for draft in drafts:
        if isinstance(draft, DraftFailure):
            continue
        if not isinstance(draft, Lattice | Proposal):
            raise DllmError(
                f"drafter {drafter.name!r} returned {type(draft).__name__}: `draft` returns a Lattice or a Proposal, "
                "and dllm.drafting.EMPTY where it has nothing to say"
            )
        try:
            draft.check()
        except DllmError as error:
            raise DllmError(f"drafter {drafter.name!r}: {error}") from error
    return drafts


def companies(asks: Iterable[Ask]) -> list[list[int]]:
    """Places of asks that are answered together."""
    found: dict[Hashable, list[int]] = {}
    for i, a in enumerate(asks):
        company = a.drafter.company
        found.setdefault(object() if company is None else (type(a.drafter), company), []).append(i)
    return list(found.values())


def _one(a: Ask) -> Draft | DraftFailure:
    try:
        return a.drafter.draft(a.ids, a.k, generator=a.generator)
    except DraftFailure as failure:
        return failure


@contextmanager
def blamed(drafter: Drafter) -> Iterator[None]:
    """Errors of a drafter's own code as one line that names it."""
    try:
        yield
    except (DllmError, DraftFailure):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise DllmError(f"drafter {drafter.name!r} failed with {type(error).__name__}: {first_line(error)}") from error
