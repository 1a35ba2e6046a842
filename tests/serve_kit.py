"""A server of the embedded model on 127.0.0.1, in this process, and what asks it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import openai
import uvicorn

import dllm
from dllm.serve.app import create_app
from dllm.serve.config import ServeConfig

PROMPT = "Tom has 12 apples. He buys 7 more."
MESSAGES = [{"role": "user", "content": PROMPT}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATIENCE = 300.0  # seconds until what has to come is given up, however busy the machine is


class Site:
    """A running server."""

    def __init__(self, url, app, backend):
        self.url, self.app, self.backend = url, app, backend
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def post(self, path, body, **how):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **how.pop("headers", {})}
        return httpx2.post(self.url + path, content=data, headers=headers, timeout=60, **how)

    def events(self, path, body):
        """The data of every event of a stream, with the event's name."""
        lines = self.post(path, {**body, "stream": True}).text.split("\n")
        names = {i + 1: line[7:] for i, line in enumerate(lines) if line.startswith("event: ")}
        return [(names.get(i, ""), line[6:]) for i, line in enumerate(lines) if line.startswith("data: ")]

    def idle(self):
        """Wait until nothing runs."""
        until = time.monotonic() + PATIENCE
        while (load := self.backend.load).running or load.waiting:
            assert time.monotonic() < until, load
            time.sleep(0.01)


@contextmanager
def serving(backend=None, config=ServeConfig()) -> Iterator[Site]:
    backend = dllm.Engine("tiny", max_rows=config.max_rows, max_queue=config.max_queue) if backend is None else backend
    app = create_app(backend, config, "tiny")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    while httpx2.get(f"{url}/health").status_code == 503:
        time.sleep(0.02)
    try:
        yield Site(url, app, backend)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


class Gate:
    """Forwards of a model that wait until they are let through."""

    def __init__(self, monkeypatch, model):
        self.open, self.inside, self.passing = threading.Event(), threading.Event(), 0
        forward = model.forward

        def waiting(*args, **kwargs):
            if self.passing:
                self.passing -= 1
            else:
                self.inside.set()
                assert self.open.wait(PATIENCE)
            return forward(*args, **kwargs)

        self.open.set()
        monkeypatch.setattr(model, "forward", waiting)

    def shut(self, after=0):
        self.passing = after
        self.inside.clear()
        self.open.clear()
