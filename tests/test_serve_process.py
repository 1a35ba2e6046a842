"""`dllm serve` as a process: the commands of docs/serve.md, kill -9 and a restart, an orderly end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from serve_kit import CHAT, MESSAGES

PAGE = (Path(__file__).parent.parent / "docs" / "serve.md").read_text(encoding="utf-8")
ASK = {"messages": MESSAGES, "temperature": 1.0, "seed": 7, "max_tokens": 24}
LONG = {"messages": MESSAGES, "sampler": "confidence", "block_length": 4, "max_tokens": 96, "stream": True}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


@contextmanager
def process(*command):
    asked = [sys.executable, "-m", *" ".join(command).replace("8000", "0").split()]  # any free port; it says which
    made = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, url = list[str](), None
        while url is None:
            said.append(made.stdout.readline())
            assert said[-1], "".join(said)
            url = re.search(r"running on (http\S+)", said[-1])
        while httpx2.get(f"{url[1]}/health").status_code == 503:
            time.sleep(0.1)
        yield made, url[1]
    finally:
        made.kill()
        made.wait()


COMMAND = re.search(r"^dllm serve tiny .*$", PAGE, re.M)[0]


def test_the_page_serves_and_a_signal_lets_answers_end():
    with process(COMMAND) as (made, url):
        curl = next(block for block in blocks("bash") if "curl" in block).replace("http://127.0.0.1:8000", url)
        shown = json.loads(subprocess.run(["bash", "-c", curl], capture_output=True, check=True, text=True).stdout)
        assert shown["choices"][0]["message"]["content"]
        code = blocks("python")[0].replace("http://127.0.0.1:8000", url)
        exec(compile(code, "docs/serve.md", "exec"), {})
        with httpx2.stream("POST", url + CHAT, json=LONG, timeout=60) as stream:
            lines = []
            for line in stream.iter_lines():
                lines.append(line)
                if len(lines) == 3:
                    made.send_signal(signal.SIGTERM)
        assert lines[-1] == "data: [DONE]" or lines[-2] == "data: [DONE]"
        assert made.wait(20) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_signal_ends_running_answers_and_is_no_fault_of_ours(stream):
    with process(COMMAND) as (made, url):
        answers = []

        def ask():
            body = {**LONG, "max_tokens": 500, "min_new_tokens": 500, "stream": stream}
            answers.append(httpx2.post(url + CHAT, json=body, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        while not httpx2.get(f"{url}/health").json()["load"]["running"]:
            time.sleep(0.02)
        made.send_signal(signal.SIGINT)
        while httpx2.get(f"{url}/health").status_code == 200:
            time.sleep(0.02)
        made.send_signal(signal.SIGINT)
        assert made.wait(20) in (130, -signal.SIGINT)
        asking.join()
        (answer,) = answers
        assert answer.status_code == (200 if stream else 503)
        said = answer.text.strip().splitlines()[-1].removeprefix("data: ")  # the last event, or all
        assert json.loads(said)["error"]["code"] == "draining"
        assert "Traceback" not in made.stdout.read()


@pytest.mark.sweep
def test_a_kill_loses_nothing():
    with process(COMMAND) as (made, url):
        answer = httpx2.post(url + CHAT, json=ASK, timeout=60).json()["choices"][0]["message"]
        with pytest.raises(httpx2.TransportError), httpx2.stream("POST", url + CHAT, json=LONG, timeout=30) as stream:
            for n, _ in enumerate(stream.iter_lines()):
                if n == 3:
                    os.kill(made.pid, signal.SIGKILL)
    with process(COMMAND) as (_, url):
        assert httpx2.post(url + CHAT, json=ASK, timeout=60).json()["choices"][0]["message"] == answer
