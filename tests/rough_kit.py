"""A client without manners, and the server that it asks."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from serve_kit import serving

import dllm
from dllm.serve.config import ServeConfig


@dataclass
class Served:
    """A server that is up."""

    engine: dllm.Engine
    port: int

    def ask(self, path: str, body: Any = None, timeout: float = 120, **headers: str) -> tuple[int, Any]:
        """Status and body of one request; a body that is no bytes is sent as JSON. What is no JSON comes as text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            if body is None:
                connection.request("GET", path)
            else:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            text = response.read().decode()
            with suppress(ValueError):
                return response.status, json.loads(text)
            return response.status, text
        finally:
            connection.close()

    def open(self, *sent: bytes) -> socket.socket:
        """A connection that has sent some bytes."""
        made = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        for some in sent:
            made.sendall(some)
        return made

    def idle(self) -> bool:
        """Whether the engine comes to rest."""
        until = time.monotonic() + 60
        while any(self.engine.load[:4]) and time.monotonic() < until:
            time.sleep(0.05)
        return not any(self.engine.load[:4])


@contextmanager
def served(model: Any, config: ServeConfig) -> Iterator[Served]:
    """A server over a model."""
    engine = dllm.Engine(model, max_rows=config.max_rows, max_queue=config.max_queue)
    with serving(engine, config) as site:
        yield Served(engine, int(site.url.rpartition(":")[2]))


def status(made: socket.socket) -> int:
    """The status of what a connection answers; 0: it was closed without one."""
    try:
        head = made.recv(1 << 16)
    except ConnectionError:
        return 0
    return int(head.split()[1]) if head.startswith(b"HTTP/1.1 ") else 0
