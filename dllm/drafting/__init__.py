"""Drafting for autoregressive verifiers: everything that an author of drafters, searches and length controllers needs
(docs/adding-a-drafter.md). The names load lazily."""

# ruff: noqa: I001  # the imports are for type checkers
# fmt: off
from typing import TYPE_CHECKING

import dllm

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

_HOMES = {
    "dllm.drafting.autoregressive": "ARDrafter",
    "dllm.drafting.control": "ADL Controller CostAware FailFast Fixed Heuristic RejectionThreshold RoundStats",
    "dllm.drafting.diffusion": "DiffusionDrafter SamplerDrafter",
    "dllm.drafting.drafters": "Drafter Need",
    "dllm.drafting.front": "calibrate",
    "dllm.drafting.lattice": "DraftFailure Lattice",
    "dllm.drafting.loop": "SpecConfig SpecResult",
    "dllm.drafting.proposal": "EMPTY Proposal Rows chain",
    "dllm.drafting.registry": "as_drafter as_verifier",
    "dllm.drafting.retrieval": "Fallback PromptLookup SuffixDrafter TokenRecycling",
    "dllm.drafting.search": "EAL Argmax BestFirstTree CPSBeam CPSSample Edges PathSearch Sample SampleTree Viterbi",
    "dllm.drafting.verifier": "CausalLM Verifier",
    "dllm.spec": "param",
}
__all__ = [
    "ADL", "EAL", "EMPTY", "ARDrafter", "Argmax", "BestFirstTree", "CPSBeam", "CPSSample", "CausalLM", "Controller",
    "CostAware", "DiffusionDrafter", "DraftFailure", "Drafter", "Edges", "FailFast", "Fallback", "Fixed",
    "Heuristic", "Lattice", "Need", "PathSearch", "PromptLookup", "Proposal", "RejectionThreshold", "RoundStats",
    "Rows", "Sample", "SampleTree", "SamplerDrafter", "SpecConfig", "SpecResult", "SuffixDrafter", "TokenRecycling",
    "Verifier", "Viterbi", "as_drafter", "as_verifier", "calibrate", "chain", "param",
]

if not TYPE_CHECKING:
    __getattr__ = dllm.lazy(__name__, _HOMES)
