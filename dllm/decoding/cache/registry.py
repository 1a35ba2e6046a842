"""Specifications of cache policies: names, parameters, and the policy of a call that names none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dllm.decoding.cache.bidirectional import DKVCache, DLLMCache, Dual, Interval, Prefix
from dllm.decoding.cache.block import Block, BlockDual
from dllm.decoding.cache.policy import NoCache, Policy
from dllm.spec import named, settings

if TYPE_CHECKING:
    from dllm.models.model import Model


POLICIES: dict[str, type[Policy]] = {
    cls.name: cls for cls in (NoCache, Prefix, Dual, Interval, DKVCache, DLLMCache, Block, BlockDual)
}


def default(model: Model, usable: tuple[str, ...] | None) -> Policy:
    """The cache of a call that names none: `block` where it is exact and the sampler can use it, else `none`."""
    exact = model.block_size is not None and model.supports_cache and (usable is None or Block.name in usable)
    return Block() if exact else NoCache()


def policy(spec: str | Mapping[str, object] | Policy | None) -> Policy:
    """A cache policy from a name ("dual"), "dual:left=16,right=16", a dict with `name`, or a policy."""
    if spec is None or isinstance(spec, Policy):
        return spec or NoCache()
    name, _, params = named(spec, "cache", POLICIES)
    return POLICIES[name](**settings(f"cache {name!r}", POLICIES[name], params))
