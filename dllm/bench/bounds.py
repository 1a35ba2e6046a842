"""What bounds of a drafter's work cost and bring: `dllm trim` measures a head by the ids that are kept, `dllm bench
drafting-context` a draft by the length of the prompt, and acceptance where the prompt matters."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from dllm.bench.drafting import Course, Options
from dllm.bench.runtime import Figure
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Drafter, Need
from dllm.drafting.front import calibrate, encode
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.drafting.trim import Size, coverage, ranked, sizes
from dllm.drafting.verifier import Verifier
from dllm.errors import DllmError
from dllm.models.hub import load
from dllm.models.native import NativeModel
from dllm.tasks.registry import generate
from dllm.training.data import Pair

FEWEST = 512  # ids of the smallest head that is tried; each next one has twice as many
HELD = 5  # every fifth answer is counted for coverage, the others for the ranking
LENGTHS = (50, 500, 1000, 4000)
CONTEXTS: dict[str, Options] = {
    "whole text": {},
    "whole text, approx": {"prefix_cache": "approx"},
    "window 256": {"window": 256},
    "window 256, approx": {"window": 256, "prefix_cache": "approx"},
    "window 192, recall 64": {"window": "192:recall=64"},
    "auto": {"window": "auto"},
}
READS: dict[str, Options] = {
    "whole text": {},
    "window 64": {"window": 64},
    "window 32": {"window": 32},
    "window 32, 16 sinks": {"window": "32:sinks=16"},
    "window 32, recall 32": {"window": "32:recall=32,chunk=16"},
    "auto": {"window": "auto"},
}


def trims(
    verifier: Verifier, drafter: DiffusionDrafter, answers: Sequence[Pair], k: int, acceptance: float, repeats: int = 7
) -> tuple[list[int], list[Size]]:
    """All ids, the most frequent in the answers first, and what drafts of k slots take and bring by how many are kept:
    from 512 in doublings to the whole. Coverage is of every fifth answer, which the ranking is not made of."""
    always = sorted({*verifier.eos, *drafter.model.eos_ids})
    ends = [i for i in always if i < verifier.vocab]
    texts = [pair.answer for pair in answers]
    held = texts[HELD - 1 :: HELD]
    if not held:
        raise DllmError(f"{len(texts)} answers are too few: coverage is measured on every fifth")
    rest = [text for i, text in enumerate(texts) if i % HELD != HELD - 1]
    shares = coverage(ranked(rest, verifier.vocab, ends), held)
    ranking = ranked(texts, verifier.vocab, ends)
    doublings = (FEWEST << i for i in range(20))
    tried: list[int] = [*(n for n in doublings if n < verifier.vocab), verifier.vocab]
    prompt = [*answers[0].prompt, *answers[0].answer][-128:]
    needs = {n: Need(verifier.vocab, verifier.eos, trim=tuple(ranking[:n])) for n in tried[:-1]}
    seconds = draft_seconds(drafter, prompt, k, {**needs, tried[-1]: Need(verifier.vocab, verifier.eos)}, repeats)
    costs = calibrate(verifier, None, prompt, (0, k), repeats, timer_of(drafter)).verify
    return ranking, sizes(shares, seconds, k, acceptance, float(costs.table(1 + k)[-1]), float(costs.table(1)[-1]))


def draft_seconds(
    drafter: DiffusionDrafter, ids: Sequence[int], k: int, needs: Mapping[int, Need], repeats: int
) -> dict[int, float]:
    """Median seconds of a draft of k slots behind a text, by the key of its need; in turns, so that all see the same
    machine."""
    forks = {}
    for key, need in needs.items():
        forks[key] = drafter.fork()
        forks[key].reset(ids, need)
    clock: dict[int, list[float]] = {key: [] for key in forks}
    timer = timer_of(drafter)
    for turn in range(repeats + 1):
        for key, fork in forks.items():
            start = timer()
            fork.draft(ids, k)
            if turn:  # the first of each is slow
                clock[key].append(timer() - start)
    return {key: statistics.median(found) for key, found in clock.items()}


def timer_of(drafter: DiffusionDrafter) -> Callable[[], float]:
    """On a CPU the processor's seconds, whatever else the machine does."""
    return time.process_time if drafter.model.device.type == "cpu" else time.perf_counter


def run_context(repeats: int = 5, *, n: int = 40) -> Iterator[Figure]:
    """A draft behind 50 to 4 000 tokens, of a dLLM of the shape of SmolLM2's first eight layers; and tau of the
    embedded pair on prompts whose facts stand far before the question, or were asked and answered before."""
    yield from _lengths(repeats)
    yield from _acceptance(n)


def _lengths(repeats: int) -> Iterator[Figure]:
    model = like_smollm2()
    generator = torch.Generator().manual_seed(1)
    vocab, size = model.vocab_size, max(LENGTHS) + 4 * (2 + 2 * repeats)
    text = torch.randint(vocab // 500 + 2, vocab, (size,), generator=generator).tolist()
    for name, how in CONTEXTS.items():
        found = {
            length: _rounds(DiffusionDrafter(model, vocabulary="ids", **how), text, length, repeats)
            for length in LENGTHS
        }
        ratio = found[max(LENGTHS)] / found[min(LENGTHS)]
        note = ", ".join(f"{length}: {1e3 * s:.1f} ms" for length, s in found.items())
        yield Figure(
            f"{name}: a draft at {max(LENGTHS)} tokens to one at {min(LENGTHS)}",
            ratio,
            1.5 if how.get("window") else None,
            note=note,
        )


def like_smollm2(layers: int = 8) -> NativeModel:
    """A dLLM of the shape of SmolLM2-135M's first layers, with random weights."""
    torch.manual_seed(0)
    shape = replace(load("tiny").config, vocab_size=49_152, embedding_rows=49_152, max_positions=8192, tied=True)
    shape = replace(shape, hidden_size=576, intermediate_size=1536, n_heads=9, n_kv_heads=3, head_dim=64)
    return NativeModel(replace(shape, n_layers=layers))


def _rounds(drafter: DiffusionDrafter, text: Sequence[int], length: int, repeats: int) -> float:
    """Mean seconds of the drafts of rounds that accept four tokens each, the first of which reads the prompt and does
    not count."""
    ids, timer = list(text[:length]), timer_of(drafter)
    drafter.reset(ids, Need(drafter.model.vocab_size))
    clock = []
    for _ in range(1 + 2 * repeats):
        start = timer()
        drafter.draft(ids, 8)
        clock.append(timer() - start)
        ids += text[len(ids) : len(ids) + 4]
        drafter.observe(ids, ids[-4:], ())
    return statistics.mean(clock[1:])


def _acceptance(n: int) -> Iterator[Figure]:
    verifier, drafter = as_verifier("tiny-ar"), as_drafter("tiny")
    for kind, lines in {"facts first": far(n), "asked again": again(n)}.items():
        prompts, _ = encode(verifier, lines)
        fixed: Options = {"length": "fixed:k=12", "carry": "off"}
        settings = {name: {**fixed, **options} for name, options in READS.items()}
        for name, found in Course(verifier, drafter, prompts, settings, 40).tallies():
            yield Figure(f"{kind}, {name}: tau", found.tau, note=found.note)


def _problems(n: int) -> list[tuple[str, str, str]]:
    """Facts, question and answer of held-out word problems that end with a question."""
    found = [(e.prompt.rpartition(". "), e.answer) for e in generate("word_problems", "test", 12 * n, 1)]
    return [(facts + ".", asked, answer) for (facts, dot, asked), answer in found if dot and asked.endswith("?")]


def far(n: int) -> list[str]:
    """Problems whose question stands behind three times as many facts of others."""
    problems, rng = _problems(n), random.Random(0)
    others = [facts for facts, _, _ in problems[n:]]
    return [" ".join([facts, *rng.sample(others, 6), asked]) for facts, asked, _ in problems[:n]]


def again(n: int) -> list[str]:
    """Problems that were answered before, with three others between."""
    problems, rng = _problems(n), random.Random(0)
    out = []
    for facts, asked, answer in problems[:n]:
        between = [f"{f} {q} {a}" for f, q, a in rng.sample(problems[n:], 3)]
        out.append("\n".join([f"{facts} {asked} {answer}", *between, f"{facts} {asked}"]))
    return out


def only_dllm(drafter: Drafter | None) -> DiffusionDrafter:
    """Errors: DllmError for a drafter that is no dLLM."""
    if not isinstance(drafter, DiffusionDrafter) or not isinstance(drafter.model, NativeModel):
        raise DllmError("a head is trimmed of a dLLM that drafts: tiny, or the folder of an aligned one")
    return drafter
