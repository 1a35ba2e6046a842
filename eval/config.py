"""The configuration of an evaluation: plain YAML in, frozen dataclasses out.

A file names tasks, a model, a sampler, a cache and decoding arguments. `extends:` takes another file as the base,
`matrix:` sweeps over samplers, caches, lengths or models, and `key.sub=value` overrides come last. Whatever is
wrong is said with the file, the line and the key.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from dllm import spec
from dllm.call.arguments import CacheSpec
from dllm.decoding.cache import registry as caches
from dllm.errors import DllmError, unknown
from dllm.eval.arguments import translated
from dllm.models.arguments import Checkpoint
from dllm.samplers import registry
from dllm.spec import NOWHERE, Json, Keys, Source, param, with_name

# --------------------------------------------------------------------------------------------------------------- schema

WHERE = ("cache_dir", "local_files_only")  # of a model: where its files lie, not what they are
HOW = ("graphs",)  # of decoding: how it runs, not what it gives


class ModelSpec(Checkpoint):
    """What `dllm.load` takes; an argument that is left out, or null, is the model's own."""

    @property
    def title(self) -> str:
        """The name with whatever else decides the weights: `tiny(dtype=float64)`."""
        return describe({k: v for k, v in self.plain().items() if k not in (*WHERE, "device", "device_map")})


@dataclass(frozen=True)
class GenerateSpec:
    """The decoding arguments of `dllm.generate`, by the same names; `None` leaves the default of the model's family."""

    max_new_tokens: int | None = param(None, "width of the generation window", low=0)
    block_length: int | None = param(None, "columns decoded before the next ones", low=1)
    steps: int | None = param(None, "forwards over the whole window (quota samplers)", low=1)
    temperature: float | None = param(None, "0 is greedy", low=0)
    top_p: float | None = param(None, "nucleus", above=0, high=1)
    top_k: int | None = param(None, "tokens that are drawn from, at most", low=1)
    cfg_scale: float | None = param(None, "classifier-free guidance; 0 is off", low=0)
    stop: tuple[str, ...] | None = param(None, "strings that end the answer")
    eos: tuple[int, ...] | None = param(None, "ids that end it")
    min_new_tokens: int | None = param(None, "no end token in the first columns", low=0)
    suppress_tokens: tuple[int, ...] | None = param(None, "ids that are never predicted")
    logits_eos_inf: bool | None = param(None, "end tokens are never predicted (LLaDA)")
    confidence_eos_eot_inf: bool | None = param(None, "columns that predict an end token are committed last (LLaDA)")
    early_stop: bool | None = param(None, "false: every column is decoded, as in the public codes")
    lookahead: int | str | dict[str, object] | None = param(None, "rows of exact verification (docs/lookahead.md)")
    chat: bool | None = param(None, "whether text goes through the chat template; null: where there is one")
    gumbel: bool | None = param(None, "draw by Gumbel noise instead of the inverse CDF")
    max_nfe: int | None = param(None, "forwards a row may take", low=1)
    graphs: bool | None = param(None, "decode by CUDA graphs; null: where they can be")
    logprobs: int | None = param(None, "log-probabilities of the tokens, kept with each sample", low=0, high=20)
    regex: str | None = param(None, "the answer matches it fully (docs/constraints.md)")
    choices: tuple[str, ...] | None = param(None, "the answer is one of these")
    json_schema: dict[str, object] | str | None = param(None, "the answer is a document of this schema")
    grammar: str | None = param(None, "the answer is a text that this grammar parses, in the notation of lark")
    constraint: dict[str, object] | None = param(None, "the fields of a dllm.Constraint, such as max_depth")

    def given(self) -> Json:
        """The arguments that are not left to the family, as `dllm.generate` takes them."""
        return {k: v for k, v in spec.plain(self).items() if v is not None}


@dataclass(frozen=True)
class SpeculateSpec:
    """A drafting run: `model` drafts and the autoregressive `verifier` verifies."""

    verifier: ModelSpec
    drafter: ModelSpec = param(ModelSpec("model"), "or none (plain decoding), suffix, lookup, recycle, another model")
    options: Json = param({}, "arguments of dllm.speculate (search, length, k, tree …), or of the peer's loop")
    loop: Literal["dllm", "transformers"] = param("dllm", "transformers: a peer, its own generate decodes")

    @property
    def plain(self) -> bool:
        """Whether nobody drafts: what drafted settings are measured against."""
        return self.drafter.name == "none" and not (self.loop == "transformers" and self.options)


@spec.plain.register
def _(made: SpeculateSpec) -> Json:
    """A network of a name alone is that name: marks of finished samples go by it."""
    models = {"verifier": made.verifier.plain(), "drafter": made.drafter.plain()}
    named = {key: m["name"] if len(m) == 1 else m for key, m in models.items()}
    peer = {} if made.loop == "dllm" else {"loop": made.loop}
    return {**named, "options": spec.plain(made.options), **peer}


@dataclass(frozen=True)
class ReadSpec:
    """Labels to read in place of an answer that is decoded (`dllm.read`)."""

    labels: tuple[str, ...] = param((), "what an answer may be")
    template: str = param("{answer}", "the answer's text; {answer} is where a label stands")
    null: str | None = param(None, "a prompt without content, to calibrate by")
    temperature: float = param(1.0, "that log p is divided by, such as an evaluation before this one fitted", above=0)


@dataclass(frozen=True)
class TaskSpec:
    """One task. `name` is an embedded task, a known benchmark's shape, `jsonl`, or `lm-eval:<task>`; the rest
    refines it."""

    name: str
    label: str | None = param(None, "the name in the report, where one task appears twice")
    limit: int | None = param(None, "the first documents only")
    path: str | None = param(None, "the user's file (jsonl and the benchmark shapes)")
    split: str = param("test", "of the benchmark")
    seed: int = param(0, "of the problem generator, or of the sample")
    shots: int | None = param(None, "solved examples before the question; null: what the benchmark's own file says")
    shots_path: str | None = param(None, "the file of the examples")
    prompt: str | None = param(None, 'template over the document\'s fields: "{question}\\nAnswer:"')
    answer: str | None = param(None, 'template over the document\'s fields: "{answer}"')
    metric: str | None = param(None, "exact, contains, number, math, choice, python, none (nothing is graded)")
    extract: str | tuple[str, ...] | None = param(None, "regular expressions; group 1 of the first match is it")
    read: ReadSpec | None = param(None, "labels to read instead of decoding: accuracy, Brier score and ECE")
    turns: str | None = param(None, "the field that lists a user's turns; each follows the model's own answer")
    category: str | None = param(None, "the field by which the report tells documents apart")
    categories: tuple[str, ...] | None = param(None, "these only; null: all of the file")
    sample: int | None = param(None, "documents of each category, drawn by the seed; null: all", low=1)
    fields: dict[str, str] = param({}, "the names a benchmark's columns have in the user's file")
    options: Json = param({}, "lm-eval: num_fewshot, include_path …")
    sampler: registry.Spec | None = param(None, "of this task only, in place of the setting's")
    generate: GenerateSpec = param(GenerateSpec(), "decoding arguments of this task only")

    @property
    def title(self) -> str:
        """What the report calls it."""
        return self.label or self.name


@dataclass(frozen=True)
class EngineSpec:
    """Where the work runs. `local`: this process; `accelerate`: the ranks of `accelerate launch`; `ray`: actors on
    a cluster."""

    kind: Literal["local", "accelerate", "ray"] = "local"
    workers: int = param(1, "processes of a cluster")
    address: str | None = param(None, "of a running Ray cluster; null starts one here")
    cpus_per_worker: float = param(1.0, "reserved on the cluster")
    gpus_per_worker: float = param(0.0, "reserved on the cluster")
    retries: int = param(3, "of a batch whose worker was lost")


@dataclass(frozen=True)
class Expected:
    """A figure that somebody published, put beside ours in the report."""

    task: str
    value: float
    setting: str | None = param(None, "the label of a setting; null means every setting")
    metric: str = param("accuracy", "a figure of the report")
    source: str = param("", "where it was published")


@dataclass(frozen=True)
class Setting:
    """One point of the sweep: everything that decides an output apart from the document."""

    label: str
    model: ModelSpec
    sampler: registry.Spec | None  # None: the model family's own
    cache: CacheSpec | None  # None: the family's own
    generate: GenerateSpec
    speculate: SpeculateSpec | None = None

    @property
    def decodes(self) -> bool:
        """Whether the setting's model is asked at all: a verifier may draft without it."""
        return self.speculate is None or self.speculate.drafter.name == "model"

    @property
    def networks(self) -> tuple[ModelSpec | None, ModelSpec | None]:
        """What has to be loaded at a time."""
        return (self.model if self.decodes else None, None if self.speculate is None else self.speculate.verifier)

    source: Source = field(default=NOWHERE, compare=False, repr=False)  # where its keys were given


AUTO = 64  # documents of a batch where memory says how many of them decode at a time: what a kill may cost


@dataclass(frozen=True)
class Config:
    """A whole evaluation. `settings` is the expanded matrix."""

    name: str
    tasks: tuple[TaskSpec, ...]
    settings: tuple[Setting, ...]
    seed: int = param(0, "of decoding; request i uses seed + i")
    data: str | None = param(None, "a folder of local data, BENCHMARK/SPLIT.jsonl: documents of lm-eval's tasks")
    limit: int | None = param(None, "the first documents of every task only", low=1)
    batch_size: int | Literal["auto"] = param(8, "prompts decoded at a time; auto: as many as memory takes", low=1)
    warmup: int = param(1, "batches decoded and thrown away before a setting's clock starts", low=0)
    repeats: int = param(1, "times that every batch is decoded; its seconds are the median", low=1)
    trace: int = param(0, "documents per task and setting whose commit order is kept; AR-ness is theirs", low=0)
    confidence: float = param(0.95, "of the bootstrap intervals", above=0, high=0.9999)
    engine: EngineSpec = param(EngineSpec(), "where the work runs")
    confinement: str = param("auto", "of generated programs: namespaces, bubblewrap, docker, docker:IMAGE")
    allow_unconfined_code: bool = param(False, "programs that cannot be confined run all the same (`none`: all do)")
    expected: tuple[Expected, ...] = param((), "published figures, put beside ours")
    unknown: tuple[str, ...] = param((), "what a paper leaves open, printed in the report")
    about: str = param("", "printed above the report")
    out: str | None = param(None, "the folder of the run; null: runs/NAME")
    source: Source = field(default=NOWHERE, compare=False, repr=False)

    @property
    def batch(self) -> int:
        """Documents of a batch, which is finished or not as a whole; of an automatic one not all decode at a time."""
        return AUTO if self.batch_size == "auto" else self.batch_size

    def plain(self) -> Json:
        """The configuration as plain YAML values that `load` reads back: `None`s left out, the sweep spelled out
        point by point."""
        values: Json = _prune(spec.plain(self))
        points = values.pop("settings")  # in a sweep a list is a choice, so a composition goes in as the only one
        values["matrix"] = [{k: [v] if isinstance(v, list) else v for k, v in point.items()} for point in points]
        return values

    def methods(self) -> dict[str, str]:
        """The curve that each setting, by its label, is a point of."""
        several = len({s.model for s in self.settings}) > 1
        return {s.label: method(s, several) for s in self.settings}

    def identity(self) -> Json:
        """What results depend on: `plain()` without where it runs and what it is compared with."""
        ignored = ("engine", "expected", "unknown", "about", "out", "name", "confidence")
        return {k: _prune(v, *HOW) for k, v in self.plain().items() if k not in ignored}

    def cells(self) -> dict[tuple[str, str], Json]:
        """What the samples of each task and setting, by their labels, depend on. How many documents are asked, and
        what else the file holds, is not in it."""
        whole = {"seed": self.seed, "batch_size": self.batch_size, "repeats": self.repeats}
        tasks = {t.title: _prune(spec.plain(t), "label", "limit", *HOW) for t in self.tasks}
        settings = {s.label: _prune(spec.plain(s), "label", *WHERE, *HOW) for s in self.settings}
        return {(t, s): {**whole, "task": tasks[t], "setting": settings[s]} for t in tasks for s in settings}


# What `expected:` may name: the figures of a cell of the report.
FIGURES = (
    *("accuracy", "nfe", "nfe_equiv", "tpf", "tpf_mean", "tokens", "tokens_raw", "accepted_per_cycle"),
    *("seconds", "prefill_seconds", "decode_seconds", "tokens_per_second", "tokens_per_second_sample", "peak_mb"),
)

# The keys of a file are those of Config, with the sweep in place of the settings.
_AXES = ("model", "sampler", "cache", "generate", "speculate")
_TOP = [f.name for f in fields(Config) if f.name not in ("settings", "source")] + [*_AXES, "extends", "matrix"]


def schema() -> Json:
    """The JSON Schema of a file for `dllm eval`."""
    config, task, generate = map(spec.keys_of, (Config, TaskSpec, GenerateSpec))
    drafting = spec.or_text(spec.keys_of(SpeculateSpec))
    sampler = registry.schema()
    shared = {**sampler.pop("$defs"), "task": spec.or_text(task)}
    parts = (spec.schema(ModelSpec), sampler, caches.schema(), generate, drafting)
    point = {axis: spec.ref(axis) for axis in _AXES}
    for key in ("sampler", "generate"):
        task["properties"][key] = {**point[key], "description": task["properties"][key]["description"]}
    swept = {**point, **{f"generate.{key}": one for key, one in generate["properties"].items()}}
    sweep = {
        "type": "object",
        "properties": {"label": {"type": "string"}, **{key: spec.many(one) for key, one in swept.items()}},
        "patternProperties": {r"^(model|sampler|cache|speculate)\.": {}},
        "additionalProperties": False,
    }
    shared |= {**dict(zip(_AXES, parts, strict=True)), "sweep": sweep}
    config["properties"] = {key: one for key, one in config["properties"].items() if key in _TOP}
    config["properties"] |= {**point, "tasks": spec.many(spec.ref("task")), "matrix": spec.many(spec.ref("sweep"))}
    return {**spec.document({**config, "required": ["tasks"]}), "$defs": shared}


# -------------------------------------------------------------------------------------------------------------- reading


def override(data: Json, text: str) -> Json:
    """`key.sub=value` applied to the plain values; the value is read as YAML.

    Setting a swept axis (`sampler=…` or `sampler.name=…`) replaces the sweep over it; setting one parameter
    (`sampler.tau=…`) changes that parameter at every point of the sweep.
    """
    path, value = spec.assignment(text)
    key, place = ".".join(map(str, path)), f"--set {text}"
    whole = len(path) == 1 or path[1:] == ("name",)
    if path[0] in ("sampler", "generate") and isinstance(data.get("tasks"), list):
        entries = [_below_the_call(_own_names(entry), path, value, place) for entry in data["tasks"]]
        data = {**data, "tasks": entries}
    sweep = data.get("matrix")
    axes = sweep if isinstance(sweep, list) else [sweep] if isinstance(sweep, dict) else []
    for axis in axes:
        name = next((n for n in (key, path[0]) if n in axis), None)
        if name is None:
            continue
        if whole or name == key:
            axis.pop(name)
        else:
            values = axis[name] if isinstance(axis[name], list) else [axis[name]]
            axis[name] = [spec.assign(v, path[1:], value, place) for v in values]
    if axes and not any(set(axis) - {"label"} for axis in axes):
        data.pop("matrix")
    if whole and path[0] in ("sampler", "model"):  # another name: the old one's parameters go with it
        return {**data, path[0]: with_name(value)}
    changed: Json = spec.assign(data, path, value, place)
    return changed


def _own_names(entry: Any) -> Any:
    """A task's entry with lm-eval's `gen_kwargs` under our names in `generate`, so that there is one place to look."""
    options = entry.get("options") if isinstance(entry, dict) else None
    if not (isinstance(options, dict) and isinstance(options.get("gen_kwargs"), dict)):
        return entry
    said = translated(options["gen_kwargs"])
    methods = {"sampler": said.pop("sampler")} if "sampler" in said else {}
    rest = {k: v for k, v in options.items() if k != "gen_kwargs"}
    return {**methods, **entry, "options": rest, "generate": {**said, **(entry.get("generate") or {})}}


def _below_the_call(entry: Any, path: Keys, value: Any, place: str) -> Any:
    """A task's entry without what this call says instead; a parameter is changed in the task's own sampler too."""
    own = entry.get(path[0]) if isinstance(entry, dict) else None
    if own is None:
        return entry
    rest = {k: v for k, v in entry.items() if k != path[0]}
    if path[0] == "sampler":
        whole = len(path) == 1 or path[1:] == ("name",)
        return rest if whole else {**rest, "sampler": spec.assign(own, path[1:], value, place)}
    said = path[1:2] if len(path) > 1 else value or ()
    return {**rest, "generate": {k: v for k, v in own.items() if k not in said} if isinstance(own, dict) else own}


# ------------------------------------------------------------------------------------------------------------- building


def load(config: Config | Mapping[str, object] | str | Path, sets: Sequence[str] = (), **changes: Any) -> Config:
    """A `Config` from a YAML file, a mapping of the same keys, or a `Config`; `changes` (not None) and `sets` come
    last."""
    changes = {k: v for k, v in changes.items() if v is not None}
    if isinstance(config, Config):
        if sets:
            raise DllmError("overrides apply to a file or a mapping; change a Config with dataclasses.replace")
        return replace(config, **changes)
    data, source = gather(config, sets)
    return build({**data, **changes}, source)


def gather(config: Mapping[str, object] | str | Path, sets: Sequence[str]) -> tuple[Json, Source]:
    """The plain values of a file or mapping with the overrides applied, and where each was given."""
    if isinstance(config, Mapping):
        data, source = copy.deepcopy(dict(config)), NOWHERE
    else:
        data, source = spec.read(config)
        data.setdefault("name", Path(config).stem)
    for text in sets:
        data, source = override(data, text), source.placed(spec.assignment(text)[0], f"--set {text}")
    return data, source


def build(data: Mapping[str, object], source: Source) -> Config:
    """Validate plain values and expand the sweep. Errors name the key, its line, and the nearest known key."""
    if "tune" in data:
        raise source.error(("tune",), "this file is for `dllm tune`; `dllm eval` has no use for the key")
    for key in data:
        if key not in _TOP:
            raise source.error((key,), unknown("key", str(key), _TOP))
    if not data.get("tasks"):
        raise source.error(("tasks",) if "tasks" in data else (), "no tasks; give for example `tasks: [word_problems]`")
    given = data["tasks"] if isinstance(data["tasks"], list) else [data["tasks"]]
    tasks = tuple(spec.build(TaskSpec, _own_names(t), source, ("tasks", i)) for i, t in enumerate(given))
    labels = [task.title for task in tasks]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise source.error(("tasks", i), f"{label!r} is there twice; tell the two apart with `label:`")
    whole = {"name": "eval", **data, "tasks": (), "settings": ()}
    config = spec.build(Config, {k: v for k, v in whole.items() if k not in (*_AXES, "matrix", "extends")}, source)
    settings = _settings(data, source)
    for i, figure in enumerate(config.expected):
        names = {"metric": FIGURES, "task": labels, "setting": [s.label for s in settings]}
        for key, known in names.items():
            if (value := vars(figure)[key]) is not None and value not in known:
                raise source.error(("expected", i, key), unknown(key, value, known))
    return replace(config, tasks=tasks, settings=settings, source=source)


def _settings(data: Mapping[str, object], source: Source) -> tuple[Setting, ...]:
    """The points of the sweep, those of equal labels once."""
    seen: dict[str, Setting] = {}
    for sweep, where in _sweeps(data.get("matrix") or {}, source):
        named = sweep.pop("label", None)
        axes = {k: v if isinstance(v, list) else [v] for k, v in sweep.items()}
        for axis, values in axes.items():
            if axis.split(".")[0] not in _AXES:
                raise source.error((*where, axis), unknown("axis", axis, _AXES))
            if not values:
                raise source.error((*where, axis), "the list is empty, so the sweep has no point")
        for picks in itertools.product(*(range(len(values)) for values in axes.values())):
            at = dict(zip(axes, picks, strict=True))
            chosen = {axis: axes[axis][i] for axis, i in at.items()}
            point = _point(data, chosen)
            varying = {axis: value for axis, value in chosen.items() if len(axes[axis]) > 1 or axis == "sampler"}
            label = _label(named, varying, point)
            here = source
            for axis, i in at.items():
                here = here.placed(spec.dotted(axis), source.place((*where, axis, i)))
            setting = _setting(label, point, here)
            if seen.setdefault(label, setting) != setting:
                raise source.error(where, f"two settings are called {label!r}; give each a `label:`")
    return tuple(seen.values())


def _point(data: Mapping[str, object], chosen: Json) -> Json:
    """What the file says of the axes, with what one point of the sweep says instead."""
    point: Json = {k: v for k, v in data.items() if k in _AXES}
    for axis, new in chosen.items():
        head, *rest = spec.dotted(axis)
        old = point.get(str(head))
        if rest:
            point[str(head)] = spec.assign(old, tuple(rest), new, axis)
        elif head in ("model", "sampler"):
            point[str(head)] = spec.merge(with_name(old), with_name(new))
        else:
            point[str(head)] = spec.merge(old, new)
    return point


def _sweeps(sweeps: object, source: Source) -> Iterable[tuple[Json, Keys]]:
    """A mapping is one product; a list of mappings is the union of their products."""
    if isinstance(sweeps, dict):
        yield dict(sweeps), ("matrix",)
    elif isinstance(sweeps, list) and all(isinstance(s, dict) for s in sweeps):
        for i, sweep in enumerate(sweeps):
            yield dict(sweep), ("matrix", i)
    else:
        raise source.error(("matrix",), "write `axis: [values]` pairs, or a list of such mappings")


def _label(named: object, varying: Json, point: Mapping[str, object]) -> str:
    first = str(named or describe(point.get("sampler") or "default"))
    shown = {} if named and len(varying) == 1 else {axis: v for axis, v in varying.items() if axis != "sampler"}
    rest = [f"{axis.removeprefix('generate.').removeprefix('sampler.')}={describe(v)}" for axis, v in shown.items()]
    return " · ".join([first, *rest])


def describe(said: object) -> str:
    """`{name: threshold, tau: 0.9}` as `threshold(tau=0.9)`, a composition with `+`."""
    if isinstance(said, list):
        return "+".join(map(describe, said))
    if not isinstance(said, Mapping):
        return str(said)
    rest = ", ".join(f"{k}={v}" for k, v in said.items() if k != "name")
    name = str(said.get("name", ""))
    return f"{name}({rest})" if rest else name


def method(setting: Setting, model: bool = False) -> str:
    """The name under which settings form one curve: sampler and cache (or how it is drafted) without parameters, and
    the model if asked."""
    if setting.speculate:
        options = setting.speculate.options
        names = [setting.speculate.drafter.name, *(options[k] for k in ("search", "length") if k in options)]
        words = ["plain"] if setting.speculate.plain else ["drafted:", *map(_bare, names)]
        words += ["by transformers"] if setting.speculate.loop == "transformers" else []
    else:
        sampler = setting.sampler if isinstance(setting.sampler, list) else [setting.sampler or "default"]
        words = ["+".join(map(_bare, sampler))]
        words += [_bare(setting.cache)] if setting.cache and _bare(setting.cache) != "none" else []
        words += ["lookahead"] if setting.generate.lookahead else []
    return " ".join(words + ([Path(setting.model.title).name] if model else []))


def _bare(said: object) -> str:
    """The name of a sampler, cache or search without its parameters."""
    return str(said["name"] if isinstance(said, Mapping) else said).partition(":")[0]


def _setting(label: str, point: Json, source: Source) -> Setting:
    sampler = point.get("sampler")
    if isinstance(sampler, dict) and set(sampler) == {"name"}:
        sampler = sampler["name"]
    if sampler in ("default", ""):
        sampler = None
    if not (sampler is None or isinstance(sampler, str | list) or (isinstance(sampler, dict) and "name" in sampler)):
        raise source.error(
            ("sampler",), "a sampler is a name, a mapping with `name:` and parameters, or a list of these"
        )
    drafting = point.get("speculate")
    drafting = {"verifier": drafting} if isinstance(drafting, str) else drafting
    return Setting(
        label=label,
        model=spec.build(ModelSpec, point.get("model") or {}, source, ("model",)),
        sampler=sampler,
        cache=point.get("cache"),
        generate=spec.build(GenerateSpec, point.get("generate") or {}, source, ("generate",)),
        speculate=spec.build(SpeculateSpec, drafting, source, ("speculate",)) if drafting else None,
        source=source,
    )


def _prune(value: object, *drop: str) -> Any:
    """Plain values without `None`s, empty mappings and the keys in `drop`."""
    if isinstance(value, Mapping):
        kept = {k: _prune(v, *drop) for k, v in value.items() if v is not None and k not in drop}
        return {k: v for k, v in kept.items() if v != {}}
    return [_prune(v, *drop) for v in value] if isinstance(value, list) else value
