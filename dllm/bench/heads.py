"""`dllm bench drafting-heads`: the output head of a drafter with fewer ids (VocabTrim) and with two factors (SlimSpec).

What it takes: eight slots at SmolLM2's size, and all that follows on the logits for a draft. What it is worth: heads
over the states of the embedded verifier that differ in this alone, each trained from the same seed on the same answers;
tau of their drafts on held-out prompts, and its difference to the whole head's with a bootstrap interval over prompts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import dllm
from dllm.bench.drafting import TASKS, held_out
from dllm.bench.runtime import Figure
from dllm.drafting.drafters import Need
from dllm.drafting.registry import as_verifier
from dllm.eval.metrics import paired_gain
from dllm.models.hub import load
from dllm.models.linear import linear
from dllm.training import heads
from dllm.training.config import HeadRecipe, ScheduleSpec

VOCAB, HIDDEN, SLOTS = 49_152, 576, 8  # of SmolLM2, and of a draft
COSTS = (
    (VOCAB, 0), (16_384, 0), (8192, 0), (4096, 0), (VOCAB, 256), (VOCAB, 128), (VOCAB, 64), (VOCAB, 32), (16_384, 128),
    (8192, 128),
)  # fmt: skip
WORTH = ((664, 0), (128, 0), (64, 0), (664, 64), (664, 32), (664, 16), (128, 32))  # of 664 ids and 128 columns
ANSWERS = {"word_problems": 600, "functions": 300}
NEW, BATCH = 96, 25


def run(repeats: int = 5, *, n: int = 100, steps: int = 300) -> Iterator[Figure]:
    """Milliseconds of heads by ids and rank, then tau of trained ones."""
    yield from costs(repeats)
    with TemporaryDirectory() as folder:
        yield from worth(Path(folder), n, steps)


def called(ids: int, rank: int, whole: int) -> str:
    """What a setting is called."""
    some = "all ids" if ids == whole else f"{ids} ids"
    return f"{some}, rank {rank}" if rank else some


def costs(repeats: int) -> Iterator[Figure]:
    """Of a head's product, and of bans, pruning and draws behind it; in turns, so that all see the same machine."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(SLOTS, HIDDEN, generator=g)
    weights = {
        (ids, rank): [torch.randn(*shape, generator=g) for shape in ([(rank, HIDDEN), (ids, rank)] if rank else
                                                                     [(ids, HIDDEN)])]
        for ids, rank in COSTS
    }  # fmt: skip
    clock: dict[tuple[int, int], list[tuple[float, float]]] = {key: [] for key in COSTS}
    for _ in range(repeats + 1):
        for key in COSTS:
            clock[key].append(_timed(x, weights[key]))
    for key, found in clock.items():
        head, rest = (1e3 * statistics.median(times) for times in zip(*found[1:], strict=True))  # the first is slow
        size = 4e-6 * sum(w.numel() for w in weights[key])
        note = f"{rest:.2f} ms behind it, {size:.0f} MB of weights"
        yield Figure(f"{called(*key, VOCAB)}: ms of a head", head, note=note)


@torch.inference_mode()
def _timed(x: Tensor, weights: Sequence[Tensor]) -> tuple[float, float]:
    """Processor's seconds of the products, and of what a draft makes of the logits."""
    start = time.process_time()
    for weight in weights:
        x = linear(x, weight)
    middle = time.process_time()
    Need(x.shape[1]).told(x)
    return middle - start, time.process_time() - middle


def worth(folder: Path, n: int, steps: int) -> Iterator[Figure]:
    """tau of heads of the embedded verifier by ids and rank."""
    verifier = as_verifier("tiny-ar")
    model = load("tiny-ar")
    mask = getattr(model.tokenizer, "mask_token", "")  # foreign
    prompts = {task: held_out(model, task, n) for task in TASKS}
    first: dict[str, list[tuple[int, int]]] = {}
    plain: dict[str, list[list[int]]] = {}
    for ids, rank in WORTH:
        name = called(ids, rank, WORTH[0][0])
        recipe = HeadRecipe(
            str(folder / name), data=str(folder / "answers.jsonl"), tasks=ANSWERS, max_new_tokens=NEW, taps=(1, 4),
            mask=mask, rank=32, vocabulary=ids, head_rank=rank, batch_size=16, anchors=16, save_every=steps,
            schedule=ScheduleSpec(steps, 20, steps // 2),
        )  # fmt: skip
        head = str(heads.run(recipe))
        for task in TASKS:
            counts, texts = list[tuple[int, int]](), list[list[int]]()
            for at in tqdm(range(0, n, BATCH), f"{name}, {task}", unit="batch", leave=False):
                outs = dllm.speculate(
                    verifier, head, prompts[task][at : at + BATCH], max_new_tokens=NEW, length="fixed:k=4", carry="off"
                )
                counts += [(sum(r.emitted for r in out.rounds), out.n_verify) for out in outs]
                texts += [out.sequences for out in outs]
            before, own = first.setdefault(task, counts), plain.setdefault(task, texts)
            tokens, calls = np.array(counts).sum(0)
            note = f"{calls} verify calls, {sum(a != b for a, b in zip(texts, own, strict=True))} texts differ"
            if counts is not before:
                gain, low, high = paired_gain(before, counts)
                note += f", {gain:+.3f} ({low:+.3f} to {high:+.3f}) above all ids"
            yield Figure(f"{task}, {name}: tau", tokens / calls, note=note)
