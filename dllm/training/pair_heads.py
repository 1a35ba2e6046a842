"""Training a pair head for a drafter that stands still (`dllm.drafting.pair_head`).

The verifier's own greedy answers are the data. Cut one anywhere, let the drafter fill the slots behind the cut, and ask
of every slot for the verifier's token under q_j(. | the verifier's token before): the softmax over the slot's
candidates, times their mass. A token that is no candidate is in the remainder, which no pair score changes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dllm.drafting.diffusion import DiffusionDrafter, SamplerDrafter
from dllm.drafting.drafters import Need
from dllm.drafting.lattice import pruned
from dllm.drafting.pair_head import PairHead
from dllm.drafting.registry import as_drafter, as_verifier, is_drafter_name
from dllm.drafting.verifier import CausalLM, Verifier
from dllm.errors import DllmError
from dllm.models.hub import load_verifier, pick_device
from dllm.training import checkpoint
from dllm.training.answers import answers_of
from dllm.training.config import PairHeadConfig
from dllm.training.data import Pair
from dllm.training.steps import fitting, run_steps

log = logging.getLogger(__name__)
Save = Callable[[int, PairHead, torch.optim.Optimizer], None]


class Slots(NamedTuple):
    """N drafted slots whose tokens the verifier gave: candidates (N, M), -1 padded, their log-probabilities (N, M), the
    verifier's token before (N,), and the place of its own among the candidates (N,), M where it is none."""

    tokens: Tensor
    logp: Tensor
    before: Tensor
    place: Tensor


def slots_of(drafter: DiffusionDrafter, data: Sequence[Pair], cuts: Sequence[int], k: int, m: int) -> Slots:
    """What the drafter says of the `k` tokens behind each cut of an answer, on the host."""
    texts = [c.prompt + c.answer[:n] for c, n in zip(data, cuts, strict=True)]
    logits = drafter.columns(texts, k)  # (B, k, V)
    follow = [c.answer[n : n + k] for c, n in zip(data, cuts, strict=True)]
    known = [(b, j) for b, answer in enumerate(follow) for j in range(len(answer))]
    row, slot = torch.tensor(known, device=logits.device).T
    table, _ = pruned(logits[row, slot], 1.0, m, drafter.need.eos)
    tokens, logp = table[:, 3:].cpu().chunk(2, 1)
    target = torch.tensor([t for answer in follow for t in answer])
    before = [[text[-1], *answer][: len(answer)] for text, answer in zip(texts, follow, strict=True)]
    hit = tokens == target[:, None]
    place = torch.where(hit.any(-1), hit.int().argmax(-1), tokens.shape[1])
    return Slots(tokens.long(), logp, torch.tensor([t for some in before for t in some]), place)


def nats(head: PairHead, slots: Slots) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the verifier's tokens, the remainder included, under the pairs and the marginals: (), ()."""
    s = slots.logp + head.score(slots.before[:, None], slots.tokens.clamp_min(0))[:, 0]  # (N, M)
    mass = slots.logp.logsumexp(-1, keepdim=True)
    rest = torch.log1p(-mass.exp().clamp(max=1 - 1e-6))
    pairs, own = torch.cat([s.log_softmax(-1) + mass, rest], 1), torch.cat([slots.logp, rest], 1)
    at = slots.place[:, None]
    return -pairs.gather(1, at).mean(), -own.gather(1, at).mean()


def train(
    drafter: DiffusionDrafter,
    data: Sequence[Pair],
    config: PairHeadConfig,
    saved: Mapping[str, Any] | None = None,
    save: Save | None = None,
) -> tuple[PairHead, list[float]]:
    """A pair head, and the loss of every step. The drafter has been `reset`.

    `save(steps, head, optimizer)` is called now and then and at Ctrl-C, which ends a step; `saved` holds what it got. A
    step depends on its number and the state alone, so a run that goes on equals an uninterrupted one.
    """
    room = drafter.model.max_positions - config.block - 1
    data = [c for c in data if len(c.prompt) + len(c.answer) <= room]
    if not data:
        raise DllmError("the teacher gave no answer that fits the drafter's positions")
    head = PairHead.fresh(drafter.need.vocab, config.rank, torch.Generator().manual_seed(config.seed))
    weights = [head.predecessor.requires_grad_(), head.successor.requires_grad_()]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    first, losses = 0, list[float]()
    if saved is not None:
        first = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for weight, kept in zip(weights, saved["weights"], strict=True):
                weight.copy_(kept)

    def backward(step: int, size: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"{config.seed} pairs {step}")
        some = rng.choices(data, k=size)
        cuts = [rng.randrange(len(c.answer)) for c in some]
        loss, own = nats(head, slots_of(drafter, some, cuts, config.block, config.candidates))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss, own

    def take(step: int) -> dict[str, str]:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, 10 * (step + 1) / config.steps, 1 - step / config.steps)
        loss, own = fitting(config.batch_size, partial(backward, step), drafter.model.device)
        if not bool(torch.isfinite(loss)):
            raise DllmError(f"the loss is not finite at step {step}: lower lr")
        optimizer.step()
        losses.append(float(loss.detach()))
        return {"loss": f"{losses[-1]:.3f}", "without": f"{float(own):.3f}"}

    kept = None if save is None else lambda done: save(done, head, optimizer)
    run_steps("pair head", first, config.steps, take, kept, config.save_every)
    return PairHead(head.predecessor.detach(), head.successor.detach()), losses


def parts(config: PairHeadConfig) -> tuple[DiffusionDrafter, Verifier]:
    """The drafter, which stands still, and its teacher. Errors: a drafter without lattices, or in another tokenizer."""
    drafter = None if is_drafter_name(config.drafter.name) else as_drafter(config.drafter)
    if not isinstance(drafter, DiffusionDrafter) or isinstance(drafter, SamplerDrafter):
        raise DllmError(f"a pair head is trained for a dLLM that drafts lattices, and {config.drafter.name} is none")
    device = pick_device(config.device)
    teacher = load_verifier(
        config.verifier.name, **{"dtype": config.dtype, "device": device, **config.verifier.given()}
    )
    verifier = as_verifier(cast(CausalLM, teacher))
    drafter.reset([], Need(verifier.vocab, verifier.eos, tokenizer=verifier.tokenizer))
    if not drafter.lattices:
        raise DllmError("the drafter reads the verifier's text in another tokenizer: it has no candidates to weigh")
    return drafter, verifier


def run(config: PairHeadConfig, resume: bool = False) -> Path:
    """The whole recipe: teacher answers, training; returns the folder of the head, `output/pair-head`.

    `resume` goes on from the checkpoint and the teacher's answers; without it `output` must hold none.
    """
    folder = Path(config.output)
    path, made = folder / checkpoint.CHECKPOINT, folder / "pair-head"
    saved = checkpoint.begin(config, resume)
    if config.threads:
        torch.set_num_threads(config.threads)
    drafter, verifier = parts(config)

    def save(step: int, head: PairHead, optimizer: torch.optim.Optimizer) -> None:
        weights, state = [head.predecessor.detach(), head.successor.detach()], optimizer.state_dict()
        values = {"recipe": checkpoint.recipe(config), "step": step, "optimizer": state, "weights": weights}
        checkpoint.save_atomically(values, path)
        log.info("step %d saved in %s", step, path)

    data = answers_of(config, verifier.model)  # type: ignore[arg-type]
    log.info("%d teacher answers, %d tokens", len(data), sum(len(c.answer) for c in data))
    head, _ = train(drafter, data, config, saved, save)
    about = {"law": "mass", "drafter": config.drafter.name, "verifier": config.verifier.name, "block": config.block}
    head.save(made, about)
    return made
