"""The peer: transformers' own decoding loop, plain, with prompt lookup, an assistant model or a hidden-state head.

It runs in the same process as our settings, with the verifier and the ids that they have, and its result has the same
type, so that one rule counts and one clock measures all of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria

from dllm.call.arguments import RULES
from dllm.call.prompts import One
from dllm.decoding.stopping import Stops
from dllm.drafting.control import RoundStats
from dllm.drafting.front import encode
from dllm.drafting.registry import is_drafter_name
from dllm.drafting.request import SpecResult
from dllm.drafting.verifier import Verifier
from dllm.errors import DllmError, first_line, unknown
from dllm.eval.config import ModelSpec
from dllm.eval.records import Decoding
from dllm.models.hub import EMBEDDED, PACKAGED, load_verifier, locate, pick_device, pick_dtype, read_json_config

HEADS = ("muse_glimmer_assistant",)  # read the verifier's hidden states: speculation_type="dflash"
OURS = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "eos_token_id", "stop_strings", "seed")


@dataclass(frozen=True)
class Peer:
    """How transformers drafts: a network or none, and options of its `generate`."""

    assistant: nn.Module | None
    options: Mapping[str, Any]


def check_options(options: Mapping[str, object]) -> None:
    """Errors: what transformers' `generate` has no use for, and what the setting's `generate:` says."""
    generation: Any = GenerationConfig
    known = [name for name in generation().to_dict() if name not in OURS]
    for name in options:
        if name not in known:
            hint = "; it stands under `generate:` as with every setting" if name in OURS else ""
            raise unknown("option of transformers' generate", name, known, hint)


def assistant(spec: ModelSpec) -> nn.Module | None:
    """The drafting network of a name; None for none. Errors: a drafter of ours, which `generate` does not know."""
    if spec.name == "none":
        return None
    if spec.name == "model" or is_drafter_name(spec.name):
        raise DllmError(
            f"drafter {spec.name!r} is ours: with `loop: transformers` a drafter is none, a causal language model or a "
            "native DFlash head"
        )
    if spec.name not in (*EMBEDDED, *PACKAGED):
        folder = locate(spec.name, **spec.hub)
        if (kind := read_json_config(folder, spec.name).get("model_type")) in HEADS:
            from transformers import AutoModel

            given = spec.given()
            place = pick_device(given.get("device", "auto"))
            try:
                head = AutoModel.from_pretrained(
                    folder, dtype=pick_dtype(given.get("dtype"), place) or "auto", trust_remote_code=False
                )
            except (OSError, ValueError, KeyError, ImportError) as error:
                raise DllmError(
                    f"{spec.name} ({kind}) cannot be loaded by transformers: {first_line(error)}"
                ) from error
            return cast(nn.Module, head.to(place).eval())
    return cast(nn.Module, load_verifier(spec))


class _Rounds(StoppingCriteria):
    """Stops nothing: transformers asks once a round, which tells how long the text was then."""

    def __init__(self, length: int) -> None:
        self.lengths = [length]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.lengths.append(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def by_generate(verifier: Verifier, prompt: One, peer: Peer, decoding: Decoding, seed: int) -> SpecResult:
    """One prompt by the verifier's own `generate`, with the rounds that it took."""
    (ids,), _ = encode(verifier, prompt, decoding.get("chat"))
    limit, temperature = decoding.get("max_new_tokens", 128), decoding.get("temperature", 0.0)
    for name, value in {"max_new_tokens": limit, "temperature": temperature}.items():
        RULES[name].check(name, value)
    given: dict[str, Any] = {"max_new_tokens": limit, "do_sample": temperature > 0, **peer.options}
    if temperature > 0:
        law = {"temperature": temperature, "top_k": decoding.get("top_k") or 0, "top_p": decoding.get("top_p")}
        given |= {name: value for name, value in law.items() if value is not None}
    end = verifier.eos if decoding.get("eos") is None else frozenset(decoding["eos"])
    if decoding.get("eos") is not None:
        given["eos_token_id"] = sorted(end)
    if stop := decoding.get("stop"):
        given |= {"stop_strings": list(stop), "tokenizer": verifier.tokenizer}
    if peer.assistant is not None:
        given["assistant_model"] = peer.assistant
        if cast(Any, peer.assistant).config.model_type in HEADS:
            given.setdefault("speculation_type", "dflash")
    text, rounds, forwards = torch.tensor([ids], device=verifier.device), _Rounds(len(ids)), [0]

    def count(*_: object) -> None:
        forwards[0] += 1

    hook = peer.assistant and peer.assistant.register_forward_pre_hook(count)
    start = time.perf_counter()
    try:
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            out: list[int] = verifier.model.generate(
                text, attention_mask=torch.ones_like(text), stopping_criteria=[rounds], **given
            )[0].tolist()
    finally:
        if hook:
            hook.remove()
    result = SpecResult(out, len(ids), seconds=time.perf_counter() - start)
    for before, after in zip(rounds.lengths, rounds.lengths[1:], strict=False):
        result.rounds.append(RoundStats(accepted=after - before - 1, emitted=after - before))
        result.spans.append((after - before - 1, after - before))
    result.rounds[0].forwards = forwards[0]
    stops = Stops.of(end, stop, verifier.tokenizer)
    cut = stops.cut(result.emitted)
    result.text = None if verifier.tokenizer is None else cut.text
    if cut.stopped:
        result.finish_reason, result.end = "stop", len(ids) + len(cut.tokens)
        del result.sequences[len(ids) + cut.through :]
    return result
