"""Names of samplers, and how a specification becomes a sampler.

    "threshold"                          a name
    "factor:compat"                      a preset
    "localleap:kappa=0.9,tau=0.75"       parameters
    "adablock+credit+prophet"            a composition
    {"name": "localleap", "tau": 0.75}   the same as a mapping; a list of these composes
    "prophet:published"                  the published defaults, whatever the model's own settings are

A name without parameters takes the settings that the model brings (`dllm tune --save`), and the published defaults
where it brings none.

A sampler from another package joins through the entry point group `dllm.samplers` (docs/adding-a-sampler.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from dllm.decoding.slots import Context, Sampler
from dllm.errors import DllmError, unknown
from dllm.samplers.base import Bundle, Method, merge
from dllm.samplers.blocks import Blocks
from dllm.samplers.quota import Quota, confidence
from dllm.spec import Json, Named, Plugins, many, named, names_of, ref, render, split

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
    "multiblock": "multiblock:MultiBlock",
    "d2f": "d2f:D2F",
    "d3llm": "d2f:D3LLM",
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
    "clad": "clad:CLAD",
    "dapd": "dapd:DAPD",
    "dawn": "dawn:DAWN",
}

# what other codes call the same thing
TRANSLATED = {
    "low_confidence": "confidence",
    "topk_margin": "margin",
    "margin_confidence": "margin",
    "neg_entropy": "entropy",
    "confidence_threshold": "threshold",
    "fast_dllm": "threshold",
    "entropy_threshold": "d3llm:max_open=1",
    "generate_multi_block": "d3llm:released",
    "linear_position": "sdar:sequential",
    "pc_sampler": "pc",
    "maskgit_plus": "dream:alg=maskgit_plus",
    "origin": "dream:alg=origin",
    "eb_sampler": "eb",
    "entropy_bounded": "eb",
    "low_confidence_static": "confidence",
    "low_confidence_dynamic": "threshold",
}


OTHERS = Plugins("dllm.samplers", "sampler", Method, "dllm.samplers.base.Method", BUILTIN)


def names() -> list[str]:
    """All samplers that there are, built-in ones in the order of the table, then those of other packages that load."""
    return [*BUILTIN, *OTHERS.names()]


def method(name: str) -> type[Method]:
    """The class behind a name. Errors: unknown name, with the nearest one; another package's that does not load."""
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        ours: type[Method] = vars(import_module(f"dllm.samplers.{module}"))[attribute]
        return ours
    if name in OTHERS.points:
        return OTHERS.load(name)
    if name in TRANSLATED:
        raise unknown("sampler", name, names(), hint=f": here it is called {TRANSLATED[name]!r}")
    raise unknown("sampler", name, names())


Spec: TypeAlias = str | Mapping[str, object] | Method | Iterable[Any]
Settings: TypeAlias = Mapping[str, Any]  # parameters of one sampler
Tuned: TypeAlias = Mapping[str, Mapping[str, Settings]]  # name or composition -> part -> parameters

UNTUNED: Tuned = MappingProxyType({})
TUNED, PUBLISHED = "tuned", "published"  # presets of every sampler: the model's own settings, the class's defaults


class Part(NamedTuple):
    """A method, and the model's own settings where it has its parameters from these."""

    method: Method
    own: Settings | None


def parse(spec: Spec, tuned: Tuned = UNTUNED) -> list[Method]:
    """The methods that a specification names; `tuned` holds the model's own settings. Errors: unknown names, values."""
    return [part.method for part in resolve(spec, tuned)]


def spell(spec: Spec, tuned: Tuned = UNTUNED) -> str:
    """The specification in full: what runs, as a text that runs the same again on this model."""
    return _spelled(resolve(spec, tuned), tuned)


def check(spec: Spec) -> None:
    """Errors: unknown names, presets, parameters and values, as far as they show without a model."""
    for part in _parts(spec):
        if isinstance(part, Named):
            method(part.name).build(None if part.preset == TUNED else part.preset, **part.params)


def schema() -> Json:
    """The JSON Schema of a specification: a name, a mapping, or a list of these, which share one definition."""
    known = {name: method(name) for name in names()}
    one = names_of(known, {name: (TUNED, PUBLISHED, *cls.presets) for name, cls in known.items()}, True)
    return {**many(ref("method")), "$defs": {"method": one}}


def published(spec: Spec) -> Spec:
    """The specification with the published defaults where it names no parameters, whatever the model's settings are."""
    if isinstance(spec, str):
        return "+".join(part if ":" in part else f"{part.strip()}:{PUBLISHED}" for part in split(spec, "+"))
    if isinstance(spec, Mapping):
        return {**spec, "preset": PUBLISHED} if set(spec) == {"name"} else spec
    return [published(part) for part in spec] if isinstance(spec, Iterable) else spec


def resolve(spec: Spec, tuned: Tuned) -> list[Part]:
    """The methods of a specification. A composition takes the model's settings for all of it where there are such,
    else each part its own."""
    parts = _parts(spec)
    whole = tuned.get("+".join(part.name for part in parts)) if all(map(_tunable, parts)) else None
    found = []
    for part in parts:
        if isinstance(part, Method):
            found.append(Part(part, None))
            continue
        own = whole if whole is not None else tuned.get(part.name)
        settings = own.get(part.name, {}) if own is not None and _tunable(part) else None
        if settings is None and part.preset == TUNED:
            raise DllmError(
                f"this model has no settings of its own for {part.name!r} (`dllm tune --save` writes them): "
                f"give its parameters, or {part.name}:{PUBLISHED}"
            )
        found.append(_built(part, settings))
    return found


def _built(part: Named, settings: Settings | None) -> Part:
    cls = method(part.name)
    if settings is None:
        with OTHERS.blamed(part.name):
            return Part(cls.build(part.preset, **part.params), None)
    try:
        cls.build(**settings)
    except DllmError as error:
        raise DllmError(f"the model's own sampler settings: {error}") from error
    return Part(cls.build(**{**settings, **part.params}), settings)


def _tunable(part: Named | Method) -> bool:
    """Whether a part leaves its parameters to the model."""
    return isinstance(part, Named) and (part.preset == TUNED or (part.preset is None and not part.params))


def _parts(spec: Spec) -> list[Named | Method]:
    """The parts of a specification, not built yet."""
    if isinstance(spec, Method):
        return [spec]
    if isinstance(spec, str):
        if not spec.strip():
            raise DllmError(f"empty sampler name; known: {', '.join(names())}")
        return [_read(part) for part in split(spec, "+")]
    if isinstance(spec, Mapping):
        return [named(spec, "sampler", presets=True)]
    if not isinstance(spec, Iterable) or isinstance(spec, bytes | type):
        raise DllmError(f"a sampler is a name, a mapping with the key 'name', or a list of these, not {spec!r}")
    parts = [part for one in spec for part in _parts(one)]
    if not parts:
        raise DllmError("a list of samplers names at least one")
    return parts


def _read(text: str) -> Named:
    method(text.partition(":")[0].strip())  # an unknown name is the first thing to say
    return named(text, "sampler", presets=True)


def _spelled(parts: list[Part], tuned: Tuned) -> str:
    """Parts as text: whose settings they are, and the parameters that differ from the published defaults."""
    words = [[TUNED] if part.own is not None else [] for part in parts]
    changed = [_changed(part) for part in parts]
    taken = set(tuned)
    if not any(words) and not any(changed):
        taken |= set(tuned.get("+".join(part.method.name for part in parts), ()))
    for part, said, values in zip(parts, words, changed, strict=True):
        if not said and not values and part.method.name in taken:  # bare, it would take the model's own
            said.append(PUBLISHED)
    return "+".join(render(p.method.name, *w, **c) for p, w, c in zip(parts, words, changed, strict=True))


def _changed(part: Part) -> dict[str, object]:
    """The parameters that the model's settings name or that differ from the published defaults."""
    return {f.name: value for f in fields(part.method)
            if (value := vars(part.method)[f.name]) != f.default or f.name in (part.own or ())}  # fmt: skip


def build(spec: Spec, context: Context, extra: Bundle = Bundle(), tuned: Tuned = UNTUNED) -> Sampler:
    """The merged sampler of a specification; `extra` carries the slots that the call itself asks for, `tuned` the
    model's own settings."""
    found = resolve(spec, tuned)
    said = [part.method.name for part in found]
    if twice := next((name for name in said if said.count(name) > 1), None):
        raise DllmError(f"sampler {twice!r} is named twice in {'+'.join(said)!r}")
    parts = []
    for method, _ in found:
        with OTHERS.blamed(method.name):
            parts.append((method.name, method.bundle(context)))
    defaults = Bundle(window=Blocks.of(context), score=confidence, select=Quota.of(context))
    if any((extra.inputs, extra.adjust, extra.amend)):
        parts.append(("this call", extra))
    return merge(parts, defaults)._replace(spec=_spelled(found, tuned))
