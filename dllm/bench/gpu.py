"""`dllm bench gpu`: what decoding at LLaDA-8B's shape costs on a GPU, beside the floor that the card sets.

The floor of a forward is the time in which its weights can be read once, at the bandwidth of a copy that is measured in
the same run. Models are random and made on the device: cost does not depend on the weights. Every row says what is
asked of it; a row that cannot be measured here, or not in the minutes that are left, says why.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import dllm
from dllm.bench import step
from dllm.bench.lookahead import Race, race
from dllm.bench.rival import LOOPS, check, rival
from dllm.bench.runtime import PROBLEM, WINDOW, Figure, clock, random_model, seconds, side_by_side
from dllm.bench.shapes import FULL, SMALL, Scale, Shape, experts_read, weights
from dllm.bench.traced import traced
from dllm.call.job import Job, prepare
from dllm.decoding.meter import Meter
from dllm.decoding.runner import Tick
from dllm.errors import DllmError, first_line, unknown
from dllm.eval.records import Decoding
from dllm.models.native import NativeModel
from dllm.models.quantize import quantize
from dllm.tasks import registry as tasks

log = logging.getLogger(__name__)
EAGER: Decoding = {"graphs": False}
NO_CARD = "needs a GPU"
SEQUENTIAL = ("daedal", "eotp")  # they edit the length, and walk over the whole canvas for it
CHILD = "import sys; from dllm.bench.gpu import first_call; first_call(sys.argv[1] == 'small', sys.argv[2] or None)"


class Pace(NamedTuple):
    """What a decode takes."""

    seconds: float  # of the whole call, median
    forwards: int
    tokens: int

    @property
    def forward(self) -> float:
        """Seconds of a forward, the loop included."""
        return self.seconds / self.forwards

    def __str__(self) -> str:
        rate = self.tokens / self.seconds
        return f"{1e3 * self.forward:.2f} ms a forward, {self.forwards} forwards, {rate:.0f} tokens/s"


Found = tuple[float, str]  # the value of a row, and its note


class Part(NamedTuple):
    """Rows that are measured together."""

    name: str
    rows: tuple[Figure, ...]  # what is asked, nothing measured yet
    work: Callable[[], Iterable[Found]]  # as many as there are rows
    seconds: float  # that it takes on an H100, about
    lacks: str = ""  # why it cannot be measured here


def asked(name: str, bound: float | None = None, at_least: bool = False) -> Figure:
    """A row before it is measured."""
    return Figure(name, None, bound, at_least)


class Bench:
    """One run: its device, its models, and what each row does."""

    def __init__(self, scale: Scale, device: torch.device, repeats: int, against: Path | None = None) -> None:
        self.scale, self.device, self.repeats, self.against = scale, device, repeats, against
        self.timer = clock(device)

    # -- what rows share

    def model(self, shape: Shape) -> NativeModel:
        """A random model: bfloat16, which a CPU computes slowly, so there float32."""
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        return random_model(**shape, device=self.device, dtype=dtype)

    @cached_property
    def dense(self) -> NativeModel:
        """The model of most rows."""
        return self.model(self.scale.dense)

    @cached_property
    def tables(self) -> list[Tensor]:
        """The logits that samplers step on."""
        return [t.to(self.device) for t in step.tables(self.scale.vocabulary, 1)]

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy on the device."""
        source = torch.zeros(self.scale.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        times = [seconds(partial(target.copy_, source), self.timer) for _ in range(10)]
        return 2 * source.nbytes / statistics.median(times[3:])

    def floor(self, model: NativeModel, share: float = 1.0) -> float:
        """Seconds in which the weights that a forward needs are read; `share` of the experts."""
        return weights(model, share) / self.bandwidth

    def prompts(self, rows: int) -> list[list[int]]:
        """Random prompts, the first one of full length, the others ragged down to half of it."""
        generator, top = torch.Generator().manual_seed(0), self.scale.prompt
        lengths = [top - i * top // (2 * rows) for i in range(rows)]
        return [torch.randint(self.scale.vocabulary // 2, (n,), generator=generator).tolist() for n in lengths]

    def pace(self, model: NativeModel, rows: int = 1, **changes: Any) -> Pace:
        """A decode of `rows` prompts together, warm; `changes` of the call."""
        call = {**self.scale.call, "batch_size": rows, **changes}
        prompts = self.prompts(rows)
        [out, *_] = dllm.generate(model, prompts, **call)
        again = partial(dllm.generate, model, prompts, **call)
        spent = statistics.median(seconds(again, self.timer) for _ in range(self.repeats))
        return Pace(spent, out.calls, rows * self.scale.new)

    def laps(self, job: Job) -> list[float]:
        """Seconds of each tick of a decode but the first, in which the loop starts; of that one where it is alone."""
        ticks = islice(job.ticks(Meter(1)), self.scale.ticks)
        times = [self.timer(), *(self.timer() for _ in ticks)]
        first, *others = [b - a for a, b in pairwise(times)]
        return others or [first]

    # -- rows

    def read(self) -> Iterator[Found]:
        """The card and its floor."""
        yield self.bandwidth / 1e12, f"{2 * self.scale.copied / 1e9:.2g} GB read and written"
        yield 1e3 * self.floor(self.dense), f"{weights(self.dense) / 1e9:.3g} GB of weights"

    def first(self) -> Iterator[Found]:
        """The first call of a process against a later one."""
        began = self.timer()
        [out] = dllm.generate(self.dense, self.prompts(1), **self.scale.call)
        first, later = self.timer() - began, self.pace(self.dense).seconds
        yield first - later, f"{first:.2f} s, later {later:.2f} s; {out.stats.get('graphs', 'no graphs')}"

    def decode(self, **changes: Any) -> Iterator[Found]:
        """A decode against its floor."""
        found = self.pace(self.dense, **changes)
        yield found.forward / self.floor(self.dense), str(found)

    def steady(self) -> Iterator[Found]:
        """What a step asks of the card, in the middle of a block of one token a step."""
        skipped, steps = self.scale.length // 4, self.scale.length // 2
        job = prepare(self.dense, self.prompts(1)[0], {**self.scale.call, "steps": self.scale.new})
        ticks = job.ticks(Meter(1))
        advance(ticks, skipped)
        plain = seconds(partial(advance, ticks, steps), self.timer) / steps
        advance(ticks, self.scale.length - steps)  # as far into the next block
        counts = traced(partial(advance, ticks, steps), steps)
        yield counts.busy / plain, f"{1e3 * counts.busy:.2f} of {1e3 * plain:.2f} ms a step"
        launched = f"{counts.launches:.1f} launches, {counts.replays:.1f} replays"
        yield counts.launches + counts.replays, f"{launched}; {counts.copies:.1f} copies beside"
        yield counts.waits, f"{steps} steps"

    def batch(self) -> Iterator[Found]:
        """Many rows against one, and rows of a ragged batch against themselves alone."""
        one, many = self.pace(self.dense), self.pace(self.dense, self.scale.rows)
        gain = many.tokens / many.seconds / (one.tokens / one.seconds)
        yield gain, f"{many}; alone {one.tokens / one.seconds:.0f} tokens/s"
        model = self.embedded()
        prompts = [e.prompt for e in tasks.generate("word_problems", "test", self.scale.rows)]
        call: Decoding = {"max_new_tokens": self.scale.answer, "cache": "dual"}
        together = dllm.generate(model, prompts, batch_size=len(prompts), **call)
        alone = [dllm.generate(model, prompt, **call) for prompt in prompts]
        equal = sum(a.sequences == b.sequences for a, b in zip(together, alone, strict=True))
        yield equal / len(prompts), f"{equal} of {len(prompts)} rows"

    def embedded(self) -> NativeModel:
        """The embedded model in float32."""
        return dllm.load("tiny", device=self.device, dtype="float32")

    def rivals(self) -> Iterator[Found]:
        """The loop of the folder on its own network, with our weights, in turns with ours."""
        assert self.against is not None
        scale, [ids] = self.scale, self.prompts(1)
        prompt = torch.tensor([ids], device=self.device)
        mask = self.dense.vocab_size - 1
        with rival(self.against, self.dense) as other:
            for cache in LOOPS:
                theirs = partial(
                    other.decode, cache, prompt, steps=scale.steps, new=scale.new, block=scale.length, mask=mask
                )
                mine = partial(dllm.generate, self.dense, ids, **{**scale.call, "cache": cache})
                slow, fast = side_by_side(theirs, mine, min(self.repeats, 3), timer=self.timer)
                (tokens, nfe), out = theirs(), mine()
                same = sum(a == b for a, b in zip(tokens, out.sequences[len(ids) :], strict=False)) / len(tokens)
                counts = f"{nfe} and {out.nfe} forwards, {same:.0%} of the tokens equal"
                yield slow / fast, f"{slow:.2f} and {fast:.2f} s; {counts}"

    def own_work(self, name: str) -> Iterator[Found]:
        """Steps of a sampler on a model that computes nothing: greedy, and with top-p."""
        model = step.Tables(self.tables)
        if name in step.SHIFTED:
            model.shift, model.block_size = 1, WINDOW
        for law in ({}, {"temperature": 0.7, "top_p": 0.95}):
            call = {"sampler": step.spec(name), "max_new_tokens": WINDOW, "block_length": WINDOW, "early_stop": False}
            prompt, times = list(range(WINDOW)), list[float]()
            for turn in range(self.repeats + 1):
                job = prepare(model, prompt, {**call, **law, "cache": "none"})
                laps = self.laps(job)
                times += laps if turn else []
            steps = f"{len(laps)} steps a decode, {job.counts.replays if job.counts else 0} replays"
            yield 1e3 * statistics.median(times), steps

    def ahead(self) -> Iterator[Found]:
        """Lookahead at the full shape: what a tick costs, and `auto`."""
        found = race(self.dense, self.prompts(1), self.repeats, self.scale.call, (None, 4, "auto"), self.timer)
        tick = {s: found.seconds[s] / found.forwards[s] for s in found.seconds}
        yield tick[4] / tick[None], f"{1e3 * tick[4]:.2f} and {1e3 * tick[None]:.2f} ms"
        yield auto(found)

    def ahead_embedded(self) -> Iterator[Found]:
        """Lookahead on the embedded model, by the wall clock."""
        call: Decoding = {"max_new_tokens": self.scale.answer, "sampler": "confidence", "cache": "dual"}
        found = race(self.embedded(), [PROBLEM], self.repeats, call, (None, 4, "auto"), self.timer)
        forwards = f"{found.forwards[None]} forwards become {found.forwards[4]}"
        yield found.seconds[None] / found.seconds[4], f"{found.seconds[None]:.2f} s; {forwards}"
        yield auto(found)

    def block(self) -> Iterator[Found]:
        """A model that decodes blocks of its own."""
        model = self.model(self.scale.block)
        found = self.pace(model, cache=None)
        yield found.forward / self.floor(model), f"{found}; floor {1e3 * self.floor(model):.2f} ms"

    def mixture(self) -> Iterator[Found]:
        """A mixture of experts; its floor counts the experts that its forwards choose."""
        model = self.model(self.scale.mixture)
        decode = partial(dllm.generate, model, self.prompts(1), **{**self.scale.call, "cache": None}, **EAGER)
        share = experts_read(model, decode)
        found, floor = self.pace(model, cache=None), self.floor(model, share)
        yield found.forward / floor, f"{found}; floor {1e3 * floor:.2f} ms, {share:.0%} of the experts"

    def quantized(self) -> Iterator[Found]:
        """Weight-only 8-bit against the same shape as it is."""
        model = self.model(self.scale.dense)
        quantize(model.transformer, "int8")
        plain, eight = self.pace(self.dense), self.pace(model)
        yield eight.forward / plain.forward, f"{1e3 * eight.forward:.2f} and {1e3 * plain.forward:.2f} ms"

    def compiled(self) -> Iterator[Found]:
        """compile=True in processes of their own: nothing cached, everything cached."""
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(2):
                first, forward = self.child(folder)
                yield first, f"then {1e3 * forward:.2f} ms a forward"
        yield forward / self.floor(self.dense), f"{1e3 * forward:.2f} ms a forward"

    def compiled_quantized(self) -> Iterator[Found]:
        """Weight-only 8-bit with compiled layers, where the conversion of the weights is part of the products."""
        with tempfile.TemporaryDirectory() as folder:
            first, forward = self.child(folder, "int8")
        plain = self.pace(self.dense)
        note = f"{1e3 * forward:.2f} and {1e3 * plain.forward:.2f} ms; first call {first:.1f} s"
        yield forward / plain.forward, note

    def child(self, folder: str, quantization: str = "") -> tuple[float, float]:
        """Seconds of the first call and of a later forward in a process that keeps what it compiles in `folder`."""
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder, "triton"))}
        command = [sys.executable, "-c", CHILD, "full" if self.scale.bars else "small", quantization]
        environ = {**os.environ, **caches, **self.scale.environ}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ)
        if done.returncode:
            raise DllmError(f"the process that compiles failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        first, forward = json.loads(done.stdout.splitlines()[-1])
        return float(first), float(forward)

    # -- all of them

    def parts(self) -> list[Part]:
        """Every row, in an order that measures the most telling ones first."""
        card = "" if self.device.type == "cuda" else NO_CARD
        ao = "" if importlib.util.find_spec("torchao") else "needs torchao: pip install 'dllm-toolkit[quantization]'"
        length, rows = self.scale.length, self.scale.rows
        decode, each = f"decode, dual, block {length}, batch 1", "time per forward / floor"
        lookahead, eight = "lookahead=4, batch 1", "weight-only 8-bit, time per forward / bf16's"
        return [
            Part("read", (asked("device copy, TB/s"), asked("floor of a forward, ms")), self.read, 8),
            Part("first", (asked("first call of a process, seconds beyond a later one", 3.0),), self.first, 6, card),
            Part("decode", (asked(f"{decode}: {each}", 1.6),), self.decode, 6),
            Part("eager", (asked(f"{decode}, graphs off: {each}"),), partial(self.decode, **EAGER), 12, card),
            Part("steady", (
                asked("share of a step in which the GPU works", 0.9, True),
                asked("launches and graph replays a step", 12), asked("waits for the device a step", 1),
            ), self.steady, 8, card),
            Part("batch", (
                asked(f"tokens/s at {rows} ragged rows / at 1", 6, True),
                asked("rows equal to themselves alone, float32", 1, True),
            ), self.batch, 15),
            Part("against", tuple(
                asked(f"Fast-dLLM's loop / ours, {cache}", 4 if cache == "dual" else None, True) for cache in LOOPS
            ), self.rivals, 60, "" if self.against else "needs --against FOLDER"),
            Part("lookahead", (
                asked(f"{lookahead}: time per tick / plain tick", 1.5), asked("lookahead=auto / plain, seconds", 1.05),
            ), self.ahead, 15),
            Part("lookahead", (
                asked("embedded model: plain / lookahead=4, seconds", 1.5, True),
                asked("embedded model: lookahead=auto / plain, seconds", 1.05),
            ), self.ahead_embedded, 10),
            Part("block", (asked(f"SDAR-8B's shape: {each}", 2),), self.block, 10),
            Part("mixture", (asked(f"LLaDA2-mini's shape: {each}", 2),), self.mixture, 15),
            Part("int8", (asked(eight, 0.75),), self.quantized, 15, ao),
            Part("compile", (
                asked("compile=True, first call, nothing cached, s", 60),
                asked("compile=True, first call of a later process, s", 10),
                asked(f"{decode}, compile=True: {each}", 1.6),
            ), self.compiled, 80),
            *map(self.sampler, step.runnable()),
            Part("int8", (asked(f"{eight}, compile=True", 0.75),), self.compiled_quantized, 60, ao or card),
        ]  # fmt: skip

    def sampler(self, name: str) -> Part:
        """The rows of a sampler."""
        row = f"own work of a step, ms: {name}"
        greedy, nucleus = (2.0, 2.0) if name in SEQUENTIAL else (0.6, 1.2)
        return Part("own-work", (asked(row, greedy), asked(f"{row}, top-p", nucleus)), partial(self.own_work, name), 1)


def run(
    only: Sequence[str] | None = None,
    repeats: int = 5,
    *,
    small: bool = False,
    against: Path | None = None,
    minutes: float = 5.0,
    device: torch.device | None = None,
) -> Iterator[Figure]:
    """Every row, as it is measured.

    only: names of parts. small: tiny shapes that a CPU decodes in seconds; nothing is asked of their figures. against:
    the folder of another code's loop. minutes: parts that do not fit in are left out, and say so. Errors: no GPU for
    the full shapes, unknown parts, a folder without the files that are needed.
    """
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if place.type != "cuda" and not small:
        raise DllmError("bench gpu: torch sees no CUDA device; --small runs tiny shapes on a CPU")
    if against is not None:
        check(against)
    bench = Bench(SMALL if small else FULL, place, repeats, against)
    parts = bench.parts()
    known = {part.name for part in parts}
    for name in only or ():
        if name not in known:
            raise unknown("part of bench gpu", name, known)
    return within(bench, [part for part in parts if not only or part.name in only], minutes)


def within(bench: Bench, parts: Sequence[Part], minutes: float) -> Iterator[Figure]:
    """The rows of these parts, those of them skipped that would end too late."""
    end = time.monotonic() + 60 * minutes
    with tqdm(parts, leave=False) as bar:
        for part in bar:
            bar.set_description(part.name)
            left, needs = end - time.monotonic(), part.seconds if bench.scale.bars else 0
            late = f"takes about {needs:g} s, and {max(left, 0):.0f} s of {minutes:g} minutes are left"
            for row in measured(part if left >= needs else part._replace(lacks=part.lacks or late)):
                yield row if bench.scale.bars else replace(row, bound=None)
            if bench.device.type == "cuda":  # the next part has the memory of the last one's model
                gc.collect()
                torch.cuda.empty_cache()


def measured(part: Part) -> Iterator[Figure]:
    """The rows of a part with what was found. An error is a row as well: those of the other parts are still wanted."""
    done, why, failed = 0, f"skipped: {part.lacks}", False
    if not part.lacks:
        try:
            for row, (value, note) in zip(part.rows, part.work(), strict=True):
                yield replace(row, value=value, note=note)
                done += 1
        except Exception as error:
            log.debug("%s", part.name, exc_info=True)
            why, failed = f"{type(error).__name__}: {first_line(error)}", True
    yield from (replace(row, note=why, failed=failed) for row in part.rows[done:])


def advance(ticks: Iterator[Tick], count: int) -> None:
    """Run some ticks of a decode."""
    deque(islice(ticks, count), 0)


def auto(found: Race) -> Found:
    """The row of `auto`."""
    return found.seconds["auto"] / found.seconds[None], f"{found.seconds['auto']:.2f} and {found.seconds[None]:.2f} s"


def first_call(small: bool, quantization: str | None) -> None:
    """Print the seconds of a process's first call with compile=True, and of a later forward. For `Bench.child`."""
    bench = Bench(SMALL if small else FULL, torch.device("cuda" if torch.cuda.is_available() else "cpu"), 3)
    if quantization is not None:
        quantize(bench.dense.transformer, quantization)
    call = partial(dllm.generate, bench.dense, bench.prompts(1), **bench.scale.call, compile=True)
    first = seconds(call, bench.timer)
    print(json.dumps([first, bench.pace(bench.dense, compile=True).forward]))
