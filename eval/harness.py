"""lm-evaluation-harness: the toolkit as one of its models, its tasks inside our configurations.

    python -m dllm.eval.harness --model_args pretrained=tiny,sampler=threshold --tasks gsm8k --batch_size 8
    tasks: [{name: "lm-eval:gsm8k", options: {num_fewshot: 5}}]           # in a configuration

Written for lm-eval 0.4.13 and 0.4.10: the newer asks the model to gather, the older its `accelerator`; both are there.
Needs the extra [eval].
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dllm
from dllm.errors import DllmError, unknown
from dllm.generation import Arguments, encode

from .config import Config, Setting, TaskSpec
from .store import Row, Store, decoding_identity, sample_key
from .worker import Worker, attempt, failed, measure

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import Collator, normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise DllmError(f"lm-eval is missing ({error}): pip install 'dllm-toolkit[eval]'") from None

log = logging.getLogger(__name__)

MAX_GEN_TOKS = 256  # lm-eval's own default
SAMPLES = 128  # of the Monte-Carlo bound, as LLaDA's evaluation takes for likelihood tasks
# Arguments of lm-eval requests that say nothing to a diffusion model, or that are read otherwise.
_READ = {"until", "max_gen_toks", "do_sample", "temperature"}


@register_model("dllm")
class DiffusionLM(LM):
    """A masked-diffusion model behind lm-eval's interface.

    pretrained        what `dllm.load` takes; or `model`, a loaded one
    batch_size        rows decoded together ("auto" is 8); a batch holds requests of equal arguments, ragged in length
    mc_num, mc_batch  samples of the likelihood bound, and how many of them go through the model at once
    check_greedy      also say whether a continuation is the greedy one, a decode for each request; without it the
                      answer is False
    seed              of every draw; request i of a rank uses seed + i

    Everything else is an argument of `dllm.generate` (`sampler`, `cache`, `block_length`, `steps`, …) for every
    request; a request's own `max_gen_toks`, `until`, `temperature`, `top_p` and `top_k` come first.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        model: Any = None,
        dtype: str | None = None,
        device: str | None = None,
        revision: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        mc_num: int = SAMPLES,
        mc_batch: int = 32,
        check_greedy: bool = False,
        seed: int = 0,
        **decoding: Any,
    ) -> None:
        super().__init__()
        self.accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            device = self._join(device)
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None  # lm-eval's default, which nobody asked for
        wanted = {"dtype": dtype, "device": device, "revision": revision}
        self.model = model or dllm.load(pretrained, **{k: v for k, v in wanted.items() if v is not None})
        self.name = pretrained
        self._device = self.model.device
        self.tokenizer = self.model.tokenizer
        if self.tokenizer is None:
            raise DllmError(f"{pretrained} has no tokenizer, and lm-eval asks with text")
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size or 1)
        self.mc_num, self.mc_batch, self.check_greedy, self.seed = int(mc_num), int(mc_batch), check_greedy, int(seed)
        Arguments.parse(decoding)  # unknown arguments are refused now, not at the first request
        self.decoding = decoding
        self.journal: Journal | None = None

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
        return tensor if self.accelerator is None else self.accelerator.gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if self.accelerator is None:
            return [obj]
        into = [None] * self._world_size if self._rank == dst else None
        torch.distributed.gather_object(obj, into, dst=dst)
        return into

    def barrier(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------------------------------------- chat

    @property
    def tokenizer_name(self) -> str:
        """What fingerprints lm-eval's request cache."""
        return str(getattr(self.tokenizer, "name_or_path", "") or self.name).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that will be used: the tokenizer's own, or the one of this name."""
        if not chat_template:
            return None
        own = getattr(self.tokenizer, "chat_template", None)
        return own.get(chat_template if isinstance(chat_template, str) else "default") if isinstance(own, dict) else own

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages to one text; without a generation prompt the last (assistant's) message is left open to go on."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise DllmError(f"{self.name} has no chat template; leave out --apply_chat_template")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # ------------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers in the order of the requests. Equal arguments share batches; every answer is cached when it is
        there."""
        indexed = [(request.args[0], request.args[1], i) for i, request in enumerate(requests)]
        drawn = any(self.arguments(given).get("temperature") for _, given, _ in indexed)
        # Long prompts first, to pad little and to run out of memory early; where tokens are drawn, in the given order.
        collator = Collator(
            indexed, lambda r: (0 if drawn else -len(r[0]), r[2]), group_fn=lambda r: r[1], group_by="gen_kwargs"
        )
        bar = tqdm(total=len(indexed), desc="dllm", disable=disable_tqdm or self.rank != 0, file=sys.stderr)
        answers: list[str] = []
        with bar:
            for batch in collator.get_batched(n=self.batch_size if not drawn else 1):
                contexts, given, first = [c for c, _, _ in batch], batch[0][1], batch[0][2]
                texts = self._answer(contexts, given, first)
                for context, text in zip(contexts, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", (context, given), text)
                answers += texts
                bar.update(len(texts))
        return collator.get_original(answers)

    def _answer(self, contexts: list[str], given: Mapping[str, Any], first: int) -> list[str]:
        """One batch; what a journal already holds is not decoded again."""
        arguments, seed = self.arguments(given), self.seed + first
        if self.journal is None:
            return [output.text for output in self._decode(contexts, arguments, seed)]
        keys = self.journal.keys(contexts, given, arguments, seed)
        if not self.journal.holds(keys):  # the whole batch again, so that a resumed row is what it would have been
            outcomes = attempt(lambda some, seed: self._decode(some, arguments, seed), contexts, seed)
            self.journal.add(keys, contexts, outcomes)
        return self.journal.texts(keys)

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `dllm.generate` for one request."""
        asked = dict(normalize_gen_kwargs(dict(given), MAX_GEN_TOKS))
        out = {**self.decoding, "max_new_tokens": asked["max_gen_toks"]}
        out["stop"] = [s for s in asked["until"] if isinstance(s, str) and s]
        if "temperature" in given or "do_sample" in given:
            out["temperature"] = float(asked.get("temperature", 0.0)) if asked.get("do_sample") else 0.0
        known = set(Arguments.__dataclass_fields__) - set(out)
        for name, value in asked.items():
            if name in known:
                out[name] = value
            elif name not in _READ:
                log.warning(
                    "lm-eval's generation argument %s=%r means nothing to a diffusion model; left out", name, value
                )
        return out

    def _decode(self, contexts: list[str], arguments: dict[str, Any], seed: int) -> list[Any]:
        ids = [self._ids(context, arguments["max_new_tokens"]) for context in contexts]
        return dllm.generate(self.model, ids, **{**arguments, "seed": seed, "batch_size": len(ids)})

    def _ids(self, context: str, room: int) -> list[int]:
        """Token ids, cut on the left where context and answer would not fit."""
        ids = encode(self.model, context, False) or self._start()
        keep = self.model.max_positions - room
        if keep < 1:
            raise DllmError(f"max_gen_toks={room} leaves no room for a prompt in {self.model.max_positions} positions")
        if len(ids) > keep:
            log.warning("a prompt of %d tokens is cut on the left to %d", len(ids), keep)
        return ids[-keep:]

    def _start(self) -> list[int]:
        return [self.model.bos_id] if self.model.shift and self.model.bos_id is not None else []

    # ------------------------------------------------------------------------------------------------------- likelihood

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The Monte-Carlo lower bound of ln p(continuation | context), and whether the continuation is greedy."""
        out = []
        for request in tqdm(requests, desc="dllm", disable=disable_tqdm or self.rank != 0, file=sys.stderr):
            context, continuation = request.args
            head, tail = self._pair(context, continuation)
            greedy = self.check_greedy and self._greedy(head, len(tail)) == tail
            out.append((self._score(head, tail), bool(greedy)))
            self.cache_hook.add_partial("loglikelihood", request.args, out[-1])
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The bound of whole texts: each half window given the half before it, so that every token counts once."""
        out = []
        for request in tqdm(requests, desc="dllm", disable=disable_tqdm or self.rank != 0, file=sys.stderr):
            ids, half = encode(self.model, request.args[0], False), self.model.max_positions // 2
            pieces = range(0, len(ids), half)
            out.append(sum(self._score(ids[max(0, i - half) : i] or self._start(), ids[i : i + half]) for i in pieces))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, out[-1])
        return out

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of context and continuation, cut where the joint text is; spaces at the border belong to the
        continuation."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole, head = encode(self.model, bare + continuation, False), encode(self.model, bare, False) if bare else []
        tail = whole[len(head) :]
        keep = self.model.max_positions - len(tail)
        head = head or self._start()
        return head[-keep:] if keep > 0 else [], tail

    def _score(self, head: list[int], tail: list[int]) -> float:
        options = {"samples": self.mc_num, "batch_size": self.mc_batch, "seed": self.seed}
        guidance = {"cfg_scale": self.decoding["cfg_scale"]} if self.decoding.get("cfg_scale") else {}
        return dllm.score(self.model, head, tail, **options, **guidance)

    def _greedy(self, head: list[int], length: int) -> list[int]:
        """One token a forward, the surest first, with no early end."""
        one_by_one = {"max_new_tokens": length, "block_length": length, "steps": length, "early_stop": False}
        return dllm.generate(self.model, head, sampler="confidence", **one_by_one).sequences[len(head) :]


# -------------------------------------------------------------------------------------------------------- configuration


class Journal:
    """Our samples of one lm-eval task under one setting: read before a request is decoded, written after."""

    def __init__(self, store: Store, task: str, label: str, setting: Setting, weights: str):
        self.store, self.task, self.label, self.setting, self.weights = store, task, label, setting, weights

    def keys(self, contexts: Sequence[str], given: Any, arguments: Mapping[str, Any], seed: int) -> list[str]:
        """The identities of a batch's samples."""
        out = []
        for i, context in enumerate(contexts):
            identity = decoding_identity(self.setting, {**arguments, "request": given}, seed + i)
            out.append(sample_key(self.task, "", "", context, "", identity, self.weights))
        return out

    def holds(self, keys: Sequence[str]) -> bool:
        return all(key in self.store.rows for key in keys)

    def texts(self, keys: Sequence[str]) -> list[str]:
        return [self.store.rows[key]["text"] for key in keys]

    def add(self, keys: Sequence[str], contexts: Sequence[str], outcomes: Sequence[Any]) -> None:
        """Append a decoded batch; lm-eval's verdicts come later."""
        head = {"task": self.label, "setting": self.setting.label, "index": -1, "doc": ""}
        rows = []
        for key, context, (output, took) in zip(keys, contexts, outcomes, strict=True):
            row: Row = {"key": key, **head, "prompt": _mark(context), "clock": took}
            if isinstance(output, Exception):
                rows.append(row | failed(output))
            else:
                said = {"text": output.text, "answer": None, "correct": None}
                rows.append({**row, **said, **measure(output), "error": None})
        self.store.append([row for row in rows if row["key"] not in self.store.rows])

    def grade(self, samples: Sequence[Mapping[str, Any]], metric: str, task: str) -> None:
        """Write lm-eval's verdicts into the rows of every rank: the same keys again, and the last of a key counts.
        `task` is the label of these samples' line in the report."""
        self.store.reload()
        mine: dict[str, list[Row]] = {}
        for row in self.store.rows.values():
            if row["setting"] == self.setting.label and row["task"] in (self.label, task):
                mine.setdefault(row["prompt"], []).append(row)
        rows = []
        for sample in samples:
            known = {"index": sample["doc_id"], "doc": str(sample["doc_id"]), "target": str(sample["target"])}
            for row in mine.get(_mark(_prompt(sample)), []):
                correct = 0.0 if row["error"] else float(sample.get(metric) or 0.0)
                rows.append({**row, **known, "task": task, "correct": correct})
        self.store.append([row for row in rows if row != self.store.rows[row["key"]]])


def _mark(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def _prompt(sample: Mapping[str, Any]) -> str:
    """The text of a logged sample's first request."""
    arguments = sample["arguments"]
    first = arguments["gen_args_0"]["arg_0"] if isinstance(arguments, Mapping) else arguments[0][0]
    return str(first)


OWN = ("metric", "include_path", "include_defaults")  # options that are not simple_evaluate's


@functools.cache
def _manager(include_path: str | None = None, include_defaults: bool = True) -> TaskManager:
    return TaskManager(include_path=include_path, include_defaults=include_defaults)  # indexes thousands of files: once


def check_task(spec: TaskSpec) -> None:
    """Errors: a task that lm-eval does not know, an option that is neither ours nor `simple_evaluate`'s."""
    known = (*OWN, *inspect.signature(simple_evaluate).parameters)
    for key in spec.options:
        if key not in (*known, "rehearse"):
            raise unknown("option of an lm-eval task", key, known)
    name, manager = spec.name.removeprefix("lm-eval:"), _managed(spec)
    if not manager.match_tasks([name]):
        raise unknown("lm-eval task", name, manager.all_tasks)


def _managed(spec: TaskSpec) -> TaskManager:
    return _manager(**{k: spec.options[k] for k in ("include_path", "include_defaults") if k in spec.options})


def run_tasks(config: Config, store: Store, worker: Worker, lead: bool = True) -> list[dict[str, Any]]:
    """Evaluate the `lm-eval:` tasks of a configuration under every setting; their metrics, task by setting.

    Generated answers go through our samples (so they resume and carry counts); likelihoods are lm-eval's alone.
    """
    out = []
    for setting in worker.config.settings:
        model = worker.model(setting.model)
        lm = DiffusionLM(setting.model.name, model, batch_size=config.batch_size, seed=config.seed)
        for spec in config.tasks:
            name, label = spec.name.removeprefix("lm-eval:"), spec.label or spec.name
            options = {k: v for k, v in spec.options.items() if k not in (*OWN, "rehearse")}
            lm.journal = Journal(store, name, label, setting, lm.model.identity())
            lm.decoding = _decoding(setting, spec)
            try:
                found = simple_evaluate(
                    model=lm,
                    tasks=[name],
                    limit=_limit(config, spec),
                    task_manager=_managed(spec),
                    bootstrap_iters=0,
                    random_seed=config.seed,
                    log_samples=True,
                    **options,
                )
            except (KeyError, ValueError, TypeError, OSError) as error:  # OSError: data that cannot be reached
                raise config.source.error(("tasks",), f"lm-eval cannot run {name!r}: {error}") from None
            if found is None or not lead:
                continue
            for task, results in found["results"].items():
                samples = found["samples"].get(task, [])
                chosen = _chosen(results, spec.options.get("metric"))
                line = label if len(found["results"]) == 1 else f"{label}:{task}"
                filtered = [s for s in samples if s["filter"] == _filter(results, chosen, samples)]
                lm.journal.grade(filtered, chosen.split(",")[0], line)
                out.append(_cell(line, setting, results, chosen, found["versions"].get(task, ""), samples))
    return out


def _decoding(setting: Setting, spec: TaskSpec) -> dict[str, Any]:
    """Sampler, cache and decoding arguments; stop strings and lengths are the task's."""
    given = {**setting.generate.given(), **spec.generate.given()}
    given = {k: v for k, v in given.items() if k not in ("stop", "chat")}
    return {**given, "sampler": setting.sampler, "cache": setting.cache}


def _limit(config: Config, spec: TaskSpec) -> int | None:
    limits = [limit for limit in (config.limit, spec.limit) if limit is not None]
    return min(limits) if limits else None


def _chosen(results: Mapping[str, Any], metric: str | None) -> str:
    """The asked metric, or the task's first: lm-eval names them `metric,filter`."""
    names = [k for k, v in results.items() if "," in k and "_stderr" not in k and isinstance(v, int | float)]
    fitting = [k for k in names if metric in (None, k, k.split(",")[0])]
    if not fitting:
        raise unknown("metric", str(metric), names)
    return fitting[0]


def _filter(results: Mapping[str, Any], chosen: str, samples: Sequence[Mapping[str, Any]]) -> str:
    wanted = chosen.partition(",")[2]
    filters = [s["filter"] for s in samples]
    return wanted if wanted in filters else filters[0] if filters else ""


def _cell(
    task: str,
    setting: Setting,
    results: Mapping[str, Any],
    chosen: str,
    version: Any,
    samples: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One task's figures as lm-eval prints them."""
    return {
        "task": task,
        "setting": setting.label,
        "version": str(version),
        "n": len({s["doc_id"] for s in samples}),
        "metric": chosen,
        "accuracy": float(results[chosen]) if 0 <= results[chosen] <= 1 else math.nan,
        "lm_eval": {k: v for k, v in results.items() if isinstance(v, int | float)},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """lm-eval's own command line with the model `dllm` registered, and taken where none is named."""
    from lm_eval.__main__ import cli_evaluate

    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] and arguments[0] in ("ls", "validate"):
        pass
    elif not any(a == "--model" or a.startswith("--model=") for a in arguments) and "--config" not in arguments:
        head = 1 if arguments[:1] == ["run"] else 0
        arguments = [*arguments[:head], "--model", "dllm", *arguments[head:]]
    sys.argv = [str(Path(sys.argv[0]).name), *arguments]
    try:
        cli_evaluate()
    except DllmError as error:
        sys.exit(f"dllm: {error}")


if __name__ == "__main__":
    main()
