"""Calls of a model that decodes itself (`Model.own_decoder`): one prompt at a time, by no sampler of ours."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dllm.call.arguments import Arguments
from dllm.call.encoding import prompt_ids
from dllm.call.job import MAX_NEW_TOKENS
from dllm.call.output import Output
from dllm.errors import DllmError
from dllm.models.model import Model, OwnDecoder

TAKEN = {"sampler", "max_new_tokens", "seed", "n", "chat", "batch_size"}


def answers(model: Model, decoder: OwnDecoder, prompt: object, given: Mapping[str, Any]) -> tuple[list[Output], bool]:
    """The answers, and whether the call had a single prompt. Errors: arguments that the decoder cannot honour."""
    args = Arguments.parse(given)
    for name, value in args.given().items():
        if name not in TAKEN:
            raise DllmError(f"{name}={value!r} does not apply to DiffusionGemma, which decodes itself; leave it out")
    options = decoder.options(args.sampler)
    listed, single = prompt_ids(model, prompt, args.chat)
    prompts = [ids for ids in listed for _ in range(args.n)]
    new = MAX_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    outputs: list[Output] = []
    for seed, ids in enumerate(prompts, args.seed):
        began = time.perf_counter()
        done = decoder.decode(ids, new, seed, options)
        output = Output(
            text="" if model.tokenizer is None else model.tokenizer.decode(done.tokens, skip_special_tokens=True),
            sequences=ids + done.tokens,
            tokens=done.tokens,
            nfe=done.nfe,
            calls=done.nfe + sum(output.nfe for output in outputs),  # of the call so far
            finish_reason="stop" if done.stopped else "length",
            seconds=time.perf_counter() - began,
            prefill_seconds=0.0,
            positions=done.nfe * (model.block_size or 0),
            canvas_length=len(ids) + new,
            decoded=len(done.tokens),
            sampler="native",
            cache="native",
            seed=seed,
        )
        outputs.append(output)
    return outputs, single and args.n == 1
