"""The stages of an alignment, step after step. A step depends on its number and the state alone."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from dllm.errors import DllmError
from dllm.training.alignment.objective import Draw, Learner, Objective, Rows, Sum
from dllm.training.alignment.registry import as_objective
from dllm.training.config import AlignConfig, Stage
from dllm.training.data import Pair
from dllm.training.trainer import mixed, patience

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """How far a run is: `step` steps of stage `stage`, counted from 0, are done."""

    stage: int
    step: int
    optimizer: Mapping[str, Any]
    objective: Mapping[str, Any]


START = Place(0, 0, {}, {})


def align(
    learner: Learner,
    data: Sequence[Pair],
    config: AlignConfig,
    start: Place = START,
    save: Callable[[Place], None] | None = None,
) -> list[float]:
    """All stages from `start` on, in place; returns the loss of every step.

    `save` is called now and then and at Ctrl-C, which ends a step. A run that goes on from there equals an
    uninterrupted one. Errors: no answers, none that fits, a loss that is not finite.
    """
    objectives = [as_objective(stage.objective) for stage in config.stages]
    data = fitting(data, learner)
    losses: list[float] = []
    network = learner.model.transformer
    network.train()
    for number in range(start.stage, len(objectives)):
        stage, objective = config.stages[number], objectives[number]
        optimizer = torch.optim.AdamW(network.parameters(), lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01)
        first = start.step if number == start.stage else 0
        if first:
            optimizer.load_state_dict(dict(start.optimizer))
            objective.load_state_dict(start.objective)
        name = f"stage {number + 1}"
        steps = tqdm(range(first, stage.steps), name, initial=first, total=stage.steps, unit="step")
        with steps as bar, patience() as interrupted:
            for step in bar:
                draw = drawn(config.seed, number, step)
                some = draw.rng.choices(data, k=config.batch_size)
                for group in optimizer.param_groups:
                    group["lr"] = rate(stage, step)
                loss = backward(objective, learner, some, draw, config)
                if not bool(torch.isfinite(loss)):
                    raise DllmError(f"the loss of {name} is not finite at step {step}: lower lr or alpha")
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(float(loss))
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                if save is not None and ((step + 1) % config.save_every == 0 or interrupted.is_set()):
                    save(Place(number, step + 1, optimizer.state_dict(), objective.state_dict()))
                if interrupted.is_set():
                    log.warning("stopped in %s after step %d: go on with --resume", name, step + 1)
                    raise KeyboardInterrupt
    network.eval()
    return losses


def backward(
    objective: Objective, learner: Learner, some: Sequence[Pair], draw: Draw, config: AlignConfig
) -> torch.Tensor:
    """The loss of a step (), and its gradients."""
    texts = objective.texts(some, learner, draw)
    rows = Rows.of(texts, masked_id(learner)).to(learner.model.device)
    with mixed(config.dtype, learner.model.device):
        found: Sum = objective.loss(rows, learner)
    loss = found.total / found.weight
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def drawn(seed: int, stage: int, step: int) -> Draw:
    """The randomness of a step."""
    rng = random.Random(f"{seed} {stage} {step}")
    return Draw(rng, torch.Generator().manual_seed(rng.getrandbits(60)))


def rate(stage: Stage, step: int) -> float:
    """The learning rate of a step: up over a tenth, down over the rest."""
    return stage.lr * min(1.0, 10 * (step + 1) / stage.steps, 1 - step / stage.steps)


def masked_id(learner: Learner) -> int:
    """The learner's mask."""
    mask = learner.model.mask_id
    assert mask is not None  # it is a masked-diffusion model
    return mask


def fitting(data: Sequence[Pair], learner: Learner) -> list[Pair]:
    """The answers that the learner has positions and ids for; what is left out is told. Errors: none is left."""
    if not data:
        raise DllmError("the teacher gave no answers to learn from")
    model = learner.model
    room = model.max_positions - learner.block - len(learner.tail)
    fits = [c for c in data if len(c.prompt) + len(c.answer) <= room]
    if not fits:
        raise DllmError(f"every teacher answer is longer than the drafter's {model.max_positions} positions allow")
    known = [c for c in fits if max(*c.prompt, *c.answer) < model.vocab_size]
    if not known:
        raise DllmError(f"every teacher answer holds an id that the drafter's vocabulary of {model.vocab_size} lacks")
    if len(known) < len(data):
        log.warning("%d of %d teacher answers do not fit the drafter: left out", len(data) - len(known), len(data))
    return known
