"""Drafting for autoregressive verifiers: everything that an author of drafters, searches and length controllers needs
(docs/adding-a-drafter.md). The names load lazily."""

# ruff: noqa: F401, I001  # the imports are for type checkers
# fmt: off
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllm.drafting.autoregressive import ARDrafter
    from dllm.drafting.control import ADL, Controller, CostAware, FailFast, Fixed, Heuristic, RejectionThreshold
    from dllm.drafting.control import RoundStats
    from dllm.drafting.diffusion import DiffusionDrafter, SamplerDrafter
    from dllm.drafting.drafters import Drafter, Need
    from dllm.drafting.front import calibrate
    from dllm.drafting.lattice import DraftFailure, Lattice
    from dllm.drafting.loop import SpecConfig, SpecResult
    from dllm.drafting.proposal import EMPTY, Proposal, Rows, chain
    from dllm.drafting.registry import as_drafter, as_verifier
    from dllm.drafting.retrieval import Fallback, PromptLookup, SuffixDrafter, TokenRecycling
    from dllm.drafting.search import EAL, Argmax, BestFirstTree, CPSBeam, CPSSample, PathSearch, Sample, SampleTree
    from dllm.drafting.search import Edges, Viterbi
    from dllm.drafting.verifier import CausalLM, Verifier
    from dllm.spec import param

_NAMES = {
    "drafting.autoregressive": "ARDrafter",
    "drafting.control": "ADL Controller CostAware FailFast Fixed Heuristic RejectionThreshold RoundStats",
    "drafting.diffusion": "DiffusionDrafter SamplerDrafter",
    "drafting.drafters": "Drafter Need",
    "drafting.front": "calibrate",
    "drafting.lattice": "DraftFailure Lattice",
    "drafting.loop": "SpecConfig SpecResult",
    "drafting.proposal": "EMPTY Proposal Rows chain",
    "drafting.registry": "as_drafter as_verifier",
    "drafting.retrieval": "Fallback PromptLookup SuffixDrafter TokenRecycling",
    "drafting.search": "EAL Argmax BestFirstTree CPSBeam CPSSample Edges PathSearch Sample SampleTree Viterbi",
    "drafting.verifier": "CausalLM Verifier",
    "spec": "param",
}
_HOME = {name: f"dllm.{module}" for module, names in _NAMES.items() for name in names.split()}
__all__ = [*_HOME]  # noqa: PLE0604

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return vars(import_module(_HOME[name]))[name]
