"""Benches of the cache policies: `dllm bench cache`, and `python -m dllm.bench.cache` for a table.

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
from functools import partial
from typing import Unpack

import torch
from tqdm import tqdm

import dllm
from dllm.bench.runtime import Figure, random_model, side_by_side
from dllm.call.arguments import DecodingArguments
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


def cache(repeats: int = 3) -> list[Figure]:
    """Cost per token at 1024 new tokens against 128 under `block`: blocks of 32, 4 forwards each; processor time."""
    model, prompt = random_model(512, 4, 8192, 4096, 32), [7 * i for i in range(64)]

    def decode(new: int) -> None:
        sampler = "sdar:low_confidence_static,steps=4"
        dllm.generate(model, prompt, max_new_tokens=new, early_stop=False, sampler=sampler)

    times = side_by_side(partial(decode, 128), partial(decode, 1024), repeats, timer=time.process_time)
    short, long = (1e3 * seconds / new for seconds, new in zip(times, (128, 1024), strict=True))
    note = f"{short:.2f} and {long:.2f} ms a token; width 512, 4 layers"
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
    correct: Callable[[int, str], bool] | None = None,
    probes: int = 4,
    **arguments: Unpack[DecodingArguments],
) -> list[Policy]:
    """Decode `prompts` under every cache; error and seconds are taken on the first `probes` of them, one at a time."""
    rows: list[Policy] = []
    plain: list[list[int]] = []
    some = prompts[:probes]
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    for name in tqdm(CACHES, desc="caches"):
        call: DecodingArguments = {**arguments, "cache": name}
        outs = dllm.generate(model, prompts, **call)
        plain = plain or [o.tokens for o in outs]
        began = clock()
        for prompt in some:
            dllm.generate(model, prompt, **call)  # its answer is on the host when it returns
        spent = (clock() - began) / len(some)
        errors = [e for row in cache_error(model, some, **call) for e in row]
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
    call: DecodingArguments = {"sampler": sampler, "block_length": 32, "max_new_tokens": new}
    prompts = [e.prompt for e in examples]
    return report(policies(model, prompts, lambda i, text: task.grade(examples[i], text), probes=2, **call))


def main() -> None:
    """The command line of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="word_problems", help="whose test problems are decoded")
    parser.add_argument("--count", type=int, default=50, help="problems of the task")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--sampler", default="confidence", help="one token a forward shows most of a cache's errors")
    parser.add_argument("--new", type=int, default=96, help="new tokens a problem")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(on_task(options.model, options.task, options.count, options.new, options.sampler))


if __name__ == "__main__":
    main()
