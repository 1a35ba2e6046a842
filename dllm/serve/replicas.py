"""Several copies of a server behind one address: a Ray Serve deployment of the same app (extra `[ray]`).

Ray starts the replicas, routes, restarts what dies and scales with the requests; here is only the glue.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI

from dllm.errors import DllmError
from dllm.models.arguments import Checkpoint
from dllm.serve import ingress
from dllm.serve.app import create_app
from dllm.serve.config import ServeConfig
from dllm.serve.server import hosted

NAME = "dllm"  # of the application, and its deployment


@dataclass(frozen=True)
class Scale:
    """How many replicas, from one number to another."""

    least: int
    most: int

    @classmethod
    def read(cls, replicas: int | None, autoscale: str | None) -> Scale | None:
        """What --replicas and --autoscale say; None: neither. Errors: both, or what is no number of replicas."""
        if replicas is not None and autoscale is not None:
            raise DllmError("--replicas is a number and --autoscale a range: give one of them")
        if replicas is None and autoscale is None:
            return None
        given = f"--replicas {replicas}" if autoscale is None else f"--autoscale {autoscale}"
        least, _, most = (autoscale or f"{replicas}:{replicas}").partition(":")
        if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
            raise DllmError(f"{given}: expected a number from 1 on, or MIN:MAX such as 1:8")
        return cls(int(least), int(most))


def deploy(
    checkpoint: Checkpoint, config: ServeConfig, scale: Scale, pace: Mapping[str, Any] | None = None, **cluster: Any
) -> None:
    """Start replicas behind `config.host`:`config.port`; returns when they are up.

    pace: seconds of Ray's `AutoscalingConfig` until it adds and ends replicas. cluster: arguments of `ray.init` where
    Ray is not connected yet. A request that finds `max_queue` others waiting gets status 429. Errors: Ray is not
    installed.
    """
    try:
        import ray
        from ray import serve
        from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
    except ImportError:
        raise DllmError("replicas need Ray Serve: pip install 'dllm-toolkit[ray]'") from None
    if not ray.is_initialized():
        os.environ.setdefault(ingress.VARIABLE, ingress.PATH)  # its proxies have our environment
        ray.init(**{"include_dashboard": False, "logging_level": logging.WARNING, **cluster})
    name, gpu = Path(checkpoint.name).name, checkpoint.device != "cpu" and torch.cuda.is_available()

    def build() -> FastAPI:
        app = create_app(hosted(checkpoint, config), config, name)
        app.state.metrics.labels = {"replica": serve.get_replica_context().replica_id.unique_id}
        return app

    class Replica:
        async def check_health(self) -> None:
            """Ray replaces a replica that raises: one whose engine is stuck, or has ended."""
            code, reason = self.app.state.serving.trouble  # type: ignore[attr-defined]
            if code == "unavailable":
                raise RuntimeError(reason)

    # A request has a lane for its whole life: so many are a replica's own, and a short line, so that no lane waits.
    lanes, line = config.max_rows, max(1, config.max_rows // 4)
    size: dict[str, Any] = {"num_replicas": scale.least}
    if scale.most > scale.least:
        size = {"autoscaling_config": AutoscalingConfig(
            min_replicas=scale.least, max_replicas=scale.most, target_ongoing_requests=lanes,
            **(pace or {}),
        )}  # fmt: skip
    deployment = serve.deployment(
        name=NAME, max_ongoing_requests=lanes + line, max_queued_requests=config.max_queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=2),
        graceful_shutdown_timeout_s=config.drain_seconds, ray_actor_options={"num_cpus": 1, "num_gpus": int(gpu)},
        **size,
    )(serve.ingress(build)(Replica))  # fmt: skip
    serve.start(http_options=HTTPOptions(host=config.host, port=config.port, keep_alive_timeout_s=90))
    serve.run(deployment.bind(), name=NAME, route_prefix="/")


def replicated(checkpoint: Checkpoint, config: ServeConfig, scale: Scale) -> None:
    """The same until a signal comes; then running answers get `drain_seconds`, or end at a second one."""
    config.keys()  # an error now, before Ray starts
    deploy(checkpoint, config, scale)
    over = threading.Event()

    def end(*_: object) -> None:
        if over.is_set():  # the second signal
            raise KeyboardInterrupt
        over.set()

    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, end)
    over.wait()
    remove()


def remove() -> None:
    """End the replicas: nothing new is taken, and running answers get `drain_seconds`. Ray Serve ends with its last
    application."""
    serve = import_module("ray.serve")
    try:
        while NAME in serve.status().applications:
            with suppress(TimeoutError):  # Ray waits for a minute
                serve.delete(NAME)
    finally:
        if not serve.status().applications.keys() - {NAME}:
            serve.shutdown()
