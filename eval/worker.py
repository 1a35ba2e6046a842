"""A worker: holds a model, decodes batches, grades them. Every engine is a way to call `Worker.run` for many batches.

A batch is a fixed run of documents. A sample's outcome is a function of the batch alone (its seed is the run's plus the
document's index), so it does not matter which worker runs it, when, or whether an earlier run was cut short.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

import dllm
from dllm.call.output import Output
from dllm.call.prompts import One, Several
from dllm.drafting.autoregressive import ARDrafter
from dllm.drafting.diffusion import DiffusionDrafter
from dllm.drafting.drafters import Drafter
from dllm.drafting.front import encode
from dllm.drafting.hidden.drafter import HiddenDrafter
from dllm.drafting.registry import as_drafter, as_verifier, is_drafter_name
from dllm.drafting.request import SpecResult
from dllm.drafting.verifier import Verifier, embedding
from dllm.errors import DllmError
from dllm.eval.arguments import layered
from dllm.eval.config import Config, ModelSpec, ReadSpec, Setting, SpeculateSpec, TaskSpec
from dllm.eval.peers import Peer, assistant, by_generate
from dllm.eval.records import Clock, Decoding, Environment, Prompt, Sample, Turn
from dllm.eval.store import sample_key
from dllm.eval.tasks import Document, Task, Unavailable, confined
from dllm.eval.tasks import load as load_task
from dllm.models.model import Model
from dllm.models.native import NativeModel, fingerprint

log = logging.getLogger(__name__)
P = TypeVar("P")

# What the verifier's own decoding takes; blocks, caches and samplers are the drafter's business.
TIE = 1e-3  # of logits: the order of additions moves them by less, and in half precision by an ulp
VERIFIER_ARGUMENTS = ("max_new_tokens", "temperature", "top_k", "top_p", "eos", "stop", "chat", "graphs")


PACKAGES = ("dllm-toolkit", "torch", "transformers", "numpy", "scipy", "lm-eval", "math-verify", "ray", "accelerate")


@dataclass(frozen=True)
class Batch:
    """Documents that are decoded together: of which task, from which to which, under each of which settings. One worker
    decodes them under all of them, one after the other, so that a machine's moods meet all alike."""

    settings: tuple[int, ...]
    task: int
    start: int
    stop: int


def arguments(setting: Setting, spec: TaskSpec, defaults: Decoding) -> Decoding:
    """The decoding arguments of a cell, sampler and cache with them: those of the task's entry, then the setting's,
    then the task's own defaults."""
    methods = {"sampler": setting.sampler, "cache": setting.cache}
    entry = {**spec.generate.given(), "sampler": spec.sampler}
    return layered(entry, {**setting.generate.given(), **methods}, defaults)


class Drafted:
    """A drafting result with the names of an output. Its forwards are the verifier's; the drafter's are counted
    apart."""

    def __init__(self, result: SpecResult):
        self.text, self.finish_reason, self.seconds = result.text or "", result.finish_reason, result.seconds
        self.nfe, self.draft_forwards, self.tokens = result.n_verify, result.draft_forwards, result.tokens
        self.decoded, self.ids = len(result.emitted), result.emitted
        self.accepted = [r.accepted for r in result.rounds]
        self.emitted = [emitted for _, emitted in result.spans]
        self.own = sum(r.t_search + r.t_commit + r.t_other for r in result.rounds)
        self.slots = _slots([r.judged for r in result.rounds])

    @property
    def turn(self) -> Turn:
        """What is kept of it as one of several answers."""
        done: Turn = {"text": self.text, "ids": self.ids, "nfe": self.nfe}
        return {**done, "seconds": self.seconds, "emitted": self.emitted}


def _slots(rounds: Sequence[dict[int, bool]]) -> list[list[int]]:
    """How often each slot of a draft was judged, and how often accepted."""
    out = [[0, 0] for _ in range(1 + max((slot for judged in rounds for slot in judged), default=-1))]
    for judged in rounds:
        for slot, accepted in judged.items():
            out[slot][0] += 1
            out[slot][1] += accepted
    return out


@dataclass(frozen=True)
class Labelled:
    """A label that was read, with the names of an output."""

    text: str
    labels: dict[str, float]  # p of each
    nfe: int
    seconds: float


@dataclass(frozen=True)
class Talk:
    """The answers of a conversation; the last one is graded."""

    answers: tuple[Output | Drafted, ...]

    @property
    def text(self) -> str:
        """The last answer's."""
        return self.answers[-1].text

    @property
    def turns(self) -> list[Turn]:
        """Every answer; none is kept of what `Sample.text` says alone."""
        if len(self.answers) == 1 and isinstance(self.answers[0], Output):
            return []
        return [a.turn if isinstance(a, Drafted) else {"text": a.text, "nfe": int(a.nfe)} for a in self.answers]


Decoded = Output | Drafted | Labelled | Talk


def available(config: Config) -> tuple[Config, tuple[Task, ...], dict[str, str]]:
    """The configuration and its loaded tasks without those that cannot run here, and the reason of each of these."""
    try:
        confined.choose(config.confinement, config.allow_unconfined_code)
    except DllmError as error:
        raise config.source.error(("confinement",), str(error)) from None
    tasks, skipped = [], {}
    for i, spec in enumerate(config.tasks):
        try:
            tasks.append((spec, load_task(spec, config.limit)))
        except Unavailable as error:
            skipped[spec.title] = str(error)
        except DllmError as error:
            raise config.source.error(("tasks", i), str(error)) from None
    return replace(config, tasks=tuple(s for s, _ in tasks)), tuple(t for _, t in tasks), skipped


class Worker:
    """One process's share of an evaluation: at most one model at a time."""

    def __init__(self, config: Config, folder: str | None = None, tasks: tuple[Task, ...] | None = None):
        self.config = config
        self.folder = Path(folder) if folder else None
        if tasks is None:
            _, tasks, skipped = available(config)
            for label, reason in skipped.items():
                raise Unavailable(f"{label}: {reason}")
        self.tasks = tasks
        self._spec: ModelSpec | None = None
        self._model: Model | None = None
        self._verifiers: dict[str, Verifier] = {}
        self._drafters: dict[str, Drafter | None] = {}
        self._assistants: dict[str, nn.Module | None] = {}
        self._marks: dict[str, str] = {}
        self._warm: set[int] = set()

    def model(self, spec: ModelSpec) -> Model:
        """The loaded model; the one before it is let go first."""
        if self._model is None or self._spec != spec:
            self._model, self._spec = None, None
            self._model = dllm.load(spec)
            self._spec, self._marks[spec.title] = spec, self._model.identity()
        return self._model

    def verifier(self, spec: ModelSpec) -> Verifier:
        """The loaded verifier; the one before it is let go first."""
        if spec.title not in self._verifiers:
            self._verifiers.clear()
            self._verifiers[spec.title] = as_verifier(spec)
            self._marks[spec.title] = fingerprint(cast(nn.Module, self._verifiers[spec.title].model))
        return self._verifiers[spec.title]

    def weights(self, index: int) -> dict[str, str]:
        """`weights_of` one of the configuration's settings."""
        return self.weights_of(self.config.settings[index])

    def weights_of(self, setting: Setting) -> dict[str, str]:
        """A mark of the weights of every network of a setting: two checkpoints under one name do not share it."""
        names = []
        if setting.decodes:
            names.append(setting.model.title)
            if names[0] not in self._marks:
                self.model(setting.model)
        if setting.speculate:
            names.append(setting.speculate.verifier.title)
            if names[-1] not in self._marks:
                self.verifier(setting.speculate.verifier)
            network = self._network(setting.speculate)  # one that cannot be loaded is found out now
            name = f"drafter {setting.speculate.drafter.title}"
            if name not in self._marks and network is not None:
                self._marks[name] = fingerprint(*network)
            names += [name] if name in self._marks else []
        return {name: self._marks[name] for name in names}

    def keys(self, batch: Batch) -> list[list[str]]:
        """The identities of a batch's samples, setting by setting."""
        return [self._keys(batch, setting) for setting in batch.settings]

    def _keys(self, batch: Batch, index: int) -> list[str]:
        setting, spec, task = self.config.settings[index], self.config.tasks[batch.task], self.tasks[batch.task]
        decoding = arguments(setting, spec, task.generate.given())
        weights = "+".join(self.weights(index).values())
        out = []
        for i in range(batch.start, batch.stop):
            doc = task.documents[i]
            question = (spec.title, task.version, doc.id, doc.prompt, *doc.turns, doc.target)
            out.append(sample_key(question, setting, decoding, self.config.seed + i, weights))
        return out

    def run(self, batch: Batch) -> Iterator[list[Sample]]:
        """Decode and grade one batch, setting by setting: the samples of each; a prompt that a model fails on gives a
        sample with the error, and the others go on. With several repeats each setting's come behind the last."""
        for setting in batch.settings:
            self._warm_up(batch, setting)
        earlier = [
            [self._outcomes(batch, setting) for setting in batch.settings] for _ in range(1, self.config.repeats)
        ]
        for i, setting in enumerate(batch.settings):
            passes = [self._outcomes(batch, setting), *(one[i] for one in earlier)]
            outcomes = [(one[0][0], _median([took for _, took in one])) for one in zip(*passes, strict=True)]
            yield self._samples(batch, setting, outcomes)

    def all(self, batch: Batch) -> list[Sample]:
        """The samples of one batch under all of its settings, at once: a generator does not travel."""
        return [row for rows in self.run(batch) for row in rows]

    def _outcomes(self, batch: Batch, index: int) -> list[Outcome]:
        """What a setting makes of a batch, decoded once."""
        setting, spec, task = self.config.settings[index], self.config.tasks[batch.task], self.tasks[batch.task]
        decoding, trace = arguments(setting, spec, task.generate.given()), batch.start < self.config.trace
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

        def decode(some: list[Document], seed: int) -> list[Decoded]:
            if spec.read is not None:
                return self._read(setting, spec.read, [d.prompt for d in some], decoding)
            return [*self._talks(setting, some, decoding, seed, trace)]

        return attempt(decode, list(task.documents[batch.start : batch.stop]), self.config.seed + batch.start)

    def _samples(self, batch: Batch, index: int, outcomes: Sequence[Outcome]) -> list[Sample]:
        setting, spec, task = self.config.settings[index], self.config.tasks[batch.task], self.tasks[batch.task]
        documents, keys = task.documents[batch.start : batch.stop], self._keys(batch, index)
        rows: list[Sample] = []
        for at, doc, key, (output, took) in zip(range(batch.start, batch.stop), documents, keys, outcomes, strict=True):
            head: Sample = {"key": key, "task": spec.title, "setting": setting.label, "index": at}
            row: Sample = {**head, "doc": doc.id, "prompt": doc.prompt, "target": doc.target, "clock": took}
            if doc.category:
                row["category"] = doc.category
            if isinstance(output, Exception):
                rows.append({**row, **failed(output), **({} if task.graded else {"correct": None})})
            else:
                rows.append({**row, **self._graded(task, doc, output), **self._order(key, at, output)})
        return rows

    def _talks(
        self, setting: Setting, documents: Sequence[Document], decoding: Decoding, seed: int, trace: bool
    ) -> list[Talk]:
        """The conversations of documents: every later turn follows the model's own answer to the one before."""
        prompts: list[Prompt] = [messages(d.prompt) if d.turns else d.prompt for d in documents]
        said: list[list[Output | Drafted]] = [[] for _ in documents]
        for turn in range(1 + max(len(d.turns) for d in documents)):
            going = [i for i, d in enumerate(documents) if turn <= len(d.turns)]
            for i in going if turn else ():
                answer = {"role": "assistant", "content": said[i][-1].text}
                asked = {"role": "user", "content": documents[i].turns[turn - 1]}
                prompts[i] = [*messages(prompts[i]), answer, asked]
            for run in _runs(going):  # row i of a batch draws with seed + i
                outputs = self.generate(setting, [prompts[i] for i in run], decoding, seed + run[0], trace)
                for i, output in zip(run, outputs, strict=True):
                    said[i].append(output)
        return [Talk(tuple(answers)) for answers in said]

    # --------------------------------------------------------------------------------------------------------- decoding

    def _warm_up(self, batch: Batch, index: int) -> None:
        """Decode the last document and discard it, so that compilation, caches and allocators are not on a setting's
        clock and no drafter has seen the first ones."""
        setting, spec, task = self.config.settings[index], self.config.tasks[batch.task], self.tasks[batch.task]
        if index in self._warm or spec.read is not None:
            return
        self._warm.add(index)
        decoding = arguments(setting, spec, task.generate.given())
        if setting.speculate is not None:  # a store would learn the document
            options = {k: v for k, v in setting.speculate.options.items() if k != "store"}
            setting = replace(setting, speculate=replace(setting.speculate, options=options))
        for _ in range(self.config.warmup):
            try:
                self.generate(setting, [task.documents[-1].prompt], decoding, self.config.seed)
            except Exception:  # it will come again, and then be a sample
                log.debug("warm-up of %s failed", setting.label, exc_info=True)
                return

    def generate(
        self, setting: Setting, prompts: Sequence[One], decoding: Decoding, seed: int, trace: bool = False
    ) -> list[Output | Drafted]:
        """One batch by a setting's model, drafted where it says so; row i draws with `seed + i`."""
        model = self.model(setting.model) if setting.decodes else None
        if setting.speculate is not None:
            return [self._speculate(setting.speculate, model, p, decoding, seed + i) for i, p in enumerate(prompts)]
        assert model is not None  # no verifier: the model decodes
        decoding = {**decoding, "trace": trace}
        return [*(admitted if self.config.batch_size == "auto" else together)(model, prompts, decoding, seed)]

    def _read(self, setting: Setting, spec: ReadSpec, prompts: list[Prompt], decoding: Decoding) -> list[Decoded]:
        """The most probable label of each prompt."""
        if setting.speculate is not None:
            raise DllmError(f"setting {setting.label!r} drafts for a verifier, which `read:` does not ask")
        began = time.perf_counter()
        taken = {k: v for k, v in decoding.items() if k in ("chat", "cfg_scale") and v is not None}
        found = dllm.read(
            self.model(setting.model), cast("Several", prompts), spec.template, slots={"answer": spec.labels},
            null=spec.null, temperature=spec.temperature, batch_size=len(prompts), **taken,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        slots = [(r["answer"], r.nfe) for r in found]
        return [Labelled(slot.best, slot.p, nfe, seconds) for slot, nfe in slots]

    def _speculate(
        self, spec: SpeculateSpec, model: Model | None, prompt: One, decoding: Decoding, seed: int
    ) -> Drafted:
        """One prompt decoded by the verifier, drafted as the setting says."""
        verifier = self.verifier(spec.verifier)
        given = {k: v for k, v in decoding.items() if k in VERIFIER_ARGUMENTS}
        if spec.loop == "transformers":
            return Drafted(by_generate(verifier, prompt, Peer(self._assistant(spec), spec.options), given, seed))
        drafter, options, store = self._drafter(spec.drafter, model), dict(spec.options), spec.options.get("store")
        if self.folder is not None and isinstance(store, str) and Path(store).name == store:
            options["store"] = self.folder / store
        return Drafted(dllm.speculate(verifier, drafter, prompt, seed=seed, **{**given, **options}))

    def _drafter(self, spec: ModelSpec, model: Model | None) -> Model | Drafter | str | None:
        """What drafts; a retrieval drafter is a new one for each text, so that no sample depends on those before it."""
        if spec.name in ("model", "none"):
            return model if spec.name == "model" else None
        if is_drafter_name(spec.name):
            return spec.name
        if spec.title not in self._drafters:
            self._drafters[spec.title] = as_drafter(spec)
        return self._drafters[spec.title]

    def _network(self, spec: SpeculateSpec) -> tuple[nn.Module, str] | None:
        """The drafter's weights, and what else of it counts; None where it has none."""
        if spec.loop == "transformers":
            network = self._assistant(spec)
            return None if network is None else (network, str(None))
        drafter = self._drafter(spec.drafter, None)
        if isinstance(drafter, DiffusionDrafter) and isinstance(drafter.model, NativeModel):
            return drafter.model.transformer, str(drafter.suffix)
        if isinstance(drafter, HiddenDrafter):
            return drafter.head, str(None)
        return (cast(nn.Module, drafter.model), str(None)) if isinstance(drafter, ARDrafter) else None

    def _assistant(self, spec: SpeculateSpec) -> nn.Module | None:
        """The network that drafts in transformers' own loop."""
        if spec.drafter.title not in self._assistants:
            self._assistants[spec.drafter.title] = assistant(spec.drafter)
        return self._assistants[spec.drafter.title]

    def gap(self, spec: SpeculateSpec, decoding: Decoding, row: Sample, turn: int, at: int) -> tuple[float, bool]:
        """Between the verifier's two best logits where the answer `turn` of a sample has its token `at`, and whether it
        is within rounding."""
        verifier, turns, prompt = self.verifier(spec.verifier), row["turns"], row["prompt"]
        for answer, asked in zip(turns[:turn], row["asked"][:turn], strict=True):
            reply = {"role": "assistant", "content": answer["text"]}
            prompt = [*messages(prompt), reply, {"role": "user", "content": asked}]
        (ids,), _ = encode(verifier, prompt, decoding.get("chat"))
        text = torch.tensor([[*ids, *turns[turn]["ids"][:at]]], device=verifier.device)
        logits, _ = verifier.forward(text, 1)
        first, second = logits[0, -1].topk(2).values.tolist()
        eps = torch.finfo(embedding(verifier.model).dtype).eps
        return first - second, first - second <= max(TIE, eps * abs(first))

    # ---------------------------------------------------------------------------------------------------------- results

    def _graded(self, task: Task, doc: Document, output: Decoded) -> Sample:
        graded = task.score(doc, output.text)
        answer = None if graded.answer == output.text else graded.answer  # the whole text is not stored twice
        row: Sample = {"text": output.text, "answer": answer, "correct": graded.correct if task.graded else None}
        if doc.turns:
            row["asked"] = list(doc.turns)
        if graded.note:
            row["note"] = graded.note
        if isinstance(output, Labelled):
            row["truth"] = next((label for label in output.labels if task.score(doc, label).correct >= 1), None)
        return {**row, **measure(output), "error": None}

    def _order(self, key: str, index: int, output: Decoded) -> Sample:
        """Keep the commit order where the configuration asks for it; what it says of the answer."""
        output = output.answers[-1] if isinstance(output, Talk) else output
        if index >= self.config.trace or not isinstance(output, Output) or output.trace is None:
            return {}
        if self.folder is not None:
            folder = self.folder / "trace"
            folder.mkdir(parents=True, exist_ok=True)
            output.trace.save(folder / f"{key}.json")
        return {"arness": output.trace.arness(tokens=len(output.tokens))}


def together(model: Model, prompts: Sequence[One], decoding: Decoding, seed: int) -> list[Output]:
    """One batch; row i draws with `seed + i`."""
    return dllm.generate(model, cast("Several", list(prompts)), seed=seed, batch_size=len(prompts), **decoding)


def admitted(model: Model, prompts: Sequence[One], decoding: Decoding, seed: int) -> list[Output]:
    """The same answers, as many rows at a time as an engine takes."""
    with dllm.Engine(model, max_rows=len(prompts), max_queue=len(prompts)) as engine:
        requests = [engine.submit(prompt, seed=seed + i, **decoding) for i, prompt in enumerate(prompts)]
        outputs = [request.result() for request in requests]
    log.info("%d prompts, %d at a time: %s", len(prompts), engine.most, engine.describe())
    return [replace(output, stats={**output.stats, "rows": engine.most}) for output in outputs]


def messages(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as a conversation."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _runs(indices: Sequence[int]) -> Iterator[list[int]]:
    """Ascending indices in runs without a gap."""
    run: list[int] = []
    for i in indices:
        if run and i != run[-1] + 1:
            yield run
            run = []
        run.append(i)
    if run:
        yield run


def _median(clocks: Sequence[Clock]) -> Clock:
    """The clock of several decodes of one batch; memory is the peak of all."""
    if len(clocks) == 1:
        return clocks[0]
    out: dict[str, float] = {}
    for name in clocks[0]:
        values = [clock[name] for clock in clocks if name in clock]  # type: ignore[literal-required]
        out[name] = max(values) if name == "peak_mb" else statistics.median(values)
    return cast("Clock", out)


Outcome = tuple[Decoded | Exception, Clock]


def attempt(generate: Callable[[list[P], int], list[Decoded]], prompts: list[P], seed: int) -> list[Outcome]:
    """An output, or the exception, for every prompt, and what the clock says of it. A batch that fails is tried one by
    one to find who is to blame."""
    start, worked = time.perf_counter(), time.process_time()
    try:
        outputs = generate(prompts, seed)
    except Exception as error:
        if len(prompts) > 1:
            return [outcome for i, prompt in enumerate(prompts) for outcome in attempt(generate, [prompt], seed + i)]
        log.warning("a prompt failed: %s", error)
        return [(error, {"seconds": 0.0, "share": 0.0})]
    n = len(prompts)
    shares: Clock = {
        "share": (time.perf_counter() - start) / n, "processor": (time.process_time() - worked) / n, "rows": n
    }  # fmt: skip
    return [(output, {**clock(output), **shares, **memory()}) for output in outputs]


def failed(error: Exception) -> Sample:
    """What a sample says of a prompt that the model failed on."""
    message = " ".join(str(error).split())[:500]
    nothing: Sample = {"tokens": 0, "tokens_raw": 0, "nfe": 0, "nfe_equiv": None, "finish": "error"}
    verdict: Sample = {"text": "", "answer": None, "correct": 0.0}
    return {**verdict, **nothing, "error": f"{type(error).__name__}: {message}"}


def measure(output: Decoded) -> Sample:
    """The counts of one output: tokens to the first stop, all decoded positions, forwards, and forwards in full
    lengths."""
    if isinstance(output, Labelled):
        nothing: Sample = {"tokens": 0, "tokens_raw": 0, "nfe": output.nfe, "nfe_equiv": float(output.nfe)}
        return {**nothing, "finish": "read", "p": output.labels[output.text], "labels": output.labels}
    if isinstance(output, Talk):
        whole = _sum([measure(answer) for answer in output.answers])
        return {**whole, "turns": turns} if (turns := output.turns) else whole
    counts: Sample = {"tokens": len(output.tokens), "tokens_raw": output.decoded, "nfe": int(output.nfe)}
    ended: Sample = {"nfe_equiv": None, "finish": output.finish_reason}
    if isinstance(output, Drafted):
        drafts: Sample = {"accepted": output.accepted, "slots": output.slots, "draft_forwards": output.draft_forwards}
        drafts |= {"own": output.own} if output.own else {}
        return {**counts, **ended, **drafts}
    own: Sample = {"nfe_equiv": output.nfe_equiv, "sampler": output.sampler}
    if output.logprobs is not None:
        own["logprobs"] = [None if said is None else round(said.logprob, 6) for said in output.logprobs]
    return {**counts, **ended, **own}


def _sum(answers: Sequence[Sample]) -> Sample:
    """The counts of several answers together, and how the last one ended."""
    out: dict[str, Any] = dict(answers[-1])
    for name in ("tokens", "tokens_raw", "nfe", "nfe_equiv", "draft_forwards", "own", "accepted", "logprobs"):
        parts: list[Any] = [answer.get(name) for answer in answers]
        if all(part is not None for part in parts):
            out[name] = [*itertools.chain(*parts)] if isinstance(parts[0], list) else sum(parts)
    slots = [answer["slots"] for answer in answers if "slots" in answer]
    deep = itertools.zip_longest(*slots, fillvalue=(0, 0))
    out |= {"slots": [[sum(judged) for judged in zip(*slot, strict=True)] for slot in deep]} if slots else {}
    return cast("Sample", out)


def clock(output: Decoded) -> Clock:
    """A sample's own seconds, from the start of its call."""
    if isinstance(output, Talk):
        parts: list[dict[str, float]] = [cast("dict[str, float]", clock(answer)) for answer in output.answers]
        return cast("Clock", {n: (max if n == "admitted" else sum)(part[n] for part in parts) for n in parts[0]})
    if not isinstance(output, Output):
        return {"seconds": output.seconds}
    stages: Clock = {"prefill_seconds": output.prefill_seconds, "decode_seconds": output.decode_seconds}
    most: Clock = {"admitted": cast(int, output.stats["rows"])} if "rows" in output.stats else {}
    return {"seconds": output.seconds, **stages, **most}


def memory() -> Clock:
    """Peak memory so far in MB: the accelerator's where there is one, else this process's."""
    if torch.cuda.is_available():
        return {"peak_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1)}
    try:
        import resource

        peak = (1 if sys.platform == "darwin" else 2**10) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    except ImportError:  # Windows
        import psutil

        peak = psutil.Process().memory_info().peak_wset
    return {"peak_mb": round(peak / 2**20, 1)}


def environment() -> Environment:
    """Versions and hardware; no names of machines or users."""
    packages = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    here: Environment = {"python": platform.python_version(), "system": platform.system()}
    return {**here, "packages": packages, "hardware": hardware()}


def occasion() -> Environment:
    """When a run began, by which command, and from which state of the toolkit."""
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "commit": commit(), "command": shlex.join(command)}


def commit() -> str | None:
    """The commit of the checkout that the toolkit runs from, with `+` where files have changed; None outside of one."""
    tree = Path(dllm.__file__).resolve().parent.parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(tree), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != tree:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> str:
    """Processor, threads and accelerators in words."""
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        name = next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    threads = torch.get_num_threads()
    words = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        words = f"{len(names)} × {names[0]}; {words}"
    return words
