"""From what a user writes to the object: searches, controllers, drafters, verifiers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from dllm import spec
from dllm.drafting.drafters import Drafter
from dllm.drafting.retrieval import PromptLookup, SuffixDrafter, TokenRecycling
from dllm.drafting.verifier import Verifier
from dllm.errors import DllmError, nearest
from dllm.models.arguments import Checkpoint
from dllm.models.files import optional_json

RETRIEVAL: dict[str, Any] = {"suffix": SuffixDrafter, "lookup": PromptLookup, "recycle": TokenRecycling}


def named(kind: str, what: Any, table: Mapping[str, Any], made: type) -> Any:
    """The object of "name", "name:key=value,key=value" or {"name": ..., key: value}; a `made` object passes."""
    if isinstance(what, made) and not isinstance(what, str | type):
        return what
    name, options = _parsed(kind, what, table)
    return table[name](**options)


def _parsed(kind: str, what: Any, table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    name, _, options = spec.named(what, kind, table)
    return name, spec.settings(f"{kind} {name!r}", table[name], options)


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

        found = Checkpoint(what) if isinstance(what, str) else what
        near = nearest(found.name, (*RETRIEVAL, *EMBEDDED))
        if near in RETRIEVAL and "/" not in found.name and not Path(found.name).exists():
            raise DllmError(f"unknown drafter {found.name!r}; did you mean {near!r}?")
        folder, what = locate(found.name, **found.hub), load(found)
        if what.config.causal:
            what = load_verifier(found)
        elif how := optional_json(folder / "drafter.json"):  # what `dllm align` left there
            return DiffusionDrafter(what, **spec.settings(str(folder / "drafter.json"), DiffusionDrafter, how))
    if isinstance(what, nn.Module):
        return ARDrafter.shared(what)
    if hasattr(what, "mask_id") and hasattr(what, "logits"):
        return DiffusionDrafter.shared(what)
    raise DllmError(
        f"a drafter is a dLLM, a causal LM, a Drafter, or one of {', '.join(RETRIEVAL)}; got {type(what).__name__}"
    )
