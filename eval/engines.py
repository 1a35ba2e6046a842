"""Where jobs run: this process, the ranks of `accelerate launch`, or a Ray cluster. Each yields finished batches.

Scheduling, retries and lost workers are Ray's business, ranks and barriers accelerate's; here is only the glue.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from dllm.errors import DllmError
from dllm.eval.config import Config, EngineSpec
from dllm.eval.store import Row
from dllm.eval.tasks import Task
from dllm.eval.worker import Job, Worker

log = logging.getLogger(__name__)


class Engine(Protocol):
    """`lead`: this process keeps the folder's books. `map` yields the rows of the jobs that fall to this process."""

    lead: bool
    worker: Worker

    def weights(self, setting: int) -> dict[str, str]: ...
    def keys(self, jobs: Sequence[Job]) -> list[list[str]]: ...
    def map(self, jobs: Sequence[Job]) -> Iterator[list[Row]]: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...


class Local:
    """This process, one batch after another."""

    lead = True

    def __init__(self, config: Config, folder: str, tasks: tuple[Task, ...]):
        self.worker = Worker(config, folder, tasks)

    def weights(self, setting: int) -> dict[str, str]:
        return self.worker.weights(setting)

    def keys(self, jobs: Sequence[Job]) -> list[list[str]]:
        return [self.worker.keys(job) for job in jobs]

    def map(self, jobs: Sequence[Job]) -> Iterator[list[Row]]:
        for job in jobs:
            yield self.worker.run(job)

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


class Accelerate(Local):
    """Data parallel under `accelerate launch`: every rank takes each n-th job and appends to the same file."""

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

    def map(self, jobs: Sequence[Job]) -> Iterator[list[Row]]:
        return super().map(jobs[self.accelerator.process_index :: self.accelerator.num_processes])

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.accelerator.end_training()


class Ray:
    """Actors on a Ray cluster. A lost actor is started anew by Ray and its batch handed out again."""

    lead = True

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
                place = (
                    "start a Ray cluster here" if spec.address is None else f"reach a Ray cluster at {spec.address!r}"
                )
                raise DllmError(f"cannot {place}: {' '.join(str(error).split())[:200]}") from None
        actor: Any = ray.remote(
            num_cpus=spec.cpus_per_worker,
            num_gpus=spec.gpus_per_worker,
            max_restarts=-1,
            max_task_retries=spec.retries,
        )(Worker)
        # The tasks are read again by each worker: their scorers are functions, which do not travel; `trace` files
        # need a shared folder.
        self.actors: list[Any] = [actor.remote(config, folder) for _ in range(spec.workers)]
        self.worker = Worker(config, None, tasks)

    def weights(self, setting: int) -> dict[str, str]:
        return self._get(self.actors[0].weights.remote(setting))

    def keys(self, jobs: Sequence[Job]) -> list[list[str]]:
        return self._get([self.actors[0].keys.remote(job) for job in jobs])

    def _get(self, reference: Any) -> Any:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, DllmError) else error) from None
        except self.ray.exceptions.RayError as error:
            raise DllmError(f"the Ray cluster lost its workers: {type(error).__name__}; run again to go on") from None

    def map(self, jobs: Sequence[Job]) -> Iterator[list[Row]]:
        from ray.util import ActorPool

        pool: Any = ActorPool(self.actors)
        results: Iterable[list[Row]] = pool.map_unordered(lambda actor, job: actor.run.remote(job), jobs)
        try:
            yield from results
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, DllmError) else error) from None
        except self.ray.exceptions.RayError as error:
            raise DllmError(
                f"the Ray cluster lost a worker for good: {type(error).__name__}; run again to go on"
            ) from None

    def wait(self) -> None:
        pass

    def close(self) -> None:
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
    kinds: dict[str, Any] = {"local": Local, "accelerate": Accelerate, "ray": Ray}
    return kinds[config.engine.kind](config, folder, tasks)
