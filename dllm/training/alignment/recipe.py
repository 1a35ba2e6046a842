"""The recipe of an aligned drafter (DEER, arXiv 2512.15176): the verifier's answers, a smaller copy, the stages."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from dllm.drafting.registry import as_verifier
from dllm.drafting.trim import ranked
from dllm.drafting.verifier import CausalLM
from dllm.drafting.vocabulary import Vocabulary
from dllm.errors import DllmError, unknown
from dllm.models.config import ModelConfig
from dllm.models.families import FAMILIES
from dllm.models.files import replaced_checkpoint, write_json
from dllm.models.hub import load, load_verifier, pick_device
from dllm.models.native import NativeModel
from dllm.models.recast import Recast, cut
from dllm.training import checkpoint
from dllm.training.alignment.loop import START, Place, align
from dllm.training.alignment.objective import Learner
from dllm.training.alignment.registry import as_objective
from dllm.training.answers import answers_of
from dllm.training.config import AlignConfig
from dllm.training.data import Pair
from dllm.training.lora import add_lora, merge_lora, save_adapter
from dllm.training.team import Team

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What a recipe names: the drafter before it learns, its teacher, and how their ids relate.

    base, recast: of the causal model that the drafter was, if it was one.
    """

    model: NativeModel
    verifier: PreTrainedModel
    vocabulary: Vocabulary
    base: ModelConfig
    recast: Recast | None


def run(config: AlignConfig, resume: bool = False) -> NativeModel:
    """The whole recipe: teacher answers, a smaller copy if asked for, all stages; the model in `output/model`.

    With `lora` that folder holds the adapters alone and names their base. Beside them, `drafter.json` says how to draft
    with it. `resume` goes on from the checkpoint in `output`; without it the folder must hold none.
    """
    folder = Path(config.output)
    path = folder / checkpoint.CHECKPOINT
    for stage in config.stages:
        as_objective(stage.objective)  # a mistake there is said before anything is loaded
    team = Team.joined(config.device)
    saved = checkpoint.begin(config, resume) if team.first or resume else None
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    parts = parts_of(config, team)
    model, network = parts.model, parts.model.transformer
    sep = separator(model, config)
    if config.lora.rank:
        add_lora(network, config.lora)

    def save(place: Place) -> None:
        weights = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
        values = {"recipe": checkpoint.recipe(config), **place._asdict(), "weights": weights}
        if team.first:
            checkpoint.save_atomically(values, path)
            log.info("stage %d, step %d saved in %s", place.stage + 1, place.step, path)

    start = START if saved is None else Place(*(saved[name] for name in Place._fields))
    if saved is not None:
        network.load_state_dict(saved["weights"], strict=False)
    if team.first:
        data = answers_of(config, parts.verifier)
    team.wait()
    if not team.first:
        data = answers_of(config, parts.verifier)
    ends = as_verifier(cast(CausalLM, parts.verifier)).eos
    ranking = ranked((pair.answer for pair in data), parts.vocabulary.size, ends) if config.trim else []
    data = translated(data, parts)
    log.info("%d teacher answers, %d tokens", len(data), sum(len(c.answer) for c in data))
    verifier = parts.verifier.requires_grad_(False) if parts.vocabulary.kind == "ids" else None
    align(Learner(model, config.block, sep, verifier, config.pack), data, config, start, save, team)
    save(Place(len(config.stages), 0, {}, {}))  # nothing left to do
    how: dict[str, object] = {} if sep is None else {"suffix_token_id": sep}
    if config.trim:
        how["vocab_keep"] = ranking[: config.trim]
    if team.first:
        export(parts, config, how)
    team.wait()
    return NativeModel(model.config, merge_lora(network).eval(), model.tokenizer) if config.lora.rank else model


def export(parts: Parts, config: AlignConfig, how: Mapping[str, object]) -> None:
    """Write what was learned into `output/model`, with the file that says how to draft with it."""
    model, folder = parts.model, Path(config.output) / "model"
    if not config.lora.rank:
        model.transformer.to(torch.bfloat16 if config.dtype == "bfloat16" else torch.float32)
        model.save(folder, extra={"drafter.json": how})
        return
    with replaced_checkpoint(folder) as draft:
        base = FAMILIES[parts.base.family], parts.base, config.drafter.name
        save_adapter(model.transformer, config.lora, *base, draft)
        if parts.recast is not None:
            parts.recast.write(draft)
        write_json(draft / "drafter.json", how)


def parts_of(config: AlignConfig, team: Team = Team()) -> Parts:
    """The drafter before alignment (a dLLM, cut to size) and its teacher. Errors: their ids have nothing in common, or
    the drafter lacks a special one."""
    device = pick_device(team.device(config.device))
    kind = torch.bfloat16 if config.lora.rank and config.dtype == "bfloat16" else torch.float32
    model, recast = load(config.drafter, dtype=kind, device=device), None
    base = model.config
    if base.causal:
        mask = token(model, config.recast.mask, "mask", "recast.mask")
        attention = config.recast
        recast = Recast.of(config.drafter.name, base, mask, config.layers, attention.block_size, attention.shift)
        model = recast.apply(model)
    elif config.layers:
        if config.lora.rank:
            raise DllmError("adapters on the first layers alone need a causal drafter: leave out layers, or lora")
        model = cut(model, config.layers)
    model.sampler_settings = {}  # they are of the weights that are about to change
    model.to(device)
    arguments = {"dtype": config.dtype, "device": str(model.device), **config.verifier.given()}
    verifier = load_verifier(config.verifier.name, **arguments)
    return Parts(model, verifier, related(model, verifier, config), base, recast)


def related(model: NativeModel, verifier: PreTrainedModel, config: AlignConfig) -> Vocabulary:
    """How the ids of drafter and verifier relate. Errors: by text alone, or without the verifier's end tokens."""
    size = len(verifier.get_input_embeddings().weight)  # type: ignore[arg-type]
    tokenizer = getattr(verifier, "tokenizer", None)  # foreign
    found = Vocabulary.between(model.tokenizer, tokenizer, model.vocab_size, size)
    if found.kind == "text":
        raise DllmError(
            f"drafter {config.drafter.name} and verifier {config.verifier.name} share too few tokens: an aligned "
            "drafter learns the verifier's, so take one whose tokenizer has the same strings"
        )
    end = verifier.generation_config.eos_token_id
    ends = [end] if isinstance(end, int) else list(end or ())
    known = range(model.vocab_size) if found.kind == "ids" else found.from_verifier
    if lost := [i for i in ends if i not in known]:
        raise DllmError(
            f"the vocabulary of {config.drafter.name} ({model.vocab_size} ids) does not cover the verifier's end token "
            f"{lost[0]}: a drafter of its answers must be able to end them"
        )
    return found


def translated(data: Sequence[Pair], parts: Parts) -> list[Pair]:
    """The answers in the drafter's ids."""
    if parts.vocabulary.kind == "ids":
        return list(data)
    return [Pair(*map(parts.vocabulary.context, pair)) for pair in data]


def separator(model: NativeModel, config: AlignConfig) -> int | None:
    """What closes a block in training and in drafting; None: nothing."""
    if config.separator is False:
        return None
    named = "" if config.separator is True else str(config.separator)
    return token(model, named, "sep", "separator")


def token(model: NativeModel, named: str, kind: str, key: str) -> int:
    """The id of a token that a recipe names, or else of the tokenizer's own of this kind. Errors: there is none."""
    tokenizer = model.tokenizer
    own = getattr(tokenizer, f"{kind}_token_id", None)  # foreign
    if not named and own is not None:
        return int(own)
    if not named:
        false = ", or false" if kind == "sep" else ""
        raise DllmError(f"this tokenizer has no {kind} token: set {key} to a special token that no text holds{false}")
    vocab = tokenizer.get_vocab() if tokenizer is not None else {}
    if named not in vocab:
        raise unknown("token", named, [t for t in vocab if t.startswith("<")] or vocab, of=key)
    return vocab[named]
