"""Speculation inside `model.generate(..., custom_generate=dllm.spec_generate, drafter=...)`.

transformers prepares everything (prompt, processors, stopping criteria, cache) and hands over the decoding loop alone.
It drops `streamer=` and `tokenizer=` on the way: pass `spec_streamer=`, and for stop strings a ready
`StopStringCriteria` in `stopping_criteria=`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from dllm.drafting.loop import Request, SpecConfig, SpecResult, run
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.drafting.speculation import law_of, shared_controller
from dllm.errors import DllmError

TEXT = ("attention_mask", "position_ids", "cache_position", "token_type_ids")
NATIVE = ("MaxLengthCriteria", "EosTokenCriteria")  # the loop checks these itself, token by token


def spec_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    drafter: Any = None,
    spec: SpecConfig | Mapping[str, Any] | None = None,
    spec_streamer: Any = None,
    spec_results: list[SpecResult] | None = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop for `custom_generate`: ids (B, L) in, ids (B, L + new) out, right-padded where rows end early.

    drafter        anything `dllm.speculate` takes; None decodes plainly.
    spec           `SpecConfig` or a mapping of its fields.
    spec_streamer  a transformers streamer (batch 1).
    spec_results   a list that receives one `SpecResult` per row, with all metrics.
    """
    if generation_config is None:
        raise DllmError(
            "spec_generate is called by transformers: model.generate(..., custom_generate=dllm.spec_generate)"
        )
    if (generation_config.num_beams or 1) > 1:
        raise DllmError("beam search cannot be speculated: use num_beams=1")
    if model_kwargs.get("use_cache") is False:
        raise DllmError("speculation needs the verifier's cache: drop use_cache=False")
    _refuse(generation_config, model_kwargs)
    verifier = as_verifier(model)
    source = as_drafter(drafter)
    cfg = SpecConfig.of(spec, {})
    batch = len(input_ids)
    if batch > 1 and spec_streamer is not None:
        raise DllmError("a streamer follows one text: generate with batch size 1")
    requests = _requests(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
    cache = model_kwargs.get("past_key_values")
    session = verifier.open(batch, _usable(cache, requests))
    if spec_streamer is not None:
        spec_streamer.put(input_ids.cpu())
    controller = shared_controller(verifier, source, cfg, generation_config.do_sample)
    results = run(verifier, source, requests, cfg, controller, spec_streamer, session)
    if spec_results is not None:
        spec_results.extend(results)
    sequences = _pad([[*q.pad, *r.sequences] for q, r in zip(requests, results, strict=True)], generation_config)
    sequences = sequences.to(input_ids.device)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=session.cache)  # type: ignore[arg-type]


def _refuse(config: Any, kwargs: Mapping[str, Any]) -> None:
    """Say what would be lost silently."""
    records = [f"output_{x}" for x in ("scores", "logits", "attentions", "hidden_states")]
    wanted = [x for x in records if config.return_dict_in_generate and getattr(config, x, False)]
    if wanted:
        raise DllmError(f"{', '.join(wanted)}: not recorded while speculating (spec_results= has the metrics)")
    other = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in TEXT]
    if other:
        raise DllmError(f"only text can be speculated: the model was also given {', '.join(other)}")


def _requests(ids: Tensor, processors: Any, criteria: Any, config: Any, kwargs: Mapping[str, Any]) -> list[Request]:
    law = law_of(processors if processors is not None else [])
    eos = getattr(config, "_eos_token_tensor", None)
    ends = frozenset() if eos is None else frozenset(eos.reshape(-1).tolist())
    mask = kwargs.get("attention_mask")
    custom = [c for c in criteria or [] if type(c).__name__ not in NATIVE]
    out = []
    for b, row in enumerate(ids.tolist()):
        real = len(row) if mask is None or mask.dim() != 2 else int(mask[b].sum())
        if mask is not None and mask.dim() == 2 and not bool(mask[b, len(row) - real :].all()):
            raise DllmError("prompts must be padded on the left: set tokenizer.padding_side='left'")
        pad = row[: len(row) - real]
        limit = config.max_length - len(pad)
        stop = _stop(custom, pad, ids.device)
        processors = law.processors if len(ids) == 1 else _row_of(law.processors, b, len(ids))
        out.append(Request(row[len(pad) :], limit, ends, config.do_sample, processors, law.warp, stop, None, pad))
    return out


def _row_of(processors: Any, row: int, batch: int) -> Any:
    """Processors for one row of a batch: some keep per-row tensors, so they are shown a batch of the right height."""
    if processors is None:
        return None

    def apply(ids: Tensor, scores: Tensor) -> Tensor:
        return processors(ids.expand(batch, -1), scores.repeat(batch, 1))[row : row + 1]

    return apply


def _stop(criteria: Sequence[Any], pad: list[int], device: Any) -> Callable[[list[int]], bool] | None:
    """Stopping criteria of transformers, asked after every single token."""
    if not criteria:
        return None

    def stopped(ids: list[int]) -> bool:
        text = torch.tensor([[*pad, *ids]], device=device)
        return any(bool(c(text, None).all()) for c in criteria)  # type: ignore[arg-type]

    return stopped


def _usable(cache: Any, requests: Sequence[Request]) -> Any:
    """The cache that transformers prepared: kept for one row (it may hold an earlier turn), own for a batch."""
    if cache is None:
        return None
    if len(requests) == 1 and cache.get_seq_length() >= len(requests[0].ids):
        raise DllmError("past_key_values already covers the prompt: pass at least one new token")
    return cache


def _pad(rows: list[list[int]], config: Any) -> Tensor:
    pad = getattr(config, "_pad_token_tensor", None)
    value = 0 if pad is None else int(pad)
    width = max(len(r) for r in rows)
    return torch.tensor([r + [value] * (width - len(r)) for r in rows])
