"""Test configuration: one thread, as parallel runs share the cores; the fast ring; the options of the sweeps."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import sweeps
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# An example that a busy machine is slow at is no fault.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


# `pytest -m fast`, before every commit: these files without what has a ring of its own. Hand examples, rules on the
# bar, contracts, golden decodes. Other files are not even imported then.
FAST = {
    "test_architecture.py", "test_bars.py", "test_cache.py", "test_drafting_search.py", "test_engine.py",
    "test_eval_config.py", "test_eval_metrics.py", "test_generate.py", "test_golden_decodes.py",
    "test_lookahead_rules.py", "test_models.py", "test_prediction.py", "test_prompts.py",
    "test_samplers_hand.py", "test_samplers_identities.py", "test_spec.py", "test_stopping.py", "test_sweeps.py",
    "test_training_tasks.py", "test_stress_tasks.py",
}  # fmt: skip
RINGS = ("sweep", "ray", "smollm")
LONG = "trained"  # golden decodes of the checkpoint with long answers: the suite has them


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    if config.getoption("markexpr") == "fast" and collection_path.name.startswith("test_"):
        return collection_path.name not in FAST
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if " at 0x" in item.name:  # an address differs between the workers of xdist, which then collect different tests
            raise pytest.UsageError(f"{item.nodeid}: give its parameters ids that do not hold an address")
        long = item.path.name == "test_golden_decodes.py" and LONG in item.name
        if item.path.name in FAST and not long and not any(item.get_closest_marker(ring) for ring in RINGS):
            item.add_marker("fast")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test and its fixtures draw does not depend on the tests before them."""
    torch.manual_seed(0)


pytest_runtest_call = pytest_runtest_setup


def pytest_collection_finish() -> None:
    """A full collection walks what torch and transformers made at import: a tenth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_addoption(parser) -> None:
    group = parser.getgroup("sweeps")
    group.addoption("--sweep-minutes", type=float, help="with -m sweep: a rotating sample of so many minutes")
    group.addoption("--sweep-seed", type=int, help="which sample; by default the date")


def pytest_configure(config) -> None:
    if minutes := config.getoption("sweep_minutes"):
        sweeps.sample = sweeps.Sample(minutes, config.getoption("sweep_seed"))
        config.pluginmanager.register(sweeps.sample)
