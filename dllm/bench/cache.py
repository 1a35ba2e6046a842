"""Benches of the cache policies: `dllm bench cache`, and `python -m dllm.bench.cache` for a table.

`cache` measures whether a token of a long generation costs more than one of a short generation under `block`.
`policies` decodes the same prompts under every policy of a bidirectional model: logit error, forwards, positions,
seconds, accuracy; `--task word_problems --count 50` prints its table for the embedded model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Unpack

import torch
from tqdm import tqdm

import dllm
from dllm.bench.runtime import Figure, random_model, side_by_side
from dllm.call.arguments import DecodingArguments
from dllm.call.cache_error import cache_error
from dllm.call.output import Output
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


def policies(model: Model, task_name: str, count: int, probes: int = 2, **arguments: Unpack[DecodingArguments]) -> str:
    """Every cache on `count` test problems of a task, in Markdown.

    Error and seconds are taken on the first `probes` of them, one at a time; seconds on a CPU are of processor time.
    `in full forwards` are recomputed positions / canvas length, `same answer` is the share equal to those of `none`.
    """
    task, lines, plain = tasks.task(task_name), [], list[Output]()
    examples = task.generate("test", count)
    prompts = [e.prompt for e in examples]
    some = prompts[:probes]
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    for name in tqdm(CACHES, desc="caches"):
        call: DecodingArguments = {**arguments, "cache": name}
        outs = dllm.generate(model, prompts, **call)
        plain = plain or outs
        began = clock()
        for prompt in some:
            dllm.generate(model, prompt, **call)  # its answer is on the host when it returns
        spent = (clock() - began) / len(some)
        nfe, full = statistics.fmean(o.nfe for o in outs), statistics.fmean(o.nfe_equiv for o in outs)
        same = statistics.fmean(a.tokens == o.tokens for a, o in zip(plain, outs, strict=True))
        right = statistics.fmean(task.grade(e, o.text) for e, o in zip(examples, outs, strict=True))
        work = (f"{nfe:.1f}", f"{full:.1f}", f"{spent:.3f}", f"{100 * same:.0f} %", f"{100 * right:.1f} %")
        lines.append([f"`{name}`", *errors(model, some, call), *work])
    head = ["cache", "logit error, max", "mean", "flips", "NFE", "in full forwards", "s / answer", "same answer"]
    return table([*head, "accuracy"], lines)


def errors(model: Model, prompts: list[str], call: DecodingArguments) -> tuple[str, str, str]:
    """How far a cache's logits are from those of full forwards on the same canvases, over all steps.

    The largest and the mean difference, and the share of candidates whose most probable token differs.
    """
    steps = [step for row in cache_error(model, prompts, **call) for step in row]
    if not steps:  # there is no cache
        return "0", "0", "0.00 %"
    largest, mean = max(step.max for step in steps), statistics.fmean(step.mean for step in steps)
    flips = sum(step.flips for step in steps) / max(sum(step.candidates for step in steps), 1)
    return f"{largest:.2g}", f"{mean:.2g}", f"{100 * flips:.2f} %"


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
    call: DecodingArguments = {"sampler": options.sampler, "block_length": 32, "max_new_tokens": options.new}
    print(policies(dllm.load(options.model), options.task, options.count, **call))


if __name__ == "__main__":
    main()
