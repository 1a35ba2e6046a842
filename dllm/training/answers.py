"""The verifier's own answers, which drafters and pair heads learn from: made in batches, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from tqdm import tqdm

from dllm.drafting.front import encode
from dllm.drafting.registry import as_verifier
from dllm.drafting.verifier import CausalLM
from dllm.errors import DllmError, first_line
from dllm.models.hub import load_verifier, pick_device
from dllm.tasks.registry import generate
from dllm.training.config import Taught
from dllm.training.data import Pair, read_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def answers_of(config: Taught, verifier: PreTrainedModel) -> list[Pair]:
    """The answers that a recipe learns from: those in its file, made first where they are missing."""
    path = config.answers
    if not (config.tasks or config.prompts):
        return read_answers(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prompts, _ = encode(as_verifier(cast("CausalLM", verifier)), task_lines(config))
    return continuations(verifier, prompts, config.max_new_tokens, config.batch_size, path)


def make(config: Taught) -> list[Pair]:
    """The same with the recipe's own verifier and nothing else in memory."""
    if config.threads:
        torch.set_num_threads(config.threads)
    arguments = {"dtype": config.dtype, "device": pick_device(config.device), **config.verifier.given()}
    return answers_of(config, load_verifier(config.verifier.name, **arguments))


def continuations(
    verifier: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 32,
    path: Path | None = None,
) -> list[Pair]:
    """The verifier's own greedy answers to prompts given as ids.

    With `path` each answer is kept in that file as soon as it is there, and those of an earlier run are not made again.
    """
    pad = verifier.generation_config.pad_token_id or 0
    end = verifier.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    kept = _kept(path)
    out = [Pair(list(p), kept[tuple(p)]) if tuple(p) in kept else None for p in prompts]
    order = sorted((i for i, c in enumerate(out) if c is None), key=lambda i: len(prompts[i]))
    for at in tqdm(range(0, len(order), batch_size), desc="teacher", unit="batch", leave=False):
        some = [list(prompts[i]) for i in order[at : at + batch_size]]
        width = max(map(len, some))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in some], device=verifier.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some], device=verifier.device)
        texts = verifier.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
        )[:, width:].tolist()
        for i, prompt, text in zip(order[at : at + batch_size], some, texts, strict=True):
            stop = next((n + 1 for n, t in enumerate(text) if t in ends), len(text))
            out[i] = Pair(prompt, text[:stop])
        if path is not None:
            lines = [json.dumps(out[i]) for i in order[at : at + batch_size]]
            with path.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
    return [c for c in out if c is not None and c.answer]


def _kept(path: Path | None) -> dict[tuple[int, ...], list[int]]:
    """prompt -> answer of an earlier run; a line that was cut off is dropped, from the file too."""
    if path is None or not path.exists():
        return {}
    try:
        *whole, rest = path.read_text(encoding="utf-8").split("\n")
        if rest:
            path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        return {tuple(prompt): answer for prompt, answer in map(json.loads, whole)}
    except (OSError, ValueError, TypeError) as error:
        raise DllmError(f"{path} is damaged ({first_line(error)}); delete it and run again") from None


def task_lines(config: Taught, split: str = "train") -> list[str]:
    """The prompts of a recipe: problems of the built-in tasks, or the lines of a file."""
    if config.prompts:
        return read_prompts(config.prompts)
    return [e.prompt for name, n in config.tasks.items() for e in generate(name, split, n, config.seed)]


def read_answers(path: Path) -> list[Pair]:
    """All answers of a file that must be there."""
    if not path.exists():
        raise DllmError(f"there are no answers in {path}: name tasks or prompts to make them from, or another file")
    return [Pair(list(prompt), answer) for prompt, answer in _kept(path).items() if answer]
