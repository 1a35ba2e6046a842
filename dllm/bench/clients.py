"""Clients of a server, in a process of their own, as clients are: `ask` starts it, and it needs nothing but Python.

It reads a `Load` as JSON, streams `/v1/completions`, and writes what each client heard. Seconds are its own.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from dllm.errors import DllmError
from dllm.spec import Json

PATIENCE = 120.0  # seconds that a client waits


@dataclass(frozen=True)
class Load:
    """What clients ask for."""

    port: int
    bodies: list[Json]
    clients: int  # that ask at a time
    delays: list[float] = field(default_factory=list)  # seconds from the beginning to each request; none: at once
    leaves: dict[str, float] = field(default_factory=dict)  # by place: the client goes away so many seconds later


class Heard(NamedTuple):
    """What a client was answered, with seconds from its request."""

    text: str
    tokens: int
    nfe: int
    finish: str
    first: float  # to the first token that is final
    block: float  # a block, the median
    queued: float  # until it had a lane
    seconds: float  # to the last byte


def ask(
    port: int, bodies: Sequence[Json], *, clients: int | None = None, delays: Sequence[float] = (),
    leaves: dict[int, float] | None = None,
) -> tuple[list[Heard | None], float]:  # fmt: skip
    """What so many clients hear of these requests, None who went away; and the seconds of all together.

    Errors: a status other than 200, an error in a stream.
    """
    gone = {str(i): seconds for i, seconds in (leaves or {}).items()}
    load = Load(port, list(bodies), clients or len(bodies), list(delays), gone)
    done = subprocess.run(
        [sys.executable, "-m", "dllm.bench.clients"],
        input=json.dumps(asdict(load)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise DllmError(f"clients failed: {done.stderr[-500:]}")
    said: Json = json.loads(done.stdout)
    if said["errors"]:
        raise DllmError(f"{len(said['errors'])} of {len(bodies)} requests failed; the first: {said['errors'][0]}")
    return [heard and Heard(*heard) for heard in said["heard"]], float(said["seconds"])


def told(port: int, body: Json, leave: float | None = None) -> Heard | None:
    """What a server streams to one client; None: it went away so many seconds after its request.

    Errors: a status other than 200, with its message; an error in the stream.
    """
    began, first, text, last = time.perf_counter(), 0.0, "", Json()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        given = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
        connection.request("POST", "/v1/completions", given, {"Content-Type": "application/json"})
        if leave is not None:
            time.sleep(leave)
            return None
        response = connection.getresponse()
        if response.status != 200:
            raise DllmError(f"status {response.status}: {response.read(500)!r}")
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk: Json = json.loads(line[6:])
            if "error" in chunk:
                raise DllmError(f"an error in the stream: {chunk['error']}")
            if chunk.get("dllm", {}).get("tokens") and not first:
                first = time.perf_counter() - began
            for choice in chunk["choices"]:
                text += choice["text"]
                last |= {"choice": choice}
            last |= {"usage": chunk} if chunk["usage"] else {}
        seconds = time.perf_counter() - began
    finally:
        connection.close()
    about, usage = last["choice"]["dllm"], last["usage"]
    block = usage["dllm"]["timeline"]["median_block_seconds"]
    return Heard(
        text, usage["usage"]["completion_tokens"], about["nfe"], last["choice"]["finish_reason"],
        first or seconds, seconds if block is None else block, about["queue_seconds"], seconds,
    )  # fmt: skip


def main(load: Load) -> Json:
    """What was heard, and errors. The clock starts when all clients stand ready."""
    heard, errors, lock = dict[int, Heard | None](), list[str](), threading.Lock()
    line, began = iter(range(len(load.bodies))), 0.0

    def go() -> None:
        nonlocal began
        began = time.perf_counter()

    ready = threading.Barrier(load.clients, go)

    def client() -> None:
        ready.wait()
        while True:
            with lock:
                i = next(line, None)
            if i is None:
                return
            if load.delays:
                time.sleep(max(0.0, began + load.delays[i] - time.perf_counter()))
            try:
                heard[i] = told(load.port, load.bodies[i], load.leaves.get(str(i)))
            except Exception as error:
                errors.append(f"request {i}: {type(error).__name__}: {error}")

    clients = [threading.Thread(target=client, daemon=True) for _ in range(load.clients)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    seconds = time.perf_counter() - began
    return {"heard": [heard.get(i) for i in range(len(load.bodies))], "errors": errors, "seconds": seconds}


if __name__ == "__main__":
    json.dump(main(Load(**json.load(sys.stdin))), sys.stdout)
