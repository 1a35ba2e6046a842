"""The objectives by name: `continuation`, or `refinement:alpha=1.02`, or a mapping with `name`."""

from __future__ import annotations

from dllm import spec
from dllm.training.alignment.continuation import Continuation
from dllm.training.alignment.diffusion import Diffusion
from dllm.training.alignment.distillation import Distillation
from dllm.training.alignment.length import Length
from dllm.training.alignment.objective import Objective
from dllm.training.alignment.policy import Policy
from dllm.training.alignment.refinement import Refinement
from dllm.training.alignment.replay import Replay
from dllm.training.alignment.selective import Selective

OBJECTIVES: dict[str, type[Objective]] = {
    "continuation": Continuation,
    "refinement": Refinement,
    "distillation": Distillation,
    "length": Length,
    "selective": Selective,
    "policy": Policy,
    "replay": Replay,
    "diffusion": Diffusion,
}


def as_objective(what: object) -> Objective:
    """The objective of a stage. Errors: an unknown name or parameter, a value out of range."""
    name, _, options = spec.named(what, "objective", OBJECTIVES)
    return OBJECTIVES[name](**spec.settings(f"objective {name!r}", OBJECTIVES[name], options))
