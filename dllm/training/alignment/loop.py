"""The stages of an alignment, step after step. A step depends on its number and the state alone."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dllm.errors import DllmError, out_of_memory
from dllm.models.transformer import Transformer
from dllm.training.alignment.objective import Draw, Learner, Objective
from dllm.training.alignment.registry import as_objective
from dllm.training.alignment.rows import Masked
from dllm.training.config import AlignConfig, Stage
from dllm.training.data import Pair
from dllm.training.steps import run_steps
from dllm.training.team import Team
from dllm.training.trainer import mixed

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """How far a run is: `step` steps of stage `stage`, counted from 0, are done."""

    stage: int
    step: int
    optimizer: Mapping[str, object]
    objective: Mapping[str, object]


START = Place(0, 0, {}, {})


def align(
    learner: Learner,
    data: Sequence[Pair],
    config: AlignConfig,
    start: Place = START,
    save: Callable[[Place], None] | None = None,
    team: Team = Team(),
) -> list[float]:
    """All stages from `start` on, in place; returns the loss of every step.

    `save` is called now and then and at Ctrl-C, which ends a step. A run that goes on from there equals an
    uninterrupted one. Errors: no answers, none that fits, a loss that is not finite, memory that runs out.
    """
    objectives = [as_objective(stage.objective) for stage in config.stages]
    data = fitting(data, learner)
    losses: list[float] = []
    network = learner.model.transformer
    weights = [p for p in network.parameters() if p.requires_grad]
    network.train()
    for number in range(start.stage, len(objectives)):
        here = start if number == start.stage else Place(number, 0, {}, {})
        with recomputed(network, config.checkpointing):
            losses += run_stage(objectives[number], here, learner, data, weights, config, save, team)
    network.eval()
    return losses


def run_stage(
    objective: Objective,
    start: Place,
    learner: Learner,
    data: Sequence[Pair],
    weights: Sequence[torch.nn.Parameter],
    config: AlignConfig,
    save: Callable[[Place], None] | None,
    team: Team,
) -> list[float]:
    """One stage from `start` on; see `align`."""
    stage, name, losses = config.stages[start.stage], f"stage {start.stage + 1}", list[float]()
    optimizer = torch.optim.AdamW(weights, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01)
    if start.step:
        optimizer.load_state_dict(dict(start.optimizer))
        objective.load_state_dict(start.objective)

    def take(step: int) -> dict[str, str]:
        draw = drawn(config.seed, start.stage, step)
        some = draw.rng.choices(data, k=config.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = rate(stage, step)
        loss = backward(objective, learner, objective.texts(some, learner, draw), weights, config, team)
        if not bool(torch.isfinite(loss)):
            raise DllmError(f"the loss of {name} is not finite at step {step}: lower lr or alpha")
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        return {"loss": f"{losses[-1]:.3f}"}

    def kept(done: int) -> None:
        if save is not None:
            save(Place(start.stage, done, optimizer.state_dict(), objective.state_dict()))

    run_steps(name, start.step, stage.steps, take, kept, config.save_every, team.first)
    return losses


def backward(
    objective: Objective,
    learner: Learner,
    texts: Sequence[Masked],
    weights: Sequence[torch.nn.Parameter],
    config: AlignConfig,
    team: Team,
) -> Tensor:
    """The loss of a step (), and its gradients. Errors: out of memory, with as many forwards as would have fitted."""
    asked = min(config.accumulate, len(team.share(texts)))
    for parts in doubling(asked, len(team.share(texts))):
        try:
            loss = gradients(objective, learner, texts, weights, config.dtype, parts, team)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            for weight in weights:
                weight.grad = None
            if team.size > 1:  # the others wait for this process, so nothing can be tried
                raise DllmError(f"a share of the batch does not fit: try accumulate: {2 * parts}") from error
            continue
        if parts == asked:
            return loss
        raise DllmError(
            f"batch_size {config.batch_size} in {asked} forwards does not fit on {learner.model.device}: "
            f"accumulate: {parts} does, and takes the same steps"
        )
    raise DllmError(f"not even one text fits on {learner.model.device}: set checkpointing: true, or cut the answers")


def doubling(first: int, last: int) -> list[int]:
    """`first`, twice as many, and so on up to `last`."""
    found = [first]
    while found[-1] < last:
        found.append(min(2 * found[-1], last))
    return found


def gradients(
    objective: Objective,
    learner: Learner,
    texts: Sequence[Masked],
    weights: Sequence[torch.nn.Parameter],
    dtype: str,
    parts: int,
    team: Team,
) -> Tensor:
    """The loss of a step over `parts` forwards of every process, (), and its gradients."""
    mine = team.share(texts)
    sums = torch.zeros(2, device=learner.model.device)
    for i in range(parts):
        some = mine[i * len(mine) // parts : (i + 1) * len(mine) // parts]
        if not some:
            continue
        with mixed(dtype, learner.model.device):
            found = objective.loss(learner.rows(some), learner)
        found.total.backward()  # type: ignore[no-untyped-call]
        sums += torch.stack([found.total.detach().float(), found.weight.detach().float()])
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    grads = [weight.grad for weight in weights if weight.grad is not None]
    team.add([*grads, sums])
    torch._foreach_div_(grads, float(sums[1]))
    return sums[0] / sums[1]


@contextmanager
def recomputed(network: Transformer, wanted: bool) -> Iterator[None]:
    """Inside, the layers keep no activations for the backward and compute them again there."""
    layers = list(network.layers) if wanted else []
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def drawn(seed: int, stage: int, step: int) -> Draw:
    """The randomness of a step; torch's own (dropout) depends on it too."""
    rng = random.Random(f"{seed} {stage} {step}")
    torch.manual_seed(rng.getrandbits(60))
    return Draw(rng, torch.Generator().manual_seed(rng.getrandbits(60)))


def rate(stage: Stage, step: int) -> float:
    """The learning rate of a step: up over a tenth, down over the rest."""
    return stage.lr * min(1.0, 10 * (step + 1) / stage.steps, 1 - step / stage.steps)


def fitting(data: Sequence[Pair], learner: Learner) -> list[Pair]:
    """The answers that the learner has positions and ids for; what is left out is told. Errors: none is left."""
    if not data:
        raise DllmError("the teacher gave no answers to learn from")
    model = learner.model
    room = model.max_positions - learner.block - (learner.sep is not None)
    fits = [c for c in data if len(c.prompt) + len(c.answer) <= room]
    if not fits:
        raise DllmError(f"every teacher answer is longer than the drafter's {model.max_positions} positions allow")
    known = [c for c in fits if max(*c.prompt, *c.answer) < model.vocab_size]
    if not known:
        raise DllmError(f"every teacher answer holds an id that the drafter's vocabulary of {model.vocab_size} lacks")
    if len(known) < len(data):
        log.warning("%d of %d teacher answers do not fit the drafter: left out", len(data) - len(known), len(data))
    return known
