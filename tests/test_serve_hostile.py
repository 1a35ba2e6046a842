"""A server among clients that mean it ill, or do not care: each gets its error, and everybody else an answer."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

pytest.importorskip("fastapi")

import psutil
from rough_kit import Served, served, status

import dllm
from dllm.decoding.constraints import compiling
from dllm.serve.config import ServeConfig

CHAT = "/v1/chat/completions"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CONFIG = ServeConfig(
    max_rows=2, max_queue=4, body_seconds=1.0, body_bytes=1 << 20, event_buffer=4 << 10, request_timeout=60.0,
    defaults={"block_length": 4, "max_new_tokens": 16},
)  # fmt: skip


TOOK = list[float]()  # seconds of each /health


@cache
def embedded() -> Any:
    return dllm.load("tiny")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(embedded(), CONFIG) as server:
        yield server
        print(f"the slowest /health took {max(TOOK, default=0):.3f} s")  # pytest -s


@pytest.fixture(autouse=True)
def healthy(server: Served) -> Iterator[None]:
    """While a test goes on the server says that it is well, and afterwards it answers and holds nothing."""
    over, said = threading.Event(), list[int]()

    def watch() -> None:
        while not over.wait(0.1):
            began = time.monotonic()
            said.append(server.ask("/health", timeout=10)[0])
            TOOK.append(time.monotonic() - began)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
    assert set(said) <= {200}
    until = time.monotonic() + 60
    code = 429
    while code == 429 and time.monotonic() < until:  # what was sent last may be read after the engine came to rest
        assert server.idle()
        code, answer = server.ask(CHAT, asked())
    assert code == 200 and answer["choices"][0]["message"]["content"]


def asked(text: str = "Tom has 12 apples. He buys 7 more.", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


def raw(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


DEEP = b'{"messages": ' + b"[" * 100_000
BODIES = {
    "deep": (DEEP, 400),
    "deep and whole": (DEEP + b"]" * 100_000 + b"}", 400),
    "nan": (json.dumps(asked(temperature=float("nan"))).encode(), 400),
    "infinity": (json.dumps(asked(top_p=float("inf"))).encode(), 400),
    "huge number": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400),
    "long integer": (b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}", 400),
    "bad utf-8": (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
    "utf-16": (json.dumps(asked()).encode("utf-16"), 400),
    "surrogate": (json.dumps(asked("\ud800")).encode(), 400),
    "surrogate stop": (json.dumps(asked(stop="\udfff")).encode(), None),  # no text has it: it never stops
    "nul": (json.dumps(asked("a\0b")).encode(), None),
    "stops": (json.dumps(asked(stop=[str(i) for i in range(10_000)])).encode(), 400),
    "long stop": (json.dumps(asked(stop="x" * 100_000)).encode(), 400),
    "twice": (b'{"n": 1, "n": 99, "messages": [{"role": "user", "content": "x"}]}', 400),
    "choices": (json.dumps(asked(n=1 << 40)).encode(), 400),
    "empty": (b"", 400),
    "long": (json.dumps(asked("x" * 900_000)).encode(), 400),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_none_gets_an_error(server: Served, name: str) -> None:
    body, expected = BODIES[name]
    code, answer = server.ask(CHAT, body)
    assert code == (expected or code) < 500
    if code != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert len(answer["error"]["message"]) < 1000


BOMBS = {"counts": "(.{1,300}x){1,20}", "powers": "[ab]*a[ab]{14}"}


@pytest.mark.parametrize("name", BOMBS)
def test_a_constraint_that_explodes_is_refused(server: Served, name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(compiling, "SECONDS", 1)
    code, answer = server.ask(CHAT, asked(regex=BOMBS[name]))
    assert code == 400 and answer["error"]["code"] in ("constraint_too_large", "invalid_value")


def test_bodies_are_bounded_in_size_and_time(server: Served) -> None:
    """Declared, counted, and waited for."""
    declared = server.open(HEAD + b"Content-Length: 10000000000\r\n\r\n")
    assert status(declared) == 413
    counted = server.open(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    with contextlib.suppress(OSError):  # it stops listening
        for _ in range(30):
            counted.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
    assert status(counted) in (413, 0)  # what was on its way may drown the answer
    dripping = server.open(HEAD + b"Content-Length: 100\r\n\r\n")
    with contextlib.suppress(OSError):
        for _ in range(12):
            dripping.sendall(b" ")
            time.sleep(0.1)
    assert status(dripping) == 408
    for made in (declared, counted, dripping):
        made.close()


def test_half_headers_hold_up_nobody(server: Served) -> None:
    held = [server.open(HEAD[: 10 + i]) for i in range(40)]
    assert server.ask(CHAT, asked())[0] == 200
    for made in held:
        made.close()


def test_what_is_no_http_is_closed(server: Served) -> None:
    for noise in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"\0" * 4096,
        HEAD + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    ):
        with contextlib.suppress(OSError):
            made = server.open(noise + b"\r\n\r\n")
            assert status(made) in (0, 400, 431)
            made.close()


def test_readers_that_do_not_read_lose_their_lanes(server: Served) -> None:
    body = json.dumps(
        asked(stream=True, logprobs=True, top_logprobs=20, max_tokens=200, n=4, sampler="confidence")
    ).encode()
    deaf = list[socket.socket]()
    for _ in range(4):
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        made.connect(("127.0.0.1", server.port))
        made.sendall(raw(body))
        deaf.append(made)
    assert server.idle()  # answered, refused or cancelled: nobody waits for them
    for made in deaf:
        made.close()


def test_a_thousand_connections_come_and_go(server: Served) -> None:
    me = psutil.Process()
    before = me.num_fds()
    for wave in range(10):
        held = [server.open((b"", HEAD, raw(json.dumps(asked(stream=True)).encode())[:-5])[i % 3]) for i in range(100)]
        for made in held:
            if wave % 2:  # a reset in place of an end
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            made.close()
    until = time.monotonic() + 30
    while me.num_fds() > before + 10 and time.monotonic() < until:
        time.sleep(0.1)
    assert me.num_fds() <= before + 10
