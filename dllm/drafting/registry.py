"""From what a user writes to the object: searches, controllers, drafters, verifiers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from dllm.drafting.drafters import Drafter
from dllm.drafting.retrieval import PromptLookup, SuffixDrafter, TokenRecycling
from dllm.drafting.verifier import Verifier
from dllm.errors import DllmError, nearest, unknown

RETRIEVAL: dict[str, Any] = {"suffix": SuffixDrafter, "lookup": PromptLookup, "recycle": TokenRecycling}


def named(kind: str, what: Any, table: Mapping[str, Any]) -> Any:
    """The object of "name", "name:key=value,key=value" or {"name": ..., key: value}; an object passes through."""
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
            options[key.strip()] = yaml.safe_load(value)
    else:
        return what
    if name not in table:
        raise unknown(kind, name, table)
    try:
        return table[name](**options)
    except TypeError as error:
        raise DllmError(f"{kind} {name!r}: {str(error).split('__init__() ')[-1]}") from error


def as_verifier(what: Any, tokenizer: Any = None) -> Verifier:
    """A `Verifier` of a model, a name or a folder. One wrapper per model, so that its measurements last."""
    if isinstance(what, Verifier):
        return what if tokenizer is None else what.with_tokenizer(tokenizer)
    if isinstance(what, str | Path):
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
        return named("drafter", what, RETRIEVAL)
    from dllm.drafting.autoregressive import ARDrafter
    from dllm.drafting.diffusion import DiffusionDrafter

    if isinstance(what, str):
        from dllm.models.hub import EMBEDDED, load, load_verifier, locate, optional_json

        near = nearest(what, (*RETRIEVAL, *EMBEDDED))
        if near in RETRIEVAL and "/" not in what and not Path(what).exists():
            raise DllmError(f"unknown drafter {what!r}; did you mean {near!r}?")
        folder = locate(what, None)
        name, what = what, load(what)
        if what.config.causal:
            what = load_verifier(name)
        elif how := optional_json(folder / "drafter.json"):  # what `dllm align` left there
            try:
                return DiffusionDrafter(what, **how)
            except TypeError as error:
                raise DllmError(f"{folder / 'drafter.json'}: {str(error).split('__init__() ')[-1]}") from error
    if isinstance(what, nn.Module):
        return ARDrafter(what)
    if hasattr(what, "mask_id") and hasattr(what, "logits"):
        return DiffusionDrafter.shared(what)
    raise DllmError(
        f"a drafter is a dLLM, a causal LM, a Drafter, or one of {', '.join(RETRIEVAL)}; got {type(what).__name__}"
    )
