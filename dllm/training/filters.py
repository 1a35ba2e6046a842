"""Traces, training and evaluation of Learn2PD filters (arXiv 2509.25188), in minutes of CPU.

The teacher is the model's own one-token-a-step answer y: along the extremely greedy parallel path every column whose
prediction equals y is committed at once, and the filter learns to say which these are from the confidences alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dllm.call.arguments import CacheSpec, DecodingArguments
from dllm.call.generate import generate
from dllm.decoding.prediction import Prediction
from dllm.decoding.slots import Context, Needs, View, rank
from dllm.errors import DllmError
from dllm.models.files import replaced
from dllm.models.native import NativeModel
from dllm.samplers import quota
from dllm.samplers.base import Bundle, Method
from dllm.samplers.learn2pd import REACH, Filter, accepted, block_view, feature_of, tokenizer_hash

log = logging.getLogger(__name__)


class Traces(NamedTuple):
    """One row for each block and step; B columns of a block."""

    conf: Tensor  # (n, B) float32 confidence feature
    masked: Tensor  # (n, B) bool
    label: Tensor  # (n, B) bool: the prediction is the teacher's token
    real: Tensor  # (n, B) bool: columns of the block
    prompt: Tensor  # (n,) index of the prompt
    step: Tensor  # (n,) steps since the row began
    meta: dict[str, str]

    def save(self, path: str | Path) -> None:
        """Write them to a safetensors file."""
        with replaced(path) as draft:
            save_file({k: v.contiguous() for k, v in zip(self._fields[:6], self[:6], strict=True)}, draft, self.meta)

    @classmethod
    def load(cls, path: str | Path) -> Traces:
        """Read saved traces. Errors: a missing file, or one that holds none."""
        try:
            with safe_open(path, "pt") as file:
                return cls._make([*(file.get_tensor(k) for k in cls._fields[:6]), dict(file.metadata() or {})])
        except (OSError, SafetensorError) as error:
            raise DllmError(f"cannot read the traces {path}: {error}") from error

    def take(self, rows: Tensor) -> Traces:
        """Some rows of them."""
        return Traces._make([*(x[rows] for x in self[:6]), self.meta])

    def split(self, seed: int = 0) -> tuple[Traces, Traces, Traces]:
        """Training, validation and test rows, 80/10/10 by prompt: no block leaks across."""
        names: Tensor = self.prompt.unique()  # type: ignore[no-untyped-call]
        order = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
        cut = max(1, len(order) // 10)
        parts = (order[2 * cut :], order[:cut], order[cut : 2 * cut])
        train, validation, test = (self.take(torch.isin(self.prompt, part)) for part in parts)
        return train, validation, test


def join(tables: Sequence[Traces]) -> Traces:
    """Several traces as one; equal prompts of a seed stay together. Errors: different features, blocks or models."""
    first = tables[0]
    for other in tables[1:]:
        for key in ("feature", "block_length", "tokenizer", "model"):
            if other.meta.get(key) != first.meta.get(key):
                raise DllmError(f"traces differ in {key}: {first.meta.get(key)!r} and {other.meta.get(key)!r}")
    return Traces._make([*(torch.cat(x) for x in zip(*(t[:6] for t in tables), strict=True)), first.meta])


class Teacher(NamedTuple):
    """Per-column leaves: the teacher's answer."""

    ids: Tensor  # (B, L)


class Request(NamedTuple):
    """Per-row leaves: the row's place in the call."""

    row: Tensor  # (B,)


@dataclass(frozen=True, eq=False)
class Follow(Method):
    """Commits what agrees with the teacher and records every step; where nothing agrees, the teacher's surest column.

    With a `filter` the path is the filter's own (its mistakes included), and the labels are still the teacher's.
    """

    teacher: Tensor  # (B, L) ids, rows as the call's prompts
    feature: str
    size: int
    rows: list[tuple[Tensor, ...]] = field(default_factory=list)
    filter: Filter | None = None

    name: ClassVar[str] = "follow"

    def bundle(self, context: Context) -> Bundle:
        """The slots: `adjust` writes the teacher's tokens, `select` takes what agrees with them and records."""
        schedule = quota.Quota.of(context)

        def adjust(view: View, pred: Prediction) -> Prediction:
            if self.filter is not None:
                return pred
            return pred.rescored(pred.confidence, token=view.gather(view.columns[Teacher].ids))

        def select(view: View, soft: Prediction, score: Tensor) -> Tensor:
            raw = soft.raw
            agrees = raw.token == view.gather(view.columns[Teacher].ids)
            self.record(view, raw, agrees)
            if self.filter is None:
                return agrees
            top = rank(score, view.live) < schedule.count(view)[:, None]
            return accepted(self.filter.to(raw.cols.device), self.filter.tau, view, raw) | top

        return Bundle(
            select=select, adjust=(adjust,), needs=Needs(committed=True),
            columns=lambda canvas: Teacher(F.pad(self.teacher, (0, canvas.ids.shape[1] - self.teacher.shape[1]))),
            memory=lambda canvas: Request(torch.arange(len(canvas.start), device=canvas.start.device)),
        )  # fmt: skip

    def record(self, view: View, pred: Prediction, agrees: Tensor) -> None:
        """Note one step of every row: features, masks and labels of the block, (B, size) each."""
        width = (view.window.hi - view.window.lo)[:, None]
        real = torch.arange(self.size, device=width.device) < width
        conf, _ = block_view(view, feature_of(pred, self.feature), self.size, 0.0)
        masked, _ = block_view(view, view.masked.float(), self.size, 0.0)
        label, _ = block_view(view, agrees.float(), self.size, 0.0)
        table = (conf, (masked > 0.5) & real, (label > 0.5) & real, real, view.memory[Request].row, view.state.step)
        self.rows.append(tuple(x.cpu() for x in table))


def collect(
    model: NativeModel,
    prompts: list[str] | list[list[int]],
    *,
    max_new_tokens: int = 64,
    block_length: int = 32,
    feature: str = "log1m",
    filter: Filter | None = None,
    cache: CacheSpec | None = None,
    batch_size: int = 32,
    chat: bool | None = None,
) -> Traces:
    """Traces of the greedy parallel path (or of a filter's own path) against the model's one-token-a-step answers.

    feature "log1m" spreads out the confidences close to one, where most columns of a trained model are.
    """
    call: DecodingArguments = {
        "max_new_tokens": max_new_tokens, "block_length": block_length, "early_stop": False, "cache": cache,
        "batch_size": batch_size, "chat": chat, "sampler": "confidence",
    }  # fmt: skip
    rows: list[tuple[Tensor, ...]] = []
    for at in tqdm(range(0, len(prompts), batch_size), desc="traces", unit="batch"):
        some = prompts[at : at + batch_size]
        answers = generate(model, some, **call)
        width = max(len(a.sequences) for a in answers)
        teacher = torch.tensor([a.sequences + [0] * (width - len(a.sequences)) for a in answers], device=model.device)
        follow = Follow(teacher, feature, block_length, [], filter)
        following: DecodingArguments = {**call, "sampler": follow}
        for a, b in zip(answers, generate(model, some, **following), strict=True):
            if filter is None and a.sequences != b.sequences:
                raise DllmError("the greedy parallel path misses the teacher's answer: the model is not deterministic")
        rows += [(*r[:4], r[4] + at, r[5]) for r in follow.rows]
    meta = {
        "feature": feature, "block_length": str(block_length), "vocab_size": str(model.vocab_size),
        "family": model.family, "tokenizer": tokenizer_hash(model.tokenizer), "model": model.fingerprint(),
        "n_prompts": str(len(prompts)),
        "schedule": "confidence, one token a step", "on_policy": str(filter is not None),
    }  # fmt: skip
    return Traces._make([*(torch.cat(x) for x in zip(*rows, strict=True)), meta])


@dataclass(frozen=True)
class Recipe:
    """How a filter is trained. Defaults: seconds on one CPU thread for some ten thousand rows."""

    kind: str = "shared"
    hidden: int = 32  # of the shared kind; the block kind's is its block length
    epochs: int = 30
    batch_size: int = 64  # a few hundred prompts of a confident model give a few thousand rows at most
    lr: float = 3e-3
    weight_decay: float = 0.01
    precision: float = 0.98  # that tau has to reach on validation columns
    masked_only: bool = True  # False: committed columns are easy positives, as in the reference
    seed: int = 0


def train(traces: Traces, recipe: Recipe = Recipe(), start: Filter | None = None) -> Filter:
    """Fit a filter, keep the epoch of the best validation loss, and choose tau for the target precision there."""
    feature, size = traces.meta["feature"], int(traces.meta["block_length"])
    fit, validation, test = traces.split(recipe.seed)
    if not len(validation.prompt):
        raise DllmError("training a filter needs traces of at least three prompts")
    revealed = "fill" if recipe.masked_only else "model"
    filter_ = start or Filter(fresh(recipe, size), size, recipe.kind, feature, revealed)
    weights = {k: v.clone().requires_grad_() for k, v in filter_.weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    draws = torch.Generator().manual_seed(recipe.seed)
    best, kept, waited = float("inf"), filter_, 0
    for _ in tqdm(range(recipe.epochs), desc="filter", unit="epoch"):
        for rows in torch.randperm(len(fit.prompt), generator=draws).split(recipe.batch_size):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            loss_of(replace(filter_, weights=weights), fit.take(rows), recipe.masked_only).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        now = replace(filter_, weights={k: v.detach().clone() for k, v in weights.items()})
        with torch.no_grad():
            loss = float(loss_of(now, validation, recipe.masked_only))
        best, kept, waited = (loss, now, 0) if loss < best else (best, kept, waited + 1)
        if waited == 5:
            break
    p, label, _ = scores(kept, validation)
    kept = replace(kept, tau=cut_for(p, label, recipe.precision))
    figures = {f"test_{k}": f"{v:.4f}" for k, v in evaluate(kept, test).items()}
    meta = {**traces.meta, **figures, "target_precision": str(recipe.precision), "seed": str(recipe.seed)}
    return replace(kept, meta={**meta, "n_rows": str(len(traces.prompt)), "validation_loss": f"{best:.4f}"})


def fresh(recipe: Recipe, size: int) -> dict[str, Tensor]:
    """New weights, uniform in +-1/sqrt(inputs), from the recipe's seed."""
    draws = torch.Generator().manual_seed(recipe.seed)
    inputs, hidden, out = (size, size, size) if recipe.kind == "block" else (2 * (2 * REACH + 1) + 2, recipe.hidden, 1)

    def layer(rows: int, cols: int) -> tuple[Tensor, Tensor]:
        bound = cols**-0.5
        return tuple((2 * torch.rand(s, generator=draws) - 1) * bound for s in ((rows, cols), (rows,)))

    (w1, b1), (w2, b2) = layer(hidden, inputs), layer(out, hidden)
    return {"linear1.weight": w1, "linear1.bias": b1, "linear2.weight": w2, "linear2.bias": b2}


def loss_of(filter_: Filter, rows: Traces, masked_only: bool) -> Tensor:
    """Binary cross-entropy of the columns that count: the masked ones, or all."""
    counted = rows.masked if masked_only else rows.real
    z = filter_(rows.conf, rows.masked, rows.real)
    return F.binary_cross_entropy_with_logits(z[counted], rows.label[counted].float())


@torch.no_grad()
def scores(filter_: Filter, rows: Traces) -> tuple[Tensor, Tensor, Tensor]:
    """Filter probability, label and confidence of every masked column, each (m,)."""
    p = filter_(rows.conf, rows.masked, rows.real).sigmoid()
    return p[rows.masked], rows.label[rows.masked], rows.conf[rows.masked]


def cut_for(p: Tensor, label: Tensor, precision: float) -> float:
    """The smallest threshold on p above which at least `precision` of the labels are true; 1 where there is none."""
    order = p.argsort(descending=True)
    right = label[order].double().cumsum(0) / torch.arange(1, len(p) + 1)
    good = (right >= precision).nonzero()[:, 0]
    if not len(good):
        return 1.0
    last = int(good[-1])
    below = p[order[last + 1]] if last + 1 < len(p) else torch.tensor(0.0)
    return float(below.clamp(max=float(p[order[last]]) - 1e-6))


def evaluate(filter_: Filter, rows: Traces) -> dict[str, float]:
    """Offline figures on masked columns, beside those of one confidence threshold of equal precision.

    reveals: columns accepted a step and block; `threshold_` figures: the plain confidence at the same precision.
    """
    p, label, conf = scores(filter_, rows)
    if not len(p):
        return {}
    chosen, steps = p > filter_.tau, len(rows.prompt)
    precision = float(label[chosen].float().mean()) if bool(chosen.any()) else 1.0
    plain = conf > cut_for(conf, label, precision)
    bins = (p * 10).long().clamp(max=9)
    ece = sum(
        float((bins == b).float().mean() * (p[bins == b].mean() - label[bins == b].float().mean()).abs())
        for b in range(10)
        if bool((bins == b).any())
    )
    return {
        "precision": precision,
        "recall": float(label[chosen].sum() / label.sum().clamp(min=1)),
        "false_positive_rate": float((chosen & ~label).sum() / (~label).sum().clamp(min=1)),
        "auroc": auroc(p, label),
        "confidence_auroc": auroc(conf, label),
        "ece": ece,
        "reveals": float(chosen.sum()) / steps,
        "threshold_reveals": float(plain.sum()) / steps,
        "threshold_recall": float(label[plain].sum() / label.sum().clamp(min=1)),
        "oracle_reveals": float(label.sum()) / steps,
    }


def auroc(p: Tensor, label: Tensor) -> float:
    """Probability that a right column scores above a wrong one, ties half."""
    values, rank = p.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    count = torch.bincount(rank, minlength=len(values)).double()
    mean = count.cumsum(0) - (count - 1) / 2
    ones = float(label.sum())
    zeros = len(p) - ones
    if not ones or not zeros:
        return 1.0
    return (float(mean[rank][label].sum()) - ones * (ones + 1) / 2) / (ones * zeros)
