"""Replicas under Ray Serve: one that is killed, and more requests than there is room for."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")

from dllm.errors import DllmError
from dllm.models.arguments import Checkpoint
from dllm.serve.config import ServeConfig
from dllm.serve.ingress import Shaped
from dllm.serve.replicas import Scale, deploy, remove

CHAT = "/v1/chat/completions"


SCALES = [
    (3, "1:2", "give one of them"),
    (0, None, "--replicas 0"),
    (None, "4:2", "--autoscale 4:2"),
    (None, "x", "MIN:MAX"),
]


@pytest.mark.parametrize(("replicas", "autoscale", "says"), SCALES)
def test_a_scale_that_is_none_is_one_line(replicas: int | None, autoscale: str | None, says: str) -> None:
    with pytest.raises(DllmError, match=says):
        Scale.read(replicas, autoscale)


def test_scales_are_numbers_and_ranges() -> None:
    assert (Scale.read(None, None), Scale.read(3, None), Scale.read(None, "1:8")) == (None, Scale(3, 3), Scale(1, 8))


def passed(app: Any) -> list[Any]:
    """What a client gets of an app behind the middleware."""
    sent = list[Any]()

    async def told(message: Any) -> None:
        sent.append(message)

    asyncio.run(Shaped(app)({"type": "http"}, None, told))  # type: ignore[arg-type]
    return sent


def test_errors_of_the_router_have_the_shape_of_ours_and_answers_pass() -> None:
    def answers(status: int, kind: bytes, body: bytes, again: bytes = b"3") -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"content-type", kind), (b"retry-after", again)]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})

        return app

    async def nobody(scope: Any, receive: Any, send: Any) -> None:
        pass

    for status, code in ((429, "queue_full"), (503, "unavailable"), (408, "timeout")):
        start, body = passed(answers(status, b"text/plain", b"Request dropped"))
        assert start["status"] == status and dict(start["headers"])[b"retry-after"] == b"3"
        assert json.loads(body["body"])["error"]["code"] == code
    for status, kind in ((429, b"application/json"), (200, b"text/plain"), (404, b"text/plain")):
        assert [m.get("body") for m in passed(answers(status, kind, b"ours"))] == [None, b"ours"]
    # a path that Ray knows nothing of: the model's application is not there yet, or is being ended
    routeless = b"Path '/health' not found. Ping http://.../-/routes for available routes."
    start, body = passed(answers(404, b"text/plain", routeless))
    assert (start["status"], json.loads(body["body"])["error"]["code"]) == (503, "unavailable")
    start, body = passed(nobody)
    assert (start["status"], json.loads(body["body"])["error"]["type"]) == (503, "server_error")


def test_an_answer_has_one_id() -> None:
    """The replica's; Ray puts its own beside it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"x-request-id", b"mine"), (b"content-length", b"0"), (b"x-request-id", b"of Ray")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    start, _ = passed(app)
    assert sorted(start["headers"]) == [(b"content-length", b"0"), (b"x-request-id", b"mine")]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Two replicas of one lane each, with room for one in each line and two in the router's."""
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    patient = {"health_check_initial_delay_ms": 120_000, "health_check_timeout_ms": 120_000, "worker_niceness": 0}
    config = ServeConfig(port=port, max_rows=1, max_queue=2, defaults={"block_length": 4})
    try:
        deploy(
            Checkpoint("tiny", device="cpu"), config, Scale(2, 2), num_cpus=4, log_to_driver=False,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}, _system_config=patient, _node_ip_address="127.0.0.1",
        )  # fmt: skip
        until = time.monotonic() + 300
        while time.monotonic() < until:  # both are warm
            said = [ask(port, 4)[0] for _ in range(6)]
            if set(said) == {200}:
                break
            time.sleep(1)
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def opened(port: int, tokens: int, stream: bool = False) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = {"messages": [{"role": "user", "content": "Tom has 12 apples."}], "max_tokens": tokens, "stream": stream}
    body |= {"sampler": "confidence", "min_new_tokens": tokens}
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def ask(port: int, tokens: int) -> tuple[int, str, dict[str, Any]]:
    response = opened(port, tokens)
    body = json.loads(response.read())
    return response.status, response.getheader("Retry-After") or "", body


@pytest.mark.ray
def test_a_replica_that_dies_breaks_its_streams_and_a_retry_succeeds(port: int) -> None:
    import psutil

    response = opened(port, 400, stream=True)
    assert response.status == 200 and response.readline().startswith(b"data: ")
    found = [p for p in psutil.process_iter() if "ServeReplica:dllm" in " ".join(p.cmdline())]
    assert len(found) == 2
    for process in found:
        process.cpu_percent()
    time.sleep(0.5)
    busy = max(found, key=lambda process: process.cpu_percent())
    os.kill(busy.pid, signal.SIGKILL)
    try:
        rest = response.read()
    except (http.client.IncompleteRead, ConnectionError) as error:
        rest = getattr(error, "partial", b"")
    assert b"[DONE]" not in rest  # nobody takes it for whole
    assert ask(port, 4)[0] == 200


@pytest.mark.ray
def test_who_finds_no_room_is_told_when_to_come_again(port: int) -> None:
    said = list[tuple[int, str, dict[str, Any]]]()
    threads = [threading.Thread(target=lambda: said.append(ask(port, 64))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {code for code, *_ in said} == {200, 429}
    for code, again, body in said:
        if code == 429:
            assert again.isdecimal() and int(again) > 0
            error = body["error"]
            assert (error["type"], error["param"], error["code"]) == ("rate_limit_error", None, "queue_full")


@pytest.mark.ray
def test_replicas_come_with_waiting_requests_and_go_without(port: int) -> None:
    """The same deployment, from one replica on: a burst of requests brings another one, and its end ends it."""
    from ray import serve

    def replicas() -> int:
        states = serve.status().applications["dllm"].deployments["dllm"].replica_states
        return int(states.get("RUNNING", 0))

    def until(count: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while replicas() != count:
            assert time.monotonic() < end, (replicas(), count)
            time.sleep(0.5)

    config = ServeConfig(port=port, max_rows=1, max_queue=50, defaults={"block_length": 4})
    pace = {"metrics_interval_s": 1, "look_back_period_s": 2, "upscale_delay_s": 1, "downscale_delay_s": 2}
    deploy(Checkpoint("tiny", device="cpu"), config, Scale(1, 2), pace)
    until(1, 120)
    said, over = list[int](), threading.Event()

    def asking() -> None:
        while not over.is_set():
            said.append(ask(port, 32)[0])

    threads = [threading.Thread(target=asking) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        until(2, 180)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert set(said) == {200}
    until(1, 120)
    assert ask(port, 4)[0] == 200


@pytest.mark.ray
def test_at_the_end_answers_that_have_begun_are_finished(port: int) -> None:
    from ray import serve

    deploy(Checkpoint("tiny", device="cpu"), ServeConfig(port=port, max_rows=1), Scale(1, 1))
    assert ask(port, 4)[0] == 200
    rest, refused = list[bytes](), list[int]()
    response = opened(port, 400, stream=True)
    reader = threading.Thread(target=lambda: rest.append(response.read()))
    reader.start()
    ending = threading.Thread(target=remove)
    ending.start()
    while not (refused and refused[-1] != 200):
        try:
            refused.append(ask(port, 4)[0])
        except OSError:
            break  # it has ended
    ending.join()
    reader.join()
    assert rest[0].rstrip().endswith(b"data: [DONE]")
    assert refused[-1] == 503
    assert not serve.status().applications
