"""What a server lets in, and how an answer ends that nobody waits for."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import socket
import threading
import time
import weakref
from contextlib import contextmanager
from itertools import count
from queue import SimpleQueue

import httpx2
import openai
import pytest
from serve_kit import CHAT, MESSAGES, PATIENCE, TEXT, Gate, serving

import dllm
from dllm.call.engine import Engine
from dllm.decoding.stopping import Stops
from dllm.drafting.registry import as_verifier
from dllm.errors import DllmError, QueueFull, TimedOut
from dllm.models.arguments import Checkpoint
from dllm.serve import requests, stream
from dllm.serve.answers import Choice
from dllm.serve.app import LONG
from dllm.serve.config import KEY, ServeConfig
from dllm.serve.errors import told
from dllm.serve.pair import Pair
from dllm.serve.server import hosted, listen, settings

ASK = {"messages": MESSAGES, "max_tokens": 4}
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def model():
    return dllm.load("tiny")


@pytest.fixture
def site(model, request):
    """A server with the settings that a test is marked with (`settled`)."""
    config = ServeConfig(**getattr(request, "param", {}))
    with serving(Engine(model, max_rows=config.max_rows, max_queue=config.max_queue), config) as site:
        yield site


def settled(**given):
    return pytest.mark.parametrize("site", [given], indirect=True, ids=[""])


@contextmanager
def sent(site, text):
    """A connection over which some text went as it is."""
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as link:
        link.sendall(text.encode())
        yield link


def raw(site, text):
    """What comes back for it."""
    with sent(site, text) as link:
        return link.recv(1 << 16).decode()


def test_keys_come_from_the_environment_and_a_file(model, monkeypatch, tmp_path):
    (tmp_path / "keys").write_text("two\n\nthree\n")
    monkeypatch.setenv(KEY, "one")
    with serving(Engine(model), ServeConfig(key_file=tmp_path / "keys")) as site:
        for key in ("one", "two", "three"):
            assert site.post(CHAT, ASK, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for headers in ({}, {"Authorization": "Bearer four"}, {"Authorization": "Basic one"}, {"Authorization": "one"}):
            answer = site.post(CHAT, ASK, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert "x-request-id" in answer.headers
        with pytest.raises(openai.AuthenticationError):
            site.client.models.list()
        assert httpx2.get(f"{site.url}/health").status_code == 200  # probes have no key
    (tmp_path / "none").write_text("\n")
    with pytest.raises(DllmError, match="holds no API key"):
        ServeConfig(key_file=tmp_path / "none").keys()


def test_a_process_that_goes_on_lets_go_of_what_there_was(model):
    """Of objects in a circle, too, which the collector leaves alone while the server is up."""
    circle = threading.Event()
    circle.own, gone = circle, weakref.ref(circle)
    with serving(Engine(model)):
        del circle
    gc.collect()
    assert gone() is None


def test_a_long_body_that_takes_its_time_is_passed(model, monkeypatch):
    """Others that are long wait behind it."""
    inside, go, read = threading.Event(), threading.Event(), requests.completion

    def slow(fields, *rest):
        if len(fields.prompt) > LONG:
            inside.set()
            assert go.wait(PATIENCE)
        return read(fields, *rest)

    monkeypatch.setattr(requests, "completion", slow)
    with serving(Engine(model)) as site:
        long = threading.Thread(target=site.post, args=(TEXT, {"prompt": "a" * (LONG + 1), "max_tokens": 4}))
        long.start()
        assert inside.wait(PATIENCE)
        assert site.post(TEXT, {"prompt": "a", "max_tokens": 4}).status_code == 200
        assert long.is_alive()
        go.set()
        long.join()


@settled(body_bytes=300)
def test_bodies_are_bounded_in_size(site):
    assert site.post(TEXT, {"prompt": "a" * 300}).json()["error"]["code"] == "request_too_large"
    assert raw(site, f"{HEAD}Content-Length: 10000000000\r\n\r\n").startswith("HTTP/1.1 413")
    chunked = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n" + "40\r\n" + "a" * 64 + "\r\n"
    assert raw(site, chunked + "ff\r\n" + "a" * 255 + "\r\n").startswith("HTTP/1.1 413")
    assert site.post(TEXT, {"prompt": "a", "max_tokens": 1}).status_code == 200


@settled(body_seconds=0.3)
def test_bodies_are_bounded_in_time(site):
    assert raw(site, HEAD + 'Content-Length: 50\r\n\r\n{"a').startswith("HTTP/1.1 408")


def test_a_body_of_another_type_is_refused(site):
    answer = site.post(CHAT, ASK, headers={"Content-Type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def together(site, count, body=None):
    """So many requests at a time: their statuses and answers."""

    async def one(client):
        answer = await client.post(f"{site.url}{CHAT}", json=body or ASK)
        return answer.status_code, answer.headers.get("retry-after"), answer.json()

    async def every():
        async with httpx2.AsyncClient(timeout=PATIENCE, limits=httpx2.Limits(max_connections=count)) as client:
            return await asyncio.gather(*(one(client) for _ in range(count)))

    return asyncio.run(every())


@settled(per_key=2)
def test_one_key_has_so_many_requests_at_a_time(site, model, monkeypatch):
    gate = Gate(monkeypatch, model)
    gate.shut()
    opened_after(3, site, gate)
    answers = together(site, 5)
    assert sorted(status for status, *_ in answers) == [200, 200, 429, 429, 429]
    refused = next(answer for answer in answers if answer[0] == 429)
    assert refused[1] == "1" and refused[2]["error"]["type"] == "rate_limit_error"
    assert refused[2]["error"]["message"].startswith("2 requests are under way")  # nobody has a key here


@settled(per_key=1)
def test_what_is_not_under_v1_is_no_request_of_a_key(site):
    with socket.create_connection(("127.0.0.1", int(site.url.rpartition(":")[2]))) as slow:
        slow.sendall(
            b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        time.sleep(0.3)
        assert site.post(CHAT, ASK).status_code == 200


def opened_after(refusals, site, gate):
    """Open the gate once so many requests have been refused."""
    refused = count(1)
    site.app.state.serving.counted.append(
        lambda ended: ended.code != "ok" and next(refused) == refusals and gate.open.set()
    )


@settled(max_rows=1, max_queue=2)
def test_a_full_line_says_when_to_come_again_and_the_client_does(site, model, monkeypatch):
    gate = Gate(monkeypatch, model)
    gate.shut()
    opened_after(3, site, gate)
    answers = together(site, 6)
    counts = [status for status, *_ in answers]
    assert set(counts) == {200, 429} and counts.count(200) in (2, 3)
    refused = next(answer for answer in answers if answer[0] == 429)
    assert int(refused[1]) >= 1 and refused[2]["error"]["code"] == "queue_full"
    gate.shut()
    opened_after(3, site, gate)
    client = openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=5)

    async def every():
        asked = (client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4) for _ in range(6))
        return await asyncio.gather(*asked)

    assert len(asyncio.run(every())) == 6


def test_an_answer_is_cancelled_when_its_client_leaves_streamed_or_not(site, model, monkeypatch):
    counted = SimpleQueue()
    site.app.state.serving.counted.append(counted.put)
    gate = Gate(monkeypatch, model)
    for live in (True, False):
        gate.shut()
        body = json.dumps({"messages": MESSAGES, "stream": live})
        with sent(site, f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}"):
            assert gate.inside.wait(PATIENCE)
        assert counted.get(timeout=PATIENCE).code == "client_closed_request"
        gate.open.set()
        site.idle()


@settled(request_timeout=0.2)
def test_an_answer_that_takes_too_long_is_no_answer(site, model, monkeypatch):
    forward = model.forward

    def slowly(*args, **kwargs):
        time.sleep(0.3)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", slowly)
    answer = site.post(CHAT, ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert answer.headers["x-should-retry"] == "false"
    with pytest.raises(openai.APIError, match="not done in its time"):
        list(site.client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))


@settled(event_buffer=500, defaults={"sampler": "confidence", "block_length": 1})
def test_a_reader_that_is_too_slow_is_cut_off(site, model, monkeypatch):
    taken = stream.Ear.taken
    monkeypatch.setattr(stream.Ear, "taken", lambda ear: taken(ear) if ear.ended else ear.wake.clear() or [])
    events = site.events(CHAT, {"messages": MESSAGES, "max_tokens": 32})
    assert json.loads(events[-1][1])["error"]["code"] == "slow_reader"
    site.idle()


def test_pages_of_other_origins_ask_where_the_settings_name_them(model):
    with serving(Engine(model), ServeConfig(origins=("https://page.example",))) as site:
        allowed = site.post(CHAT, ASK, headers={"Origin": "https://page.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        assert (
            "access-control-allow-origin" not in site.post(CHAT, ASK, headers={"Origin": "https://b.example"}).headers
        )


def test_a_server_that_drains_or_is_stuck_takes_no_requests(site, monkeypatch):
    serving = site.app.state.serving
    monkeypatch.setattr(serving, "draining", True)
    for answer in (site.post(CHAT, ASK), httpx2.get(f"{site.url}/health")):
        assert answer.status_code == 503 and "draining" in answer.text
    assert httpx2.get(f"{site.url}/health/live").status_code == 200
    monkeypatch.setattr(serving, "draining", False)
    monkeypatch.setattr(type(serving.backend), "trouble", "no forward has ended for 31 s")
    assert httpx2.get(f"{site.url}/health").json()["reason"] == "no forward has ended for 31 s"


def test_a_fault_of_ours_says_nothing_of_its_inside(site, monkeypatch):
    monkeypatch.setattr(type(site.app.state.serving.backend), "submit", lambda *_: 1 / 0)
    answer = site.post(CHAT, ASK)
    assert answer.status_code == 500 and answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["type"] == "server_error" and "division" not in answer.text
    assert told(RuntimeError("CUDA out of memory")).code == "out_of_memory"


def test_an_answer_that_fails_is_told_and_counted_as_our_fault_streamed_or_not(site, monkeypatch):
    counted = []
    site.app.state.serving.counted.append(counted.append)
    monkeypatch.setattr(Choice, "feed", lambda *_: 1 / 0)
    answer = site.post(CHAT, ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert json.loads(site.events(CHAT, ASK)[-1][1])["error"]["code"] == "internal_error"
    site.idle()
    assert [ended.code for ended in counted] == ["internal_error", "internal_error"]


def test_settings_come_from_a_file_the_command_line_and_their_limits(tmp_path):
    (tmp_path / "serve.yaml").write_text("port: 9000\nmax_rows: 4\ndefaults: {sampler: klass}\n")
    made = settings(tmp_path / "serve.yaml", ["max_rows=16", "defaults.cache=dual"], {"port": 0})
    assert (made.port, made.max_rows, made.defaults) == (0, 16, {"sampler": "klass", "cache": "dual"})
    with pytest.raises(DllmError, match="did you mean 'max_rows'"):
        settings(None, ["max_row=3"], {})
    with pytest.raises(DllmError, match="at least 1"):
        settings(None, ["max_rows=0"], {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"max_new_tokens": "many"}, "an integer"),
        ({"sampler": "klas"}, "did you mean 'klass'"),
        ({"cache": "duel"}, "did you mean 'dual'"),
        ({"batch_size": 4}, "leave it out"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_defaults_that_no_request_could_have_are_refused_at_the_start(given, said):
    with pytest.raises(DllmError, match=f"defaults: .*{said}"):
        ServeConfig(defaults=given)


def test_a_pair_refuses_defaults_of_another_kind_of_model():
    with pytest.raises(DllmError, match="defaults: cfg_scale is for a masked-diffusion model"):
        hosted(Checkpoint("tiny-ar"), ServeConfig(speculate="tiny", defaults={"cfg_scale": 1.0}))


def test_in_the_line_of_a_pair_time_runs_and_who_leaves_has_no_place(monkeypatch):
    verifier = as_verifier("tiny-ar")
    pair, gate = Pair(verifier, None, max_queue=2), Gate(monkeypatch, verifier.model)
    gate.shut()

    def submit(timeout):
        return pair.submit("Tom has", 1, timeout, "shared", {"max_new_tokens": 4, "seed": 0, "chat": False})

    running = submit(math.inf)
    assert gate.inside.wait(PATIENCE)
    last, left = submit(math.inf), submit(math.inf)
    with pytest.raises(QueueFull):
        submit(math.inf)
    left.cancel()
    late, ended = submit(0.1), threading.Event()
    late.listen(lambda event: ended.set() if event is None else None)
    assert ended.wait(PATIENCE) and isinstance(late.error, TimedOut) and pair.load.waiting == 1
    gate.open.set()
    pair.close(drain=True)
    assert running.error is None and last.error is None and last.heard[-1] is None


def test_a_pair_serves_the_verifiers_own_text(monkeypatch):
    verifier = dllm.load_verifier("tiny-ar")
    with serving(Pair(verifier, "tiny")) as site:
        asked = {"messages": MESSAGES, "max_tokens": 10, "n": 2, "temperature": 1.0, "seed": 3}
        got = site.post(CHAT, asked).json()
        want = [dllm.speculate(verifier, "tiny", MESSAGES, max_new_tokens=10, temperature=1.0, seed=s) for s in (3, 4)]
        assert [c["message"]["content"] for c in got["choices"]] == [w.text for w in want]
        assert got["usage"]["completion_tokens"] == sum(len(w.tokens) for w in want)
        parts = site.client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=10, stream=True)
        text = "".join(p.choices[0].delta.content or "" for p in parts)
        assert text == dllm.speculate(verifier, None, MESSAGES, max_new_tokens=10).text
        for odd in ({"sampler": "klass"}, {"regex": "a"}, {"draft": True, "stream": True}):
            error = site.post(CHAT, {**ASK, **odd}).json()["error"]
            assert (error["code"], error["param"]) == ("unsupported", next(iter(odd)))
        plain = dllm.speculate(verifier, None, "12 + 7 =", max_new_tokens=4, chat=False).text
        assert site.post(TEXT, {"prompt": "12 + 7 =", "max_tokens": 4}).json()["choices"][0]["text"] == plain
        assert site.post("/v1/reads", {"prompt": "a", "template": "{b}", "slots": {"b": ["c"]}}).status_code == 400
        assert site.client.models.list().data[0].model_extra["dllm"]["drafter"] == "tiny"


def test_no_event_is_lost_to_a_listener_that_comes_late(model):
    """An engine's request passes on what came before it was listened to."""
    with Engine(model) as engine:
        request = engine.submit(MESSAGES, max_new_tokens=8, sampler="threshold")
        output, heard = request.result(), []
        request.listen(heard.append)
        assert heard[-1] is None and "".join(news.read().text for news in heard[:-1]) == output.text
        assert engine.run(lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            engine.run(lambda: 1 / 0)


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DllmError, match=f"cannot listen at 127.0.0.1:{port}: Address already in use"):
            listen(Checkpoint("no/model"), ServeConfig(port=port))
    with pytest.raises(DllmError, match=r"cannot listen at nowhere\.invalid:1: "):
        listen(Checkpoint("no/model"), ServeConfig(host="nowhere.invalid", port=1))


def test_an_error_of_a_tokenizer_ends_the_stream_that_is_read(model, monkeypatch):
    """At once, and no other."""
    settled = Stops.settled

    def broken(self, ids):
        if "no such thing" in self.strings:
            raise OverflowError("no such id")
        return settled(self, ids)

    monkeypatch.setattr(Stops, "settled", broken)
    gate, ask = Gate(monkeypatch, model), {"messages": MESSAGES, "max_tokens": 8, "stop": "no such thing"}
    with serving(Engine(model), ServeConfig(defaults={"sampler": "confidence", "block_length": 1})) as site:
        gate.shut(after=2)
        assert json.loads(site.events(CHAT, ask)[-1][1])["error"]["code"] == "internal_error"
        gate.open.set()
        site.idle()
        assert site.events(CHAT, ASK)[-1][1] == "[DONE]"
