"""Accuracy of the embedded pair on its tasks, with 95 % intervals: the release check behind `dllm train --eval`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dllm.call.generate import generate as decode
from dllm.models.hub import load
from dllm.models.native import NativeModel
from dllm.tasks.base import Example
from dllm.tasks.registry import task

TWIN_TASKS = ("word_problems", "functions")  # sudoku has no order of reading, which is all a causal model can do


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `n` problems of one task solved by one model."""

    model: str
    task: str
    correct: int
    n: int

    @property
    def value(self) -> float:
        """The share of right answers."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval."""
        return wilson(self.correct, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.model:8} {self.task:14} {self.value:7.1%}  [{low:.1%}, {high:.1%}]  n={self.n}"


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, w = correct / n, z * z / n
    middle, half = (p + w / 2) / (1 + w), z * math.sqrt(p * (1 - p) / n + w / (4 * n)) / (1 + w)
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    model: NativeModel,
    names: Sequence[str],
    n: int = 500,
    seed: int = 0,
    split: str = "test",
    label: str = "",
) -> list[Accuracy]:
    """Greedy accuracy on `n` held-out problems a task; a diffusion model commits one token a step, the most
    confident.
    """
    results = []
    for name in names:
        examples = task(name).generate(split, n, seed)
        texts = answers(model, name, examples)
        correct = sum(task(name).grade(e, text) for e, text in zip(examples, texts, strict=True))
        results.append(Accuracy(label or model.family, name, correct, len(examples)))
    return results


def answers(model: NativeModel, name: str, examples: Sequence[Example], batch_size: int = 32) -> list[str]:
    """The model's answers to `examples` of task `name`."""
    prompts = [model.chat([{"role": "user", "content": e.prompt}]) for e in examples]
    # Short prompts with short ones: rows of a batch are as wide as the longest.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for i in tqdm(range(0, len(order), batch_size), desc=name, unit="batch", leave=False):
        rows = order[i : i + batch_size]
        some = [prompts[r] for r in rows]
        found = (_continue if model.config.causal else _unmask)(model, some, task(name).window)
        for row, text in zip(rows, found, strict=True):
            texts[row] = text
    return texts


def _unmask(model: NativeModel, prompts: list[list[int]], window: int) -> list[str]:
    outputs = decode(model, prompts, sampler="confidence", max_new_tokens=window, block_length=window,
                     batch_size=len(prompts))  # fmt: skip
    return [o.text or "" for o in outputs]


@torch.inference_mode()
def _continue(model: NativeModel, prompts: list[list[int]], window: int) -> list[str]:
    """Greedy continuations of a causal model, whole rows again at every token: the sequences are short."""
    ends = torch.tensor(model.eos_ids)
    lengths = torch.tensor([len(p) for p in prompts])
    rows = torch.arange(len(prompts))
    ids = torch.full((len(prompts), int(lengths.max()) + window), ends[0].item())  # (B, T)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for step in range(window):
        at = lengths + step
        hidden = model.forward(ids[:, : int(at.max())].to(model.device)).cpu()
        token: Tensor = model.logits(hidden[rows, at - 1].to(model.device)).argmax(-1).cpu()  # (B,)
        ids[rows, at] = torch.where(done, ends[0], token)
        done |= torch.isin(token, ends)
        if bool(done.all()):
            break
    return [_text(model, ids[row, n : n + window].tolist()) for row, n in enumerate(lengths.tolist())]


def _text(model: NativeModel, ids: list[int]) -> str:
    stop = next((i for i, token in enumerate(ids) if token in model.eos_ids), len(ids))
    assert model.tokenizer is not None
    return str(model.tokenizer.decode(ids[:stop]))


def evaluate_pair(n: int, seed: int, folders: Sequence[str | Path], names: Sequence[str]) -> list[Accuracy]:
    """A dLLM on all the named tasks, a causal twin on those with an order of reading; each of `folders` is what
    `dllm.load` takes.
    """
    results = []
    for folder in folders:
        model = load(folder)
        mine = [name for name in names if name in TWIN_TASKS] if model.config.causal else names
        results += evaluate(model, mine, n, seed, label=Path(folder).name)
    return results
