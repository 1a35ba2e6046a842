"""Learn2PD: a tiny network reads the block's confidences and says which columns are final (arXiv 2509.25188)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllm.errors import DllmError
from dllm.models.files import replaced
from dllm.samplers import Bundle, Constant, Context, Method, Needs, Prediction, View, param, quota, rank

FORMAT = "dllm-filter-1"
FEATURES = ("prob", "log1m", "negent")
KINDS = ("block", "shared")
REACH = 4  # neighbours on each side that the position-shared kind sees
EMBEDDED = "learn2pd-tiny.safetensors"


@dataclass(frozen=True, eq=False)
class Filter:
    """A two-layer network from the confidences of a block to one logit a column.

    kind     block   the paper's: absolute positions, two B x B layers (2 B^2 + 2 B parameters, 2112 at B = 32).
             shared  one small network for every position, fed with its neighbourhood and the share of masks: any B.
    feature  prob: probability of the proposed token; log1m: -ln(1 - prob); negent: negative entropy in nats.
    revealed "fill": committed columns count as sure (1 for prob); "model": the model's own answer, the reference.
    """

    weights: dict[str, Tensor]  # linear1.weight, linear1.bias, linear2.weight, linear2.bias; float32
    block_length: int
    kind: str = "block"
    feature: str = "prob"
    revealed: str = "fill"
    tau: float = 0.96  # LLaDA in the released script
    meta: Mapping[str, str] | None = None  # where it came from: model, tokenizer, data, validation figures

    def __post_init__(self) -> None:
        wanted = {"kind": KINDS, "feature": FEATURES, "revealed": ("fill", "model")}
        for key, choices in wanted.items():
            if (given := vars(self)[key]) not in choices:
                raise DllmError(f"filter: {key}={given!r} must be one of {', '.join(choices)}")
        shapes = {key: tuple(value.shape) for key, value in self.weights.items()}
        size, hidden = self.inputs, shapes.get("linear1.bias", (0,))[0]
        out = self.block_length if self.kind == "block" else 1
        expected = {
            "linear1.weight": (hidden, size), "linear1.bias": (hidden,),
            "linear2.weight": (out, hidden), "linear2.bias": (out,),
        }  # fmt: skip
        if shapes != expected:
            raise DllmError(
                f"filter: tensors {shapes} do not fit a {self.kind} filter of block_length={self.block_length}"
            )

    @property
    def inputs(self) -> int:
        """How many numbers the network reads for a block, or a column."""
        return self.block_length if self.kind == "block" else 2 * (2 * REACH + 1) + 2

    def __call__(self, conf: Tensor, masked: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits (B, W) for the confidence features and masks (B, W) of a block; a short block is padded, then cut.

        `real` (B, W): columns of the block, for rows whose block is shorter than W.
        """
        w, x = self.weights, self.arrange(conf, masked, torch.ones_like(masked) if real is None else real)
        hidden = F.relu(F.linear(x, w["linear1.weight"], w["linear1.bias"]))
        out = F.linear(hidden, w["linear2.weight"], w["linear2.bias"])
        return out[:, : conf.shape[1]] if self.kind == "block" else out[..., 0]

    def to(self, device: torch.device) -> Filter:
        """The same filter with its weights there."""
        return replace(self, weights={key: value.to(device) for key, value in self.weights.items()})

    def arrange(self, conf: Tensor, masked: Tensor, real: Tensor) -> Tensor:
        """The network's input: (B, block_length), or (B, W, inputs) for the shared kind."""
        conf = conf.float()
        if self.revealed == "fill":
            conf = torch.where(masked, conf, fill_of(self.feature))
        conf = torch.where(real, conf, 0.0)
        if self.kind == "block":
            return F.pad(conf, (0, self.block_length - conf.shape[1]))
        return neighbourhood(conf, masked, real)

    def fingerprint(self) -> str:
        """Sixteen hex digits of its weights and settings."""
        own = repr((self.kind, self.block_length, self.feature, self.revealed, self.tau)).encode()
        weights = b"".join(self.weights[key].float().numpy().tobytes() for key in sorted(self.weights))
        return hashlib.sha256(own + weights).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """One safetensors file, float32, with everything that a loader has to check as metadata."""
        own = {"format": FORMAT, "kind": self.kind, "block_length": str(self.block_length), "feature": self.feature}
        own |= {"revealed": self.revealed, "tau": repr(self.tau)}
        with replaced(path) as draft:
            save_file({k: v.float().contiguous() for k, v in self.weights.items()}, draft, {**(self.meta or {}), **own})

    @classmethod
    def load(cls, path: str | Path) -> Filter:
        """Read a saved filter, or the reference's `.pth`. Errors: a missing file, or one that is no filter."""
        if Path(path).suffix in (".pth", ".pt"):
            return cls.convert(path)
        try:
            with safe_open(path, "pt") as file:
                meta = dict(file.metadata() or {})
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DllmError(f"cannot read the filter {path}: {error}") from error
        if meta.get("format") != FORMAT:
            raise DllmError(f"{path} is no filter: neither one written by `dllm filter train` nor the reference's .pth")
        kind, size, tau = meta["kind"], int(meta["block_length"]), float(meta["tau"])
        return cls(weights, size, kind, meta["feature"], meta["revealed"], tau, meta)

    @classmethod
    def convert(cls, path: str | Path, tau: float = 0.96) -> Filter:
        """The reference's `.pth` (a state dict of linear1 and linear2), read with weights_only.

        It was trained on the model's answers at committed columns too, so it is fed with these.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            weights = {
                key: state[key].float() for key in ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
            }
        except Exception as error:  # torch.load raises whatever the archive makes it raise
            raise DllmError(f"{path} is no state dict of a Learn2PD filter: {error}") from error
        return cls(
            weights, weights["linear1.weight"].shape[1], revealed="model", tau=tau, meta={"source": Path(path).name}
        )

    def check(self, context: Context) -> None:
        """Errors: a block longer than the filter's, another vocabulary, another tokenizer."""
        if self.kind == "block" and context.block_length > self.block_length:
            raise DllmError(
                f"learn2pd: the filter was trained for blocks of {self.block_length} columns, not "
                f"{context.block_length}: use block_length={self.block_length}, or train one of kind 'shared'"
            )
        meta = self.meta or {}
        if int(meta.get("vocab_size", context.vocab_size)) != context.vocab_size:
            raise DllmError(
                f"learn2pd: the filter was trained on a model with {meta['vocab_size']} tokens; this one has "
                f"{context.vocab_size}. Train one with: dllm filter train"
            )
        ours = tokenizer_hash(context.tokenizer)
        if ours and meta.get("tokenizer") and meta["tokenizer"] != ours:
            raise DllmError(
                "learn2pd: the filter was trained with another tokenizer; train one with: dllm filter train"
            )


def fill_of(feature: str) -> float:
    """What a committed column counts as: the top of the feature's scale."""
    return {"prob": 1.0, "log1m": 20.0, "negent": 0.0}[feature]


def neighbourhood(conf: Tensor, masked: Tensor, real: Tensor) -> Tensor:
    """(B, W, inputs) what the shared kind sees of a column: confidences and masks around it, share of masks, best."""
    span = 2 * REACH + 1
    around = F.pad(conf, (REACH, REACH)).unfold(1, span, 1)  # (B, W, span)
    open_ = F.pad(masked.float(), (REACH, REACH)).unfold(1, span, 1)
    share = (masked.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)).expand_as(conf)  # of its own columns
    best = conf.masked_fill(~masked, -torch.inf).amax(1, keepdim=True).nan_to_num(neginf=0.0).expand_as(conf)
    return torch.cat([around, open_, share[..., None], best[..., None]], -1)


def feature_of(pred: Prediction, feature: str) -> Tensor:
    """(B, W) the confidence feature of a prediction, float32."""
    if feature == "negent":
        return pred.negative_entropy.float()
    if feature == "log1m":
        return (-torch.log1p(-pred.confidence.double())).clamp(max=20.0).float()
    return pred.confidence.float()


def tokenizer_hash(tokenizer: object) -> str:
    """Sixteen hex digits of a tokenizer's vocabulary; empty without one."""
    if not hasattr(tokenizer, "get_vocab"):  # None, too  # foreign
        return ""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()[:16]


def block_view(view: View, values: Tensor, size: int, fill: float) -> tuple[Tensor, Tensor]:
    """A table (B, W) over the columns of the step as (B, size) over those of the window, and where each came from."""
    at = torch.where(view.inside, view.cols - view.window.lo[:, None], size).clamp(max=size)
    table = values.new_full((values.shape[0], size + 1), fill)
    return table.scatter(1, at, values)[:, :size], at


def accepted(filter_: Filter, tau: float, view: View, pred: Prediction) -> Tensor:
    """(B, W) bool: candidates whose filter probability exceeds tau."""
    size = filter_.block_length if filter_.kind == "block" else view.canvas.ids.shape[1]
    conf, at = block_view(view, feature_of(pred, filter_.feature), size, 0.0)
    masked, _ = block_view(view, view.masked.float(), size, 0.0)
    width = (view.window.hi - view.window.lo)[:, None]
    real = torch.arange(size, device=conf.device) < width
    sure = filter_(conf, real & (masked > 0.5), real).sigmoid() > tau  # (B, size)
    spare = torch.cat([sure, torch.zeros_like(sure[:, :1])], 1)
    return spare.gather(1, at) & view.live


Given: TypeAlias = Filter | str | Path | None


@dataclass(frozen=True)
class Learn2PD(Method):
    """Commit the columns that a trained filter holds for final, and always the schedule's most confident ones.

    A filter belongs to a model: train one with `dllm filter collect` and `dllm filter train`. The default is the one of
    the embedded model.
    """

    filter: Given = param(None, "path of a filter (the reference's .pth too), or a Filter; None: the embedded model's")
    tau: float | None = param(None, "None: the filter's own, chosen on validation data; 1 accepts nothing", high=1)

    name: ClassVar[str] = "learn2pd"
    source: ClassVar[str] = "Learn2PD, arXiv 2509.25188"
    cost: ClassVar[str] = "one row, the window's columns, and a filter of two small layers"

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection. Errors: a filter of another model or block."""
        given = self.filter
        if given is None:
            given = Filter.load(str(files("dllm.assets").joinpath(EMBEDDED)))
        elif not isinstance(given, Filter):
            given = Filter.load(given)
        given.check(context)
        tau = given.tau if self.tau is None else self.tau
        schedule, network = quota.Quota.of(context), Constant(given.to)

        def select(view: View, soft: Prediction, score: Tensor) -> Tensor:
            return accepted(network.on(view.cols.device), tau, view, soft) | (
                rank(score, view.live) < schedule.count(view)[:, None]
            )

        return Bundle(select=select, needs=Needs(committed=given.revealed == "model"))
