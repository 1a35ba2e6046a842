"""Errors that a user can cause. One clear line each; the command line prints them without a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


class DllmError(ValueError):
    """A mistake in the input: the message says what is wrong and what to do."""


class TooLong(DllmError):
    """A prompt and its answer do not fit the model's positions."""


class Unsatisfiable(DllmError):
    """No member of a constraint fits the columns that it may fill."""


class TooLarge(DllmError):
    """A constraint takes more states, edges, bytes or time than it may."""


class Cancelled(DllmError):
    """The request was cancelled, or the engine closed before it was done."""


class QueueFull(DllmError):
    """No room in the line."""


class TimedOut(DllmError, TimeoutError):
    """The request was not done in its time, or nobody waits any longer."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is most likely a slip of."""
    return next(iter(get_close_matches(name, sorted(known), n=1, cutoff=0.65)), None)


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "", of: str = "") -> DllmError:
    """The error for an unknown `name` (of something), with the nearest known one."""
    known = sorted(known)
    near = nearest(name, known)
    suggestion = f"; did you mean {near!r}?" if near else f"; known: {', '.join(known)}"
    return DllmError(f"unknown {kind} {name!r}{of and f' of {of}'}{hint or suggestion}")


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: by its class, or in words as a CPU and MPS do."""
    told = re.search(r"out of memory|can't allocate memory", str(error), re.IGNORECASE)
    return bool(told) or type(error).__name__ in ("OutOfMemoryError", "MemoryError")


def first_line(error: Exception) -> str:
    """What another library's error says, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
