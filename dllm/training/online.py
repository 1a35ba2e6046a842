"""A drafter that learns from the user's own traffic (Online Speculative Decoding, arXiv 2310.07177)."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch

from dllm import spec
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.errors import DllmError, out_of_memory
from dllm.models.arguments import Checkpoint
from dllm.models.files import current, optional_json, replaced_checkpoint
from dllm.models.hub import load, locate
from dllm.models.native import NativeModel
from dllm.spec import check, param
from dllm.training.alignment.loop import doubling
from dllm.training.alignment.objective import Learner
from dllm.training.checkpoint import read, save_atomically
from dllm.training.laws import DIVERGENCES
from dllm.training.traffic import Kept, Recorder, Round, Traffic, loss, masked

STATE, TRAFFIC = "online.pt", "traffic.pt"


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
        self.saved: tuple[Path, int] | None = None  # where weights were last written, and after how many updates


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
        self.start = ""  # what it was before it learned, where that has a name
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
            losses.append(self._gradients(drawn, learner))
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            student.optimizer.step()
        student.optimizer.zero_grad(set_to_none=True)
        network.eval()
        return losses

    def _gradients(self, drawn: Sequence[tuple[list[int], Round]], learner: Learner) -> float:
        """The loss of a step, and its gradients, in as few forwards as fit. Errors: not even one round does."""
        student, weight = self.student, sum(len(told.best) for _, told in drawn)
        for parts in doubling(1, len(drawn)):
            student.optimizer.zero_grad(set_to_none=True)
            lost = 0.0
            try:
                for i in range(parts):
                    some = drawn[i * len(drawn) // parts : (i + 1) * len(drawn) // parts]
                    rows = learner.rows([masked(ids, told, learner, self.traffic.window) for ids, told in some])
                    total = loss(rows, learner, student.pace.divergence).total / weight
                    total.backward()  # type: ignore[no-untyped-call]
                    lost += float(total.detach())
                return lost
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
        student.model.transformer.eval()
        raise DllmError(f"not even one round of an update fits on {learner.model.device}: give a window")

    def save(self, folder: str | Path) -> Path:
        """Weights, as a checkpoint that any drafter is loaded from, and beside them what goes on learning.

        Weights are written only where they changed since they were last written there. A kill at any moment leaves what
        was there before, or all of it but the last rounds. Errors: a disk that is full.
        """
        student, folder = self.student, Path(folder)
        how = {name: spec.plain(value) for name, value in self.options.items()}
        with student.lock:
            folder.mkdir(parents=True, exist_ok=True)
            if student.saved != (folder, student.updates):
                with replaced_checkpoint(folder) as draft:
                    student.model.save(draft, extra={"drafter.json": how})
                    state = {"start": self.start, "updates": student.updates}
                    save_atomically({**state, "optimizer": student.optimizer.state_dict()}, draft / STATE)
                student.saved = folder, student.updates
            save_atomically(self.traffic.state_dict(), folder / TRAFFIC)
        return folder

    @staticmethod
    def holds(folder: str | Path) -> bool:
        """Whether `save` wrote there."""
        return (current(Path(folder)) / STATE).exists()

    @classmethod
    def load(cls, what: str | Path | Checkpoint, *, pace: Pace = Pace(), device: str | None = None) -> Self:
        """What `save` wrote, or any aligned drafter or dLLM, which begins to learn. Errors: a model of another kind,
        and of another type than float32."""
        found = what if isinstance(what, Checkpoint) else Checkpoint(str(what))
        model = load(Checkpoint(found.name, **{"dtype": "float32", "device": device, **found.given()}))
        if not isinstance(model, NativeModel) or model.mask_id is None:
            raise DllmError(f"{found.name} is no masked-diffusion model, which is what learns from traffic")
        model.sampler_settings = {}  # they are of the weights that are about to change
        folder = locate(found.name, **found.hub)
        options = optional_json(folder / "drafter.json")
        drafter = cls(model, pace=pace, **spec.settings(f"{folder}/drafter.json", DiffusionDrafter, options))
        drafter.start = found.name
        if (folder / STATE).exists():
            state = read(folder / STATE)
            drafter.student.optimizer.load_state_dict(state["optimizer"])
            for group in drafter.student.optimizer.param_groups:  # its rate was that of another pace
                group["lr"] = pace.lr
            drafter.start, drafter.student.updates = state["start"], state["updates"]
            drafter.student.saved = Path(found.name), state["updates"]
        if (kept := Path(found.name) / TRAFFIC).exists():
            drafter.traffic.load_state_dict(cast(Kept, read(kept)))
        return drafter
