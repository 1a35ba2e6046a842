"""The recipe of an aligned drafter (DEER, arXiv 2512.15176): the verifier's answers, a smaller copy, the stages."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dllm.drafting.vocabulary import Vocabulary
from dllm.errors import DllmError
from dllm.models.hub import load, load_verifier, pick_device
from dllm.models.native import NativeModel
from dllm.models.transformer import Transformer
from dllm.training import checkpoint
from dllm.training.alignment.loop import START, Place, align
from dllm.training.alignment.objective import Learner
from dllm.training.alignment.registry import as_objective
from dllm.training.answers import answers_of
from dllm.training.config import AlignConfig
from dllm.training.trainer import as_diffusion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def run(config: AlignConfig, resume: bool = False) -> NativeModel:
    """The whole recipe: teacher answers, a smaller copy if asked for, all stages; the model in `output/model`.

    Beside the model, `drafter.json` says how to draft with it. `resume` goes on from the checkpoint in `output`;
    without it the folder must hold none.
    """
    folder = Path(config.output)
    path = folder / checkpoint.CHECKPOINT
    for stage in config.stages:
        as_objective(stage.objective)  # a mistake there is said before anything is loaded
    saved = checkpoint.begin(config, resume)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model, verifier = pair(config)

    def save(place: Place) -> None:
        weights = {n: p.detach() for n, p in model.transformer.named_parameters()}
        values = {"recipe": checkpoint.recipe(config), **place._asdict(), "weights": weights}
        checkpoint.save_atomically(values, path)
        log.info("stage %d, step %d saved in %s", place.stage + 1, place.step, path)

    start = START if saved is None else Place(*(saved[name] for name in Place._fields))
    if saved is None:
        save(start)
    else:
        model.transformer.load_state_dict(saved["weights"], strict=False)
    data = answers_of(config, verifier)
    log.info("%d teacher answers, %d tokens", len(data), sum(len(c.answer) for c in data))
    learner = Learner(model, config.block, separator(model) if config.separator else None, verifier)
    align(learner, data, config, start, save)
    save(Place(len(config.stages), 0, {}, {}))  # nothing left to do
    model.transformer.to(torch.bfloat16 if config.dtype == "bfloat16" else torch.float32)
    how = {"suffix_token_id": separator(model)} if config.separator else {}
    model.save(folder / "model", extra={"drafter.json": how})
    return model


def pair(config: AlignConfig) -> tuple[NativeModel, PreTrainedModel]:
    """The drafter before alignment (bidirectional, cut to size) and its teacher. DllmError where they number their
    tokens differently."""
    device = pick_device(config.device)
    model = load(config.drafter, dtype=torch.float32, device=device)
    model.sampler_settings = {}  # they are of the weights that are about to change
    model = as_diffusion(model) if model.config.causal else model
    model = (shrink(model, config.layers) if config.layers else model).to(device)
    arguments = {"dtype": config.dtype, "device": str(model.device), **config.verifier.given()}
    verifier = load_verifier(config.verifier.name, **arguments)
    size = len(verifier.get_input_embeddings().weight)  # type: ignore[arg-type]
    tokenizer = getattr(verifier, "tokenizer", None)  # foreign
    if Vocabulary.between(model.tokenizer, tokenizer, model.vocab_size, size).kind != "ids":
        raise DllmError(
            f"drafter {config.drafter.name} and verifier {config.verifier.name} number their tokens differently: an "
            "aligned drafter learns the verifier's ids, so take one that has the verifier's tokenizer"
        )
    return model, verifier


def shrink(model: NativeModel, layers: int) -> NativeModel:
    """A copy with the first `layers` layers: embedding, final norm and head as they are."""
    if not 1 <= layers <= model.config.n_layers:
        raise DllmError(f"layers must lie between 1 and the model's {model.config.n_layers}, got {layers}")
    small = Transformer(replace(model.config, n_layers=layers))
    wanted = small.state_dict()
    small.load_state_dict({k: v for k, v in model.transformer.state_dict().items() if k in wanted})
    return NativeModel(replace(model.config, n_layers=layers), small, model.tokenizer)


def separator(model: NativeModel) -> int:
    """The tokenizer's separator, which closes a block in training and in drafting."""
    sep = getattr(model.tokenizer, "sep_token_id", None)  # foreign
    if sep is None:
        raise DllmError("this tokenizer has no separator token: set separator: false")
    return int(sep)
