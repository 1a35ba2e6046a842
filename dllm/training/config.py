"""A training recipe: what `configs/train/*.yaml` and `configs/align/*.yaml` may say; `dllm.spec` reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from dllm import spec
from dllm.errors import DllmError, unknown
from dllm.models.arguments import Checkpoint
from dllm.spec import param


@dataclass(frozen=True)
class Section:
    """Base of a recipe and its parts: whoever makes them, their values are checked."""

    def __post_init__(self) -> None:
        spec.check(self, "a recipe")


@dataclass(frozen=True)
class ModelSpec(Section):
    """`start`: a model to go on from; without it a new one of these sizes."""

    start: Checkpoint | None = param(None, "what dllm.load takes: a name, or a mapping of it and other arguments")
    hidden_size: int = param(128, "the embedded model's, as are the other sizes; an even multiple of `heads`", low=1)
    layers: int = param(6, "of attention and MLP", low=1)
    heads: int = param(4, "of attention", low=1)
    intermediate_size: int = param(352, "columns inside the MLP", low=1)
    max_positions: int = param(512, "tokens of prompt and answer, at most", low=1)
    rope_theta: float = param(10000.0, "base of the rotary frequencies", above=0)


@dataclass(frozen=True)
class DataSpec(Section):
    """`tasks`: weights of the built-in generators, or `jsonl`: a file of {"prompt", "answer"} lines.

    Windows: rows end at a multiple of 8 tokens; a share `long` of them has a window of random length up to `window`,
    a share `rare` one up to `max_window`. `chat`: prompts pass through the tokenizer's chat template, where it has one.
    """

    tasks: Mapping[str, float] = param({}, "weights of the built-in generators")
    jsonl: str = param("", 'a file of {"prompt", "answer"} lines')
    chat: bool = param(True, "prompts pass through the tokenizer's chat template, where it has one")
    window: int = param(64, "longest window of the share `long` of the rows, in tokens")
    max_window: int = param(128, "longest window of the share `rare`")
    long: float = param(0.3, "share of the rows with a window of random length up to `window`", low=0, high=1)
    rare: float = param(0.03, "share of the rows with one up to `max_window`", low=0, high=1)
    max_length: int = param(512, "tokens of a row, at most", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tasks and (min(self.tasks.values()) < 0 or not sum(self.tasks.values())):
            raise DllmError("data.tasks: weights must not be negative, and one must be positive")
        if self.long + self.rare > 1:
            raise DllmError("data.long and data.rare are shares: together at most 1")


@dataclass(frozen=True)
class MaskSpec(Section):
    """Which tokens of a row are masked.

    Shares of the rows are masked from a random column on (`reading`) or by difficulty (`hard`: whole values, hard ones
    first) instead of at random.
    The rate of a row is a uniform number raised to `power`: above 1 most rows keep most of their answer, so that more
    tokens are learned from what stands around them.
    """

    reading: float = param(0.0, "share of the rows that are masked from a random column on", low=0, high=1)
    hard: float = param(0.0, "share that is masked by difficulty: whole values, hard ones first", low=0, high=1)
    power: float = param(1.0, "the rate is a uniform number raised to it; above 1 most of an answer stays", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reading + self.hard > 1:
            raise DllmError("masks.reading and masks.hard are shares: together at most 1")


@dataclass(frozen=True)
class OptimizerSpec(Section):
    """`muon` (arXiv 2502.16982) for the layers' matrices at `lr`, AdamW for the rest at `rest_lr`; or all `adamw`.

    Muon's update is scaled to the size of AdamW's, so both names take learning rates of one magnitude.
    """

    name: Literal["muon", "adamw"] = "muon"
    lr: float = param(1e-2, "of the layers' matrices", above=0)
    rest_lr: float = param(4e-3, "of everything else", above=0)
    weight_decay: float = param(0.01, "of the matrices only")
    momentum: float = param(0.95, "of muon")
    betas: tuple[float, ...] = param((0.9, 0.98), "of AdamW")
    clip: float = param(1.0, "largest gradient norm", above=0)


@dataclass(frozen=True)
class ScheduleSpec(Section):
    """The rate rises over `warmup` steps, stays, and falls linearly to zero over the last `decay` of `steps`."""

    steps: int = param(1000, "of the optimizer", low=1)
    warmup: int = param(100, "steps over which the rate rises", low=0)
    decay: int = param(300, "last steps, over which it falls to zero", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay > self.steps:
            raise DllmError(f"schedule: decay lies between 0 and steps ({self.steps})")

    def rate(self, step: int) -> float:
        """Multiplier of the learning rates at a step counted from 0."""
        up = (step + 1) / self.warmup if self.warmup else 1.0
        down = (self.steps - step) / self.decay if self.decay else 1.0
        return max(0.0, min(1.0, up, down))


@dataclass(frozen=True)
class LoraSpec(Section):
    """Low-rank adapters (arXiv 2106.09685) through peft: `rank` 0 trains every weight."""

    rank: int = param(0, "0 trains every weight", low=0)
    alpha: int = param(16, "scale of the update, over the rank")
    dropout: float = param(0.0, "of the adapters' input", low=0, high=1)
    targets: tuple[str, ...] = param(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "modules that get an adapter"
    )


@dataclass(frozen=True)
class TrainConfig(Section):
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
    batch_size: int = param(64, "rows of a forward", low=1)
    accumulate: int = param(1, "forwards of a step", low=1)
    seed: int = param(0, "of weights, data and masks")
    precision: Literal["float32", "bfloat16"] = param("float32", "bfloat16: mixed precision, weights stay float32")
    device: str = param("auto", "cuda, mps, cpu, or the best there is")
    threads: int = param(0, "of the CPU; 0: as torch decides", low=0)
    log_every: int = param(50, "steps between two lines of the log", low=1)
    save_every: int = param(200, "steps between two checkpoints", low=1)
    tensorboard: bool = param(False, "also log for TensorBoard")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.data.tasks) == bool(self.data.jsonl):
            raise DllmError("a recipe names its data once: data.tasks or data.jsonl")
        if self.loss == "elbo" and self.masks != MaskSpec():
            raise DllmError("loss: elbo is a bound for uniform random masks only; leave out masks")
        if self.lora.rank and self.model.start is None:
            raise DllmError("lora.rank needs a model to adapt: set model.start")


@dataclass(frozen=True)
class Stage(Section):
    """AdamW at `lr` for `steps`, linear warm-up over a tenth and linear decay over the rest. 0 steps skip the stage."""

    objective: object  # what `dllm.training.alignment.registry` reads: a name, name:key=value, or a mapping
    steps: int
    lr: float

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.lr > 0:
            raise DllmError(f"a stage has at least 0 steps and a positive lr, not {self.steps} and {self.lr}")


@dataclass(frozen=True)
class Answers(Section):
    """What every recipe says that learns from a verifier's own answers (`configs/align/*.yaml`)."""

    output: str
    verifier: Checkpoint = param(Checkpoint("tiny-ar"), "what dllm.load_verifier takes")
    tasks: Mapping[str, int] = param({}, "problems per built-in task whose prompts the verifier answers")
    prompts: str = param(
        "", "or a file: a prompt a line, or .jsonl of chat messages; `free`: the verifier makes up what users say"
    )
    count: int = param(1000, "how many of those that it makes up", low=1)
    openings: tuple[str, ...] = param((), "how some of these begin, as `Summarize:`, so that they are of more kinds")
    holdout: tuple[str, ...] = param((), "files that are measured on: their prompts are never learned from")
    data: str = param("", "file of its answers, made where it is missing; by default one in `output`")
    max_new_tokens: int = param(96, "tokens of an answer of the verifier", low=1)
    temperature: float = param(0.0, "of the answers; 0: greedy", low=0)
    top_p: float = param(1.0, "mass of the tokens that answers are drawn from", above=0, high=1)
    sampling_batch: int = param(32, "answers that are made at once", low=1)
    batch_size: int = param(32, "rows of a forward", low=1)
    seed: int = param(0, "of weights, problems and masks")
    dtype: Literal["float32", "bfloat16"] = param(
        "float32", "of the verifier, and of what is saved; it learns under mixed precision in float32"
    )
    device: str = param("auto", "cuda, mps, cpu, or the best there is")
    threads: int = param(0, "of the CPU; 0: as torch decides", low=0)
    save_every: int = param(200, "steps between two checkpoints", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (bool(self.tasks) and bool(self.prompts)) or not (self.tasks or self.prompts or self.data):
            raise DllmError("a recipe names its prompts once: tasks or prompts, or only data that was made before")
        if self.openings and self.prompts != "free":
            raise DllmError("openings are how made-up prompts begin: they need prompts: free")
        self.check_files()

    @property
    def answers(self) -> Path:
        """The file of the verifier's answers."""
        return Path(self.data) if self.data else Path(self.output) / "answers.jsonl"

    def check_files(self) -> None:
        """Errors: what is measured on would be read as training data."""
        measured = {Path(name).resolve() for name in self.holdout}
        if named := [name for name in (self.prompts, self.data) if name and Path(name).resolve() in measured]:
            raise DllmError(f"{named[0]} is held out: it is measured on, and never learned from")


@dataclass(frozen=True)
class RecastSpec(Section):
    """How a causal drafter becomes a dLLM; its weights stay."""

    block_size: int | None = param(
        None, "attention in blocks of so many tokens (1: a token sees those before it); null: everything", low=1
    )
    shift: int = param(0, "1: position i is predicted in row i - 1, as the causal model did it", low=0, high=1)
    mask: str = param("", "a special token that no text holds; by default the tokenizer's mask token")


@dataclass(frozen=True)
class Taught(Answers):
    """A recipe that has a drafter to begin with."""

    drafter: Checkpoint = param(Checkpoint("tiny"), "what dllm.load takes; a causal one is turned into a dLLM first")
    block: int = param(32, "most masked tokens in a row: the k to draft with", low=1)


@dataclass(frozen=True)
class AlignConfig(Taught):
    """A recipe for a drafter. The learning rates fit the embedded pair; DEER uses 1e-4 and 5e-5 at 0.5 B."""

    layers: int = param(0, "keep only the first layers of the drafter (a smaller copy), 0 = all", low=0)
    recast: RecastSpec = RecastSpec()
    lora: LoraSpec = LoraSpec()
    separator: bool | str = param(
        True, "close the block with the tokenizer's separator, or with this token; draft with the same setting"
    )
    pack: int = param(0, "tokens of a row that several texts share; 0: a text a row", low=0)
    accumulate: int = param(1, "forwards of a step", low=1)
    checkpointing: bool = param(False, "compute activations again in the backward: less memory, a third more time")
    trim: int = param(0, "ids drafts are made of, the most frequent in the answers, see `dllm trim`; 0 = all", low=0)
    stages: tuple[Stage, ...] = (Stage("continuation", 400, 2e-3), Stage("refinement", 200, 1e-3))


@dataclass(frozen=True)
class PairHeadConfig(Taught):
    """A recipe for a pair head: `drafter` is what dllm.speculate takes, and stays as it is."""

    rank: int = param(32, "enough for a vocabulary of 664; DSpark has 256 at 150 000", low=1)
    candidates: int = param(16, "of each slot, with which it learns; DFlash 2's", low=2)
    steps: int = param(1500, "AdamW, linear warm-up over a tenth and linear decay over the rest", low=1)
    lr: float = param(1e-2, "the drafter stands still, so that a coarse rate does no harm", above=0)


@dataclass(frozen=True)
class HeadRecipe(Answers):
    """A recipe for a head over the verifier's hidden states; `batch_size` counts texts of a step."""

    taps: tuple[int, ...] = param((), "layers of the verifier that are read, at most its last but one")
    mask: str = param("", "a special token of the verifier's that no text holds")
    layers: int = param(1, "of the head", low=1)
    intermediate_size: int = param(0, "columns inside its MLP; 0: the verifier's", low=0)
    window: int = param(16, "states that are seen: the cost of a draft is flat in the length of the text", low=2)
    rope_theta: float = param(100.0, "of such a window", above=0)
    block: int = param(4, "slots of a draft", low=2)
    rank: int = param(64, "of the Markov head", low=1)
    vocabulary: int = param(8192, "most frequent ids, which are drafted", low=1)
    head_rank: int = param(0, "of an output head of its own in two factors (SlimSpec); 0: the verifier's rows", low=0)
    decay: float = param(0.8, "weight of a slot over that of the one before it", above=0, high=1)
    held_out: float = param(0.03, "share of the answers that measure tau", low=0, high=0.5)
    anchors: int = param(32, "blocks of a text in a step, at most", low=1)
    optimizer: OptimizerSpec = OptimizerSpec("muon", lr=1e-2, rest_lr=2e-3)
    schedule: ScheduleSpec = ScheduleSpec(1000, 20, 600)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.taps or not self.mask:
            raise DllmError("a recipe of a head names the layers that it reads (taps) and its mask token (mask)")


Recipe: TypeAlias = AlignConfig | PairHeadConfig | HeadRecipe
# what `dllm align` takes, by the `kind` that a file says
RECIPES: dict[str, type[Recipe]] = {"drafter": AlignConfig, "pair-head": PairHeadConfig, "head": HeadRecipe}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The recipe of `dllm train` in a YAML file, with `a.b=value` overrides applied."""
    return spec.build(TrainConfig, *_read(path, overrides))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of `dllm align` in a YAML file, of what its `kind` says. Errors: it says none, or an unknown one."""
    data, source = _read(path, overrides)
    if "kind" not in data:
        raise source.error((), f"'kind' is missing: {', '.join([*RECIPES][:-1])} or {[*RECIPES][-1]}")
    kind = str(data.pop("kind"))
    if kind not in RECIPES:
        raise source.error(("kind",), unknown("kind of recipe", kind, RECIPES))
    return spec.build(RECIPES[kind], data, source)


def recipe_schema(kind: str) -> spec.Json:
    """The JSON Schema of such a file."""
    known = spec.keys_of(RECIPES[kind])
    said = {"kind": {"const": kind, "description": "what the recipe is of"}}
    return spec.document({**known, "properties": said | known["properties"], "required": ["kind", *known["required"]]})


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[spec.Json, spec.Source]:
    data, source = spec.read(path, "recipe")
    for text in overrides:
        data, source = spec.override(data, source, text)
    return data, source
