"""What an objective of alignment is: it masks tokens of the teacher's answers, and scores what the learner says there.

A stage of a recipe names its objective. The loop draws the answers of a step, collates what the objective made of
them, asks for the loss, and steps the optimizer. The loss is a sum and its weight, so that the parts of a step (several
forwards, several processes) add up to the whole.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm.errors import DllmError
from dllm.models.native import NativeModel
from dllm.training.data import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Draw(NamedTuple):
    """The randomness of one step: it depends on the seed, the stage and the step alone."""

    rng: random.Random
    generator: torch.Generator


class Masked(NamedTuple):
    """One text of T tokens for a step, on the host."""

    ids: list[int]  # clean: the prompt, the answer so far, what is to be predicted, a separator
    masked: Tensor  # (T,) bool: what is to be predicted
    weight: Tensor  # (T,) float, read where it is masked
    extra: Mapping[str, Tensor] = NOTHING  # further values of every token, each (T,), for the loss


class Rows(NamedTuple):
    """A batch of B rows: of its M masked tokens their rows, columns, targets and weights (M,)."""

    ids: Tensor  # (B, T) noisy
    clean: Tensor  # (B, T)
    pos: Tensor  # (B, T), -1 for padding
    row: Tensor
    column: Tensor
    target: Tensor
    weight: Tensor
    extra: Mapping[str, Tensor]  # each (M,)

    @classmethod
    def of(cls, texts: Sequence[Masked], mask_id: int) -> Rows:
        """The texts, one a row."""
        clean = pad_sequence([torch.tensor(t.ids) for t in texts], batch_first=True)
        pos = pad_sequence([torch.arange(len(t.ids)) for t in texts], batch_first=True, padding_value=-1)
        masked = pad_sequence([t.masked for t in texts], batch_first=True)
        row, column = masked.nonzero(as_tuple=True)

        def at(values: Sequence[Tensor]) -> Tensor:
            return pad_sequence(list(values), batch_first=True)[row, column]

        extra = {name: at([t.extra[name] for t in texts]) for name in texts[0].extra}
        weight = at([t.weight for t in texts])
        return cls(clean.masked_fill(masked, mask_id), clean, pos, row, column, clean[row, column], weight, extra)

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        moved = {name: value.to(device) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**moved, extra={name: value.to(device) for name, value in self.extra.items()})


class Sum(NamedTuple):
    """A loss as the sum over some rows, and what it is divided by; both ()."""

    total: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Learner:
    """Who learns, and from whom; the same at every step of a run.

    block    most masked tokens in a row.
    sep      what closes a block, None: nothing.
    verifier the teacher; it stands still.
    """

    model: NativeModel
    block: int
    sep: int | None = None
    verifier: PreTrainedModel | None = None

    @property
    def tail(self) -> list[int]:
        """What stands behind the masks."""
        return [] if self.sep is None else [self.sep]

    def logits(self, rows: Rows) -> Tensor:
        """What the learner says of the masked tokens: (M, V)."""
        hidden = self.model.transformer(rows.ids, rows.pos)  # (B, T, D)
        source = (rows.column - self.model.shift).clamp(min=0)
        found: Tensor = self.model.transformer.head(hidden[rows.row, source])
        return found

    @torch.no_grad()
    def teacher(self, rows: Rows) -> Tensor:
        """What the verifier says of the same tokens behind the clean ones before each, (M, V) in the learner's ids."""
        if self.verifier is None:
            raise DllmError("this objective asks the verifier for its distributions, and none was given")
        read, at = torch.unique(rows.column - 1, return_inverse=True)
        found: Any = self.verifier(input_ids=rows.clean, use_cache=False, logits_to_keep=read)
        logits: Tensor = found.logits[rows.row, at]
        return logits[:, : self.model.vocab_size]


class Objective(ABC):
    """What a stage learns: a dataclass of its parameters, in a file of its own, and a line of `registry`."""

    @abstractmethod
    def texts(self, data: Sequence[Pair], learner: Learner, draw: Draw) -> list[Masked]:
        """What a step makes of some of the teacher's answers."""

    def loss(self, rows: Rows, learner: Learner) -> Sum:
        """The weighted cross-entropy of the masked tokens; rows are on the learner's device."""
        nats = F.cross_entropy(learner.logits(rows).float(), rows.target, reduction="none")
        return Sum((nats * rows.weight).sum(), rows.weight.sum())

    def state_dict(self) -> dict[str, Any]:
        """What it has learned itself, for a checkpoint: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        assert not state, "an objective that keeps a state loads it"


def behind(prefix: Sequence[int], target: Sequence[int], masked: Tensor, weight: Tensor, learner: Learner) -> Masked:
    """A text whose tokens `target` behind a clean prefix are masked or not, and weigh so, each (len(target),)."""
    around = len(prefix), len(learner.tail)
    return Masked([*prefix, *target, *learner.tail], F.pad(masked, around), F.pad(weight, around))
