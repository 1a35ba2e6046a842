"""Ids of the drafter against ids of the verifier: the same, mapped by string, mapped with n-grams, or bridged by text;
all of them, or those that drafts are made of.

Special tokens are never assumed to share ids: mask and pad of the drafter are banned before the softmax, and so is
every id without a counterpart, so that rows stay honest laws over verifier ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dllm.decoding.constants import Constant
from dllm.drafting.bridge import Bridge
from dllm.drafting.proposal import fit
from dllm.errors import DllmError, unknown
from dllm.models.tokenizer import Tokenizer

KINDS = ("auto", "ids", "strings", "ngrams", "text")
LOOKBEHIND = 10  # verifier tokens that a re-encoded draft must reproduce before it (as in transformers)


class Shared:
    """The ids that drafts are made of, where these are not all: n of the drafter's and the same n of the verifier's,
    ascending there. Logits, laws and draws are of n columns; ids that have none have the probability 0."""

    def __init__(self, drafter: Tensor, verifier: Tensor) -> None:
        order = verifier.argsort()
        self.drafter, self.verifier = Constant(drafter[order].to), Constant(verifier[order].to)  # (n,)
        self.column = {v: i for i, v in enumerate(verifier[order].tolist())}  # of a verifier's id

    def columns(self, ids: Iterable[int]) -> frozenset[int]:
        """Columns of those of the verifier's ids that have one."""
        return frozenset(self.column[i] for i in ids if i in self.column)

    def named(self, columns: Tensor) -> Tensor:
        """The verifier's ids of columns of any shape; -1 stays."""
        return self.verifier.on(columns.device)[columns.clamp_min(0)].where(columns >= 0, -1)

    def spread(self, rows: Tensor, size: int) -> Tensor:
        """Logits (..., n) as those of all `size` ids of the verifier."""
        whole = rows.new_full((*rows.shape[:-1], size), float("-inf"))
        return whole.index_copy(-1, self.verifier.on(rows.device), rows)


@dataclass(eq=False)
class Vocabulary:
    """How drafter ids relate to verifier ids.

    kind   "ids" (equal), "strings" (`to_verifier[d]` = verifier id or -1), "ngrams" (the same, and what is several of
           the drafter's ids, see `Bridge`; point drafts only), "text" (decode, re-encode; point chains only).
    keep   the verifier's ids that drafts are made of, see `trimmed`; None: all that have a counterpart.
    known  of equal ids, how many the drafter has; None: all. What it lacks it does not read.
    """

    kind: str
    size: int
    to_verifier: Tensor | None = None
    drafter: Tokenizer | None = None
    verifier: Tokenizer | None = None
    keep: tuple[int, ...] | None = None
    known: int | None = None

    @cached_property
    def from_verifier(self) -> dict[int, int]:
        """The map backwards."""
        return {v: d for d, v in enumerate(self._map.tolist()) if v >= 0}

    @cached_property
    def bridge_of_ngrams(self) -> Bridge:
        """What was learned so far of the tokens that are several of the drafter's."""
        direct = {d: v for d, v in enumerate(self._map.tolist()) if v >= 0}
        return Bridge(*self._tokenizers, direct)

    @property
    def points(self) -> bool:
        """Whether drafts are points alone: they have no columns in the verifier's ids."""
        return self.kind in ("ngrams", "text")

    @cached_property
    def shared(self) -> Shared | None:
        """The ids that drafts are made of; None: the verifier's, all of them."""
        keep = None if self.keep is None else torch.tensor(self.keep)
        if self.kind == "strings":
            known = self._map >= 0
            known &= torch.isin(self._map, keep) if keep is not None else True
            return Shared(known.nonzero()[:, 0], self._map[known])
        return None if keep is None else Shared(keep, keep)

    def trimmed(self, keep: Iterable[int], drafter_size: int) -> Vocabulary:
        """The same where drafts are made of these ids of the verifier alone. Errors: none that the drafter has,
        vocabularies that meet in text."""
        if self.points:
            where = "text" if self.kind == "text" else "n-grams"
            raise DllmError(f"drafter and verifier meet in {where}, so that no ids can be kept: leave out trim")
        found = replace(self, keep=tuple(i for i in keep if i < drafter_size or self.kind == "strings"))
        if found.shared is None or not found.shared.column:
            raise DllmError("trim: the drafter has none of the ids to keep")
        return found

    @classmethod
    def between(
        cls,
        drafter: Tokenizer | None,
        verifier: Tokenizer | None,
        drafter_size: int,
        verifier_size: int,
        kind: str = "auto",
    ) -> Vocabulary:
        """Relate two tokenizers; without both of them equal ids are assumed, which needs vocabularies of about one
        size.

        "auto" takes equal ids where every shared string has one id, the string map where at least half of the drafter's
        strings exist on both sides, else text. Raises DllmError where nothing can work.
        """
        if kind not in KINDS:
            raise unknown("vocabulary", kind, KINDS)
        if drafter is None or verifier is None or kind == "ids":
            if kind not in ("auto", "ids"):
                raise DllmError(f"vocabulary={kind!r} needs both tokenizers")
            smaller, larger = sorted((drafter_size, verifier_size))
            if kind == "auto" and smaller < 0.9 * larger:
                raise DllmError(
                    f"drafter ({drafter_size} ids) and verifier ({verifier_size} ids) share no vocabulary: "
                    "give both tokenizers, so that drafts can be mapped by string or text"
                )
            return cls("ids", verifier_size, known=drafter_size)
        left, right = _strings(drafter), _strings(verifier)
        table = torch.full((drafter_size,), -1)
        for string, d in left.items():
            if d < drafter_size and right.get(string, verifier_size) < verifier_size:
                table[d] = right[string]
        shared = table >= 0
        known = int(shared.sum())
        if kind == "auto" and known and known >= 0.5 * len(left):
            # padding rows and drafter-only specials are outside the comparison: they are banned in every mode
            same = torch.equal(table[shared], torch.arange(drafter_size)[shared])
            kind = "ids" if same and known >= 0.9 * len(left) else "strings"
        kind = "text" if kind == "auto" else kind
        if kind == "strings" and not known:
            raise DllmError(
                "drafter and verifier share no vocabulary: no token string exists on both sides; use 'text'"
            )
        return cls(kind, verifier_size, None if kind == "text" else table, drafter, verifier, known=drafter_size)

    @property
    def _map(self) -> Tensor:
        """(V_d,) verifier ids of the drafter's, -1 where there is none."""
        assert self.to_verifier is not None
        return self.to_verifier

    @property
    def _tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """The drafter's and the verifier's: maps and bridges are made of both."""
        assert self.drafter is not None and self.verifier is not None
        return self.drafter, self.verifier

    def context(self, ids: Sequence[int]) -> list[int]:
        """Verifier ids as drafter ids."""
        if self.kind == "ids":
            return list(ids) if self.known is None else [i for i in ids if i < self.known]
        if self.kind != "text" and all(i in self.from_verifier for i in ids):
            return [self.from_verifier[i] for i in ids]
        drafter, verifier = self._tokenizers
        text = verifier.decode(list(ids))
        return list(drafter(text, add_special_tokens=False)["input_ids"])

    def logits(self, logits: Tensor) -> Tensor:
        """Drafter logits (..., V_d) as verifier logits (..., V); ids that drafts are not made of vanish."""
        chosen = self.chosen(logits)
        return chosen if self.shared is None else self.shared.spread(chosen, self.size)

    def chosen(self, logits: Tensor) -> Tensor:
        """Drafter logits (..., V_d) as those of `shared`, or of the verifier's ids where it is None."""
        if self.shared is None:
            return fit(logits, self.size)
        return logits.index_select(-1, self.shared.drafter.on(logits.device))

    def banned(self, ids: Iterable[int | None]) -> frozenset[int]:
        """Drafter ids that must never be proposed, in verifier ids."""
        given = {i for i in ids if i is not None}
        if self.kind in ("strings", "ngrams"):
            given = {int(self._map[i]) for i in given if i < len(self._map)}
        return frozenset(i for i in given if 0 <= i < self.size) if self.kind != "text" else frozenset()

    def chain(self, ids: Sequence[int], draft: Sequence[int], k: int) -> list[int]:
        """Drafter tokens behind verifier text `ids` as at most `k` verifier tokens, up to the first that has none."""
        if self.kind == "text":
            draft = self.bridge(ids, draft, k)
        elif self.kind == "ngrams":
            draft = self.bridge_of_ngrams.merged(draft)
        elif self.kind == "strings":
            draft = self._map[list(draft)].tolist()
        return list(draft[: next((i for i, t in enumerate(draft[:k]) if not 0 <= t < self.size), k)])

    def bridge(self, ids: Sequence[int], draft: Sequence[int], k: int) -> list[int]:
        """The same through text; empty where the two tokenizations do not line up."""
        drafter, verifier = self._tokenizers
        text = drafter.decode(list(draft), skip_special_tokens=True)
        for n in range(min(LOOKBEHIND, len(ids)), 0, -1):
            tail = list(ids[len(ids) - n :])
            again = list(verifier(verifier.decode(tail) + text, add_special_tokens=False)["input_ids"])
            if again[:n] == tail:
                return again[n : n + k]
        return []


def _strings(tokenizer: Tokenizer) -> dict[str, int]:
    """Vocabulary with one sign for a leading space (byte-level and sentencepiece vocabularies write it differently)."""
    return {string.replace("\u2581", " ").replace("\u0120", " "): i for string, i in tokenizer.get_vocab().items()}
