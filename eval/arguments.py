"""The decoding arguments of a request: who may give them, who comes first, and lm-eval's names for them.

    call > task > setting > task's default > model's default

The call is `--set` or `--gen_kwargs`; the task is its entry in the file; the setting its `generate` and `sampler`, or
`--model_args`; the task's default is what our own or lm-eval's task file says; the model's is `dllm.generate`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from dllm.call.arguments import Arguments
from dllm.decoding.constraints.constraint import KINDS
from dllm.eval.records import Decoding

log = logging.getLogger(__name__)

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # in lm-eval's own order
THEIRS = (*LENGTHS, "until", "do_sample")  # what has another name here
CONSTRAINTS = (*KINDS, "constraint")
OFF = (0, -1)  # top_k in transformers and in vLLM: no limit


def layered(*ranks: Mapping[str, object]) -> Decoding:
    """One mapping from several, the first rank first; None says nothing. A constraint says where the answer ends: it
    stands for the stop strings, and for another constraint, of later ranks."""
    out: Decoding = {}
    for rank in reversed(ranks):
        said = {k: v for k, v in rank.items() if v is not None}
        if said.keys() & set(CONSTRAINTS):
            out = {k: v for k, v in out.items() if k not in (*CONSTRAINTS, "stop")}
        out |= said
    return out


def translated(given: Decoding) -> Decoding:
    """lm-eval's generation arguments (`max_gen_toks`, `until`, `do_sample`, …) by the names of `dllm.generate`; only
    what is said. Names that mean nothing to a diffusion model are left out with a warning."""
    said = {k: v for k, v in given.items() if v is not None and v != "None"}
    out: Decoding = {}
    lengths = [said.pop(name) for name in LENGTHS if name in said]
    if lengths:
        out["max_new_tokens"] = lengths[0]
    if "until" in said:
        until = said.pop("until")
        out["stop"] = [s for s in ([until] if isinstance(until, str) else until) if s]
    sampled, temperature = said.pop("do_sample", None), said.pop("temperature", None)
    if sampled is False:
        out["temperature"] = 0.0
    elif temperature is not None:
        out["temperature"] = temperature
    if said.get("top_k") in OFF:
        del said["top_k"]
    for name, value in said.items():
        if name in Arguments.__dataclass_fields__:
            out[name] = value
        else:
            log.warning("lm-eval's generation argument %s=%r means nothing to a diffusion model; left out", name, value)
    return out
