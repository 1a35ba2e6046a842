"""The Monte-Carlo likelihood bound of an answer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from dllm.call.arguments import Arguments, _at_least
from dllm.call.encoding import _padding, _unprompted, encode
from dllm.call.job import resolve_model
from dllm.call.prompts import check_ids, joined, read_one
from dllm.decoding import noise
from dllm.errors import DllmError
from dllm.models.model import Model


@torch.inference_mode()
def score(
    model: Model | str | None,
    prompt: Any = None,
    answer: Any = None,
    *,
    input_ids: Any = None,
    attention_mask: Any = None,
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
    _at_least(1).check("samples", samples)
    model = resolve_model(model)
    mask = model.mask_id
    if mask is None:
        raise DllmError("this model has no mask id: it is not a masked-diffusion model")
    if answer is None:
        raise DllmError("score needs an answer: dllm.score(model, prompt, answer)")
    prompt, padding = joined(prompt, input_ids, attention_mask), _padding(model)
    reads = partial(encode, model, chat=chat)
    head = _unprompted(model) if prompt is None else read_one(prompt, reads, padding, "the prompt to score")
    tail = read_one(answer, partial(encode, model, chat=False), padding, "the answer to score")
    if not tail:
        raise DllmError("the answer to score is empty")
    device, size, room = model.device, len(tail), model.max_positions - len(head)
    check_ids(head, model.embedding_rows, "the prompt")
    check_ids(tail, model.vocab_size, "the answer")
    if mask in head + tail:
        raise DllmError("a prompt and an answer to score hold no mask tokens")
    if size > room:
        raise DllmError(
            f"an answer of {size} tokens behind {len(head)} exceeds the model's {model.max_positions} positions"
        )
    if model.shift and not head:
        raise DllmError("with shifted logits position 0 cannot be predicted: pass a prompt of at least one token")
    text = torch.tensor(head + tail, device=device)
    zero = torch.zeros(1, dtype=torch.long, device=device)
    draw = noise.uniform(zero + seed, zero, zero, noise.TRANSFER)
    offset = (draw * size).long()  # of the strata: each l is as likely, whatever `samples` is
    counts = 1 + (torch.arange(samples, device=device) * size + offset) // samples  # stratified over 1..L
    columns = torch.arange(size, device=device)
    key, sample = torch.full((1, 1), seed, device=device), torch.arange(samples, device=device)[:, None]
    keys = noise.uniform(key, sample, columns[None], noise.ORDER)
    masked = keys.argsort(1).argsort(1) < counts[:, None]  # (samples, L)
    source = model.source(columns + len(head))
    total = 0.0
    for part, count in zip(masked.split(batch_size), counts.split(batch_size), strict=True):
        rows = text.repeat(len(part), 1)
        rows[:, len(head) :] = torch.where(part, mask, rows[:, len(head) :])
        logits = model.logits(model.forward(rows, None)[:, source])
        if cfg_scale:
            blank = rows.clone()
            blank[:, : len(head)] = mask
            free = model.logits(model.forward(blank, None)[:, source])
            logits = free + (cfg_scale + 1) * (logits - free)
            logits[..., mask] = -torch.inf
        log_p = logits.log_softmax(-1).gather(-1, text[len(head) :].expand(len(part), -1)[..., None])[..., 0]
        total += float(((log_p * part).sum(1).double() * size / count).sum())
    return total / samples
