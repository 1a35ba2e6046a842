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
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.errors import DllmError
from dllm.models.native import NativeModel
from dllm.training.alignment.rows import Masked, Reader, Rows
from dllm.training.data import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Draw(NamedTuple):
    """The randomness of one step: it depends on the seed, the stage and the step alone."""

    rng: random.Random
    generator: torch.Generator


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
    pack     tokens of a row that several texts share, 0: a text a row.
    """

    model: NativeModel
    block: int
    sep: int | None = None
    verifier: PreTrainedModel | None = None
    pack: int = 0

    def rows(self, texts: Sequence[Masked]) -> Rows:
        """The texts as this learner reads them, on its device."""
        model = self.model
        assert model.mask_id is not None  # it is a masked-diffusion model
        tail = [] if self.sep is None else [self.sep]
        return Rows.of(texts, Reader(model.mask_id, model.shift, model.block_size, tail, self.pack)).to(model.device)

    def logits(self, rows: Rows) -> Tensor:
        """What the learner says of the masked tokens: (M, V)."""
        hidden = self.model.transformer(rows.ids, rows.pos, visible=rows.visible)  # (B, T, D)
        found: Tensor = self.model.transformer.head(hidden[rows.row, rows.source])
        return found

    @torch.no_grad()
    def teacher(self, rows: Rows) -> Tensor:
        """What the verifier says of the same tokens behind the clean ones before each, (M, V) in the learner's ids."""
        if self.verifier is None:
            raise DllmError("this objective asks the verifier for its distributions, and none was given")
        read, at = torch.unique(rows.place - 1, return_inverse=True)
        found = self.verifier(input_ids=rows.clean, use_cache=False, logits_to_keep=read)
        logits: Tensor = found.logits[rows.text, at]
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

    def state_dict(self) -> dict[str, object]:
        """What it has learned itself, for a checkpoint: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from what `state_dict` gave."""
        assert not state, "an objective that keeps a state loads it"


def behind(prefix: Sequence[int], target: Sequence[int], masked: Tensor, weight: Tensor) -> Masked:
    """A text whose tokens `target` behind a clean prefix are masked or not, and weigh so, each (len(target),)."""
    return Masked([*prefix, *target], F.pad(masked, (len(prefix), 0)), F.pad(weight, (len(prefix), 0)))
