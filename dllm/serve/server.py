"""The process: settings from files and the command line, a model, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from dllm.call.engine import Engine
from dllm.errors import DllmError
from dllm.models.arguments import Checkpoint
from dllm.models.hub import load
from dllm.serve.app import Serving, create_app
from dllm.serve.config import ServeConfig
from dllm.serve.pair import TAKEN, Pair
from dllm.spec import Json, Source, build, override, read

log = logging.getLogger("uvicorn.error")


def settings(path: Path | None, sets: Sequence[str], own: Mapping[str, object]) -> ServeConfig:
    """The settings of a file, with `--set key=value` and the command line's own options over them."""
    data, source = read(path, "configuration") if path is not None else (Json(), Source("the settings"))
    for text in sets:
        data, source = override(data, source, text)
    return build(ServeConfig, {**data, **own}, source)


def hosted(checkpoint: Checkpoint, config: ServeConfig) -> Engine | Pair:
    """What decodes: an engine, or a verifier with its drafter. Errors: those of loading."""
    if config.speculate is not None:
        if odd := sorted(config.defaults.keys() - TAKEN):
            raise DllmError(f"defaults: {odd[0]} is for a masked-diffusion model that writes the text: leave it out")
        return Pair(checkpoint, None if config.speculate == "none" else config.speculate, config.max_queue)
    engine = Engine(
        load(checkpoint), max_rows=config.max_rows, kv_bytes=config.kv_bytes, tick_positions=config.tick_positions,
        max_queue=config.max_queue, prefix_bytes=config.prefix_bytes,
    )  # fmt: skip
    log.info("engine: %s", engine.describe())
    return engine


def listen(checkpoint: Checkpoint, config: ServeConfig) -> None:
    """Serve a checkpoint until a signal comes."""
    config.keys()  # an error now, before a model is loaded
    available(config.host, config.port)
    app = create_app(hosted(checkpoint, config), config, Path(checkpoint.name).name)
    Server(app.state.serving, uvicorn.Config(
        app, host=config.host, port=config.port, limit_concurrency=config.connections, timeout_graceful_shutdown=5,
        log_level="info", access_log=False, server_header=False,
    )).run()  # fmt: skip


def available(host: str, port: int) -> None:
    """Errors: an address that nothing can listen at now."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does
            tried.bind(address)
    except OSError as error:
        raise DllmError(f"cannot listen at {host}:{port}: {error.strerror}") from None


class Server(uvicorn.Server):
    """uvicorn, which at the first signal lets running answers end, ends them at the second, and waits for nothing at
    the third."""

    def __init__(self, serving: Serving, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serving = serving
        self.draining: asyncio.Task[None] | None = None
        self.hurried = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        if self.hurried:
            self.force_exit = True
            super().handle_exit(sig, frame)
            return
        if self.serving.draining:
            self.hurried = True
            return
        self.serving.draining = True
        self._captured_signals.append(sig)
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(lambda: setattr(self, "draining", loop.create_task(self._drained())))

    async def _drained(self) -> None:
        """Wait for running answers, as long as they may take; then stop."""
        loop, backend = asyncio.get_running_loop(), self.serving.backend
        until = loop.time() + self.serving.config.drain_seconds
        log.info("no more requests; those that run get %g s", self.serving.config.drain_seconds)
        while not self.hurried and loop.time() < until and (backend.load.running or backend.load.waiting):
            await asyncio.sleep(0.1)
        await asyncio.to_thread(backend.close, False)
        self.should_exit = True
