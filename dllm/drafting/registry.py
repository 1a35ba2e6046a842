"""From what a user writes to the object: searches, controllers, drafters, verifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from torch import nn

from dllm.drafting.drafters import Drafter
from dllm.drafting.retrieval import PromptLookup, SuffixDrafter, TokenRecycling
from dllm.drafting.verifier import Verifier
from dllm.errors import DllmError, nearest, unknown
from dllm.models.arguments import Checkpoint
from dllm.models.files import optional_json
from dllm.samplers.registry import value_of
from dllm.spec import misfit

RETRIEVAL: dict[str, Any] = {"suffix": SuffixDrafter, "lookup": PromptLookup, "recycle": TokenRecycling}


def named(kind: str, what: Any, table: Mapping[str, Any], made: type) -> Any:
    """The object of "name", "name:key=value,key=value" or {"name": ..., key: value}; a `made` object passes."""
    if isinstance(what, made) and not isinstance(what, str | type):
        return what
    name, options = _parsed(kind, what, table)
    return table[name](**options)


def _parsed(kind: str, what: Any, table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(what, Mapping):
        options = dict(what)
        if "name" not in options:
            raise DllmError(f"a {kind} given as a mapping needs a 'name'")
        name = options.pop("name")
    elif isinstance(what, str):
        name, _, rest = what.partition(":")
        options = {}
        for item in filter(None, rest.split(",")):
            key, equals, value = item.partition("=")
            if not equals:
                raise DllmError(f"{kind} option {item!r} is not key=value")
            options[key.strip()] = value_of(value)
    else:
        raise DllmError(f"a {kind} is a name ({', '.join(table)}), a mapping with one, or an object, not {what!r}")
    if not isinstance(name, str) or name not in table:
        raise unknown(kind, str(name), table)
    return name, settings(f"{kind} {name!r}", table[name], options)


def settings(of: str, make: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options for the keywords of `make`, of the kinds of their annotations: the one check of drafting's settings.

    Numbers that came as text are read. DllmError for other kinds and for unknown names, with the
    nearest one; ranges are checked by what is made.
    """
    known = {name: p for name, p in signature(make).parameters.items() if p.default is not Parameter.empty}
    out = {}
    for key, value in given.items():
        if key not in known:
            raise unknown("option", str(key), known or ("(none)",), of=of)
        kind = known[key].annotation
        out[key] = value_of(value) if isinstance(value, str) and misfit(kind, value) else value
        if what := misfit(kind, out[key]):
            raise DllmError(f"{of}: {key}={value!r} must be {what} (default {known[key].default!r})")
    return out


@lru_cache(maxsize=64)
def _retrieval(name: str, options: tuple[tuple[str, Any], ...]) -> Drafter:
    """One object a setting, of which every text takes a fork: measured costs belong to a drafter."""
    return RETRIEVAL[name](**dict(options))


def as_verifier(what: Any, tokenizer: Any = None) -> Verifier:
    """A `Verifier` of a model, a name or a folder. One wrapper per model, so that its measurements last."""
    if isinstance(what, Verifier):
        return what if tokenizer is None else what.with_tokenizer(tokenizer)
    if isinstance(what, str | Path | Checkpoint):
        from dllm.models.hub import load_verifier

        what = load_verifier(what)
    known = getattr(what, "_dllm_verifier", None)
    if known is None:
        known = Verifier(what, getattr(what, "tokenizer", None))
        what._dllm_verifier = known
    return known if tokenizer is None else known.with_tokenizer(tokenizer)


def as_drafter(what: Any) -> Any:
    """A `Drafter` of a dLLM, an autoregressive model, a retrieval name, a folder or Hugging Face id of either, or
    None."""
    if what is None or isinstance(what, Drafter):
        return what
    if isinstance(what, Mapping) or (isinstance(what, str) and what.split(":")[0] in RETRIEVAL):
        name, options = _parsed("drafter", what, RETRIEVAL)
        return _retrieval(name, tuple(sorted(options.items())))
    from dllm.drafting.autoregressive import ARDrafter
    from dllm.drafting.diffusion import DiffusionDrafter

    if isinstance(what, str | Checkpoint):
        from dllm.models.hub import EMBEDDED, load, load_verifier, locate

        spec = Checkpoint(what) if isinstance(what, str) else what
        near = nearest(spec.name, (*RETRIEVAL, *EMBEDDED))
        if near in RETRIEVAL and "/" not in spec.name and not Path(spec.name).exists():
            raise DllmError(f"unknown drafter {spec.name!r}; did you mean {near!r}?")
        folder, what = locate(spec.name, **spec.hub), load(spec)
        if what.config.causal:
            what = load_verifier(spec)
        elif how := optional_json(folder / "drafter.json"):  # what `dllm align` left there
            return DiffusionDrafter(what, **settings(str(folder / "drafter.json"), DiffusionDrafter, how))
    if isinstance(what, nn.Module):
        return ARDrafter.shared(what)
    if hasattr(what, "mask_id") and hasattr(what, "logits"):
        return DiffusionDrafter.shared(what)
    raise DllmError(
        f"a drafter is a dLLM, a causal LM, a Drafter, or one of {', '.join(RETRIEVAL)}; got {type(what).__name__}"
    )
