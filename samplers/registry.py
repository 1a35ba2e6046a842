"""Names of samplers, and how a specification becomes a sampler.

    "threshold"                          a name
    "factor:compat"                      a preset
    "localleap:kappa=0.9,tau=0.75"       parameters
    "adablock+credit+prophet"            a composition
    {"name": "localleap", "tau": 0.75}   the same as a mapping; a list of these composes

A sampler from another package joins through the entry point group `dllm.samplers` (docs/adding-a-sampler.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeAlias

import yaml

from dllm.errors import DllmError, unknown
from dllm.samplers.base import Bundle, Context, Method, Sampler, merge
from dllm.samplers.blocks import Blocks
from dllm.samplers.quota import Quota, confidence

BUILTIN = {
    "confidence": "quota:Confidence",
    "margin": "quota:Margin",
    "entropy": "quota:Entropy",
    "random": "quota:Random",
    "dream": "dream:Dream",
    "threshold": "threshold:Threshold",
    "factor": "threshold:Factor",
    "eb": "eb:EB",
    "sdar": "sdar:SDAR",
    "fast_dllm_v2": "fast_dllm_v2:FastDLLMv2",
    "editing": "editing:Editing",
    "freedave": "freedave:FreeDave",
    "learn2pd": "learn2pd:Learn2PD",
    "eotp": "eotp:EoTP",
    "klass": "klass:KLASS",
    "hierarchy": "hierarchy:Hierarchy",
    "dsb": "dsb:DSB",
    "wino": "wino:WINO",
    "saber": "saber:Saber",
    "remdm": "remdm:ReMDM",
    "pc": "pc:PC",
    "slowfast": "slowfast:SlowFast",
    "lopa": "lopa:LoPA",
    "localleap": "localleap:LocalLeap",
    "credit": "credit:Credit",
    "prophet": "prophet:Prophet",
    "sched": "prophet:Sched",
    "adablock": "adablock:AdaBlock",
    "ccd": "ccd:CCD",
    "eoser": "eoser:EOSER",
    "ass": "ass:ASS",
    "daedal": "daedal:DAEDAL",
}

COMMA = re.compile(r",(?![^\[]*\])")  # outside of a list: "adablock:delimiters=[8, 85],tau=0.8"

# what other codes call the same thing
TRANSLATED = {
    "low_confidence": "confidence",
    "topk_margin": "margin",
    "confidence_threshold": "threshold",
    "maskgit_plus": "dream:alg=maskgit_plus",
    "origin": "dream:alg=origin",
    "eb_sampler": "eb",
    "entropy_bounded": "eb",
    "low_confidence_static": "confidence",
    "low_confidence_dynamic": "threshold",
}


@cache
def _external() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group="dllm.samplers")}


def names() -> list[str]:
    """All registered samplers, built-in ones in the order of the table."""
    return [*BUILTIN, *(name for name in _external() if name not in BUILTIN)]


def method(name: str) -> type[Method]:
    """The class behind a name. Errors: unknown name, with the nearest one."""
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        return getattr(import_module(f"dllm.samplers.{module}"), attribute)
    if name in _external():
        return _external()[name].load()
    if name in TRANSLATED:
        raise unknown("sampler", name, names(), hint=f": here it is called {TRANSLATED[name]!r}")
    raise unknown("sampler", name, names())


Spec: TypeAlias = str | dict[str, Any] | Method | Iterable[Any]


def parse(spec: Spec) -> list[Method]:
    """The methods that a specification names."""
    if isinstance(spec, Method):
        return [spec]
    if isinstance(spec, str):
        if not spec.strip():
            raise DllmError(f"empty sampler name; known: {', '.join(names())}")
        return [_parse_one(part) for part in spec.split("+")]
    if isinstance(spec, dict):
        params = dict(spec)
        if "name" not in params:
            raise DllmError(f"a sampler given as a mapping needs the key 'name'; got {sorted(params)}")
        return [method(params.pop("name")).build(params.pop("preset", None), **params)]
    if not isinstance(spec, Iterable):
        raise DllmError(f"a sampler is a name, a mapping with the key 'name', or a list of these, not {spec!r}")
    return [m for part in spec for m in parse(part)]


def _parse_one(text: str) -> Method:
    name, _, rest = (piece.strip() for piece in text.partition(":"))
    cls, preset, params = method(name), None, {}
    for item in filter(None, (piece.strip() for piece in COMMA.split(rest))):
        key, equals, value = item.partition("=")
        if equals:
            params[key.strip()] = _value(value)
        elif preset is None:
            preset = key
        else:
            raise DllmError(f"sampler {name!r}: {item!r} is not of the form parameter=value")
    return cls.build(preset, **params)


def _value(text: str) -> Any:
    """A YAML value, and a number wherever Python reads one: YAML takes 1e-5 for text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DllmError(f"sampler parameter {text!r} is no value: a number, a word, or a list in brackets") from error
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def build(spec: Spec, context: Context, extra: Bundle = Bundle()) -> Sampler:
    """The merged sampler of a specification; `extra` carries the slots that the call itself asks for."""
    methods = parse(spec)
    named = [m.name for m in methods]
    for name in named:
        if named.count(name) > 1:
            raise DllmError(f"sampler {name!r} is named twice in {'+'.join(named)!r}")
    parts = [(m.name, m.bundle(context)) for m in methods]
    defaults = Bundle(
        window=Blocks.of(context),
        score=confidence,
        select=Quota(context.steps, context.block_length, context.block_size is not None),
    )
    if any(getattr(extra, slot) for slot in ("inputs", "adjust", "amend")):
        parts.append(("this call", extra))
    return merge(parts, defaults)
