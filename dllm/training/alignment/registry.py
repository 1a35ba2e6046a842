"""The objectives by name: `continuation`, or `refinement:alpha=1.02`, or a mapping with `name`."""

from __future__ import annotations

from dllm import spec
from dllm.training.alignment.continuation import Continuation
from dllm.training.alignment.objective import Objective
from dllm.training.alignment.refinement import Refinement

OBJECTIVES: dict[str, type[Objective]] = {"continuation": Continuation, "refinement": Refinement}


def as_objective(what: object) -> Objective:
    """The objective of a stage. Errors: an unknown name or parameter, a value out of range."""
    name, _, options = spec.named(what, "objective", OBJECTIVES)
    return OBJECTIVES[name](**spec.settings(f"objective {name!r}", OBJECTIVES[name], options))
