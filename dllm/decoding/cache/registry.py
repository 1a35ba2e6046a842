"""Specifications of cache policies: names, parameters, and the policy of a call that names none."""

from __future__ import annotations

import dataclasses
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from dllm.decoding.cache.bidirectional import DKVCache, DLLMCache, Dual, Interval, Prefix
from dllm.decoding.cache.block import Block, BlockDual
from dllm.decoding.cache.policy import NoCache, Policy
from dllm.errors import DllmError, unknown

if TYPE_CHECKING:
    from dllm.models.model import Model


POLICIES: dict[str, type[Policy]] = {
    cls.name: cls for cls in (NoCache, Prefix, Dual, Interval, DKVCache, DLLMCache, Block, BlockDual)
}


def default(model: Model, usable: tuple[str, ...] | None) -> Policy:
    """The cache of a call that names none: `block` where it is exact and the sampler can use it, else `none`."""
    exact = model.block_size is not None and model.supports_cache and (usable is None or Block.name in usable)
    return Block() if exact else NoCache()


def policy(spec: str | dict[str, Any] | Policy | None) -> Policy:
    """A cache policy from a name ("dual"), "dual:left=16,right=16", a dict with `name`, or a policy."""
    if isinstance(spec, Policy):
        return spec
    if spec is None:
        return NoCache()
    params: dict[str, Any] = dict(spec) if isinstance(spec, dict) else {}
    name = params.pop("name", None) if isinstance(spec, dict) else spec
    if isinstance(name, str) and ":" in name:
        name, _, rest = name.partition(":")
        params = dict(_parameter(name, item) for item in rest.split(","))
    if name not in POLICIES:
        raise unknown("cache", str(name), POLICIES)
    cls = POLICIES[name]
    known = {f.name: Integral if f.type == "int" else Real for f in dataclasses.fields(cls) if not f.kw_only}
    for key, value in params.items():
        if key not in known:
            raise unknown("parameter", key, known or {"(none)"}, of=f"cache {name!r}")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            kind = "an integer" if known[key] is Integral else "a number"
            raise DllmError(f"cache {name!r}: {key}={value!r} must be {kind}")
    return cls(**params)


def _parameter(name: str, item: str) -> tuple[str, int | float]:
    key, _, value = item.partition("=")
    for kind in (int, float):
        try:
            return key.strip(), kind(value)
        except ValueError:
            continue
    raise DllmError(f"cache {name!r}: {item!r} is not of the form name=number")
