"""A training recipe: what `configs/train/*.yaml` may say. Unknown keys are errors that name the nearest key."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dllm import spec as plain
from dllm.errors import DllmError, unknown


@dataclass(frozen=True)
class ModelSpec:
    """`start`: a model to go on from ("tiny", a folder, a Hugging Face id); without it a new one of these sizes."""

    start: str = ""
    hidden_size: int = 128
    layers: int = 6
    heads: int = 4
    intermediate_size: int = 352
    max_positions: int = 512
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class DataSpec:
    """`tasks`: weights of the built-in generators, or `jsonl`: a file of {"prompt", "answer"} lines.

    Windows: rows end at a multiple of 8 tokens; a share `long` of them has a window of random length up to `window`,
    a share `rare` one up to `max_window`. `chat`: prompts pass through the tokenizer's chat template, where it has one.
    """

    tasks: Mapping[str, float] = field(default_factory=dict)
    jsonl: str = ""
    chat: bool = True
    window: int = 64
    max_window: int = 128
    long: float = 0.3
    rare: float = 0.03
    max_length: int = 512


@dataclass(frozen=True)
class MaskSpec:
    """Which tokens of a row are masked.

    Shares of the rows are masked from a random column on (`reading`) or by difficulty (`hard`: whole values, hard ones
    first) instead of at random.
    The rate of a row is a uniform number raised to `power`: above 1 most rows keep most of their answer, so that more
    tokens are learned from what stands around them.
    """

    reading: float = 0.0
    hard: float = 0.0
    power: float = 1.0


@dataclass(frozen=True)
class OptimizerSpec:
    """`muon` (arXiv 2502.16982) for the layers' matrices at `lr`, AdamW for the rest at `rest_lr`; or all `adamw`.

    Muon's update is scaled to the size of AdamW's, so both names take learning rates of one magnitude.
    """

    name: Literal["muon", "adamw"] = "muon"
    lr: float = 1e-2
    rest_lr: float = 4e-3
    weight_decay: float = 0.01  # of the matrices only
    momentum: float = 0.95  # muon
    betas: tuple[float, ...] = (0.9, 0.98)  # AdamW
    clip: float = 1.0  # largest gradient norm


@dataclass(frozen=True)
class ScheduleSpec:
    """The rate rises over `warmup` steps, stays, and falls linearly to zero over the last `decay` of `steps`."""

    steps: int = 1000
    warmup: int = 100
    decay: int = 300

    def rate(self, step: int) -> float:
        """Multiplier of the learning rates at a step counted from 0."""
        up = (step + 1) / self.warmup if self.warmup else 1.0
        down = (self.steps - step) / self.decay if self.decay else 1.0
        return max(0.0, min(1.0, up, down))


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters (arXiv 2106.09685) through peft: `rank` 0 trains every weight."""

    rank: int = 0
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TrainConfig:
    """One run. `batch_size` rows a forward, `accumulate` forwards a step; `output` holds checkpoint, log and model."""

    output: str
    objective: Literal["diffusion", "autoregressive"] = "diffusion"
    loss: Literal["uniform", "elbo"] = "uniform"
    masks: MaskSpec = MaskSpec()
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    lora: LoraSpec = LoraSpec()
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: mixed precision, weights stay float32
    device: str = "auto"
    threads: int = 0  # of the CPU; 0: as torch decides
    log_every: int = 50
    save_every: int = 200
    tensorboard: bool = False

    def __post_init__(self) -> None:
        data, schedule = self.data, self.schedule
        if bool(data.tasks) == bool(data.jsonl):
            raise DllmError("a recipe names its data once: data.tasks or data.jsonl")
        if (data.tasks and not all(w >= 0 for w in data.tasks.values())) or (
            data.tasks and not sum(data.tasks.values())
        ):
            raise DllmError("data.tasks: weights must not be negative, and one must be positive")
        positive = {"batch_size": self.batch_size, "accumulate": self.accumulate, "schedule.steps": schedule.steps,
                    "log_every": self.log_every, "save_every": self.save_every, "data.max_length": data.max_length,
                    "optimizer.lr": self.optimizer.lr, "optimizer.rest_lr": self.optimizer.rest_lr,
                    "optimizer.clip": self.optimizer.clip}  # fmt: skip
        for name, value in positive.items():
            if value <= 0:
                raise DllmError(f"{name} must be positive, got {value}")
        if schedule.decay > schedule.steps or min(schedule.decay, schedule.warmup) < 0:
            raise DllmError(f"schedule: warmup and decay lie between 0 and steps ({schedule.steps})")
        if not 0 <= data.long + data.rare <= 1 or min(data.long, data.rare) < 0:
            raise DllmError("data.long and data.rare are shares: neither negative, together at most 1")
        masks = self.masks
        if min(masks.reading, masks.hard) < 0 or masks.reading + masks.hard > 1:
            raise DllmError("masks.reading and masks.hard are shares: neither negative, together at most 1")
        if masks.power <= 0:
            raise DllmError(f"masks.power must be positive, got {masks.power}")
        if self.loss == "elbo" and masks != MaskSpec():
            raise DllmError("loss: elbo is a bound for uniform random masks only; leave out masks")
        if self.lora.rank and not self.model.start:
            raise DllmError("lora.rank needs a model to adapt: set model.start")


@dataclass(frozen=True)
class Stage:
    """AdamW at `lr` for `steps`, linear warm-up over a tenth and linear decay over the rest. 0 steps skip the stage."""

    steps: int
    lr: float

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.lr > 0:
            raise DllmError(f"a stage has at least 0 steps and a positive lr, not {self.steps} and {self.lr}")


@dataclass(frozen=True)
class AlignConfig:
    """A recipe (`configs/align/*.yaml`). The learning rates fit the embedded pair; DEER uses 1e-4 and 5e-5 at 0.5 B.

    drafter, verifier   what `dllm.load` and `dllm.load_verifier` take; a causal drafter is turned into a dLLM first.
    layers      keep only the first layers of the drafter (a smaller copy), 0 = all.
    tasks       problems per built-in task whose prompts the verifier answers, or `prompts`: a file, one prompt a line.
    block       most masked tokens in a row: the k to draft with. `max_suffix`: most in stage two (the paper's 96).
    separator   close the block with the tokenizer's separator; draft with the same setting.
    alpha       1.01 is stable, 1.02 noisy, 1.05 diverges (section 4 of the paper).
    dtype       of the verifier and of the drafter that is saved. In bfloat16 the drafter learns under mixed precision:
                its weights stay float32 until then.
    """

    output: str
    drafter: str = "tiny"
    verifier: str = "tiny-ar"
    layers: int = 0
    tasks: Mapping[str, int] = field(default_factory=dict)
    prompts: str = ""
    max_new_tokens: int = 96
    block: int = 32
    max_suffix: int = 96
    separator: bool = True
    alpha: float = 1.01
    one: Stage = Stage(400, 2e-3)
    two: Stage = Stage(200, 1e-3)
    batch_size: int = 32
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    threads: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        if bool(self.tasks) == bool(self.prompts):
            raise DllmError("an alignment recipe names its prompts once: tasks or prompts")
        positive = ("block", "max_suffix", "batch_size", "max_new_tokens", "save_every")
        if any(getattr(self, name) < 1 for name in positive) or self.layers < 0:
            raise DllmError(f"{', '.join(positive)} must be positive, layers not negative")
        if self.alpha < 1:
            raise DllmError(f"alpha must be at least 1, got {self.alpha}")


def load_config(path: str | Path, overrides: Sequence[str] = (), kind: type = TrainConfig) -> Any:
    """The recipe in a YAML file, a TrainConfig or another `kind`, with `a.b=value` overrides applied."""
    path = Path(path)
    if not path.is_file():
        raise DllmError(f"no recipe {path}")
    try:
        raw = plain.load(path.read_text(encoding="utf-8"), str(path)) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise DllmError(f"cannot read {path}: {error}") from None
    if not isinstance(raw, dict):
        raise DllmError(f"{path}: a recipe is a mapping of keys")
    for item in overrides:
        _override(raw, item)
    return build(kind, raw)


def _override(raw: dict[str, Any], item: str) -> None:
    name, equals, text = item.partition("=")
    if not equals or not name:
        raise DllmError(f"--set takes key=value, got {item!r}")
    *parents, last = name.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise DllmError(f"--set {item}: {parent!r} is a value, not a section")
    raw[last] = plain.value(text)


def build(cls: Any, raw: Any, where: str = "") -> Any:
    """A frozen dataclass from nested mappings; DllmError for unknown keys, missing keys and wrong types."""
    if not isinstance(raw, Mapping):
        raise DllmError(f"{where or 'recipe'}: expected keys, got {raw!r}")
    types_ = get_type_hints(cls)
    for key in raw:
        if key not in types_:
            raise unknown("key", f"{where}.{key}".lstrip("."), [f"{where}.{k}".lstrip(".") for k in types_])
    required = [
        f.name for f in fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in raw]:
        raise DllmError(f"the recipe lacks {', '.join(missing)}")
    return cls(**{k: _value(types_[k], v, f"{where}.{k}".lstrip(".")) for k, v in raw.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in args:
            raise unknown(f"value of {where}", str(value), args)
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_value(args[0], v, where) for v in value)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {str(k): _value(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        return _number(value, where)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    name = "a list" if origin is tuple else "keys with values" if origin in (Union, types.UnionType) else _name(kind)
    raise DllmError(f"{where}: expected {name}, got {value!r}")


def _number(value: int | str, where: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise DllmError(f"{where}: expected a number, got {value!r}") from None


def _name(kind: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "keys with values")
