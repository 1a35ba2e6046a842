"""Former places: modules and names of before 0.1 still import, and the warning says where they are now."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dllm

MOVES = json.loads((Path(dllm.__file__).resolve().parent / "assets" / "moved.json").read_text(encoding="utf-8"))
STILL = {  # modules that have only lost names
    "dllm.drafting.accept",
    "dllm.drafting.control",
    "dllm.drafting.loop",
    "dllm.drafting.ngram",
    "dllm.drafting.registry",
    "dllm.drafting.verifier",
    "dllm.eval.config",
    "dllm.eval.engines",
    "dllm.eval.worker",
    "dllm.lookahead",
    "dllm.models.hub",
    "dllm.models.model",
    "dllm.samplers.base",
    "dllm.training.config",
}
NAMES = {  # what samplers, scripts and notebooks imported
    "dllm.branches": "Branch",
    "dllm.cache": "Policy Prefix Dual Interval Delayed Partial Block BlockDual POLICIES default policy spans indices",
    "dllm.canvas": "Canvas Decision Plan State Window",
    "dllm.drafting.accept": "Law Verdict",
    "dllm.drafting.candidates": "DraftCandidates LengthController assisted_by",
    "dllm.drafting.control": "LengthController",
    "dllm.drafting.loop": "CausalProxy LengthController Row Verdict run",
    "dllm.drafting.ngram": "CausalProxy",
    "dllm.drafting.registry": "RETRIEVAL settings",
    "dllm.drafting.speculation": "Law LengthController calibrate law_of speculate",
    "dllm.drafting.transformers_hook": "Record spec_generate speculator",
    "dllm.drafting.verifier": "Prompt",
    "dllm.drafting.vllm": "DLLMProposer",
    "dllm.engine": "Answer Options Runner Tick decode step",
    "dllm.eval.answers": "Answer Answers Cell decode",
    "dllm.eval.bench": "Row cache",
    "dllm.eval.bench_cache": "cache",
    "dllm.eval.bench_drafting": "run",
    "dllm.eval.bench_filters": "run",
    "dllm.eval.bench_lookahead": "run",
    "dllm.eval.bench_samplers": "run",
    "dllm.eval.bench_step": "run",
    "dllm.eval.config": "make merge parse read",
    "dllm.eval.engines": "Local",
    "dllm.eval.worker": "Job",
    "dllm.files": "optional_json replaced_checkpoint",
    "dllm.generation": "Arguments DEFAULTS Event Job Output encode generate prepare prompt_ids score stream Walk",
    "dllm.guesses": "Drafts",
    "dllm.guidance": "Guidance",
    "dllm.invariants": "Broken asserted check",
    "dllm.lookahead": "Lookahead Stats Walk",
    "dllm.memo": "Entry",
    "dllm.meter": "Meter",
    "dllm.models.bench": "main",
    "dllm.models.hub": "Model",
    "dllm.models.model": "fingerprint whole",
    "dllm.noise": "uniform",
    "dllm.pace": "Pace",
    "dllm.plain": "Loader value",
    "dllm.prediction": "Law Prediction",
    "dllm.prompts": "Padding as_list joined read read_one",
    "dllm.samplers.base": "best rank widen",
    "dllm.staleness": "StepError cache_error",
    "dllm.stopping": "Cut Stop Stops stop_strings",
    "dllm.trace": "BLANK Trace",
    "dllm.training.tasks": "Example TASKS Task generate grade task",
    "dllm.training.config": "build",
}


@pytest.mark.parametrize("former", MOVES["modules"])
def test_a_former_module_imports_and_says_where_it_is(former: str) -> None:
    sys.modules.pop(former, None) if former not in STILL else None
    if former in STILL:
        module = import_module(former)
    else:
        with pytest.warns(DeprecationWarning, match=f"^{former} is now {', '.join(MOVES['modules'][former])}$"):
            module = import_module(former)
    for name in NAMES[former].split():
        with pytest.warns(DeprecationWarning, match=rf"^{former}\.{name} is now dllm\.") as said:
            found = getattr(module, name)
        place, _, now = str(said[0].message).split()[-1].rpartition(".")
        assert getattr(import_module(place), now) is found
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_every_new_place_is_there() -> None:
    for places in MOVES["modules"].values():
        for place in places:
            import_module(place)
    for ((place, now),) in ([p.rsplit(".", 1) for p in places] for places in MOVES["names"].values()):
        assert now in vars(import_module(place)), (place, now)


def test_an_author_is_told_the_line() -> None:
    """As docs/adding-a-sampler.md had it; nothing of the old places is loaded before it is asked for."""
    code = """
import sys, warnings
warnings.simplefilter("always")
import dllm
assert "torch" not in sys.modules
from dllm.prediction import Prediction
from dllm.canvas import Window
from dllm import invariants
from dllm.samplers.base import Bundle, Context, Method, View, param
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "dllm.prediction is now dllm.decoding.prediction" in done.stderr
    assert "dllm.canvas.Window is now dllm.decoding.canvas.Span" in done.stderr


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module("dllm.generator")


def test_a_former_program_runs() -> None:
    command = [sys.executable, "-m", "dllm.eval.bench_cache", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: " in done.stdout and "python -m dllm.bench.cache" in done.stderr


def test_the_package_can_be_loaded_again():
    again = "import importlib, dllm; importlib.reload(importlib.reload(dllm))"
    code = f"{again}; import dllm.engine, dllm.samplers.base; dllm.generate"
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
