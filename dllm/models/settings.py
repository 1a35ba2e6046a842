"""Sampler settings that belong to a checkpoint: `sampler_settings.json` beside its weights.

Thresholds depend on the model that they were chosen on. `dllm tune --save` writes what it chose, with what it was
measured on; `dllm.load` reads it, and a sampler named without parameters takes it (`dllm.samplers.registry`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm.errors import DllmError
from dllm.models.files import optional_json, replaced
from dllm.spec import misfit, render

FILE = "sampler_settings.json"


@dataclass(frozen=True)
class SamplerSetting:
    """One setting and what it was measured at, on validation problems of `task`."""

    sampler: str  # a name, or names joined by "+"
    parameters: Mapping[str, Mapping[str, object]]  # by part of the sampler; empty: the published defaults
    task: str  # the tasks, joined by ", "
    n: int  # problems, over all tasks
    accuracy: float  # share of them that are solved
    interval: tuple[float, float]  # 95 % of the accuracy
    tokens_per_forward: float
    baseline: str  # what the loss is measured against, on the same problems
    loss: float  # percentage points of accuracy, more is worse
    loss_interval: tuple[float, float]  # 95 %, paired bootstrap

    @property
    def spelled(self) -> str:
        """The specification that runs at these parameters on any model."""
        return "+".join(render(part, **values) for part, values in self.parameters.items())


def read_settings(folder: Path) -> dict[str, SamplerSetting]:
    """The settings beside a checkpoint by their sampler, empty where there is no file. Errors: not of this form."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        settings = [_setting(entry) for entry in optional_json(path)["settings"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"{path} holds no sampler settings ({type(error).__name__}: {error})"
        raise DllmError(f"{what}: write it with `dllm tune --save`, or remove it") from error
    return {s.sampler: s for s in settings}


def _setting(entry: Mapping[str, Any]) -> SamplerSetting:
    setting = SamplerSetting(**entry)
    parameters = {part: dict(values) for part, values in setting.parameters.items()}
    if not isinstance(setting.sampler, str) or set(parameters) != set(setting.sampler.split("+")):
        raise ValueError(f"the parameters of {setting.sampler!r} are not those of its parts")
    for f in dataclasses.fields(SamplerSetting):
        if what := misfit(f.type, found := vars(setting)[f.name]):
            raise ValueError(f"{f.name} of {setting.sampler!r} is {found!r}, not {what}")
    return dataclasses.replace(
        setting, parameters=parameters, interval=_pair(setting.interval), loss_interval=_pair(setting.loss_interval)
    )


def _pair(values: Iterable[float]) -> tuple[float, float]:
    low, high = values
    return float(low), float(high)


def write_settings(folder: Path, settings: Iterable[SamplerSetting]) -> Path:
    """Write settings beside a checkpoint; those of other samplers that are there stay. Returns the file."""
    path = folder / FILE
    merged = {**read_settings(folder), **{s.sampler: s for s in settings}}
    text = json.dumps({"settings": [dataclasses.asdict(s) for s in merged.values()]}, indent=1) + "\n"
    with replaced(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path
