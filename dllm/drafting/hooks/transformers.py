"""Speculation inside `model.generate(..., custom_generate=dllm.spec_generate, drafter=...)`.

transformers prepares everything (prompt, processors, stopping criteria, cache) and hands over the decoding loop alone.
It drops `streamer=`, `tokenizer=` and `assistant_model=` on the way: `dllm.speculator(...)` binds them beforehand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, Unpack

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StopStringCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from dllm.drafting import CausalLM, SpecConfig, SpecResult, Verifier, as_drafter, as_verifier
from dllm.drafting.accept import Processors
from dllm.drafting.front import SpecOptions, processing, separate, shared_controller
from dllm.drafting.loop import Streamer, decode
from dllm.drafting.registry import DrafterLike
from dllm.drafting.request import Request
from dllm.drafting.verifier import PaddedPrompt
from dllm.errors import DllmError
from dllm.models.tokenizer import Tokenizer

Generated: TypeAlias = Tensor | GenerateDecoderOnlyOutput
TEXT = ("attention_mask", "position_ids", "cache_position", "token_type_ids")


def spec_generate(
    model: CausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: Sequence[StoppingCriteria] | None = None,
    generation_config: GenerationConfig | None = None,
    drafter: DrafterLike = None,
    spec: SpecConfig | Mapping[str, object] | None = None,
    spec_streamer: Streamer | None = None,
    spec_tokenizer: Tokenizer | None = None,
    spec_stop: str | Sequence[str] | None = None,
    spec_results: list[SpecResult] | None = None,
    **model_kwargs: Any,
) -> Generated:
    """The decoding loop for `custom_generate`: ids (B, L) in, ids (B, L + new) out, right-padded where rows end early.

    drafter         anything `dllm.speculate` takes; None decodes plainly.
    spec            `SpecConfig` or a mapping of its fields.
    spec_streamer   a transformers streamer (batch 1).
    spec_tokenizer  of the verifier, for `spec_stop` and for drafters with another vocabulary.
    spec_stop       stop strings, as transformers' own `stop_strings`.
    spec_results    a list that receives one `SpecResult` per row, with all metrics.

    With `return_dict_in_generate`, `output_scores` and `output_logits` are those of `generate`: one (B, V) float32
    tensor a step (in a batch, zeros where a row has ended), and `past_key_values` holds the text of a batch of 1.
    """
    if generation_config is None:
        raise DllmError(
            "spec_generate is called by transformers: model.generate(..., custom_generate=dllm.spec_generate)"
        )
    streamer = spec_streamer or _dropped("streamer")
    try:
        _refuse(model, generation_config, model_kwargs, _dropped("assistant_model"))
        verifier = as_verifier(model, spec_tokenizer)
        source = as_drafter(drafter)
        cfg = SpecConfig.of(spec, {})
        if len(input_ids) > 1 and streamer is not None:
            raise DllmError("a streamer follows one text: generate with batch size 1")
        criteria = [*(stopping_criteria or []), *_stop_strings(verifier, spec_stop)]
        wanted = generation_config.output_scores or generation_config.output_logits
        records = [Recorded([], []) for _ in input_ids] if wanted and generation_config.return_dict_in_generate else []
        requests = _requests(input_ids, logits_processor, criteria, generation_config, model_kwargs, records)
        prompts = _prompts(verifier, input_ids, generation_config, model_kwargs)
        session = verifier.open(len(input_ids), model_kwargs.get("past_key_values"), prompts)
        if spec_streamer is not None:
            spec_streamer.put(input_ids.cpu())
        controller = shared_controller(verifier, source, cfg, generation_config.do_sample)
        results = decode(verifier, source, requests, cfg, controller, streamer, session)
    except BaseException:
        if streamer is not None:
            streamer.end()  # whoever reads it waits in another thread
        raise
    if spec_results is not None:
        spec_results.extend(results)
    sequences = _pad([[*q.shown, *r.emitted] for q, r in zip(requests, results, strict=True)], generation_config)
    sequences = sequences.to(input_ids.device)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        past_key_values=session.cache,
        **_steps(records, [len(r.emitted) for r in results], generation_config),  # type: ignore[arg-type]
    )


def speculator(
    drafter: DrafterLike = None,
    *,
    streamer: Streamer | None = None,
    tokenizer: Tokenizer | None = None,
    stop_strings: str | Sequence[str] | None = None,
    results: list[SpecResult] | None = None,
    spec: SpecConfig | Mapping[str, object] | None = None,
    **options: Unpack[SpecOptions],
) -> Callable[..., Generated]:
    """`spec_generate` with its arguments bound, for `generate(custom_generate=...)` and for pipelines.

    It takes what transformers drops or refuses beside `custom_generate`: a streamer (one text), the tokenizer of the
    verifier, and stop strings. `spec` and further options are those of `dllm.speculate` (search, tree, length, ...);
    `results` receives a `SpecResult` per row.
    """
    return partial(
        spec_generate, drafter=drafter, spec=SpecConfig.of(spec, options), spec_streamer=streamer,
        spec_tokenizer=tokenizer, spec_stop=stop_strings, spec_results=results,
    )  # fmt: skip


def _dropped(name: str) -> Any:
    """What the `generate` that calls us was given and did not hand on."""
    frame = sys._getframe(2)
    return frame.f_locals.get(name) if frame.f_code.co_name == "generate" else None


def _refuse(model: CausalLM, config: GenerationConfig, kwargs: Mapping[str, object], assistant: Any) -> None:
    """Say what would be lost silently."""
    mode = config.get_generation_mode(assistant).value
    if mode == "assisted_generation":
        raise DllmError(
            "assistant_model= and prompt_lookup_num_tokens= draft in another way than custom_generate: "
            "pass drafter=assistant_model, or drafter='lookup'"
        )
    if mode not in ("greedy_search", "sample"):
        raise DllmError(f"{mode} cannot be speculated: use num_beams=1, greedy or sampled")
    if kwargs.get("use_cache") is False:
        raise DllmError("speculation needs the verifier's cache: pass use_cache=True")
    asked = {"output_attentions": config.output_attentions, "output_hidden_states": config.output_hidden_states}
    wanted = [name for name, value in asked.items() if value]
    if wanted and config.return_dict_in_generate:
        raise DllmError(f"{', '.join(wanted)}: not recorded while speculating (spec_results= has the metrics)")
    other = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in TEXT]
    kinds = kwargs.get("token_type_ids")
    meant = isinstance(kinds, Tensor) and bool(kinds.any())
    if meant or (kinds is not None and hasattr(getattr(model, "base_model", model), "wte")):  # foreign
        other.append("token_type_ids")
    if other:
        raise DllmError(f"only text can be speculated: the model was also given {', '.join(other)}")


class Recorded(NamedTuple):
    """The raw logits and the processed scores of one row, (V,) float32 a token. The loop asks for each token's scores
    once and in order."""

    logits: list[Tensor]
    scores: list[Tensor]

    def around(self, processors: Processors | None) -> Processors:
        """The processors, recording what goes in and what comes out."""

        def apply(ids: Tensor, scores: Tensor) -> Tensor:
            self.logits.append(scores[0].clone())
            scores = processors(ids, scores) if processors else scores
            self.scores.append(scores[0].clone())
            return scores

        return apply


def _steps(
    records: Sequence[Recorded], lengths: Sequence[int], config: GenerationConfig
) -> dict[str, tuple[Tensor, ...]]:
    """A (B, V) tensor a step, as long as the longest row."""

    def rows(recorded: Sequence[list[Tensor]]) -> tuple[Tensor, ...]:
        per_row = [steps[:n] for steps, n in zip(recorded, lengths, strict=True)]
        blank = next((torch.zeros_like(steps[0]) for steps in per_row if steps), None)
        return tuple(
            torch.stack([steps[i] if i < len(steps) else blank for steps in per_row])  # type: ignore[misc]
            for i in range(max(lengths))
        )

    recorded = {"scores": [r.scores for r in records], "logits": [r.logits for r in records]}
    wanted = {"scores": config.output_scores, "logits": config.output_logits}
    return {name: rows(steps) for name, steps in recorded.items() if records and wanted[name]}


def _requests(
    ids: Tensor,
    processors: LogitsProcessorList | None,
    criteria: Sequence[StoppingCriteria],
    config: GenerationConfig,
    kwargs: Mapping[str, object],
    records: list[Recorded],
) -> list[Request]:
    batch, mask, law = len(ids), _mask(ids, config, kwargs), processing(processors or [])
    whole = (LogitsProcessorList(processors or []) or None) if records else law.processors  # records see every call
    limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria] or [config.max_length]
    ends = frozenset(t for c in criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.reshape(-1).tolist())
    custom = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    out = []
    for b, row in enumerate(ids.tolist()):
        real = [t for t, m in zip(row, mask[b][-len(row) :], strict=True) if m]
        if not mask[b][-1] or (batch > 1 and row[len(row) - len(real) :] != real):
            raise DllmError("prompts must be padded on the left: set tokenizer.padding_side='left'")
        record = records[b] if records else None
        apply: Processors | None = whole if batch == 1 else _row_of(whole, b, batch)
        stop = _stop(custom, b, ids, len(real), record)
        apply = record.around(apply) if record else apply
        limit, before = min(limits) - len(row) + len(real), len(mask[b]) - len(row)
        out.append(Request(real, limit, ends, config.do_sample, apply, law.warp, stop, padded=row, before=before))
    return out


def _mask(ids: Tensor, config: GenerationConfig, kwargs: Mapping[str, object]) -> list[list[bool]]:
    """Per row what is text, over the cache too: transformers drops a mask of ones and keeps its length."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor):
        return [[True] * max(ids.shape[1], getattr(config, "_mask_length", 0))] * len(ids)  # foreign
    rows: list[list[bool]] = (mask != 0).tolist()
    return rows


def _prompts(
    verifier: Verifier, ids: Tensor, config: GenerationConfig, kwargs: Mapping[str, object]
) -> list[PaddedPrompt]:
    """The padded rows, with position ids where they are not those that `generate` makes."""
    mask, positions = _mask(ids, config, kwargs), kwargs.get("position_ids")
    given = positions if isinstance(positions, Tensor) else None
    if given is not None:
        text = torch.tensor(mask)[:, -given.shape[-1] :]
        usual = (torch.tensor(mask).long().cumsum(-1) - 1)[:, -given.shape[-1] :]
        if bool(((given.cpu() == usual) | ~text).all()):
            given = None
    if verifier.restarts and config.max_length > (verifier.turn or 0) and not all(map(all, mask)):
        raise DllmError(
            f"a padded text may not pass {verifier.turn} tokens, where LongRoPE changes its factors: "
            "generate without padding, or pass fewer new tokens"
        )
    if given is not None and (len(ids) > 1 or given.dim() != 2):
        raise DllmError("position_ids of your own are kept for one text: generate with batch size 1, or drop them")
    own = None if given is None else given[0].tolist()
    return [PaddedPrompt(row, real, own) for row, real in zip(ids.tolist(), mask, strict=True)]


def _row_of(processors: LogitsProcessorList | None, row: int, batch: int) -> Processors | None:
    """Processors for one row of a batch: a copy, because some count their calls, and shown a batch of the right height,
    because some keep a tensor a row."""
    if processors is None:
        return None
    own: Processors = LogitsProcessorList(separate(processors))

    def apply(ids: Tensor, scores: Tensor) -> Tensor:
        shown: Tensor = own(ids.expand(batch, -1), scores.repeat(batch, 1))
        return shown[row : row + 1]

    return apply


def _stop(
    criteria: Sequence[StoppingCriteria], row: int, ids: Tensor, real: int, record: Recorded | None
) -> Callable[[list[int]], bool] | None:
    """Stopping criteria of transformers for one row, asked after every single token."""
    if not criteria:
        return None
    batch, shown = len(ids), ids[row].tolist()
    own = criteria if batch == 1 else separate(criteria)

    def stopped(text: list[int]) -> bool:
        whole = torch.tensor([[*shown, *text[real:]]], device=ids.device).expand(batch, -1)
        scores = tuple(s.expand(batch, -1) for s in record.scores[: len(text) - real]) if record else None
        answers = [torch.as_tensor(c(whole, scores)).reshape(-1) for c in own]  # all are asked: some count
        return any(bool(a[min(row, len(a) - 1)]) for a in answers)

    return stopped


def _stop_strings(verifier: Verifier, strings: str | Sequence[str] | None) -> list[StoppingCriteria]:
    if not strings:
        return []
    if verifier.tokenizer is None:
        raise DllmError("stop strings need the verifier's tokenizer: dllm.speculator(..., tokenizer=tokenizer)")
    strings = [strings] if isinstance(strings, str) else list(strings)
    return [StopStringCriteria(verifier.tokenizer, strings)]  # type: ignore[arg-type]


def _pad(rows: list[list[int]], config: GenerationConfig) -> Tensor:
    pad = getattr(config, "_pad_token_tensor", None)  # foreign
    value = 0 if pad is None else int(pad)
    width = max(len(r) for r in rows)
    return torch.tensor([r + [value] * (width - len(r)) for r in rows])
