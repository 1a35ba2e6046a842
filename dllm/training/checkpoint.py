"""Checkpoints that survive a kill and a full disk: written beside the old one, synced, then renamed over it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from dllm import spec
from dllm.errors import DllmError
from dllm.models.files import replaced
from dllm.training.config import Answers, ScheduleSpec, TrainConfig

CHECKPOINT = "checkpoint.pt"
# may differ on resume
FREE = (
    "output", "device", "threads", "log_every", "save_every", "tensorboard", "schedule", "checkpointing",
    "sampling_batch",
)  # fmt: skip


def save_atomically(value: object, path: Path) -> None:
    """Write `value` to `path`; whatever fails, `path` holds the old content or the new, never a part of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as draft, draft.open("wb") as file:
            torch.save(value, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into RuntimeError
        kept = "the checkpoint before it is kept" if path.exists() else "there was none before it"
        raise DllmError(f"could not save {path}: {error}; {kept}. Free some space and go on with --resume") from error


def read(path: Path) -> dict[str, Any]:
    """The checkpoint at `path` (tensors and plain values only)."""
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return saved
    except FileNotFoundError:
        raise DllmError(f"nothing to resume: no {path}; start without --resume") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise DllmError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error


def begin(config: TrainConfig | Answers, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from, None for a new run. Errors: none to resume, one of another recipe or in the way."""
    path = Path(config.output) / CHECKPOINT
    if resume:
        saved = read(path)
        _check_recipe(config, saved["recipe"], saved["step"])
        return saved
    if path.exists():
        raise DllmError(f"{path} exists: go on with --resume, or choose another output")
    return None


def recipe(config: TrainConfig | Answers) -> dict[str, object]:
    """The recipe as plain values, as it is stored in a checkpoint."""
    return {name: spec.plain(value) for name, value in vars(config).items()}


def _check_recipe(config: TrainConfig | Answers, saved: dict[str, Any], step: int) -> None:
    """DllmError unless going on from `step` under `config` repeats the run that made the checkpoint.

    The schedule may change where it has had no effect yet: a run can be prolonged before its decay.
    """
    defaults = {f.name: spec.plain(f.default) for f in fields(config) if f.default is not MISSING}
    # a key that the checkpoint lacks came later, and had no effect before
    mine, theirs = (dict(spec.flat(values, Mapping)) for values in (recipe(config), {**defaults, **saved}))
    differ = [k for k in mine | theirs if mine.get(k) != theirs.get(k) and k.split(".")[0] not in FREE]
    if isinstance(config, TrainConfig):
        old = spec.build(ScheduleSpec, saved["schedule"])
        if any(old.rate(s) != config.schedule.rate(s) for s in range(step)):
            differ.append("schedule")
    if differ:
        names = ", ".join(f"{k} ({theirs.get(k, 'unset')!r} there)" if k != "schedule" else k for k in sorted(differ))
        raise DllmError(
            f"the checkpoint was made by another recipe: {names}; give that recipe, or another output folder"
        )
