"""A server at full queue, as long as you like: `python tests/soak_serve.py --minutes 20`.

Clients on 127.0.0.1 ask at once for more than there is room: whole answers and streams, of several samplers and seeds,
some of whom leave in the middle. The server is `dllm serve`, a process of its own, and so is who asks for /health every
second and looks at the memory. Every answer is compared with that of `dllm.generate` alone, and what the server counted
with what the clients got. The suite runs a short one (tests/test_serve_soak.py).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

import dllm

CHAT = "/v1/chat/completions"
TOM = "Tom has 12 apples. He buys 7 more. How many apples does he have?"
PROMPTS = (TOM, "Ann has 3 cats and buys 4 more cats.", "5")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"sampler": "threshold", "cache": "dual"},
    {"sampler": "klass"},
    {"sampler": "confidence", "temperature": 0.8},
    {"sampler": "threshold", "lookahead": 2},
)
CALL: dict[str, Any] = {"max_new_tokens": 24, "block_length": 8}


@dataclass
class Server:
    """A server that is up."""

    port: int
    process: psutil.Process

    def ask(self, path: str) -> tuple[int, str]:
        """Status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    @property
    def load(self) -> dict[str, int]:
        """What /health says that it does."""
        load: dict[str, int] = json.loads(self.ask("/health")[1])["load"]
        return load

    def idle(self) -> bool:
        """Whether it comes to rest."""
        until = time.monotonic() + 60
        while any(list(self.load.values())[:4]) and time.monotonic() < until:
            time.sleep(0.05)
        return not any(list(self.load.values())[:4])


@contextmanager
def served(max_rows: int, max_queue: int) -> Iterator[Server]:
    """`dllm serve tiny`, with a thread to compute, ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"dllm serve tiny --port {port} --set max_rows={max_rows} --set max_queue={max_queue}"
    made = subprocess.Popen(
        [sys.executable, "-m", *command.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    server, until, ready = Server(port, psutil.Process(made.pid)), time.monotonic() + 120, False
    try:
        while not ready:
            assert made.poll() is None and time.monotonic() < until, "the server did not become ready"
            time.sleep(0.1)
            try:
                ready = server.ask("/health")[0] == 200
            except OSError:
                continue
        yield server
    finally:
        made.terminate()
        made.wait()


@dataclass
class Soak:
    """What the clients got."""

    server: Server
    expected: dict[tuple[int, int, int], str]
    until: float
    most: int
    counts: Counter[str] = field(default_factory=Counter)
    ids: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def over(self) -> bool:
        """Whether the clients stop."""
        return time.monotonic() > self.until or sum(self.counts.values()) >= self.most

    def client(self, seed: int) -> None:
        """One after another: an answer, a stream, or a stream that is left."""
        rng = random.Random(seed)
        while not self.over:
            key = rng.randrange(len(PROMPTS)), rng.randrange(len(SETTINGS)), rng.randrange(3)
            form = rng.choices(("whole", "stream", "left"), (5, 4, 1))[0]
            try:
                outcome, identity, text = self._ask(key, form)
            except (OSError, http.client.HTTPException) as error:
                outcome, identity, text = f"lost ({type(error).__name__})", "", ""
            with self.lock:
                self.counts[outcome] += 1
                if outcome == "ok":
                    self.ids[identity] += 1
                    if text != self.expected[key]:
                        self.wrong.append(f"{key}: {text!r}")
            if outcome == "full":
                time.sleep(0.05)

    def _ask(self, key: tuple[int, int, int], form: str) -> tuple[str, str, str]:
        prompt, setting, seed = key
        call = {name: value for name, value in CALL.items() if name != "max_new_tokens"}
        body = {
            "messages": [{"role": "user", "content": PROMPTS[prompt]}], "seed": seed, "stream": form != "whole",
            "max_tokens": CALL["max_new_tokens"], **call, **SETTINGS[setting],
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=300)
        try:
            connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                response.read()
                return "full" if response.status == 429 else f"status {response.status}", "", ""
            if form == "whole":
                answer = json.loads(response.read())
                return "ok", answer["id"], answer["choices"][0]["message"]["content"]
            if form == "left":
                response.readline()
                return "left", "", ""
            chunks = [line[6:].strip() for line in response if line.startswith(b"data: ")]
            if chunks[-1] != b"[DONE]":
                return "cut", "", ""
            said = [json.loads(chunk) for chunk in chunks[:-1]]
            pieces = [choice["delta"].get("content") or "" for chunk in said for choice in chunk["choices"]]
            return "ok", said[0]["id"], "".join(pieces)
        finally:
            connection.close()


def watch(port: int, process: psutil.Process) -> dict[str, Any]:
    """Health and memory in bytes, every second until the standard input ends."""
    server, slowest, memory, wrong = Server(port, process), 0.0, list[int](), list[str]()
    while True:
        began = time.monotonic()
        if server.ask("/health")[0] != 200:
            wrong.append("not healthy")
        slowest = max(slowest, time.monotonic() - began)
        memory.append(process.memory_info().rss)
        if select.select([sys.stdin], [], [], 1.0)[0]:
            return {"slowest": slowest, "memory": memory, "wrong": wrong[:1]}


def soak(seconds: float, most: int = 1 << 30, clients: int = 24) -> dict[str, Any]:
    """Run it; what it came to."""
    model = dllm.load("tiny")
    expected = {
        (p, s, seed): dllm.generate(model, PROMPTS[p], seed=seed, **CALL, **SETTINGS[s]).text
        for p in range(len(PROMPTS)) for s in range(len(SETTINGS)) for seed in range(3)
    }  # fmt: skip
    with served(max_rows=4, max_queue=8) as server:
        run = Soak(server, expected, time.monotonic() + seconds, most)
        began = time.monotonic()
        threads = [threading.Thread(target=run.client, args=(i,)) for i in range(clients)]
        watching = subprocess.Popen(
            [sys.executable, __file__, "--watch", f"{server.port}:{server.process.pid}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        seen = json.loads(watching.communicate()[0])
        idle, load = server.idle(), server.load
        time.sleep(0.5)  # the last streams tell their end
        families = text_string_to_metric_families(server.ask("/metrics")[1])
        told = Counter[str]()  # of all routes
        for sample in (s for f in families if f.name == "dllm_requests" for s in f.samples):
            told[sample.labels["outcome"]] += int(sample.value)
    memory = seen["memory"]
    quarter = max(1, len(memory) // 4)
    early, late = memory[quarter : 2 * quarter] or memory, memory[-quarter:]
    return {
        "seconds": round(seconds, 1), "clients": dict(run.counts), "server": dict(told),
        "wrong": run.wrong[:5] + seen["wrong"],
        "answered twice": sum(n - 1 for n in run.ids.values()), "idle": idle, "load": load,
        "slowest /health": round(seen["slowest"], 3),
        "rss MB, second and last quarter": [round(sum(m) / len(m) / 1e6, 1) for m in (early, late)],
    }  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--watch", metavar="PORT:PID", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.watch:
        port, pid = map(int, given.watch.split(":"))
        print(json.dumps(watch(port, psutil.Process(pid))))
        return
    torch.set_num_threads(1)
    print(json.dumps(soak(60 * given.minutes, clients=given.clients), indent=1))


if __name__ == "__main__":
    main()
