"""The Monte-Carlo likelihood bound of an answer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dllm.call.arguments import Arguments, at_least
from dllm.call.job import ModelLike, mask_of, resolve_model
from dllm.call.prompts import Ids, Prompt, check_ids, encode, joined, padding, read_one, unprompted
from dllm.decoding import noise
from dllm.errors import DllmError
from dllm.models.model import Model


def score(
    model: ModelLike,
    prompt: Prompt | None = None,
    answer: Prompt | None = None,
    *,
    input_ids: Ids | None = None,
    attention_mask: Ids | None = None,
    samples: int = 128,
    batch_size: int = 32,
    cfg_scale: float = 0.0,
    seed: int = 0,
    chat: bool | None = None,
) -> float:
    """Monte-Carlo lower bound of ln p(answer | prompt), in nats (LLaDA, arXiv 2502.09992, appendix B.5).

    Each sample masks l of the L answer tokens, l stratified over 1..L from a keyed offset, and weighs the log-
    probabilities at the masks by L / l. The prompt stays whole. With cfg_scale the guided distribution is scored.

    prompt, answer: one text each, as `generate` takes them; None (or an empty text) as prompt starts from nothing.

    Errors: an empty answer, mask tokens, ids outside the vocabulary, more tokens than the model has positions.
    """
    Arguments(cfg_scale=cfg_scale, seed=seed, batch_size=batch_size, chat=chat)  # checks them
    at_least(1).check("samples", samples)
    model = resolve_model(model)
    mask = mask_of(model)
    if answer is None:
        raise DllmError("score needs an answer: dllm.score(model, prompt, answer)")
    head, tail = _read(model, joined(prompt, input_ids, attention_mask), answer, chat)
    text, given = torch.tensor(head + tail, device=model.device), len(head)
    masked, counts = _draw(len(tail), samples, seed, model.device)
    total = 0.0
    for part, count in zip(torch.split(masked, batch_size), torch.split(counts, batch_size), strict=True):
        rows = text.repeat(len(part), 1)
        rows[:, given:] = torch.where(part, mask, rows[:, given:])
        with torch.inference_mode():
            log_p = _logits(model, rows, given, cfg_scale).log_softmax(-1)
        log_p = log_p.gather(-1, text[given:].expand(len(part), -1)[..., None])[..., 0]  # (rows, L)
        total += float(((log_p * part).sum(1).double() * len(tail) / count).sum())
    return total / samples


def _read(model: Model, prompt: Prompt | None, answer: Prompt, chat: bool | None) -> tuple[list[int], list[int]]:
    """The ids of the prompt, and those of the answer. Errors: see `score`."""
    reads, pads = partial(encode, model, chat=chat), padding(model)
    head = unprompted(model) if prompt is None else read_one(prompt, reads, pads, "the prompt to score")
    tail = read_one(answer, partial(encode, model, chat=False), pads, "the answer to score")
    if not tail:
        raise DllmError("the answer to score is empty")
    check_ids(head, model.embedding_rows, "the prompt")
    check_ids(tail, model.vocab_size, "the answer")
    if model.mask_id in head + tail:
        raise DllmError("a prompt and an answer to score hold no mask tokens")
    if len(tail) > model.max_positions - len(head):
        raise DllmError(
            f"an answer of {len(tail)} tokens behind {len(head)} exceeds the model's {model.max_positions} positions"
        )
    if model.shift and not head:
        raise DllmError("with shifted logits position 0 cannot be predicted: pass a prompt of at least one token")
    return head, tail


def _draw(size: int, samples: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The masks of every sample (samples, size), and how many each has (samples,)."""
    zero = torch.zeros(1, dtype=torch.long, device=device)
    offset = (noise.uniform(zero + seed, zero, zero, noise.TRANSFER) * size).long()  # of the strata: so each l is as
    counts = 1 + (torch.arange(samples, device=device) * size + offset) // samples  # likely, whatever `samples` is
    key, sample = torch.full((1, 1), seed, device=device), torch.arange(samples, device=device)[:, None]
    keys = noise.uniform(key, sample, torch.arange(size, device=device)[None], noise.ORDER)
    return keys.argsort(1).argsort(1) < counts[:, None], counts


def _logits(model: Model, rows: Tensor, given: int, cfg_scale: float) -> Tensor:
    """Logits (rows, L, V) of the columns behind the `given` ones, guided away from those without a prompt."""
    source = model.source(torch.arange(given, rows.shape[1], device=rows.device))
    logits = model.logits(model.forward(rows, None)[:, source])
    if cfg_scale:
        blank, mask = rows.clone(), mask_of(model)
        blank[:, :given] = mask
        free = model.logits(model.forward(blank, None)[:, source])
        logits = free + (cfg_scale + 1) * (logits - free)
        logits[..., mask] = -torch.inf
    return logits
