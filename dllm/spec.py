"""Plain values from YAML text: files, `--set key=value`, and the parameters in specifications of samplers and caches.

A number with an exponent is a number (`1e-3`), as in JSON, Python and YAML 1.2; PyYAML, which follows YAML 1.1, takes
it for text. An anchor that refers to itself is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import yaml

from dllm.errors import DllmError, first_line

# What PyYAML raises on text that is malformed, and on dates and numbers that there are not.
ERRORS = (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the two differences above."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open: set[str] = set()

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        anchor = getattr(event, "anchor", None)
        if not anchor or isinstance(event, yaml.AliasEvent):
            if anchor in self._open:
                said = f"the anchor {anchor!r} refers to itself"
                raise yaml.composer.ComposerError(None, None, said, event.start_mark)
            return super().compose_node(parent, index)
        self._open.add(anchor)
        try:
            return super().compose_node(parent, index)
        finally:
            self._open.discard(anchor)


# Three digits of exponent at most: the text of a commit such as 73e1234 is no number.
_EXPONENT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]{1,3}$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def load(text: str, name: str) -> Any:
    """The value of a whole text; `name` is what an error calls it. Errors: not valid YAML, with the line."""
    try:
        return yaml.load(text, Loader)
    except ERRORS as error:
        raise malformed(error, name) from None


def value(text: str) -> Any:
    """One value of a `key=value`; what is no YAML is the text itself."""
    try:
        return yaml.load(text, Loader) if text.strip() else ""
    except ERRORS:
        return text


def lines(text: str) -> list[str]:
    """The lines of a text. `str.splitlines` would also cut at characters that stand inside of JSON strings (U+2028,
    U+0085, form feeds)."""
    return text.removesuffix("\n").split("\n") if text else []


def malformed(error: Exception, name: str) -> DllmError:
    """What is wrong with a text, and where."""
    mark = getattr(error, "problem_mark", None)
    line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    deep = "nested too deeply" if isinstance(error, RecursionError) else None
    return DllmError(f"{name}{line}: not valid YAML: {deep or getattr(error, 'problem', None) or first_line(error)}")


def _is_float(value: Real) -> bool:
    """Whether a number is one as a float: no NaN, and no integer beyond all floats."""
    try:
        return not math.isnan(value)
    except OverflowError:
        return False


# annotation -> what fits it, and how to say so
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda v: isinstance(v, Integral) and not isinstance(v, bool), "an integer"),
    "float": (lambda v: isinstance(v, Real) and not isinstance(v, bool) and _is_float(v), "a number"),
    "bool": (lambda v: isinstance(v, bool), "true or false"),
}


def misfit(kind: Any, value: Any) -> str:
    """What a value of this annotation must be, empty where it is that; only integers, numbers and flags are checked."""
    kinds = str(getattr(kind, "__name__", kind)).split(" | ")
    if not set(kinds) <= {*KINDS, "None"} or (value is None and "None" in kinds):
        return ""
    fits, what = KINDS[kinds[0]]
    return "" if fits(value) else what
