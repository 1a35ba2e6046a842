"""The configuration of an evaluation: plain YAML in, frozen dataclasses out.

A file names tasks, a model, a sampler, a cache and decoding arguments. `extends:` takes another file as the base,
`matrix:` sweeps over samplers, caches, lengths or models, and `key.sub=value` overrides come last. Whatever is
wrong is said with the file, the line and the key.
"""

from __future__ import annotations

import copy
import itertools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from dllm import spec as plain
from dllm.errors import DllmError, unknown
from dllm.eval.arguments import translated
from dllm.models.arguments import Checkpoint

Path_ = tuple[Any, ...]


# --------------------------------------------------------------------------------------------------------------- schema


class Source:
    """Where every key was given (a file and its line, or a `--set`), so that an error can say so."""

    def __init__(self, name: str, places: Mapping[Path_, str] | None = None):
        self.name, self.places = name, dict(places or {})

    def place(self, path: Path_) -> str:
        """Where this key, or else the nearest one around it, was given."""
        ends = range(len(path), 0 if path else -1, -1)
        return next((self.places[path[:end]] for end in ends if path[:end] in self.places), self.name)

    def error(self, path: Path_, message: str) -> DllmError:
        key = ".".join(map(str, path))
        return DllmError(f"{self.place(path)}: {key + ': ' if key else ''}{message}")

    def placed(self, path: Path_, place: str) -> Source:
        """The same with this key, and all below it, given elsewhere."""
        kept = {key: at for key, at in self.places.items() if key[: len(path)] != path}
        return Source(self.name, {**{path[:end]: place for end in range(1, len(path))}, **kept, path: place})


NOWHERE = Source("the configuration")
WHERE = ("cache_dir", "local_files_only")  # of a model: where its files lie, not what they are


class ModelSpec(Checkpoint):
    """What `dllm.load` takes; an argument that is left out, or null, is the model's own."""

    @property
    def title(self) -> str:
        """The name with whatever else decides the weights: `tiny(dtype=float64)`."""
        return describe({k: v for k, v in self.plain().items() if k not in (*WHERE, "device", "device_map")})


@dataclass(frozen=True)
class GenerateSpec:
    """The decoding arguments of `dllm.generate`, by the same names; `None` leaves the default of the model's family."""

    max_new_tokens: int | None = None
    block_length: int | None = None
    steps: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    cfg_scale: float | None = None
    stop: tuple[str, ...] | None = None
    eos: tuple[int, ...] | None = None
    min_new_tokens: int | None = None
    suppress_tokens: tuple[int, ...] | None = None
    logits_eos_inf: bool | None = None
    confidence_eos_eot_inf: bool | None = None
    early_stop: bool | None = None
    lookahead: int | str | dict[str, Any] | None = None
    chat: bool | None = None
    gumbel: bool | None = None
    max_nfe: int | None = None

    def given(self) -> dict[str, Any]:
        """The arguments that are not left to the family, as `dllm.generate` takes them."""
        values = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


@dataclass(frozen=True)
class SpeculateSpec:
    """A drafting run: `model` drafts and the autoregressive `verifier` verifies; `options` go to `dllm.speculate`."""

    verifier: str
    drafter: str = "model"  # or none (plain decoding), suffix, lookup, recycle, a folder (also of `dllm align`)
    options: dict[str, Any] = field(default_factory=dict)  # search, length, k, tree …


@dataclass(frozen=True)
class TaskSpec:
    """One task. `name` is an embedded task, a known benchmark's shape, `jsonl`, or `lm-eval:<task>`; the rest
    refines it."""

    name: str
    label: str | None = None  # the name in the report, where one task appears twice
    limit: int | None = None  # the first documents only
    path: str | None = None  # the user's file (jsonl and the benchmark shapes)
    split: str = "test"
    seed: int = 0  # of the problem generator
    shots: int | None = None  # solved examples before the question; None: what the benchmark's own file says
    shots_path: str | None = None
    prompt: str | None = None  # template over the document's fields: "{question}\nAnswer:"
    answer: str | None = None  # template over the document's fields: "{answer}"
    metric: str | None = None  # exact, contains, number, math, choice, python
    extract: str | tuple[str, ...] | None = None  # regular expressions, the first that matches; group 1 is the answer
    fields: dict[str, str] = field(default_factory=dict)  # the names a benchmark's columns have in the user's file
    options: dict[str, Any] = field(default_factory=dict)  # lm-eval: num_fewshot, include_path …
    sampler: Any = None  # of this task only, in place of the setting's
    generate: GenerateSpec = field(default_factory=GenerateSpec)  # decoding arguments of this task only


@dataclass(frozen=True)
class EngineSpec:
    """Where the work runs. `local`: this process; `accelerate`: the ranks of `accelerate launch`; `ray`: actors on
    a cluster."""

    kind: Literal["local", "accelerate", "ray"] = "local"
    workers: int = 1
    address: str | None = None  # of a running Ray cluster; None starts one here
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    retries: int = 3  # of a batch whose worker was lost


@dataclass(frozen=True)
class Expected:
    """A figure that somebody published, put beside ours in the report."""

    task: str
    value: float
    setting: str | None = None  # the label of a setting; None means every setting
    metric: str = "accuracy"
    source: str = ""


@dataclass(frozen=True)
class Setting:
    """One point of the sweep: everything that decides an output apart from the document."""

    label: str
    model: ModelSpec
    sampler: Any  # a name, a mapping with `name`, or a list of these (a composition); None: the model family's own
    cache: Any  # a name or a mapping; None: the family's own
    generate: GenerateSpec
    speculate: SpeculateSpec | None = None
    source: Source = field(default=NOWHERE, compare=False, repr=False)  # where its keys were given


@dataclass(frozen=True)
class Config:
    """A whole evaluation. `settings` is the expanded matrix."""

    name: str
    tasks: tuple[TaskSpec, ...]
    settings: tuple[Setting, ...]
    seed: int = 0
    data: str | None = None  # a folder of local data, BENCHMARK/SPLIT.jsonl; lm-eval's tasks take their documents there
    limit: int | None = None
    batch_size: int = 8
    warmup: int = 1  # batches decoded and thrown away before a setting's clock starts
    trace: int = 0  # documents per task and setting whose commit order is kept
    confidence: float = 0.95  # of the bootstrap intervals
    engine: EngineSpec = EngineSpec()
    confinement: str = "auto"  # of generated programs: namespaces, bubblewrap, docker, docker:IMAGE
    allow_unconfined_code: bool = False  # where programs cannot be confined (`confinement: none`: anywhere)
    expected: tuple[Expected, ...] = ()
    unknown: tuple[str, ...] = ()  # what a paper leaves open, printed in the report
    about: str = ""
    out: str | None = None
    source: Source = field(default=NOWHERE, compare=False, repr=False)

    def plain(self) -> dict[str, Any]:
        """The configuration as plain YAML values that `load` reads back: `None`s left out, the sweep spelled out
        point by point."""
        values = _prune(asdict(self), {"source"})
        points = values.pop("settings")  # in a sweep a list is a choice, so a composition goes in as the only one
        values["matrix"] = [
            {k: [v] if isinstance(v, list) else v for k, v in {**point, "model": setting.model.plain()}.items()}
            for point, setting in zip(points, self.settings, strict=True)
        ]
        return values

    def methods(self) -> dict[str, str]:
        """The curve that each setting, by its label, is a point of."""
        several = len({s.model for s in self.settings}) > 1
        return {s.label: method(s, several) for s in self.settings}

    def identity(self) -> dict[str, Any]:
        """What results depend on: `plain()` without where it runs and what it is compared with."""
        ignored = ("engine", "expected", "unknown", "about", "out", "name", "confidence")
        return {k: v for k, v in self.plain().items() if k not in ignored}

    def cells(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What the samples of each task and setting, by their labels, depend on. How many documents are asked, and
        what else the file holds, is not in it."""
        whole = {"seed": self.seed, "batch_size": self.batch_size}
        tasks = {t.label or t.name: _prune(asdict(t), {"label", "limit"}) for t in self.tasks}
        models = {s.label: {k: v for k, v in s.model.plain().items() if k not in WHERE} for s in self.settings}
        settings = {
            s.label: _prune({**asdict(s), "model": models[s.label]}, {"label", "source"}) for s in self.settings
        }
        return {(t, s): {**whole, "task": tasks[t], "setting": settings[s]} for t in tasks for s in settings}


# What `expected:` may name: the figures of a cell of the report.
FIGURES = (
    *("accuracy", "nfe", "nfe_equiv", "tpf", "tpf_mean", "tokens", "tokens_raw", "accepted_per_cycle"),
    *("seconds", "prefill_seconds", "decode_seconds", "tokens_per_second", "tokens_per_second_sample", "peak_mb"),
)

# The keys of a file are those of Config, with the sweep in place of the settings.
_AXES = ("model", "sampler", "cache", "generate", "speculate")
_TOP = [f.name for f in fields(Config) if f.name not in ("settings", "source")] + [*_AXES, "extends", "matrix"]


# -------------------------------------------------------------------------------------------------------------- reading


def parse(text: str, name: str) -> tuple[dict[str, Any], Source]:
    """YAML text to plain values and the lines of its keys. Errors: malformed, not a mapping, a key given twice."""
    try:
        return _Reader(text, name).read()
    except DllmError:
        raise
    except plain.ERRORS as error:
        raise plain.malformed(error, name) from None


class _Reader:
    """Builds the values of one text and notes where each key stands."""

    MOST = 100_000  # values; aliases of aliases would multiply without end

    def __init__(self, text: str, name: str):
        self.loader, self.name = plain.Loader(text), name
        self.places: dict[Path_, str] = {}
        self.own: dict[int, set[int]] = {}  # the keys that stand in a mapping itself, not in what it merges (`<<`)

    def read(self) -> tuple[dict[str, Any], Source]:
        node = self.loader.get_single_node()
        if node is None:
            raise DllmError(f"{self.name}: the file is empty; an evaluation needs at least `tasks:`")
        if not isinstance(node, yaml.MappingNode):
            raise DllmError(f"{self.place(node)}: expected `key: value` pairs")
        return self.value(node, ()), Source(self.name, self.places)

    def place(self, node: yaml.Node) -> str:
        return f"{self.name}, line {node.start_mark.line + 1}"

    def value(self, node: yaml.Node, path: Path_) -> Any:
        self.places.setdefault(path, self.place(node))
        if len(self.places) > self.MOST:
            raise DllmError(f"{self.place(node)}: more than {self.MOST} values, aliases written out")
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*path, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self.pairs(node, path)
        try:
            return self.loader.construct_object(node, deep=True)
        except plain.ERRORS as error:
            raise DllmError(f"{self.place(node)}: {getattr(error, 'problem', None) or error}") from None

    def pairs(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        own = self.own.setdefault(id(node), {id(key) for key, _ in node.value})
        self.loader.flatten_mapping(node)
        out: dict[str, Any] = {}
        given = set()
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise DllmError(f"{self.place(key_node)}: a key is a word, not a list or a mapping")
            key = str(self.loader.construct_object(key_node))
            if key in given and id(key_node) in own:
                raise DllmError(f"{self.place(key_node)}: key {key!r} is given twice")
            if id(key_node) in own:
                given.add(key)
            self.places[(*path, key)] = self.place(key_node)
            out[key] = self.value(child, (*path, key))
        return out


def read(path: str | Path, _seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Source]:
    """A file with its `extends:` chain merged in; the nearer file wins key by key, and lists are replaced whole."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = unknown("file", path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        raise DllmError(f"there is no configuration {path}{f' ({near})' if near else ''}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DllmError(f"cannot read {path}: {error}") from None
    data, source = parse(text, str(path))
    base = data.pop("extends", None)
    if base is None:
        return data, source
    parent = (path.parent / str(base)).resolve()
    if parent in (*_seen, path.resolve()):
        raise source.error(("extends",), f"{base} extends this file again")
    data_base, source_base = read(parent, (*_seen, path.resolve()))
    return _merge_keys(data_base, data), Source(str(path), {**source_base.places, **source.places})


def merge(base: Any, top: Any) -> Any:
    """`top` over `base`. Mappings merge, except that another `name` (of a sampler, a model) drops the old one's
    parameters."""
    if not (isinstance(base, dict) and isinstance(top, dict)) or ("name" in top and top["name"] != base.get("name")):
        return top
    return _merge_keys(base, top)


def _merge_keys(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    return {**base, **{k: merge(base[k], v) if k in base else v for k, v in top.items()}}


def override(data: dict[str, Any], assignment: str) -> dict[str, Any]:
    """`key.sub=value` applied to the plain values; the value is read as YAML.

    Setting a swept axis (`sampler=…` or `sampler.name=…`) replaces the sweep over it; setting one parameter
    (`sampler.tau=…`) changes that parameter at every point of the sweep.
    """
    key, equals, text = assignment.partition("=")
    path = _split(key.strip())
    if not equals or not path:
        raise DllmError(f"--set {assignment!r}: write key=value, for example --set sampler.name=credit")
    value = plain.value(text)
    whole = len(path) == 1 or path[1:] == ("name",)
    if path[0] in ("sampler", "generate") and isinstance(data.get("tasks"), list):
        entries = [_below_the_call(_own_names(entry), path, value, assignment) for entry in data["tasks"]]
        data = {**data, "tasks": entries}
    sweep = data.get("matrix")
    axes = sweep if isinstance(sweep, list) else [sweep] if isinstance(sweep, dict) else []
    for axis in axes:
        name = next((n for n in (key.strip(), path[0]) if n in axis), None)
        if name is None:
            continue
        if whole or name == key.strip():
            axis.pop(name)
        else:
            values = axis[name] if isinstance(axis[name], list) else [axis[name]]
            axis[name] = [_assign(_named(v), path[1:], value, assignment) for v in values]
    if axes and not any(set(axis) - {"label"} for axis in axes):
        data.pop("matrix")
    if path[0] in ("sampler", "model"):
        if path[0] in data:
            data[path[0]] = _named(data[path[0]])
        if whole:  # another name: the old one's parameters go with it
            return {**data, path[0]: _named(value)}
    return _assign(data, path, value, assignment)


def _own_names(entry: Any) -> Any:
    """A task's entry with lm-eval's `gen_kwargs` under our names in `generate`, so that there is one place to look."""
    options = entry.get("options") if isinstance(entry, dict) else None
    if not (isinstance(options, dict) and isinstance(options.get("gen_kwargs"), dict)):
        return entry
    said = translated(options["gen_kwargs"])
    methods = {"sampler": said.pop("sampler")} if "sampler" in said else {}
    rest = {k: v for k, v in options.items() if k != "gen_kwargs"}
    return {**methods, **entry, "options": rest, "generate": {**said, **(entry.get("generate") or {})}}


def _below_the_call(entry: Any, path: Path_, value: Any, assignment: str) -> Any:
    """A task's entry without what this call says instead; a parameter is changed in the task's own sampler too."""
    own = entry.get(path[0]) if isinstance(entry, dict) else None
    if own is None:
        return entry
    rest = {k: v for k, v in entry.items() if k != path[0]}
    if path[0] == "sampler":
        whole = len(path) == 1 or path[1:] == ("name",)
        return rest if whole else {**rest, "sampler": _assign(_named(own), path[1:], value, assignment)}
    said = path[1:2] if len(path) > 1 else value or ()
    return {**rest, "generate": {k: v for k, v in own.items() if k not in said} if isinstance(own, dict) else own}


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _assign(data: Any, path: Path_, value: Any, assignment: str) -> Any:
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(data, list):
        if not isinstance(head, int) or not 0 <= head < len(data):
            raise DllmError(f"--set {assignment!r}: {head!r} is not one of the positions 0 … {len(data) - 1}")
        return [*data[:head], _assign(data[head], rest, value, assignment), *data[head + 1 :]]
    if data is not None and not isinstance(data, dict):
        data = _named(data) if isinstance(data, str) else {}
    data = data or {}
    return {**data, str(head): _assign(data.get(str(head)), rest, value, assignment)}


def _split(key: str) -> Path_:
    return tuple(int(part) if part.isdigit() else part for part in key.split(".") if part)


# ------------------------------------------------------------------------------------------------------------- building


def load(config: Config | Mapping[str, Any] | str | Path, sets: Sequence[str] = (), **changes: Any) -> Config:
    """A `Config` from a YAML file, a mapping of the same keys, or a `Config`; `changes` (not None) and `sets` come
    last."""
    changes = {k: v for k, v in changes.items() if v is not None}
    if isinstance(config, Config):
        if sets:
            raise DllmError("overrides apply to a file or a mapping; change a Config with dataclasses.replace")
        return replace(config, **changes)
    data, source = gather(config, sets)
    return build({**data, **changes}, source)


def gather(config: Mapping[str, Any] | str | Path, sets: Sequence[str]) -> tuple[dict[str, Any], Source]:
    """The plain values of a file or mapping with the overrides applied, and where each was given."""
    if isinstance(config, Mapping):
        data, source = copy.deepcopy(dict(config)), NOWHERE
    else:
        data, source = read(config)
        data.setdefault("name", Path(config).stem)
    for assignment in sets:
        data = override(data, assignment)
        source = source.placed(_split(assignment.partition("=")[0].strip()), f"--set {assignment}")
    return data, source


def build(data: Mapping[str, Any], source: Source) -> Config:
    """Validate plain values and expand the sweep. Errors name the key, its line, and the nearest known key."""
    if "tune" in data:
        raise source.error(("tune",), "this file is for `dllm tune`; `dllm eval` has no use for the key")
    _known(data, _TOP, (), source)
    if not data.get("tasks"):
        raise source.error(("tasks",) if "tasks" in data else (), "no tasks; give for example `tasks: [word_problems]`")
    raw_tasks = data["tasks"] if isinstance(data["tasks"], list) else [data["tasks"]]
    raw_tasks = [_own_names(entry) for entry in raw_tasks]
    tasks = tuple(make(TaskSpec, _named(t), ("tasks", i), source) for i, t in enumerate(raw_tasks))
    labels = [task.label or task.name for task in tasks]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise source.error(("tasks", i), f"{label!r} is there twice; tell the two apart with `label:`")
    plain = {k: v for k, v in data.items() if k not in (*_AXES, "matrix", "tasks", "extends")}
    plain.setdefault("name", "eval")
    config: Config = make(Config, {**plain, "tasks": (), "settings": ()}, (), source)
    settings = tuple(_settings(data, source))
    for i, figure in enumerate(config.expected):
        where = ("expected", i)
        if figure.metric not in FIGURES:
            raise source.error((*where, "metric"), str(unknown("metric", figure.metric, FIGURES)))
        if figure.task not in labels:
            raise source.error((*where, "task"), str(unknown("task", figure.task, labels)))
        if figure.setting is not None and figure.setting not in [s.label for s in settings]:
            raise source.error(
                (*where, "setting"), str(unknown("setting", figure.setting, [s.label for s in settings]))
            )
    _check(config, source)
    return replace(config, tasks=tasks, settings=settings, source=source)


def _check(config: Config, source: Source) -> None:
    for name, low in (("batch_size", 1), ("warmup", 0), ("trace", 0)):
        if getattr(config, name) < low:
            raise source.error((name,), f"{getattr(config, name)} is too small; the least is {low}")
    if config.limit is not None and config.limit < 1:
        raise source.error(("limit",), f"{config.limit} leaves no document; the least is 1")
    if not 0 < config.confidence < 1:
        raise source.error(("confidence",), f"{config.confidence} is not between 0 and 1")


def _settings(data: Mapping[str, Any], source: Source) -> Iterable[Setting]:
    sweeps = data.get("matrix") or {}
    seen: dict[str, Setting] = {}
    for sweep, where in _sweeps(sweeps, source):
        named = sweep.pop("label", None)
        axes = {k: v if isinstance(v, list) else [v] for k, v in sweep.items()}
        for axis, values in axes.items():
            if axis.split(".")[0] not in _AXES:
                message = str(unknown("axis", axis, _AXES))
                raise source.error((*where, axis), message)
            if not values:
                raise source.error((*where, axis), "the list is empty, so the sweep has no point")
        for picks in itertools.product(*(range(len(values)) for values in axes.values())):
            point: dict[str, Any] = {k: v for k, v in data.items() if k in _AXES}
            chosen = {axis: axes[axis][i] for axis, i in zip(axes, picks, strict=True)}
            for axis, value in chosen.items():
                path = _split(axis)
                new = _named(value) if path[0] in ("model", "sampler") and len(path) == 1 else value
                old = _named(point.get(path[0])) if path[0] in ("model", "sampler") else point.get(path[0])
                point[path[0]] = merge(old, new) if len(path) == 1 else _assign(old, path[1:], new, axis)
            varying = {axis: value for axis, value in chosen.items() if len(axes[axis]) > 1 or axis == "sampler"}
            label = _label(named, varying, point)
            here = source
            for axis, i in zip(axes, picks, strict=True):
                here = here.placed(_split(axis), source.place((*where, axis, i)))
            setting = _setting(label, point, here)
            if label in seen and replace(setting, label="") != replace(seen[label], label=""):
                raise source.error(where, f"two settings are called {label!r}; give each a `label:`")
            if label not in seen:
                seen[label] = setting
                yield setting


def _sweeps(sweeps: Any, source: Source) -> Iterable[tuple[dict[str, Any], Path_]]:
    """A mapping is one product; a list of mappings is the union of their products."""
    if isinstance(sweeps, dict):
        yield dict(sweeps), ("matrix",)
    elif isinstance(sweeps, list) and all(isinstance(s, dict) for s in sweeps):
        for i, sweep in enumerate(sweeps):
            yield dict(sweep), ("matrix", i)
    else:
        raise source.error(("matrix",), "write `axis: [values]` pairs, or a list of such mappings")


def _label(named: Any, varying: dict[str, Any], point: Mapping[str, Any]) -> str:
    parts = [str(named)] if named else [describe(point.get("sampler") or "default")]
    for axis, value in varying.items():
        if axis == "sampler" or (named and len(varying) == 1):
            continue
        shown = describe(value)
        parts.append(f"{axis.removeprefix('generate.').removeprefix('sampler.')}={shown}")
    return " · ".join(parts)


def describe(spec: Any) -> str:
    """`{name: threshold, tau: 0.9}` as `threshold(tau=0.9)`, a composition with `+`."""
    if isinstance(spec, list):
        return "+".join(map(describe, spec))
    if not isinstance(spec, Mapping):
        return str(spec)
    rest = ", ".join(f"{k}={v}" for k, v in spec.items() if k != "name")
    name = str(spec.get("name", ""))
    return f"{name}({rest})" if rest else name


def method(setting: Setting, model: bool = False) -> str:
    """The name under which settings form one curve: sampler and cache (or how it is drafted) without parameters, and
    the model if asked."""
    if setting.speculate:
        options = setting.speculate.options
        names = [setting.speculate.drafter, *(options[k] for k in ("search", "length") if k in options)]
        words = ["plain"] if names[0] == "none" else ["drafted:", *map(_bare, names)]
    else:
        sampler = setting.sampler if isinstance(setting.sampler, list) else [setting.sampler or "default"]
        words = ["+".join(map(_bare, sampler))]
        words += [_bare(setting.cache)] if setting.cache and _bare(setting.cache) != "none" else []
        words += ["lookahead"] if setting.generate.lookahead else []
    return " ".join(words + ([Path(setting.model.title).name] if model else []))


def _bare(spec: Any) -> str:
    """The name of a sampler, cache or search without its parameters."""
    return str(spec["name"] if isinstance(spec, Mapping) else spec).partition(":")[0]


def _setting(label: str, point: Mapping[str, Any], source: Source) -> Setting:
    sampler = point.get("sampler")
    if isinstance(sampler, dict) and set(sampler) == {"name"}:
        sampler = sampler["name"]
    if sampler in ("default", ""):
        sampler = None
    if not (sampler is None or isinstance(sampler, str | list) or (isinstance(sampler, dict) and "name" in sampler)):
        raise source.error(
            ("sampler",), "a sampler is a name, a mapping with `name:` and parameters, or a list of these"
        )
    spec = point.get("speculate")
    return Setting(
        label=label,
        model=make(ModelSpec, _named(point.get("model") or {}), ("model",), source),
        sampler=sampler,
        cache=point.get("cache"),
        generate=make(GenerateSpec, point.get("generate") or {}, ("generate",), source),
        speculate=make(SpeculateSpec, {"verifier": spec} if isinstance(spec, str) else spec, ("speculate",), source)
        if spec
        else None,
        source=source,
    )


def _known(data: Any, names: Sequence[str], path: Path_, source: Source) -> None:
    if not isinstance(data, Mapping):
        raise source.error(path, f"expected `key: value` pairs, found {data!r}")
    for key in data:
        if key not in names:
            raise source.error((*path, key), str(unknown("key", str(key), names)))


def make(cls: type, data: Any, path: Path_, source: Source) -> Any:
    """A frozen dataclass from plain values, every key and type checked."""
    hints = typing.get_type_hints(cls, globals())
    members = {f.name: f for f in fields(cls) if not (cls is Config and f.name == "source")}
    _known(data, list(members), path, source)
    for name, member in members.items():
        if name not in data and member.default is MISSING and member.default_factory is MISSING:
            raise source.error(path, f"{name!r} is missing")
    values = {k: _cast(v, hints[k], (*path, k), source) for k, v in data.items()}
    try:
        return cls(**values)
    except DllmError as error:  # what a kind alone does not say
        raise source.error(path, str(error)) from None


def _cast(value: Any, hint: Any, path: Path_, source: Source) -> Any:
    """`value` as `hint` says: int to float and list to tuple are the only conversions."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options:
            try:
                return _cast(value, option, path, source)
            except DllmError:
                if len(options) == 1:
                    raise
        raise source.error(path, f"{value!r} is none of {', '.join(map(_spell, options))}")
    if origin is Literal:
        if value not in args:
            raise source.error(path, str(unknown("value", str(value), [str(a) for a in args])))
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_cast(v, args[0], (*path, i), source) for i, v in enumerate(items))
    if is_dataclass(hint):
        cls = typing.cast(type, hint)
        return value if isinstance(value, cls) else make(cls, value, path, source)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise source.error(path, f"expected `key: value` pairs, found {value!r}")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise source.error(path, f"expected {_spell(hint)}, found {value!r}")
    return value


def _spell(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(hint, "a list" if typing.get_origin(hint) is tuple else getattr(hint, "__name__", str(hint)))


def _prune(value: Any, drop: set[str]) -> Any:
    """Plain YAML values: tuples as lists, `None`s, empty mappings and the keys in `drop` left out."""
    if isinstance(value, Mapping):
        kept = {str(k): _prune(v, drop) for k, v in value.items() if v is not None and k not in drop}
        return {k: v for k, v in kept.items() if v != {}}
    if isinstance(value, list | tuple):
        return [_prune(v, drop) for v in value]
    return value
