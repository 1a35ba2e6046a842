"""From what a user writes to the object: searches, controllers, drafters, verifiers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

from torch import nn

from dllm import spec
from dllm.drafting.autoregressive import ARDrafter
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Drafter
from dllm.drafting.hidden.config import is_head
from dllm.drafting.hidden.drafter import HiddenDrafter
from dllm.drafting.hidden.head import head_of_folder, head_of_module
from dllm.drafting.retrieval import PromptLookup, SuffixDrafter, TokenRecycling
from dllm.drafting.stand import StandDrafter
from dllm.drafting.verifier import CausalLM, Verifier
from dllm.errors import DllmError, nearest
from dllm.models.arguments import Checkpoint
from dllm.models.files import optional_json
from dllm.models.hub import EMBEDDED, load, load_verifier, locate, pick_device, pick_dtype
from dllm.models.model import Model
from dllm.models.tokenizer import Tokenizer
from dllm.spec import Plugins

# what a drafter is named without being a checkpoint; other packages add theirs by the entry point group
DRAFTERS: dict[str, type[Drafter]] = {
    "suffix": SuffixDrafter,
    "lookup": PromptLookup,
    "recycle": TokenRecycling,
    "stand": StandDrafter,
}
OTHERS = Plugins("dllm.drafters", "drafter", Drafter, "dllm.drafting.Drafter", DRAFTERS)

NOT_FOR_HEADS = (
    "backend", "mask_id", "eos_ids", "block_size", "shift", "tokenizer", "quantization", "device_map",
    "attn_implementation",
)  # fmt: skip

VerifierLike: TypeAlias = str | Path | Checkpoint | Verifier | CausalLM
DrafterLike: TypeAlias = str | Mapping[str, object] | Checkpoint | Drafter | Model | CausalLM | None
T = TypeVar("T")

_MADE: dict[str, Drafter] = {}  # by name and options


def named(kind: str, what: object, table: Mapping[str, type[T]]) -> T:
    """The object of "name", "name:key=value,key=value" or {"name": ..., key: value}. Errors: see `spec.named`."""
    name, _, options = spec.named(what, kind, table)
    return table[name](**spec.settings(f"{kind} {name!r}", table[name], options))


def drafter_names() -> list[str]:
    """Drafters that are no checkpoints: the built-in ones, then those of other packages."""
    return [*DRAFTERS, *OTHERS.points]


def is_drafter_name(text: str) -> bool:
    """Whether a text names one of them, with or without options."""
    return text.split(":", maxsplit=1)[0] in drafter_names()


def as_verifier(what: VerifierLike, tokenizer: Tokenizer | None = None) -> Verifier:
    """A `Verifier` of a model, a name or a folder. Errors: no causal LM, a cache that cannot be rolled back."""
    if isinstance(what, Verifier):
        return what if tokenizer is None else Verifier(what.model, tokenizer)
    model = cast(CausalLM, load_verifier(what)) if isinstance(what, str | Path | Checkpoint) else what
    return Verifier(model, getattr(model, "tokenizer", None) if tokenizer is None else tokenizer)  # foreign


def as_drafter(what: DrafterLike) -> Drafter | None:
    """A `Drafter` of a dLLM, an autoregressive model, a drafter's name, a folder or Hugging Face id of either, or None.

    Errors: DllmError for anything else, with the nearest name, and for options that the named drafter does not take.
    """
    if what is None or isinstance(what, Drafter):
        return what
    if isinstance(what, Mapping) or (isinstance(what, str) and is_drafter_name(what)):
        return _by_name(what)
    if isinstance(what, str | Checkpoint):
        return _loaded(Checkpoint(what) if isinstance(what, str) else what)
    return _of_model(what)


def _by_name(what: str | Mapping[str, object]) -> Drafter:
    """One object a setting, of which every text takes a fork: measured costs belong to a drafter."""
    name, _, options = spec.named(what, "drafter")
    setting = spec.render(name, **options)
    table = {name: OTHERS.load(name)} if name in OTHERS.points else DRAFTERS
    if setting not in _MADE:
        with OTHERS.blamed(name):
            _MADE[setting] = named("drafter", what, table)
    return _MADE[setting]


def _loaded(found: Checkpoint) -> Drafter:
    """The drafter of a checkpoint; `dllm align` leaves a file there that says how to draft with it."""
    near = nearest(found.name, (*drafter_names(), *EMBEDDED))
    if near in drafter_names() and "/" not in found.name and not Path(found.name).exists():
        raise DllmError(f"unknown drafter {found.name!r}; did you mean {near!r}?")
    folder = locate(found.name, **found.hub)
    if is_head(raw := optional_json(folder / "config.json")):
        if unread := [name for name in found.given() if name in NOT_FOR_HEADS]:
            raise DllmError(f"{', '.join(unread)}: a head over the verifier's states has its verifier's; leave it out")
        place = pick_device(found.device)
        kind = pick_dtype(found.dtype, place) if "dtype" in found.given() else None  # as it is stored
        return HiddenDrafter(head_of_folder(folder, raw, kind, place))
    model = load(found)
    if model.config.causal:
        return _of_model(cast(CausalLM, load_verifier(found)))
    if how := optional_json(folder / "drafter.json"):
        return DiffusionDrafter(model, **spec.settings(str(folder / "drafter.json"), DiffusionDrafter, how))
    return _of_model(model)


def _of_model(model: Model | CausalLM) -> Drafter:
    """The default drafter of a loaded model, which owns its costs: the drafter is a new one for every call."""
    if isinstance(model, Model):
        drafter: Drafter = DiffusionDrafter(model)
    elif isinstance(model, nn.Module):
        raw = model.config.to_dict() if hasattr(model.config, "to_dict") else {}  # foreign
        drafter = HiddenDrafter(head_of_module(model, raw)) if is_head(raw) else ARDrafter(model)
    else:
        raise DllmError(
            f"a drafter is a dLLM, a causal LM, a Drafter, or one of {', '.join(drafter_names())}; "
            f"got {type(model).__name__}"
        )
    drafter.owner = model
    return drafter
