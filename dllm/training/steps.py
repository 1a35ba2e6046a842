"""The loop that trainings share: steps from where a run was left, with a bar, checkpoints, and a Ctrl-C that waits."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from dllm.errors import DllmError, first_line, out_of_memory

T = TypeVar("T")
log = logging.getLogger(__name__)


def run_steps(
    name: str,
    first: int,
    total: int,
    take: Callable[[int], Mapping[str, str] | None],
    save: Callable[[int], None] | None = None,
    every: int = 1,
    shown: bool = True,
) -> None:
    """Take the steps from `first` to `total`, counted from 0; the bar shows what `take` says of one.

    `save(n)` is called with n steps done: after every `every` of them, after the last, and at the first Ctrl-C, which
    ends the step that it falls into and is raised then; a second one strikes at once.
    """
    steps = range(first, total)
    bar = tqdm(steps, name, initial=first, total=total, unit="step", disable=not shown)
    with bar, patience() as interrupted:
        for step in bar:
            said, done = take(step), step + 1
            if said is not None:
                bar.set_postfix(said)
            if save is not None and (done % every == 0 or done == total or interrupted.is_set()):
                save(done)
            if interrupted.is_set():
                log.warning("%s: stopped after step %d: go on with --resume", name, done)
                raise KeyboardInterrupt


def fitting(size: int, attempt: Callable[[int], T], place: object) -> T:
    """`attempt(size)` with a batch of so many. Errors: memory that runs out, with a batch that fits."""
    least = size
    while True:
        try:
            made = attempt(least)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if least == 1:
                raise DllmError(f"not even a batch of 1 fits on {place}: {first_line(error)}") from error
            least //= 2
            continue
        if least == size:
            return made
        raise DllmError(f"batch_size {size} does not fit on {place}: batch_size {least} does")


@contextmanager
def patience() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets instead of striking.

    None is caught elsewhere than in the main thread, nor where the process ignores it (as background jobs of a shell).
    """
    asked = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield asked
        return

    def note(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        asked.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
