"""Test configuration: one thread, so that parallel runs do not fight for the cores, and the options of the sweeps."""

from __future__ import annotations

import sweeps
import torch

torch.set_num_threads(1)


def pytest_addoption(parser) -> None:
    group = parser.getgroup("sweeps")
    group.addoption("--sweep-minutes", type=float, help="with -m sweep: a rotating sample of so many minutes")
    group.addoption("--sweep-seed", type=int, help="which sample; by default the date")


def pytest_configure(config) -> None:
    if minutes := config.getoption("sweep_minutes"):
        sweeps.sample = sweeps.Sample(minutes, config.getoption("sweep_seed"))
        config.pluginmanager.register(sweeps.sample)
