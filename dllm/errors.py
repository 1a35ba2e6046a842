"""Errors that a user can cause. One clear line each; the command line prints them without a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DllmError(ValueError):
    """A mistake in the input: the message says what is wrong and what to do."""


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> DllmError:
    """The error for an unknown `name`, with the nearest known one."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    suggestion = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
    return DllmError(f"unknown {kind} {name!r}{hint or suggestion}")
