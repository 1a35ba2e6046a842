"""A file of requests, a file of answers: `dllm run-batch`.

Answers are appended as they come, each under a key made of all that decides it, so a run that was killed finds what is
there; at the end the file is put in the order of the requests.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn

from filelock import FileLock, Timeout
from tqdm import tqdm

from dllm.call.engine import Engine
from dllm.call.output import News
from dllm.errors import Cancelled, DllmError
from dllm.models.files import replaced
from dllm.models.lines import append, as_lines, disk_errors, mend
from dllm.serve import requests
from dllm.serve.answers import Reply
from dllm.serve.backend import Backend, Hosted, Pending
from dllm.serve.config import ServeConfig
from dllm.serve.errors import ApiError, told
from dllm.serve.requests import NAMES, Asked
from dllm.serve.schema import Chat, Completion, mapping
from dllm.spec import Json

AHEAD = 4  # requests under way for each lane: enough that none waits until the next line is read
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ROW = ("custom_id", "method", "url", "body")


@dataclass
class Line:
    """A request of the file."""

    key: str
    name: str | None  # custom_id
    url: str = ""
    body: Mapping[str, object] = field(default_factory=dict)
    wrong: ApiError | None = None  # why it is none


@dataclass
class Started:
    """A request that is under way, or was refused."""

    line: Line
    asked: Asked | None = None
    pending: Pending | None = None
    refused: ApiError | None = None
    news: list[News] = field(default_factory=list)

    @property
    def error(self) -> Exception | None:
        """What it has in place of an answer."""
        return self.refused or (None if self.pending is None else self.pending.error)


class Batch:
    """The requests of a file and the answers of another one.

    Errors: files that cannot be read or written, one that holds answers to other requests, another run on it.
    """

    def __init__(self, source: Path, target: Path, config: ServeConfig, name: str) -> None:
        if source.resolve() == target.resolve():
            raise DllmError(f"{target} holds the requests: name another file for the answers")
        try:
            self.given = source.read_bytes()
        except OSError as error:
            raise DllmError(f"cannot read {source}: {error.strerror}") from None
        self.target, self.config, self.name = target, config, config.name or name
        self.done = SimpleQueue[Started]()

    def run(self, engine: Engine | Backend, *, prune: bool = False) -> tuple[int, int]:
        """Answer what has no answer yet, and put the file in the order of the requests; how many lines of it are
        answers, and how many errors. prune: let answers to other requests go."""
        self.backend = Hosted(engine) if isinstance(engine, Engine) else engine
        self.fingerprint = self.backend.fingerprint()
        rows = list(self._lines())
        with disk_errors(self.target), self._alone():
            mend(self.target)
            there = self._there({row.key for row in rows}, prune)
            missing = [row for row in rows if row.key not in there]
            with tqdm(total=len(rows), initial=len(there), unit="request", disable=None) as bar:
                self._answer(missing, bar)
            return self._order(rows)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One run at a time; the kernel frees the lock of a process that dies."""
        lock = FileLock(self.target.with_name(f".{self.target.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise DllmError(f"another run is writing to {self.target}: wait for it, or choose another file") from None
        try:
            yield
        finally:
            lock.release()

    # -- requests -----------------------------------------------------------------------------------------------------

    def _lines(self) -> Iterator[Line]:
        """The requests, each with its key: what is asked, how many times it was asked before, and what answers."""
        seen = Counter[str]()
        defaults = json.dumps(self.config.defaults, sort_keys=True, default=str)
        for raw in self.given.removeprefix(b"\xef\xbb\xbf").splitlines():
            if not raw.strip():
                continue
            name, content, line = None, repr(raw), Line("", None)
            try:
                row = mapping(raw)
                name = given if isinstance(given := row.get("custom_id"), str) else None
                line.url, line.body = said(row)
                content = json.dumps([line.url, line.body], sort_keys=True)
            except ApiError as error:
                line.wrong = error
            decides = json.dumps([content, seen[content], self.fingerprint, defaults])
            seen[content] += 1
            line.key, line.name = f"batch_req_{hashlib.sha256(decides.encode()).hexdigest()[:24]}", name
            yield line

    def _asked(self, line: Line) -> Asked:
        """What a line asks. Errors: what cannot be honoured."""
        if line.wrong is not None:
            raise line.wrong
        if line.body.get("stream"):
            raise ApiError(400, "unsupported", "a batch streams nothing: leave stream out", "stream")
        body = dict(line.body)
        if body.get("seed") is None:  # one of its own, the same in every run
            body["seed"] = int(line.key[-7:], 16)
        given = (Chat if line.url == CHAT else Completion).read(json.dumps(body).encode())
        if given.model not in (None, self.name):
            raise ApiError(404, "model_not_found", f"there is no model {given.model!r}; this is {self.name!r}", "model")
        if isinstance(given, Chat):
            return requests.conversed(given, self.backend, self.config)
        return requests.completion(given, self.backend, self.config)

    # -- answers ------------------------------------------------------------------------------------------------------

    def _answer(self, rows: Sequence[Line], bar: tqdm[NoReturn]) -> None:
        """Decode, and write each answer as soon as it is there."""
        under_way, most = 0, min(AHEAD * self.config.max_rows, self.config.max_queue)  # nobody finds the line full
        try:
            for row in rows:
                while under_way >= most:
                    under_way -= self._write(bar)
                self._start(row)
                under_way += 1
            while under_way:
                under_way -= self._write(bar)
        finally:  # interrupted or not: whoever has an answer keeps it
            if not self.done.empty():
                self._write(bar)

    def _start(self, line: Line) -> None:
        """Put a request in line; what is wrong with it is its answer."""
        one = Started(line)
        try:
            one.asked = asked = self._asked(line)
            one.pending = self.backend.submit(asked.prompt, asked.n, math.inf, asked.batch, asked.arguments)
        except Exception as error:
            one.refused = told(error, line.body, NAMES)
            self.done.put(one)
            return

        def tell(news: News | None) -> None:
            if news is None:
                self.done.put(one)
            else:
                one.news.append(news)

        one.pending.listen(tell, live=False)

    def _write(self, bar: tqdm[NoReturn]) -> int:
        """Wait for an answer, and write those that are there; how many."""
        some = [self.done.get()]
        while not self.done.empty():
            some.append(self.done.get())
        append(self.target, [self._row(one) for one in some if not isinstance(one.error, Cancelled)])
        bar.update(len(some))
        return len(some)

    def _row(self, one: Started) -> Json:
        """The line of an answer, or of an error."""
        if one.error is not None:
            fault = told(one.error)
            status, body = fault.status, fault.body
            error = {key: fault.body["error"][key] for key in ("code", "message")}
        else:
            assert one.asked is not None and one.pending is not None
            reply = Reply(one.asked, self.name, self.fingerprint, self.backend)
            body, _ = reply.answered(
                one.pending, [(event, 0.0) for news in one.news if (event := news.read()) is not None]
            )
            status, error = 200, None
        request = one.line.key.removeprefix("batch_")
        return {
            "id": one.line.key, "custom_id": one.line.name,
            "response": {"status_code": status, "request_id": request, "body": body}, "error": error,
        }  # fmt: skip

    # -- the file -----------------------------------------------------------------------------------------------------

    def _written(self) -> Iterator[tuple[str, int, bool]]:
        """Key, place and failure of every line that is there. Errors: one that is no answer."""
        if not self.target.exists():
            return
        with open(self.target, "rb") as file:
            place = 0
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    yield str(row["id"]), place, row["error"] is not None
                except (ValueError, TypeError, LookupError, RecursionError):
                    said = "no answer of a batch; choose another file, or delete that line"
                    raise DllmError(f"{self.target}, line {number}: {said}") from None
                place += len(line)

    def _there(self, asked: set[str], prune: bool) -> set[str]:
        """The keys that have an answer. Errors: answers to other requests."""
        found = {key for key, _, failed in self._written() if not failed}
        if (others := len(found - asked)) and not prune:
            raise DllmError(
                f"{self.target} holds {others} answers to requests that are not among these (edited ones, or another "
                "model, version or default): choose another file, or --prune to let them go"
            )
        return found & asked

    def _order(self, rows: Sequence[Line]) -> tuple[int, int]:
        """Put the lines in the order of the requests; how many are answers, and how many errors."""
        places = {key: (place, failed) for key, place, failed in self._written()}
        if not rows:
            return 0, 0
        with replaced(self.target) as draft, open(self.target, "rb") as file, open(draft, "wb") as ordered:
            for row in rows:
                file.seek(places[row.key][0])
                line = file.readline()
                if (answer := json.loads(line))["custom_id"] != row.name:  # the same request under another name
                    line = as_lines([{**answer, "custom_id": row.name}]).encode()
                ordered.write(line)
        failed = sum(places[row.key][1] for row in rows)
        return len(rows) - failed, failed


def said(row: Mapping[str, object]) -> tuple[str, Json]:
    """Where a line's request goes, and its body. Errors: neither a line of OpenAI's, nor a prompt, nor messages."""
    if "url" in row or "body" in row:
        url, body = row.get("url"), row.get("body")
        if strangers := [key for key in row if key not in ROW]:
            wrong = f"{strangers[0]!r} is none of {', '.join(ROW)}"
            raise ApiError(400, "unknown_parameter", wrong, strangers[0])
        if row.get("method", "POST") != "POST":
            raise ApiError(400, "invalid_value", f"method {row['method']!r}: requests are POST", "method")
        if url not in (CHAT, COMPLETIONS):
            raise ApiError(400, "invalid_value", f"url {url!r} is neither {CHAT} nor {COMPLETIONS}", "url")
        if not isinstance(body, dict):
            raise ApiError(400, "invalid_value", "body must be an object", "body")
        return str(url), body
    body = {key: value for key, value in row.items() if key != "custom_id"}
    if isinstance(prompt := body.get("prompt"), str) and "messages" not in body:  # what a user says
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": prompt}]
    if "messages" in body or "prompt" in body:
        return CHAT if "messages" in body else COMPLETIONS, body
    raise ApiError(
        400, "missing_required_parameter", f"a line has {', '.join(ROW)}, or a prompt, or messages", "prompt"
    )
