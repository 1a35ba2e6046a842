"""Benches of the cache policies. `python -m dllm.bench.cache`, or `dllm bench cache` for the ratio alone.

`cache` measures whether a token of a long generation costs more than one of a short generation under `block`.
`policies` decodes the same prompts under every policy of a bidirectional model: logit error, forwards, positions,
seconds, accuracy; `--task word_problems --count 50` prints its table for the embedded model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

import dllm
from dllm.bench.runtime import Figure, as_json, random_model
from dllm.call.cache_error import cache_error
from dllm.eval.report import table
from dllm.models.model import Model
from dllm.tasks import registry as tasks

CACHES = (
    "none",
    "prefix",
    "dual",
    "dual:left=16,right=16",
    "interval",
    "interval:every=8",
    "delayed",
    "delayed:every=4",
    "dllm_cache",
    "dllm_cache:prompt_every=25,response_every=4",
)


def seconds_per_token(model: Model, new: int, batch: int, **arguments: Any) -> float:
    """Of one decode of `batch` equal-length rows after a prompt of 64 tokens; on a CPU, of processor time."""
    prompts = [[(7 * i + row) % 8000 for i in range(64)] for row in range(batch)]
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    _wait(model)
    began = clock()
    dllm.generate(model, prompts, max_new_tokens=new, early_stop=False, batch_size=batch, **arguments)
    _wait(model)
    return (clock() - began) / (new * batch)


def _wait(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def cache(
    repeats: int = 3, hidden: int = 512, layers: int = 4, device: str = "cpu", dtype: str = "float32", batch: int = 1
) -> list[Figure]:
    """Cost per token at 1024 new tokens against 128 under `block`: blocks of 32, 4 forwards each."""
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    model = random_model(hidden, layers, 8192, 4096, 32).to(device, kind)
    sampler = "sdar:low_confidence_static,steps=4"
    times: dict[int, list[float]] = {128: [], 1024: []}
    seconds_per_token(model, 128, batch, sampler=sampler)
    for _ in range(repeats):
        for new, kept in times.items():
            kept.append(seconds_per_token(model, new, batch, sampler=sampler))
    short, long = (statistics.median(t) for t in times.values())
    note = f"{short * 1e3:.2f} and {long * 1e3:.2f} ms a token; width {hidden}, {layers} layers, {batch} row(s)"
    return [Figure("block: cost per token, 1024 / 128 new tokens", long / short, 1.3, note=note)]


@dataclass(frozen=True)
class Policy:
    """One cache on one model, over all prompts."""

    cache: str
    max_error: float  # largest logit difference to a full forward on the same canvas, over all steps
    mean_error: float
    flips: float  # share of candidates whose most probable token differs
    nfe: float  # a prompt
    nfe_equiv: float  # in full forwards: recomputed positions / canvas length
    seconds: float  # a prompt alone; on a CPU, of processor time
    same: float  # share of answers equal to those of `none`
    accuracy: float | None


def policies(
    model: Model,
    prompts: list[str] | list[list[int]],
    caches: Sequence[str] = CACHES,
    correct: Callable[[int, str], bool] | None = None,
    probes: int = 4,
    **arguments: Any,
) -> list[Policy]:
    """Decode `prompts` under every cache; error and seconds are taken on the first `probes` of them, one at a time."""
    rows: list[Policy] = []
    plain: list[list[int]] = []
    some = prompts[:probes]
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    for name in tqdm(caches, desc="caches"):
        outs = dllm.generate(model, prompts, cache=name, **arguments)
        plain = plain or [o.tokens for o in outs]
        _wait(model)
        began = clock()
        for prompt in some:
            dllm.generate(model, prompt, cache=name, **arguments)
        _wait(model)
        spent = (clock() - began) / len(some)
        errors = [e for row in cache_error(model, some, cache=name, **arguments) for e in row]
        hits = None if correct is None else sum(correct(i, o.text) for i, o in enumerate(outs)) / len(outs)
        rows.append(
            Policy(
                name,
                max((e.max for e in errors), default=0.0),
                statistics.fmean(e.mean for e in errors) if errors else 0.0,
                sum(e.flips for e in errors) / max(sum(e.candidates for e in errors), 1),
                statistics.fmean(o.nfe for o in outs),
                statistics.fmean(o.nfe_equiv for o in outs),
                spent,
                sum(a == o.tokens for a, o in zip(plain, outs, strict=True)) / len(outs),
                hits,
            )
        )
    return rows


def report(rows: Sequence[Policy]) -> str:
    """The rows in Markdown."""
    head = ["cache", "logit error, max", "mean", "flips", "NFE", "in full forwards", "s / answer", "same answer"]
    lines = []
    for r in rows:
        error = (f"{r.max_error:.2g}", f"{r.mean_error:.2g}", f"{100 * r.flips:.2f} %")
        work = (f"{r.nfe:.1f}", f"{r.nfe_equiv:.1f}", f"{r.seconds:.3f}", f"{100 * r.same:.0f} %")
        lines.append([f"`{r.cache}`", *error, *work, "" if r.accuracy is None else f"{100 * r.accuracy:.1f} %"])
    return table([*head, "accuracy"], lines)


def on_task(name: str, task_name: str, count: int, new: int, sampler: str) -> str:
    """The table of every policy on test problems of one task of the embedded model."""
    task, model = tasks.task(task_name), dllm.load(name)
    examples = task.generate("test", count)
    rows = policies(
        model,
        [e.prompt for e in examples],
        correct=lambda i, text: task.grade(examples[i], text),
        probes=2,
        sampler=sampler,
        block_length=32,
        max_new_tokens=new,
    )
    return report(rows)


def main() -> None:
    """The command line of this bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--task", help="print the table of the policies on this task of the embedded model instead")
    parser.add_argument("--count", type=int, default=50, help="problems of the task")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--sampler", default="confidence", help="one token a forward shows most of a cache's errors")
    parser.add_argument("--new", type=int, default=96, help="new tokens a problem")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.task:
        print(on_task(options.model, options.task, options.count, options.new, options.sampler))
        return
    sizes = (options.repeats, options.hidden, options.layers, options.device, options.dtype, options.batch)
    print(as_json(cache(*sizes)))


if __name__ == "__main__":
    main()
