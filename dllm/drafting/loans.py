"""The graphs of the models of a call: of its verifier and its drafters, whatever texts they share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from types import TracebackType
from typing import Self, TypeVar, cast

from torch import nn

from dllm.decoding.graphs import Graphs, lent
from dllm.models.native import NativeModel

log = logging.getLogger(__name__)
T = TypeVar("T")


class Loans:
    """Each model's graphs are lent once a call, at the first use, for all of its texts and whatever it does for them.

    asked   `graphs=` of the call: None where they can be had, True asked for, False off.
    """

    def __init__(self, asked: bool | None = None) -> None:
        self.asked = asked
        self._held = ExitStack()
        self._lent: dict[int, Graphs] = {}  # by the model, which outlives the call
        self._drafting: dict[int, Graphs | None] = {}
        self._lanes: dict[int, int] = {}
        self._kept: dict[tuple[Hashable, ...], object] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.__exit__(kind, error, at)

    def of(self, model: NativeModel | nn.Module) -> Graphs:
        """The graphs of a model, until the call ends."""
        if id(model) not in self._lent:
            self._lent[id(model)] = self._held.enter_context(lent(model))
        return self._lent[id(model)]

    def drafting(self, model: object, why_not: Callable[[], str]) -> Graphs | None:
        """The same for a drafter, whose model can be captured if there is no reason against it; None where there is,
        which is said if graphs were asked for."""
        if id(model) not in self._drafting:
            why = "" if self.asked is False else why_not()
            if self.asked and why:
                log.warning("drafting runs without CUDA graphs: %s", why)
            able = self.asked is not False and not why
            self._drafting[id(model)] = self.of(model) if able and isinstance(model, NativeModel | nn.Module) else None
        return self._drafting[id(model)]

    def kept(self, model: object, key: Hashable, make: Callable[[], T]) -> T:
        """What texts of a call share where nothing is captured, made if there is none yet."""
        full = id(model), key
        if full not in self._kept:
            self._kept[full] = make()
        return cast(T, self._kept[full])

    def lane(self, model: object) -> int:
        """A place of its own for one more text that a model drafts for, among its `lanes`."""
        self._lanes[id(model)] = self.lanes(model) + 1
        return self._lanes[id(model)] - 1

    def lanes(self, model: object) -> int:
        """Texts that asked for a place; those of a call do before its first draft."""
        return self._lanes.get(id(model), 0)
