"""Constraints become automata: in a process of their own, once for a vocabulary, and remembered."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

import dllm
from dllm.decoding.constraints.automaton import TokenAutomaton, Vocabulary
from dllm.errors import DllmError, TooLarge

SECONDS = 10  # of a processor that a compilation may take
WAIT = 6  # times as long on the clock, where the machine is busy or limits are not known
KEPT = 64  # automata
LATE = "the constraint was not compiled within {} s: make its counts or its depth smaller"
OUTCOMES = Counter[str]()  # of what was asked for: made, known (there, or about to be), refused
_FUTURES: OrderedDict[Hashable, Future[TokenAutomaton]] = OrderedDict()  # the last used last
_LOCK = threading.Lock()


def compiled(
    asked: Mapping[str, object], vocabulary: Vocabulary, ends: Sequence[int], pads: Sequence[int], banned: Sequence[int]
) -> TokenAutomaton:
    """The automaton of a constraint over these tokens. Calls that ask for the same one at a time wait for one process.

    asked: `kind`, `what` and `max_depth` as the worker takes them. Errors: what the worker objects to, time that runs
    out.
    """
    given = {**asked, "ends": list(ends), "pads": list(pads), "banned": sorted(banned), "seconds": SECONDS}
    text = json.dumps(given)
    key = text, vocabulary.digest
    with _LOCK:
        waiting = _FUTURES.pop(key, None)
        future = _FUTURES[key] = Future[TokenAutomaton]() if waiting is None else waiting
        if len(_FUTURES) > KEPT:
            _FUTURES.popitem(last=False)
    outcome = "known"
    if waiting is None:
        try:
            future.set_result(_made(text, vocabulary))
            outcome = "made"
        except BaseException as error:
            outcome = "refused"
            with _LOCK:
                _FUTURES.pop(key, None)
            future.set_exception(error)
    with _LOCK:
        OUTCOMES[outcome] += 1
    return future.result()


def _made(text: str, vocabulary: Vocabulary) -> TokenAutomaton:
    sent = io.BytesIO()
    np.savez(sent, asked=np.frombuffer(text.encode(), np.uint8), **vocabulary._asdict())
    path = [str(Path(dllm.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "dllm.decoding.constraints.worker"],
            input=sent.getvalue(), capture_output=True, timeout=WAIT * SECONDS, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TooLarge(LATE.format(SECONDS)) from None
    if os.name == "posix" and done.returncode == -signal.SIGXCPU:
        raise TooLarge(LATE.format(SECONDS))
    try:
        with np.load(io.BytesIO(done.stdout)) as made:
            if "error" in made:
                raise (TooLarge if "large" in made else DllmError)(made["error"].tobytes().decode())
            return TokenAutomaton(**made)
    except (ValueError, BadZipFile, EOFError) as error:
        if isinstance(error, DllmError):
            raise
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise DllmError(f"the constraint was not compiled: {said[-1] if said else 'its process ended'}") from error
