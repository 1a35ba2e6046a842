"""Where batches run: this process, the ranks of `accelerate launch`, or a Ray cluster. Each yields finished batches.

Scheduling, retries and lost workers are Ray's business, ranks and barriers accelerate's; here is only the glue.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from dllm.errors import DllmError
from dllm.eval.config import Config, EngineSpec
from dllm.eval.records import Sample
from dllm.eval.tasks import Task
from dllm.eval.worker import Batch, Worker

log = logging.getLogger(__name__)


class Engine:
    """This process, one batch after another; the other engines change where batches run."""

    lead: bool = True  # this process keeps the folder's books

    def __init__(self, config: Config, folder: str | None, tasks: tuple[Task, ...]):
        self.worker = Worker(config, folder, tasks)

    def weights(self, setting: int) -> dict[str, str]:
        """Marks of a setting's weights."""
        return self.worker.weights(setting)

    def keys(self, batches: Sequence[Batch]) -> list[list[list[str]]]:
        """The identities of every batch's samples, setting by setting."""
        return [self.worker.keys(batch) for batch in batches]

    def map(self, batches: Sequence[Batch]) -> Iterator[list[Sample]]:
        """The samples of the batches that fall to this process, as they come."""
        for batch in batches:
            yield from self.worker.run(batch)

    def wait(self) -> None:
        """Until every process is here."""

    def close(self) -> None:
        """Let go of what was started."""


class Accelerate(Engine):
    """Data parallel under `accelerate launch`: every rank takes each n-th batch and appends to the same file."""

    def __init__(self, config: Config, folder: str, tasks: tuple[Task, ...]):
        try:
            from accelerate import Accelerator
            from accelerate.utils import InitProcessGroupKwargs
        except ImportError:
            raise DllmError("engine accelerate needs accelerate: pip install 'dllm-toolkit[accelerate]'") from None
        patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))  # a rank may finish hours before another
        self.accelerator = Accelerator(kwargs_handlers=[patience])
        self.lead = self.accelerator.is_main_process
        device = str(self.accelerator.device)
        own = [replace(s.model, device=device) if s.model.device == "auto" else s.model for s in config.settings]
        settings = tuple(replace(s, model=m) for s, m in zip(config.settings, own, strict=True))
        super().__init__(replace(config, settings=settings), folder, tasks)

    def map(self, batches: Sequence[Batch]) -> Iterator[list[Sample]]:
        """Every n-th batch."""
        return super().map(batches[self.accelerator.process_index :: self.accelerator.num_processes])

    def wait(self) -> None:
        """Until every rank is here."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the group."""
        self.accelerator.end_training()


class Ray(Engine):
    """Actors on a Ray cluster. A lost actor is started anew by Ray and its batch handed out again."""

    def __init__(self, config: Config, folder: str, tasks: tuple[Task, ...]):
        try:
            import ray
        except ImportError:
            raise DllmError("engine ray needs ray: pip install 'dllm-toolkit[ray]'") from None
        self.ray, spec = ray, config.engine
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(**_cluster(spec), include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
            except Exception as error:  # Ray raises the bare class where a node is slow to start
                aim = "start a Ray cluster here" if spec.address is None else f"reach a Ray cluster at {spec.address!r}"
                raise DllmError(f"cannot {aim}: {' '.join(str(error).split())[:200]}") from None
        actor = ray.remote(
            num_cpus=spec.cpus_per_worker, num_gpus=spec.gpus_per_worker, max_restarts=-1, max_task_retries=spec.retries
        )(Worker)
        # The tasks are read again by each worker: their scorers are functions, which do not travel; `trace` files
        # need a shared folder.
        self.actors: list[Any] = [actor.remote(config, folder) for _ in range(spec.workers)]
        super().__init__(config, None, tasks)

    def weights(self, setting: int) -> dict[str, str]:
        """As the first actor has them."""
        with self._said("its workers"):
            return cast("dict[str, str]", self.ray.get(self.actors[0].weights.remote(setting)))

    def keys(self, batches: Sequence[Batch]) -> list[list[list[str]]]:
        """As the first actor names them."""
        with self._said("its workers"):
            return cast("list[list[list[str]]]", self.ray.get([self.actors[0].keys.remote(batch) for batch in batches]))

    @contextmanager
    def _said(self, lost: str) -> Iterator[None]:
        """Errors of a worker as its own, and those of the cluster in one line."""
        try:
            yield
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, DllmError) else error) from None
        except self.ray.exceptions.RayError as error:
            raise DllmError(f"the Ray cluster lost {lost}: {type(error).__name__}; run again to go on") from None

    def map(self, batches: Sequence[Batch]) -> Iterator[list[Sample]]:
        """Whichever actor is free takes the next batch."""
        from ray.util import ActorPool

        with self._said("a worker for good"):
            yield from ActorPool(self.actors).map_unordered(lambda actor, batch: actor.all.remote(batch), list(batches))

    def close(self) -> None:
        """End the actors, and the cluster where it was started here."""
        for actor in self.actors:
            self.ray.kill(actor)
        if self._started:
            self.ray.shutdown()


def _cluster(spec: EngineSpec) -> dict[str, Any]:
    """The cluster at an address, or one of this machine alone: on loopback, since other addresses may be closed."""
    if spec.address is not None:
        return {"address": spec.address}
    cpus, gpus = max(1, round(spec.workers * spec.cpus_per_worker)), round(spec.workers * spec.gpus_per_worker)
    return {"num_cpus": cpus, "num_gpus": gpus, "_node_ip_address": "127.0.0.1"}


def start(config: Config, folder: str, tasks: tuple[Task, ...]) -> Engine:
    """The engine that the configuration asks for."""
    kinds: dict[str, type[Engine]] = {"local": Engine, "accelerate": Accelerate, "ray": Ray}
    return kinds[config.engine.kind](config, folder, tasks)
