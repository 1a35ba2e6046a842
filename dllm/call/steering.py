"""What a caller may hand a decode to steer it: transformers' logits processors and stopping criteria, and a callback.

All of it runs on the host. Processors change the logits of a column, as a function of them and of the canvas left of
the column; criteria are asked about the text as it becomes final, prefix by prefix, so that where an answer ends does
not depend on how many tokens a step writes; a callback sees every step and may end a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from dllm.decoding.canvas import Canvas
from dllm.errors import DllmError

Processor: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # ids (B, L), scores (B, V) -> scores (B, V)
Criterion: TypeAlias = Callable[[Tensor, None], object]  # ids (1, L), no scores -> a truth value, or one (1,)
C = TypeVar("C")

LAST = 1e4  # nats by which a token that a processor forbids comes behind others, where a constraint may need it

# transformers' own without a memory: the same ids and scores give the same answer
STATELESS = {
    *("EncoderNoRepeatNGramLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor", "EpsilonLogitsWarper"),
    *("EtaLogitsWarper", "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor", "MinPLogitsWarper"),
    *("ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization", "MinLengthLogitsProcessor"),
    *("MinNewTokensLengthLogitsProcessor", "NoBadWordsLogitsProcessor", "NoRepeatNGramLogitsProcessor"),
    *("RepetitionPenaltyLogitsProcessor", "SequenceBiasLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor"),
    *("SuppressTokensLogitsProcessor", "TemperatureLogitsWarper", "TopHLogitsWarper", "TopKLogitsWarper"),
    *("TopPLogitsWarper", "TypicalLogitsWarper", "EosTokenCriteria", "MaxLengthCriteria", "StopStringCriteria"),
}


class StepView(NamedTuple):
    """A row after one of its steps, copied: nothing that is done to it reaches the decode."""

    request: int  # which answer of the call
    step: int  # steps of the row so far
    nfe: int  # its forwards so far
    ids: tuple[int, ...]  # of its canvas, the prompt included
    masked: tuple[bool, ...]  # columns that are still to be written
    start: int  # the first generated column
    window: tuple[int, int]  # columns that the step could commit, half-open


OnStep: TypeAlias = Callable[[StepView], bool | None]  # a true value ends the row


class Streamer(Protocol):
    """A streamer of transformers."""

    def put(self, value: Tensor) -> None:
        """The prompt (1, L) first, then new ids (n,)."""
        ...

    def end(self) -> None:
        """Nothing follows."""
        ...


@contextmanager
def ending(streamer: Streamer | None) -> Iterator[None]:
    """A streamer ends however the call ends: who reads it may wait in another thread. Errors: what is no streamer."""
    if streamer is None:
        yield
        return
    if not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise DllmError(f"streamer={streamer!r} has no put() and end(): pass a streamer of transformers")
    try:
        yield
    finally:
        streamer.end()


def listed(given: C | Sequence[C] | None) -> tuple[C, ...]:
    """One part, several or none."""
    return () if given is None else tuple(given) if isinstance(given, Sequence) else (given,)


def named(part: object) -> str:
    """What an error calls it."""
    return getattr(part, "__name__", type(part).__name__)


def check_pure(kind: str, parts: Sequence[object]) -> None:
    """Errors: under a lookahead, a part that may remember what it was asked."""
    for part in parts:
        known = type(part).__name__ in STATELESS and type(part).__module__.startswith("transformers.")
        if not getattr(part, "pure", known):
            raise DllmError(
                f"{kind} {named(part)} may remember what it was asked, and a lookahead asks about steps that are not "
                "taken: set pure = True on it if equal questions have equal answers, or leave lookahead out"
            )


@dataclass(frozen=True)
class Processing:
    """The logits processors of a call. With `twice` every question is asked twice, and the answers must agree; where
    the answers are `constrained`, a token that a processor forbids is a last resort."""

    processors: tuple[Processor, ...]
    twice: bool
    constrained: bool

    def __call__(self, canvas: Canvas, cols: Tensor, logits: Tensor) -> Tensor:
        """The processed logits (B, W, V) at `cols` (B, W), in place. A processor sees the canvas left of the column,
        masks included. Errors: what a processor returns is no table of scores, or leaves no token."""
        places: dict[int, tuple[list[int], list[int]]] = {}
        for row, columns in enumerate(cols.tolist()):
            for place, column in enumerate(columns):
                if column >= 0:
                    rows, at = places.setdefault(column, ([], []))
                    rows.append(row)
                    at.append(place)
        for column, (rows, at) in places.items():
            ids, scores = canvas.ids[rows, :column], logits[rows, at]
            for processor in self.processors:
                scores = self.asked(processor, ids, scores, canvas.masked[rows, :column])
            if bool((scores == -torch.inf).all(-1).any()):
                names = ", ".join(map(named, self.processors))
                raise DllmError(f"logits_processor ({names}) leaves no token for column {column}")
            if self.constrained:
                before = logits[rows, at]
                scores = torch.where(scores == -torch.inf, before - LAST, scores)
            logits[rows, at] = scores
        logits[..., canvas.mask_id] = -torch.inf
        return logits

    def asked(self, processor: Processor, ids: Tensor, scores: Tensor, masked: Tensor) -> Tensor:
        """The scores (n, V) of columns behind `ids` (n, L), of which some are masks."""
        answer = self.once(processor, ids, scores)
        if self.twice and not torch.equal(answer, self.once(processor, ids, scores)):
            raise DllmError(
                f"logits processor {named(processor)} changes its mind: it gave two answers for the same ids and "
                "scores, which a lookahead cannot verify; leave lookahead out"
            )
        size = getattr(processor, "ngram_size", None)  # foreign: it would take masks for words
        if size is None or size < 2:
            return answer
        open_ = masked[:, -(size - 1) :].any(1, keepdim=True) if ids.shape[1] >= size - 1 else masked.new_ones(1, 1)
        return torch.where(open_, scores, answer)

    @staticmethod
    def once(processor: Processor, ids: Tensor, scores: Tensor) -> Tensor:
        """One answer. Errors: another shape, no tensor."""
        answer = processor(ids.clone(), scores.clone())
        if not isinstance(answer, Tensor) or answer.shape != scores.shape:
            shape = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise DllmError(
                f"logits processor {named(processor)} returned {shape} for scores of shape {list(scores.shape)}"
            )
        return answer.to(scores.dtype)


@dataclass(frozen=True)
class Criteria:
    """The stopping criteria of a call. With `twice` every question is asked twice, and the answers must agree."""

    criteria: tuple[Criterion, ...] = ()
    twice: bool = False

    def first(self, prompt: list[int], tokens: list[int], seen: int) -> int | None:
        """How many tokens of an answer stand when a criterion first holds; None: at none behind the first `seen`."""
        for n in range(seen + 1, len(tokens) + 1) if self.criteria else ():
            ids = torch.tensor([[*prompt, *tokens[:n]]])
            if any(self.holds(c, ids) for c in self.criteria):
                return n
        return None

    def holds(self, criterion: Criterion, ids: Tensor) -> bool:
        """Its verdict on a text (1, L)."""
        verdict = self.once(criterion, ids)
        if self.twice and verdict != self.once(criterion, ids):
            raise DllmError(
                f"stopping criterion {named(criterion)} changes its mind: it gave two answers for the same ids, which "
                "a lookahead cannot verify; leave lookahead out"
            )
        return verdict

    @staticmethod
    def once(criterion: Criterion, ids: Tensor) -> bool:
        """One answer. Errors: no truth value."""
        verdict = criterion(ids.clone(), None)
        if isinstance(verdict, Tensor) and verdict.numel() == 1:
            return bool(verdict)
        if not isinstance(verdict, bool):
            raise DllmError(f"stopping criterion {named(criterion)} returned {verdict!r}, not True or False")
        return verdict
