"""Drafting for autoregressive verifiers: everything that an author of drafters, searches and length controllers needs
(docs/adding-a-drafter.md)."""

# ruff: noqa: I001  # a module may take two lines
from dllm.drafting.autoregressive import ARDrafter
from dllm.drafting.control import ADL, Controller, CostAware, FailFast, Fixed, Heuristic, Judged, RejectionThreshold
from dllm.drafting.control import RoundStats
from dllm.drafting.diffusion import DiffusionDrafter, SamplerDrafter
from dllm.drafting.drafters import Ask, Drafter, Need, Ragged
from dllm.drafting.front import calibrate
from dllm.drafting.hidden.drafter import HiddenDrafter
from dllm.drafting.lattice import DraftFailure, Lattice
from dllm.drafting.config import SpecConfig
from dllm.drafting.request import SpecResult
from dllm.drafting.proposal import EMPTY, Proposal, Rows, Spread, chain
from dllm.drafting.registry import as_drafter, as_verifier
from dllm.drafting.retrieval import Fallback, PromptLookup, SuffixDrafter, TokenRecycling
from dllm.drafting.search import EAL, Argmax, BestFirstTree, CPSBeam, CPSSample, Edges, PathSearch, Sample, SampleTree
from dllm.drafting.search import Viterbi
from dllm.drafting.stand import StandDrafter
from dllm.drafting.store import Grams, Seen, Store, Successors
from dllm.drafting.verifier import CausalLM, Verifier
from dllm.spec import param

__all__ = [
    "ADL", "EAL", "EMPTY", "ARDrafter", "Argmax", "Ask", "BestFirstTree", "CPSBeam", "CPSSample", "CausalLM",
    "Controller", "CostAware", "DiffusionDrafter", "DraftFailure", "Drafter", "Edges", "FailFast", "Fallback",
    "Fixed", "Grams", "Heuristic", "HiddenDrafter", "Judged", "Lattice", "Need", "PathSearch", "PromptLookup",
    "Proposal", "Ragged", "RejectionThreshold", "RoundStats", "Rows", "Sample", "SampleTree", "SamplerDrafter",
    "Seen", "SpecConfig", "SpecResult", "Spread", "StandDrafter", "Store", "Successors", "SuffixDrafter",
    "TokenRecycling", "Verifier", "Viterbi", "as_drafter", "as_verifier", "calibrate", "chain", "param",
]  # fmt: skip
