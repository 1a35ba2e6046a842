"""What a server is told when it starts: `ServeConfig`, from a YAML file and the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dllm.call.arguments import Arguments
from dllm.decoding.cache import registry as caches
from dllm.errors import DllmError
from dllm.samplers import registry
from dllm.spec import check, param

KEY = "DLLM_API_KEY"  # the environment variable that holds the API key
OWN = {"n", "batch_size"}  # arguments that a request says, or the engine decides


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where a server listens, what it takes, and what a request gets that says nothing."""

    host: str = param("127.0.0.1", "naked HTTP stays on this machine; a reverse proxy or a container says otherwise")
    port: int = param(8000, "0 takes a free one", low=0, high=65535)
    name: str | None = param(None, "what clients call the model; None: the last part of its path or id")
    defaults: Mapping[str, object] = param({}, "arguments of dllm.generate for requests that leave them out")
    speculate: str | None = param(None, "a drafter: the model is then an autoregressive verifier")
    # the engine
    max_rows: int = param(8, "rows decoded at a time", low=1)
    kv_bytes: int | None = param(None, "bytes for keys and values; null: a share of what is left", low=1)
    tick_positions: int | None = param(None, "columns of all rows that decode at a time; null: by memory", low=1)
    max_queue: int = param(256, "requests that wait; the next one gets status 429", low=1)
    prefix_bytes: int = param(1 << 28, "bytes for keys and values of prompts that may come again", low=0)
    # what a request may be
    body_bytes: int = param(8 << 20, "room for a long conversation; more is status 413", low=1)
    body_seconds: float = param(10.0, "until a body has to be there; later is status 408", above=0)
    max_n: int = param(16, "answers to a prompt", low=1)
    max_prompts: int = param(64, "prompts of a request", low=1)
    max_stops: int = param(4, "stop strings of a request, as at OpenAI", low=1)
    stop_length: int = param(256, "characters of a stop string", low=1)
    request_timeout: float = param(600.0, "seconds until an answer has to be done, waiting included", above=0)
    per_key: int = param(256, "requests that one API key has at a time; without keys: all", low=1)
    connections: int = param(1024, "open ones; the next one gets status 503", low=1)
    # streams
    event_buffer: int = param(256 << 10, "bytes that a slow reader may be behind; then its answer is cancelled", low=1)
    send_seconds: float = param(60.0, "that a reader may take for one event", above=0)
    ping_seconds: float = param(15.0, "between comments that keep a silent stream open", above=0)
    draft_seconds: float = param(0.033, "between draft events of an answer, 30 a second; 0 sends every forward", low=0)
    # the end
    drain_seconds: float = param(30.0, "that running answers get after SIGTERM", low=0)
    # who may ask
    key_file: Path | None = param(None, "a file of API keys, one a line; DLLM_API_KEY is one more")
    origins: tuple[str, ...] = param((), "of pages in browsers that may ask (CORS); none: those of this server alone")
    canvas: bool = param(True, "whether /canvas is served")

    def __post_init__(self) -> None:
        check(self, "serve")
        try:
            if own := sorted(self.defaults.keys() & OWN):
                raise DllmError(f"{own[0]} is no default of a server: leave it out")
            said = Arguments.parse(self.defaults)
            caches.policy(said.cache)
            if said.sampler is not None:
                registry.parse(said.sampler)
        except DllmError as error:
            raise DllmError(f"defaults: {error}") from None

    def keys(self) -> tuple[str, ...]:
        """The API keys that open /v1; none: it is open to all. Errors: a file that cannot be read, or holds none."""
        found = [os.environ.get(KEY, "")]
        if self.key_file is not None:
            try:
                lines = Path(self.key_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DllmError(f"cannot read the API keys in {self.key_file}: {error}") from None
            if not any(line.strip() for line in lines):
                raise DllmError(f"{self.key_file} holds no API key: write one a line")
            found += lines
        return tuple(key.strip() for key in found if key.strip())
