"""What a server stands on: `Backend`, and the one over `dllm.Engine`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import dllm
from dllm.call.engine import Engine, Load
from dllm.call.job import defaults
from dllm.call.output import News
from dllm.call.reads import Reading, read
from dllm.decoding.cache import registry as caches
from dllm.decoding.meter import Ticket
from dllm.decoding.trace import Trace
from dllm.models.model import Model
from dllm.models.native import NativeModel
from dllm.models.tokenizer import Tokenizer
from dllm.samplers import registry
from dllm.spec import Json

STUCK = 30.0  # seconds without a tick, with work waiting


class Pending(Protocol):
    """A request under way."""

    error: Exception | None

    @property
    def prompts(self) -> Sequence[list[int]]:
        """The ids in front of each answer."""

    @property
    def block_length(self) -> int:
        """Columns that are decoded before the next ones."""

    @property
    def columns(self) -> Sequence[int]:
        """Of each canvas at first: the prompt, and what is to be written."""

    @property
    def revises(self) -> bool:
        """Whether a column of the open block may change once it is written."""

    @property
    def tickets(self) -> Sequence[Ticket]:
        """What each answer has cost."""

    @property
    def traces(self) -> Mapping[int, Trace]:
        """Those of answers that are traced."""

    def listen(
        self, tell: Callable[[News | None], None], *, live: bool = True, flush: Callable[[], None] | None = None
    ) -> None:
        """Pass its news to a function, in another thread, and None at the end; `flush` is called some time after that,
        once for several."""

    def cancel(self) -> None:
        """End it."""


class Backend(Protocol):
    """What decodes."""

    @property
    def model(self) -> Model | None:
        """The masked-diffusion model; None: the text is another model's."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the model that writes the text."""

    @property
    def load(self) -> Load:
        """What it does at the moment."""

    @property
    def trouble(self) -> str:
        """Why it cannot answer; empty: it can."""

    def about(self) -> Json:
        """What /v1/models says of it."""

    def fingerprint(self) -> str:
        """What decides an answer beside the request."""

    def expecting(self) -> AbstractContextManager[None]:
        """Meanwhile a request is being read, and is put in line soon."""

    def submit(self, prompt: object, n: int, timeout: float, batch: str, arguments: Json) -> Pending:
        """Put a request in line. Errors: those of `Engine.submit`."""

    def read(self, arguments: Json) -> Reading:
        """`dllm.read`."""

    def warm(self) -> None:
        """Decode something, so that the first request finds everything ready."""

    def close(self, drain: bool) -> None:
        """Take no more requests and stop."""


def printed(*facts: str) -> str:
    """The fingerprint of these facts."""
    return f"fp_{hashlib.sha256('|'.join(facts).encode()).hexdigest()[:16]}"


class Hosted:
    """An engine as a server's backend."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def model(self) -> Model | None:
        """The engine's."""
        return self.engine.model

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's."""
        return self.engine.model.tokenizer

    @property
    def load(self) -> Load:
        """What the engine does at the moment."""
        return self.engine.load

    @property
    def trouble(self) -> str:
        """A thread that has ended, or one that does not come to an end of its tick."""
        if not self.engine.alive:
            return "the engine has stopped"
        load, late = self.engine.load, time.monotonic() - self.engine.ticked
        if late > STUCK and load.running + load.waiting:
            return f"no forward has ended for {late:.0f} s"
        return ""

    def about(self) -> Json:
        """The model, what can be asked of it, and what it is asked where nothing is said."""
        model, said = self.engine.model, defaults(self.engine.model)
        return {
            "family": model.family,
            "mask_id": model.mask_id,
            "block_size": model.block_size,
            "max_positions": model.max_positions,
            "chat": bool(getattr(model.tokenizer, "chat_template", None)),  # foreign
            "samplers": registry.names(),
            "caches": caches.names(),
            "defaults": {"sampler": said.sampler, "cache": caches.default(model, None).name,
                         "block_length": model.block_size or said.block_length},
        }  # fmt: skip

    def fingerprint(self) -> str:
        """Weights, tokenizer, package, precision and kind of device."""
        model = self.engine.model
        weights = model.fingerprint() if isinstance(model, NativeModel) else str(model)
        words = "" if model.tokenizer is None else repr(sorted(model.tokenizer.get_vocab().items()))
        return printed(weights, words, dllm.__version__, str(model.dtype), model.device.type)

    def expecting(self) -> AbstractContextManager[None]:
        """The engine's."""
        return self.engine.expecting()

    def submit(self, prompt: object, n: int, timeout: float, batch: str, arguments: Json) -> Pending:
        """Put a request in line."""
        return self.engine.submit(prompt, n=n, timeout=timeout, batch=batch, **arguments)  # type: ignore[call-overload, no-any-return]

    def read(self, arguments: Json) -> Reading:
        """`dllm.read`, between two ticks."""
        found: Reading = self.engine.run(lambda: read(self.engine.model, **arguments))
        return found

    def warm(self) -> None:
        """One short answer."""
        model = self.engine.model
        odd = {model.mask_id, model.pad_id, model.bos_id, *model.eos_ids}
        self.engine.submit([next(i for i in range(model.vocab_size) if i not in odd)], max_new_tokens=2).result()

    def close(self, drain: bool) -> None:
        """Take no more requests and stop."""
        self.engine.close(drain=drain)
