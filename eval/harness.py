"""lm-evaluation-harness: the toolkit as one of its models, its tasks inside our configurations.

    python -m dllm.eval.harness --model_args pretrained=tiny,sampler=threshold --tasks gsm8k --batch_size 8
    tasks: [{name: "lm-eval:gsm8k", options: {num_fewshot: 5}}]           # in a configuration

Written for lm-eval 0.4.13 and 0.4.10: the newer asks the model to gather, the older its `accelerator`; both are there.
Needs the extra [eval].
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from tqdm import tqdm

import dllm
from dllm.call.arguments import Arguments
from dllm.call.job import prepare
from dllm.call.output import Output
from dllm.call.prompts import encode
from dllm.call.reads import chained
from dllm.errors import DllmError, nearest, unknown
from dllm.eval import metrics
from dllm.eval.arguments import THEIRS, layered, translated
from dllm.eval.config import AUTO, Config, Setting, TaskSpec
from dllm.eval.lm_tasks import CodeEval, Theirs, confine, note, one_line, prepared
from dllm.eval.records import Cell, Clock, Decoding, Sample
from dllm.eval.results import Found
from dllm.eval.store import Store, sample_key
from dllm.eval.tasks import Unavailable, confined
from dllm.eval.worker import Decoded, Worker, admitted, arguments, attempt, failed, measure, together
from dllm.models.arguments import RENAMED, LoadArguments
from dllm.models.model import Model
from dllm.models.tokenizer import by_template

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise DllmError(f"lm-eval is missing ({error}): pip install 'dllm-toolkit[eval]'") from None

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)
T = TypeVar("T")
Outcome = tuple[Decoded | Exception, Clock]  # of one request
confine()  # whoever loads this module's model: the programs that lm-eval's tasks have checked run confined

MAX_GEN_TOKS = 256  # lm-eval's own default
SAMPLES = 128  # of the Monte-Carlo bound, as LLaDA's evaluation takes for likelihood tasks
NO_TIME: Clock = {"seconds": 0.0, "share": 0.0}
CUT = "had prompts that were cut on the left to fit the model"


@dataclass(frozen=True)
class Ask:
    """One request made ready: what `dllm.generate` gets, or the problem that there is with it."""

    index: int  # of the answer
    task: str
    doc: int
    context: str
    given: Decoding  # lm-eval's own arguments of the request
    seed: int
    arguments: Decoding = field(default_factory=dict)
    ids: Sequence[int] = ()
    cut: int = 0  # tokens of the prompt that did not fit
    problem: Exception | None = None


def gen_kwargs_of_the_call() -> Decoding:
    """The `gen_kwargs` of the `simple_evaluate` that is running. lm-eval writes them over a task's own arguments and
    tells no model which is which; the order of precedence needs to know."""
    frame = inspect.currentframe()
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == ("lm_eval.evaluator", "simple_evaluate"):
            given = frame.f_locals.get("gen_kwargs")
            return dict(given) if isinstance(given, Mapping) else {}
        frame = frame.f_back
    return {}


def _fitting(ids: list[int], room: int, positions: int) -> tuple[list[int], int]:
    """The end of a prompt that leaves `room` for the answer, and how many tokens were cut before it."""
    keep = positions - room
    if keep < 1:
        raise DllmError(f"max_gen_toks={room} leaves no room for a prompt in {positions} positions")
    return ids[-keep:], max(0, len(ids) - keep)


def _said(output: Decoded | Exception) -> tuple[str, str | None]:
    return ("", f"{type(output).__name__}: {output}") if isinstance(output, Exception) else (output.text, None)


@register_model("dllm")
class DiffusionLM(LM):  # type: ignore[misc]  # it has no types
    """A masked-diffusion model behind lm-eval's interface.

    pretrained        what `dllm.load` takes; or `model`, a loaded one
    batch_size        rows decoded together ("auto": as many as memory takes); a batch holds requests of equal
                      arguments, ragged in length
    mc_num, mc_batch  samples of the likelihood bound, and how many of them go through the model at once
    likelihood        of a continuation: `bound`, the Monte-Carlo one, or `chain`, exact for the order from left to
                      right, a forward a token (docs/reads.md)
    check_greedy      also say whether a continuation is the greedy one, a decode for each request; without it the
                      answer is False
    seed              of every draw; request i of a rank uses seed + i
    add_bos_token     every prompt begins with the bos token, as other lm-eval models have it

    Every argument of `dllm.load` (`dtype`, `mask_id`, `revision`, …) may be given too.
    Everything else is an argument of `dllm.generate` (`sampler`, `cache`, `max_new_tokens`, `stop`, `temperature`, …)
    for every request: below the call's `gen_kwargs` and above what a task's file says (`eval/arguments.py`).
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        model: Model | None = None,
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        mc_num: int = SAMPLES,
        mc_batch: int = 32,
        likelihood: str = "bound",
        check_greedy: bool = False,
        add_bos_token: bool = False,
        seed: int = 0,
        **given: object,
    ) -> None:
        super().__init__()
        self.accelerator: Accelerator | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            device = self._join(device)
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None  # lm-eval's default, which nobody asked for
        loading, decoding = _sorted({"device": device, **given})
        # Wrong arguments are refused now, not at the first request.
        Arguments.parse({k: v for k, v in decoding.items() if k not in THEIRS})
        self.model = model or dllm.load(pretrained, **loading.given())
        self.name = pretrained
        self._device = self.model.device
        if self.model.tokenizer is None:
            raise DllmError(f"{pretrained} has no tokenizer, and lm-eval asks with text")
        self.tokenizer = self.model.tokenizer
        self.automatic = str(batch_size).startswith("auto")
        self.batch_size = AUTO if self.automatic else int(batch_size or 1)
        self.mc_num, self.mc_batch, self.check_greedy, self.seed = int(mc_num), int(mc_batch), check_greedy, int(seed)
        self.likelihood = _likelihood(likelihood)
        self.add_bos_token = bool(add_bos_token)
        if self.add_bos_token and self.model.bos_id is None:
            raise DllmError(f"add_bos_token: {pretrained} has no bos token")
        self.decoding = translated(decoding)
        Arguments.parse(self.arguments({}))
        self.journal: Journal | None = None
        self.used: dict[str, list[Decoding]] = {}  # decoding arguments by task
        self.remarks: dict[str, int] = {}  # what happened to requests, and to how many

    # ------------------------------------------------------------------------------------------------------------ ranks

    def _join(self, device: str | None) -> str:
        """Join the ranks of `accelerate launch` (or torchrun)."""
        try:
            from accelerate import Accelerator
        except ImportError:
            raise DllmError("several ranks need accelerate: pip install 'dllm-toolkit[accelerate]'") from None
        self.accelerator = Accelerator(cpu=device == "cpu" or None)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        return str(self.accelerator.device)

    @property
    def device(self) -> torch.device:
        """Where ranks exchange counts; the older lm-eval leaves this to the model."""
        return self._device

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of every rank."""
        return tensor if self.accelerator is None else self.accelerator.gather(tensor)

    def gather_object(self, obj: T, dst: int = 0) -> list[T] | None:
        """The object of every rank, on rank `dst`; None on the others."""
        if self.accelerator is None:
            return [obj]
        into: list[T] | None = [obj] * self._world_size if self._rank == dst else None
        torch.distributed.gather_object(obj, into, dst=dst)
        return into

    def barrier(self) -> None:
        """Until every rank is here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------------------------------------- chat

    @property
    def tokenizer_name(self) -> str:
        """What fingerprints lm-eval's request cache."""
        return str(getattr(self.tokenizer, "name_or_path", "") or self.name).replace("/", "__")  # foreign

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that will be used: the tokenizer's own, or the one of this name."""
        if not chat_template:
            return None
        own = getattr(self.tokenizer, "chat_template", None)  # foreign
        return own.get(chat_template if isinstance(chat_template, str) else "default") if isinstance(own, dict) else own

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages to one text; without a generation prompt the last (assistant's) message is left open to go on."""
        if getattr(self.tokenizer, "chat_template", None) is None:  # foreign
            raise DllmError(f"{self.name} has no chat template; leave out --apply_chat_template")
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        text: str = by_template(self.tokenizer, chat_history, tokenize=False, **ends)
        return text

    # ------------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers in the order of the requests. Equal arguments share batches; every answer is cached when it is
        there. A request that cannot be decoded is answered with nothing, with its reason in the log."""
        asks = self._asks(requests)
        answers = [""] * len(asks)
        failures: list[str] = []
        with tqdm(total=len(asks), desc="dllm", disable=disable_tqdm or self.rank != 0, file=sys.stderr) as bar:
            for batch in self._batches(asks):
                for ask, (text, error) in zip(batch, self._answer(batch), strict=True):
                    answers[ask.index] = text
                    if error is None:
                        self.cache_hook.add_partial("generate_until", (ask.context, ask.given), text)
                    else:
                        failures.append(error)
                bar.update(len(batch))
        self._say("failed and count as wrong", failures)
        self._say(CUT, [f"{ask.cut} tokens" for ask in asks if ask.cut])
        return answers

    def _say(self, what: str, cases: Sequence[str]) -> None:
        if cases:
            self.remarks[what] = self.remarks.get(what, 0) + len(cases)
            level = logging.WARNING if self.journal is None else logging.INFO  # a journal's samples say it again
            log.log(level, "%d requests %s; the first: %s", len(cases), what, cases[0])

    def _asks(self, requests: Sequence[Instance]) -> list[Ask]:
        """Every request made ready. Its seed follows from its document, so that it is the same on any number of ranks
        and under any limit."""
        called, asks, repeat = gen_kwargs_of_the_call(), [], 0
        for index, request in enumerate(requests):
            CodeEval.learn(getattr(request, "doc", None))  # foreign
            context, given = request.args
            repeat = repeat + 1 if index and request is requests[index - 1] else 0
            doc, repeats = getattr(request, "doc_id", None), getattr(request, "repeats", None) or 1  # foreign
            number = index if doc is None else doc * repeats + repeat
            task = getattr(request, "task_name", None) or ""  # foreign
            ask = Ask(index, task, number if doc is None else doc, context, given, self.seed + number)
            asks.append(self._ready(ask, called))
        return asks

    def _ready(self, ask: Ask, called: Decoding) -> Ask:
        """The ask with its arguments and token ids, or with what is wrong with it."""
        try:
            arguments = self.arguments(ask.given, called)
            arguments["seed"] = arguments.get("seed", self.seed) + ask.seed - self.seed
            used = {k: v for k, v in arguments.items() if k != "seed"}
            if used not in (seen := self.used.setdefault(ask.task, [])):
                seen.append(used)
            Arguments.parse(arguments)
            ids, cut = self._ids(ask.context, arguments["max_new_tokens"])
        except (DllmError, TypeError, ValueError) as error:
            return replace(ask, problem=error)
        return replace(ask, arguments=used, seed=arguments["seed"], ids=ids, cut=cut)

    def _batches(self, asks: Sequence[Ask]) -> Iterator[list[Ask]]:
        """Requests of equal arguments. Row i of a call draws with the call's seed + i: where anything is drawn, a
        batch is a run of consecutive seeds; else long prompts go first, to pad little and to run out of memory
        early."""
        groups: dict[str, list[Ask]] = {}
        for ask in asks:
            groups.setdefault(json.dumps(ask.arguments, sort_keys=True, default=str), []).append(ask)
        for group in groups.values():
            draws = self._draws(group[0])
            batch: list[Ask] = []
            for ask in group if draws else sorted(group, key=lambda a: -len(a.ids)):
                if len(batch) == self.batch_size or (draws and batch and ask.seed != batch[-1].seed + 1):
                    yield batch
                    batch = []
                batch.append(ask)
            yield batch

    def _draws(self, ask: Ask) -> bool:
        """Whether an answer depends on its seed: some samplers draw even at temperature 0."""
        if ask.arguments.get("temperature"):
            return True
        try:
            return bool(prepare(self.model, [list(ask.ids)], ask.arguments).sampler.needs.stochastic)
        except DllmError:  # it comes again when the batch is decoded, and is then these requests' reason
            return False

    def _answer(self, batch: Sequence[Ask]) -> list[tuple[str, str | None]]:
        """Text and error of each; what a journal already holds is not decoded again."""
        if self.journal is None:
            return [_said(output) for output, _ in self._outcomes(batch)]
        if not self.journal.holds(batch):  # the whole batch again, so that a resumed sample is what it would have been
            self.journal.add(batch, self._outcomes(batch))
        return self.journal.answers(batch)

    def _outcomes(self, batch: Sequence[Ask]) -> list[Outcome]:
        """An output or the exception for each, and what the clock says."""
        if (problem := batch[0].problem) is not None:  # problems have no arguments, so they are batches of their own
            return [(ask.problem or problem, NO_TIME) for ask in batch]
        return attempt(lambda some, seed: self.decode(some, batch[0].arguments, seed), list(batch), batch[0].seed)

    def arguments(self, given: Decoding, called: Decoding | None = None) -> Decoding:
        """The arguments of `dllm.generate` for one request: what the call says (`--gen_kwargs`), then this model's
        own (`--model_args`, or a configuration), then the task's file (`given`). A length that nobody says is lm-eval's
        default, or half of what a small model can hold."""
        length = {"max_new_tokens": min(MAX_GEN_TOKS, self.model.max_positions // 2)}
        out = layered(translated(called or {}), self.decoding, translated(given), length)
        for name, plain in (("n", 1), ("infill", False)):
            if out.pop(name, plain) != plain:
                raise DllmError(
                    f"{name}: lm-eval asks for one continuation a request (a task's own `repeats:` for more)"
                )
        return out

    def decode(self, asks: Sequence[Ask], arguments: Decoding, seed: int) -> list[Decoded]:
        """One batch of equal arguments."""
        decode = admitted if self.automatic else together
        return [*decode(self.model, [ask.ids for ask in asks], arguments, seed)]

    def _ids(self, context: str, room: int) -> tuple[list[int], int]:
        """Token ids, cut on the left where context and answer would not fit, and how many were cut."""
        return _fitting(self._begin(encode(self.model, context, False)), room, self.model.max_positions)

    def _begin(self, ids: list[int]) -> list[int]:
        """Behind the bos token, where it was asked for or the model can begin with nothing else."""
        bos = self.model.bos_id
        needed = self.add_bos_token or (not ids and self.model.shift)
        return [bos, *ids] if needed and bos is not None and ids[:1] != [bos] else ids

    def get_model_info(self) -> dict[str, object]:
        """What was used, for lm-eval's results file: decoding arguments by task, and requests that failed or were
        cut."""
        return {"decoding": self.used, "remarks": self.remarks}

    # ------------------------------------------------------------------------------------------------------- likelihood

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The Monte-Carlo lower bound of ln p(continuation | context), and whether the continuation is greedy."""

        def score(context: str, continuation: str) -> tuple[float, bool]:
            head, tail = self._pair(context, continuation)
            greedy = self.check_greedy and self.greedy(head, len(tail)) == tail
            return self._score(head, tail), bool(greedy)

        return self._each(requests, "loglikelihood", score, (-math.inf, False), disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The bound of whole texts: each half window given the half before it, so that every token counts once."""

        def score(text: str) -> float:
            ids, half = encode(self.model, text, False), self.model.max_positions // 2
            heads = {i: ids[max(0, i - half) : i] or self._begin([]) for i in range(0, len(ids), half)}
            return sum(self._score(head, ids[i : i + half]) for i, head in heads.items())

        return self._each(requests, "loglikelihood_rolling", score, -math.inf, disable_tqdm)

    def _each(
        self, requests: Sequence[Instance], kind: str, score: Callable[..., T], worst: T, disable_tqdm: bool
    ) -> list[T]:
        """The score of every request; the worst there is, with its reason in the log, for one that has none."""
        out, failures = [], []
        for request in tqdm(requests, desc="dllm", disable=disable_tqdm or self.rank != 0, file=sys.stderr):
            try:
                out.append(score(*request.args))
                self.cache_hook.add_partial(kind, request.args, out[-1])
            except Exception as error:
                out.append(worst)
                failures.append(f"{type(error).__name__}: {error}")
        self._say("failed and count as impossible", failures)
        return out

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of context and continuation, cut where the joint text is; spaces at the border belong to the
        continuation."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole, head = encode(self.model, bare + continuation, False), encode(self.model, bare, False) if bare else []
        tail, head = whole[len(head) :], self._begin(head)
        cut = max(0, len(head) - max(0, self.model.max_positions - len(tail)))
        if cut:
            self._say(CUT, [f"{cut} tokens"])
        return head[cut:], tail

    def _score(self, head: list[int], tail: list[int]) -> float:
        guidance, samples, rows = self.decoding.get("cfg_scale") or 0.0, self.mc_num, self.mc_batch
        if self.likelihood == "chain":
            return chained(self.model, head, tail, guidance, rows)
        given = (self.model, head, tail)
        return dllm.score(*given, samples=samples, batch_size=rows, cfg_scale=guidance, seed=self.seed)

    def greedy(self, head: list[int], length: int) -> list[int]:
        """One token a forward, the surest first, with no early end."""
        one_by_one: Decoding = {"block_length": length, "steps": length, "early_stop": False}
        out: Output = dllm.generate(self.model, head, sampler="confidence", max_new_tokens=length, **one_by_one)
        return out.sequences[len(head) :]


def _likelihood(value: object) -> str:
    if value not in ("bound", "chain"):
        raise DllmError(f"likelihood={value!r} must be bound or chain")
    return str(value)


def _sorted(given: Mapping[str, object]) -> tuple[LoadArguments, Decoding]:
    """Model arguments as those of `dllm.load` and those of `dllm.generate`. Errors: a slip of one of the former."""
    given, names = _joined(given), {*(f.name for f in fields(LoadArguments)), *RENAMED}
    others = {*Arguments.__dataclass_fields__, *THEIRS}
    for name in given.keys() - others:
        if nearest(name, names | others) in names:
            LoadArguments.of({name: None})
    loading = {name: value for name, value in given.items() if name in names}
    return LoadArguments.read(loading), {name: value for name, value in given.items() if name not in names}


def _joined(given: Mapping[str, object]) -> dict[str, object]:
    """Lists and mappings whole again: lm-eval splits `eos_ids=[1,2]` at the comma, into `[1` and a name `2]`."""
    out: dict[str, object] = {}
    torn = ""
    for name, value in given.items():
        if torn and value == "":
            out[torn] = f"{out[torn]},{name}"
        else:
            torn, out[name] = name, value
        text = out[torn]
        if not isinstance(text, str) or not text.startswith(("[", "{")) or text.endswith(("]", "}")):
            torn = ""
    return out


# -------------------------------------------------------------------------------------------------------- configuration


class Journal:
    """Our samples of one lm-eval task under one setting: read before a request is decoded, written after."""

    def __init__(self, store: Store, spec: TaskSpec, setting: Setting, weights: str):
        self.store, self.spec, self.setting, self.weights = store, spec, setting, weights

    def key(self, ask: Ask) -> str:
        """The identity of a request's sample."""
        question = (self.spec.name, "", ask.task, ask.context, "")
        return sample_key(question, self.setting, ask.arguments, ask.seed, self.weights)

    def holds(self, batch: Sequence[Ask]) -> bool:
        """Whether every request of a batch has its sample."""
        return all(self.key(ask) in self.store.rows for ask in batch)

    def answers(self, batch: Sequence[Ask]) -> list[tuple[str, str | None]]:
        """Text and error of each request of a batch that it holds."""
        rows = [self.store.rows[self.key(ask)] for ask in batch]
        return [(row["text"], row["error"]) for row in rows]

    def add(self, batch: Sequence[Ask], outcomes: Sequence[Outcome]) -> None:
        """Append a decoded batch; lm-eval's verdicts come later."""
        rows: list[Sample] = []
        for ask, (output, took) in zip(batch, outcomes, strict=True):
            head: Sample = {"key": self.key(ask), "task": self.spec.title, "setting": self.setting.label}
            named: Sample = {"index": ask.doc, "doc": str(ask.doc), "asked_by": ask.task}
            row: Sample = {**head, **named, "prompt": ask.context, "cut": ask.cut, "clock": took}
            if isinstance(output, Exception):
                rows.append({**row, **failed(output)})
            else:
                said: Sample = {"text": output.text, "answer": None, "correct": None}
                rows.append({**row, **said, **measure(output), "error": None})
        self.store.append([row for row in rows if row["key"] not in self.store.rows])

    def grade(self, samples: Sequence[Theirs], metric: str, task: str, line: str, said: Sample) -> list[Sample]:
        """The samples of every rank for one of lm-eval's tasks with its verdicts, written again: the last of a key
        counts. `line` is the task's label in the report."""
        self.store.reload()
        mine: dict[str, list[Sample]] = {}
        for row in self.store.rows.values():
            asked = row["setting"] == self.setting.label and row.get("asked_by") == task
            if asked and row["task"] in (self.spec.title, line):
                mine.setdefault(str(row["prompt"]), []).append(row)
        rows: list[Sample] = []
        for sample in samples:
            known: Sample = {"target": str(sample["target"]), "task": line, **said}
            same = mine.get(_prompt(sample), [])  # chosen documents (`samples:`) are counted otherwise by lm-eval
            for row in [row for row in same if row["index"] == sample["doc_id"]] or same:
                correct = 0.0 if row["error"] else float(sample.get(metric) or 0.0)
                rows.append({**row, **known, "correct": correct})
        self.store.append([row for row in rows if row != self.store.rows[row["key"]]])
        return rows


def _prompt(sample: Theirs) -> str:
    """The text of a logged sample's first request."""
    arguments = sample["arguments"]
    first = arguments["gen_args_0"]["arg_0"] if isinstance(arguments, Mapping) else arguments[0][0]
    return str(first)


LEAVE = "--allow-unconfined-code"
OWN = ("metric", "include_path", "include_defaults", "likelihood")  # options that are not simple_evaluate's


@functools.cache
def _manager(include_path: str | None = None, include_defaults: bool = True) -> TaskManager:
    return TaskManager(include_path=include_path, include_defaults=include_defaults)  # indexes thousands of files: once


def check_task(spec: TaskSpec) -> None:
    """Errors: a task that lm-eval does not know, an option that is neither ours nor `simple_evaluate`'s."""
    known = (*OWN, *inspect.signature(simple_evaluate).parameters)
    for key in spec.options:
        if key not in (*known, "rehearse"):
            raise unknown("option of an lm-eval task", key, known)
    _likelihood(spec.options.get("likelihood", "bound"))
    name, manager = spec.name.removeprefix("lm-eval:"), _managed(spec)
    if not manager.match_tasks([name]):
        raise unknown("lm-eval task", name, manager.all_tasks)


def _managed(spec: TaskSpec) -> TaskManager:
    return _manager(**{k: spec.options[k] for k in ("include_path", "include_defaults") if k in spec.options})


class Drafting(DiffusionLM):
    """A verifier whose answers are drafted as a setting says; the prompts are the verifier's."""

    def __init__(self, name: str, worker: Worker, setting: Setting, batch_size: int | str, seed: int):
        super().__init__(name, worker.model(setting.model), batch_size=batch_size, seed=seed)
        assert setting.speculate is not None
        self.worker, self.setting, self.verifier = worker, setting, worker.verifier(setting.speculate.verifier)
        if self.verifier.tokenizer is None:
            raise DllmError(f"{setting.speculate.verifier.title} has no tokenizer, and lm-eval asks with text")
        self.tokenizer = self.verifier.tokenizer

    def _ids(self, context: str, room: int) -> tuple[list[int], int]:
        ids = list(self.tokenizer(context, add_special_tokens=False)["input_ids"])
        return _fitting(ids, room, self.verifier.max_positions or len(ids) + room)

    def _draws(self, ask: Ask) -> bool:
        return bool(ask.arguments.get("temperature"))

    def decode(self, asks: Sequence[Ask], arguments: Decoding, seed: int) -> list[Decoded]:
        """One batch, each request drafted and verified by itself."""
        return [*self.worker.generate(self.setting, [ask.ids for ask in asks], arguments, seed)]

    def _score(self, head: list[int], tail: list[int]) -> float:
        raise DllmError("likelihoods are the model's alone; leave out `speculate` for this task")


def run_tasks(config: Config, store: Store, worker: Worker, lead: bool = True) -> Found:
    """Evaluate the `lm-eval:` tasks of a configuration under every setting.

    Generated answers go through our samples (so they resume and carry counts); likelihoods are lm-eval's alone. A task
    that cannot be had, or that fails, is left out with its reason.
    """
    out = Found()
    ready: dict[str, tuple[TaskSpec, ConfigurableTask | str, Decoding]] = {}
    for spec in config.tasks:
        try:
            ready[spec.title] = spec, *prepared(spec, _managed(spec), config.data)
        except Unavailable as error:
            out.skipped[spec.title] = str(error)
    for setting in config.settings if ready else ():
        lm = _model(setting, worker, config)
        for label, (spec, task, options) in ready.items():
            if label in out.skipped:
                continue
            lm.journal = journal = Journal(store, spec, setting, "+".join(worker.weights_of(setting).values()))
            lm.decoding, lm.used, lm.remarks = arguments(setting, spec, {}), {}, {}
            lm.likelihood = _likelihood(spec.options.get("likelihood", "bound"))
            lm.decoding.pop("chat", None)  # templates are lm-eval's business
            try:
                found = _evaluate(lm, journal, task, options, config)
            except DllmError:
                raise
            except Exception as error:
                log.debug("lm-eval failed on %s", label, exc_info=True)
                out.skipped[label] = one_line(error)
                continue
            if found is not None and lead:
                _collect(out, found, lm, journal, config, note(options))
    return out


def _model(setting: Setting, worker: Worker, config: Config) -> DiffusionLM:
    if setting.speculate is not None:
        return Drafting(setting.model.name, worker, setting, config.batch_size, config.seed)
    model = worker.model(setting.model)
    return DiffusionLM(setting.model.name, model, batch_size=config.batch_size, seed=config.seed)


def _evaluate(
    lm: DiffusionLM, journal: Journal, task: ConfigurableTask | str, options: Decoding, config: Config
) -> Theirs | None:
    spec, setting = journal.spec, journal.setting
    own = {k: v for k, v in spec.options.items() if k not in (*OWN, "rehearse")}
    chat = layered(spec.generate.given(), setting.generate.given()).get("chat")
    found: Theirs | None = simple_evaluate(
        model=lm,
        tasks=[task],
        limit=min((n for n in (config.limit, spec.limit) if n is not None), default=None),
        task_manager=_managed(spec),
        bootstrap_iters=0,
        random_seed=config.seed,
        log_samples=True,
        **{**({} if chat is None else {"apply_chat_template": chat}), **options, **own},
    )
    return found


def _collect(out: Found, found: Theirs, lm: DiffusionLM, journal: Journal, config: Config, said: Sample) -> None:
    """The cells of one task (or group of tasks) under one setting, with the counts of our samples; `said` goes into
    each."""
    asked = journal.spec.name.removeprefix("lm-eval:")
    mine: list[Sample] = []
    for task in sorted(found["results"], key=lambda name: name not in found["samples"]):  # groups behind their tasks
        results, samples = found["results"][task], found["samples"].get(task, [])
        if task not in found["samples"] and not _figures(results):
            continue  # a group that only names its tasks
        chosen = _chosen(results, journal.spec.options.get("metric"))
        line = journal.spec.title if task == asked or len(found["results"]) == 1 else f"{journal.spec.title}:{task}"
        filtered = [s for s in samples if s["filter"] == _filter(chosen, samples)]
        rows = journal.grade(filtered, chosen.split(",")[0], task, line, said) if samples else mine
        mine += rows if samples else []
        counts: Cell = metrics.summarize(rows, config.confidence, config.seed) if rows else {"errors": 0}
        counts["cut"] = sum(bool(row["cut"]) for row in rows) or lm.remarks.get(CUT, 0)
        cell = _cell(line, journal.setting, results, chosen, found["versions"].get(task, ""), samples or rows)
        out.cells.append({**counts, **cell, "decoding": lm.used.get(task, [])})
    out.rows += mine


def _figures(results: Theirs) -> list[str]:
    return [k for k, v in results.items() if "," in k and "_stderr" not in k and isinstance(v, int | float)]


def _chosen(results: Theirs, metric: str | None) -> str:
    """The asked metric, or the task's first: lm-eval names them `metric,filter`."""
    names = _figures(results)
    fitting = [k for k in names if metric in (None, k, k.split(",")[0])]
    if not fitting:
        raise unknown("metric", str(metric), names)
    return fitting[0]


def _filter(chosen: str, samples: Sequence[Theirs]) -> str:
    wanted = chosen.partition(",")[2]
    filters = [s["filter"] for s in samples]
    return wanted if wanted in filters else filters[0] if filters else ""


def _cell(
    task: str, setting: Setting, results: Theirs, chosen: str, version: object, samples: Sequence[Mapping[str, object]]
) -> Cell:
    """One task's figures as lm-eval prints them."""
    return {
        "task": task,
        "setting": setting.label,
        "version": str(version),
        "n": len({(s.get("task"), s.get("doc_id", s.get("index"))) for s in samples}),
        "metric": chosen,
        "accuracy": float(results[chosen]) if 0 <= results[chosen] <= 1 else math.nan,
        "lm_eval": {k: v for k, v in results.items() if isinstance(v, int | float)},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """lm-eval's own command line with the model `dllm` registered, and taken where none is named; besides its own
    flags it takes `--allow-unconfined-code`."""
    from lm_eval.__main__ import cli_evaluate

    arguments = list(sys.argv[1:] if argv is None else argv)
    if LEAVE in arguments:
        arguments.remove(LEAVE)
        confined.choose(allow_unconfined=True)
    said = {argument.partition("=")[0] if argument.startswith("--model=") else argument for argument in arguments}
    if arguments[:1] not in (["ls"], ["validate"]) and not said & {"--model", "--config"}:
        head = 1 if arguments[:1] == ["run"] else 0
        arguments = [*arguments[:head], "--model", "dllm", *arguments[head:]]
    sys.argv = [str(Path(sys.argv[0]).name), *arguments]
    try:
        cli_evaluate()
    except DllmError as error:
        sys.exit(f"dllm: {error}")


if __name__ == "__main__":
    main()
