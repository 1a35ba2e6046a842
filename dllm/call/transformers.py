"""A diffusion model where transformers expects one of its own: pipelines, and what a generation config says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PreTrainedConfig,
    RepetitionPenaltyLogitsProcessor,
    TextGenerationPipeline,
    pipeline,
)

from dllm.call.arguments import DecodingArguments
from dllm.call.generate import generate
from dllm.call.job import ModelLike, resolve_model
from dllm.call.output import Output
from dllm.call.steering import listed
from dllm.errors import DllmError
from dllm.models.model import Model
from dllm.models.tokenizer import NO_TOKENIZER

# names of a generation config -> ours, where they mean the same
SAME = {
    "max_new_tokens": "max_new_tokens", "min_new_tokens": "min_new_tokens", "eos_token_id": "eos",
    "suppress_tokens": "suppress_tokens", "stop_strings": "stop", "num_return_sequences": "n",
}  # fmt: skip
SAMPLING = ("temperature", "top_p", "top_k", "min_p")  # mean nothing unless do_sample
PROCESSORS: dict[str, Callable[[Any], LogitsProcessor]] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
    "min_p": MinPLogitsWarper,
}
# what has no counterpart and changes no token: ids of other parts, caches of other engines, forms of the result
IDLE = {
    *("pad_token_id", "bos_token_id", "decoder_start_token_id", "use_cache", "cache_implementation", "cache_config"),
    *("transformers_version", "_from_model_config", "max_length", "do_sample", "max_time", "compile_config"),
}
NEUTRAL: dict[str, tuple[object, ...]] = {
    "repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,), "top_k": (0,), "top_p": (1.0,), "min_p": (0.0,),
}  # fmt: skip


def made(fields: Mapping[str, object]) -> GenerationConfig:
    """A generation config with these fields."""
    return GenerationConfig(**fields)  # type: ignore[no-untyped-call]


FIELDS = frozenset(vars(made({})))


def generation_arguments(config: GenerationConfig | Mapping[str, object]) -> dict[str, Any]:
    """The arguments of `dllm.generate` that a generation config means.

    Sampling fields count where it samples; penalties become transformers' own logits processors. Fields that change no
    token are left out. Errors: a field that a canvas has no counterpart for (beams, a minimal length of the prompt and
    the answer together), by its name.
    """
    fields = config.to_diff_dict() if isinstance(config, GenerationConfig) else dict(config)
    samples, out, processors = bool(fields.get("do_sample")), dict[str, Any](), list[LogitsProcessor]()
    for name, value in fields.items():
        if value is None or value is False or name in IDLE or value in NEUTRAL.get(name, ()):
            continue
        if name in SAMPLING and not samples:
            continue
        if name in SAME:
            out[SAME[name]] = value
        elif name in PROCESSORS:
            processors.append(PROCESSORS[name](value))
        elif name in SAMPLING:
            out[name] = value
        elif name not in ("num_beams", "num_beam_groups") or value != 1:
            raise DllmError(f"the generation config says {name}={value!r}, for which a canvas has no counterpart")
    if samples:
        out.setdefault("temperature", 1.0)
    if processors:
        out["logits_processor"] = processors
    return out


class Generator:
    """What a text-generation pipeline asks of a model, answered by `dllm.generate`. See `text_pipeline`."""

    input_modalities = output_modalities = ("text",)

    def __init__(self, model: Model, arguments: DecodingArguments) -> None:
        self.model, self.arguments = model, arguments
        self.config = PreTrainedConfig(architectures=[type(model).__name__])
        ids = {"eos_token_id": list(model.eos_ids), "pad_token_id": model.pad_id, "bos_token_id": model.bos_id}
        self.generation_config = made({"do_sample": False, **model.generation_config, **ids})

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return self.model.dtype

    def can_generate(self) -> bool:
        """It can."""
        return True

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **given: Any,
    ) -> Tensor:
        """Ids (B, L) and their mask in, ids (B n, L + new) out, right-padded.

        A field of a generation config, then the arguments that the adapter was made with, then those of the call.
        """
        fields = (self.generation_config if generation_config is None else generation_config).to_diff_dict()
        fields |= {name: given.pop(name) for name in [*given] if name in FIELDS}
        given.pop("tokenizer", None)  # of stop_strings
        width = 0 if input_ids is None else input_ids.shape[1]
        if fields.get("max_length") is not None and fields.get("max_new_tokens") is None:
            fields["max_new_tokens"] = max(int(fields["max_length"]) - width, 0)
        asked = generation_arguments(fields)
        asked["logits_processor"] = [*asked.pop("logits_processor", ()), *listed(given.pop("logits_processor", None))]
        arguments = {**asked, **self.arguments, **given}
        if not arguments["logits_processor"]:
            del arguments["logits_processor"]
        n = int(arguments.pop("n", 1))
        outputs = generate(self.model, n=n, input_ids=input_ids, attention_mask=attention_mask, **arguments)
        return self._padded(input_ids, [outputs] if isinstance(outputs, Output) else outputs)

    def _padded(self, input_ids: Tensor | None, outputs: Sequence[Output]) -> Tensor:
        """The prompts as they were given, padding and all, then the tokens of each answer."""
        pad = self.model.pad_id if self.model.pad_id is not None else (*self.model.eos_ids, 0)[0]
        longest = max(len(o.tokens) for o in outputs)
        new = torch.tensor([[*o.tokens, *[pad] * (longest - len(o.tokens))] for o in outputs], dtype=torch.long)
        if input_ids is None:
            return new
        prompts = input_ids.cpu().repeat_interleave(len(outputs) // len(input_ids), 0)
        return torch.cat([prompts, new], 1).to(input_ids.device)


class _TextGeneration(TextGenerationPipeline):
    """transformers' pipeline; it knows no diffusion models by name, and would say so."""

    def check_model_type(self, supported_models: list[str] | dict[str, str]) -> None:
        """Any model will do that is a `Generator`."""


def text_pipeline(model: ModelLike = None, **arguments: Any) -> TextGenerationPipeline:
    """transformers' `pipeline("text-generation")` over a diffusion model.

    model: as `dllm.generate` takes it. arguments: of the pipeline (`batch_size`, `return_full_text`) and of
    `dllm.generate` (`sampler`, `cache`, `max_new_tokens`); the pipeline's calls take the latter, too. What neither says
    is that of the checkpoint's generation config. Errors: a model without a tokenizer, and those of `generate`.
    """
    model = resolve_model(model)
    if model.tokenizer is None:
        raise DllmError(f"a pipeline reads text, and this model has no tokenizer ({NO_TOKENIZER})")
    own = DecodingArguments.__annotations__.keys() - FIELDS - {"batch_size"}
    fixed = cast("DecodingArguments", {name: arguments.pop(name) for name in [*arguments] if name in own})
    return pipeline(
        "text-generation",
        model=cast("Any", Generator(model, fixed)),
        tokenizer=cast("Any", model.tokenizer),
        device=model.device,
        pipeline_class=_TextGeneration,
        **arguments,
    )
