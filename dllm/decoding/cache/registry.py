"""Specifications of cache policies: names, parameters, and the policy of a call that names none.

A policy from another package joins through the entry point group `dllm.caches` (docs/adding-a-cache.md).
"""

from __future__ import annotations

from collections.abc import Mapping

from dllm.decoding.cache.bidirectional import DKVCache, DLLMCache, Dual, Interval, Prefix
from dllm.decoding.cache.block import Block, BlockDual
from dllm.decoding.cache.policy import Policy
from dllm.decoding.cache.tail import NoCache
from dllm.errors import DllmError, nearest
from dllm.models.model import Model
from dllm.spec import Json, Plugins, named, names_of, settings

POLICIES: dict[str, type[Policy]] = {
    cls.name: cls for cls in (NoCache, Prefix, Dual, Interval, DKVCache, DLLMCache, Block, BlockDual)
}
OTHERS = Plugins("dllm.caches", "cache", Policy, "dllm.decoding.cache.Policy", POLICIES)  # type: ignore[type-abstract]


def names() -> list[str]:
    """All policies that there are: the built-in ones, then those of other packages that load."""
    return [*POLICIES, *OTHERS.names()]


def schema() -> Json:
    """The JSON Schema of a specification: a name, or a mapping."""
    known = {name: POLICIES[name] if name in POLICIES else OTHERS.load(name) for name in names()}
    return names_of(known, {name: tuple(cls.presets) for name, cls in known.items()})


def default(model: Model, usable: tuple[str, ...] | None) -> Policy:
    """The cache of a call that names none: `block` where it is exact and the sampler can use it, else `none`."""
    exact = model.block_size is not None and model.supports_cache and (usable is None or Block.name in usable)
    return Block() if exact else NoCache()


def policy(spec: str | Mapping[str, object] | Policy | None) -> Policy:
    """A policy from a name ("dual"), "dual:left=16,right=16", "dual:streaming" (a preset, other parameters may follow),
    a mapping with `name`, a policy, or None: no cache.

    Errors: unknown names, with the nearest one, presets, parameters and values; a policy of another package that does
    not load.
    """
    if spec is None or isinstance(spec, Policy):
        return spec or NoCache()
    name, preset, params = named(spec, "cache", [*POLICIES, *OTHERS.points], presets=True)
    cls = POLICIES[name] if name in POLICIES else OTHERS.load(name)
    if preset is not None and preset not in cls.presets:
        near = nearest(preset, cls.presets)
        hint = f", nor a preset; did you mean {near!r}?" if near else ", nor a preset" if cls.presets else ""
        raise DllmError(f"cache {name!r}: {preset!r} is not of the form key=value{hint}")
    with OTHERS.blamed(name):
        return cls(**settings(f"cache {name!r}", cls, {**(cls.presets[preset] if preset else {}), **params}))
