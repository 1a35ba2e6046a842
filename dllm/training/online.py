"""A drafter that learns from the user's own traffic (Online Speculative Decoding, arXiv 2310.07177)."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from dllm.errors import DllmError
from dllm.models.arguments import Checkpoint
from dllm.models.files import optional_json
from dllm.models.hub import load
from dllm.models.native import NativeModel
from dllm.spec import check, param
from dllm.training.alignment.objective import Learner
from dllm.training.checkpoint import read, save_atomically
from dllm.training.laws import DIVERGENCES
from dllm.training.traffic import Recorder, Traffic, loss, masked

STATE = "online.pt"


@dataclass(frozen=True)
class Pace:
    """When and how an `OnlineDrafter` learns."""

    every: int = param(8, "texts between two updates; 0: only where `update` is called", low=0)
    steps: int = param(4, "of an update, so that a text waits for a second at most on the embedded pair", low=1)
    batch_size: int = param(16, "rounds of a step", low=1)
    lr: float = param(3e-4, "of AdamW, a tenth of the rate of alignment: the drafter goes on serving", above=0)
    limit: int = param(4096, "rounds that are remembered; the oldest leave", low=1)
    divergence: str = param("forward-kl", "as of distillation", choices=tuple(DIVERGENCES))
    seed: int = param(0, "of the rounds that a step draws")

    def __post_init__(self) -> None:
        check(self, "OnlineDrafter")


class _Student:
    """What all forks of an online drafter share."""

    def __init__(self, model: NativeModel, pace: Pace) -> None:
        self.model, self.pace, self.updates = model, pace, 0
        self.optimizer = torch.optim.AdamW(model.transformer.parameters(), pace.lr, betas=(0.9, 0.98))
        self.lock = threading.Lock()


class OnlineDrafter(Recorder):
    """A dLLM that `dllm.speculate` takes as `drafter`, and that learns where its drafts are rejected.

    Every `every` texts it takes `steps` steps on remembered rounds: the divergence of its slots, up to the rejected
    one, from what the verifier said there. Texts stay the verifier's own, whatever it learns. The weights of `model`
    change in place; `save` keeps rounds and optimizer beside them.

    model     a masked-diffusion model in float32 with the verifier's tokenizer.
    options   of `DiffusionDrafter`.
    Errors: DllmError for weights in another type, for a verifier with another tokenizer.
    """

    name = "online"

    def __init__(self, model: NativeModel, *, pace: Pace = Pace(), **options: Any) -> None:
        if not isinstance(model, NativeModel) or model.dtype != torch.float32:
            raise DllmError("an online drafter learns: load the model with dtype='float32', and without quantization")
        super().__init__(model, Traffic(pace.limit), **options)
        self.options = options
        self.student = _Student(model, pace)

    def finish(self, ids: Sequence[int]) -> None:
        """Remember the rounds of the text; learn where it is time to."""
        with self.student.lock:
            super().finish(ids)
            every = self.student.pace.every
            if every and self.traffic.texts % every == 0 and self.traffic.rounds:
                self._learn(self.student.pace.steps)

    def update(self, steps: int | None = None) -> list[float]:
        """Take steps now, as many as an update has where none are named; returns their losses, in nats a slot."""
        with self.student.lock:
            return self._learn(self.student.pace.steps if steps is None else steps) if self.traffic.rounds else []

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _learn(self, steps: int) -> list[float]:
        student, network, losses = self.student, self.student.model.transformer, list[float]()
        learner = Learner(student.model, 0, self.suffix)
        rng = random.Random(f"{student.pace.seed} {student.updates}")
        student.updates += 1
        network.train()
        for _ in range(steps):
            drawn = self.traffic.draw(student.pace.batch_size, rng)
            rows = learner.rows([masked(ids, told, learner) for ids, told in drawn])
            total, weight = loss(rows, learner, student.pace.divergence)
            student.optimizer.zero_grad(set_to_none=True)
            (total / weight).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            student.optimizer.step()
            losses.append(float(total.detach() / weight))
        student.optimizer.zero_grad(set_to_none=True)
        network.eval()
        return losses

    def save(self, folder: str | Path) -> Path:
        """Weights, as a checkpoint that any drafter is loaded from, and beside them what goes on learning."""
        with self.student.lock:
            made = self.student.model.save(folder, extra={"drafter.json": self.options})
            state = {"updates": self.student.updates, "traffic": self.traffic.state_dict()}
            save_atomically({**state, "optimizer": self.student.optimizer.state_dict()}, made / STATE)
        return made

    @classmethod
    def load(cls, folder: str | Path, *, pace: Pace = Pace(), device: str = "cpu") -> Self:
        """What `save` wrote, or any aligned drafter, which begins to learn."""
        model = load(Checkpoint(str(folder)), dtype=torch.float32, device=device)
        options = optional_json(Path(folder) / "drafter.json")
        drafter = cls(model, pace=pace, **options)
        if (Path(folder) / STATE).exists():
            state = read(Path(folder) / STATE)
            drafter.student.optimizer.load_state_dict(state["optimizer"])
            drafter.student.updates = state["updates"]
            drafter.traffic.load_state_dict(state["traffic"])
        return drafter
