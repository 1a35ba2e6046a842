"""What a user may ask of an answer: `Constraint`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

from dllm.errors import DllmError, first_line, unknown

Schema: TypeAlias = Mapping[str, object]


@dataclass(frozen=True)
class Constraint:
    """What an answer must be, up to its end token: exactly one of the first four.

    regex        matches it fully.
    choices      it is one of these strings.
    json_schema  it is a document of this schema, in compact form: a mapping, or JSON text.
    grammar      it is a text that this context-free grammar parses from `start`, in the notation of lark.
    max_depth    how often a schema may refer to itself, or how many rules of a grammar that lead back to themselves may
                 be open at once with more to come.
    where        "holes": with infill=True each hole holds a member; None: the text from the first hole on is one.
    """

    regex: str | None = None
    choices: Sequence[str] | None = None
    json_schema: Schema | str | None = None
    grammar: str | None = None
    max_depth: int | None = None
    where: Literal["holes"] | None = None

    def __post_init__(self) -> None:
        said = [name for name in KINDS if vars(self)[name] is not None]
        if len(said) != 1:
            raise DllmError(f"a constraint is one of {', '.join(KINDS)}, and this has {' and '.join(said) or 'none'}")
        for name, kind in (("regex", "a pattern"), ("grammar", "the text of a grammar")):
            value = vars(self)[name]
            if value is not None and not isinstance(value, str):
                raise DllmError(f"{name}={value!r} must be {kind}")
        if self.choices is not None:
            _check_choices(self.choices)
        if isinstance(self.json_schema, str):
            try:
                object.__setattr__(self, "json_schema", json.loads(self.json_schema))
            except ValueError as error:
                raise DllmError(f"json_schema is no JSON: {error}") from error
        if self.json_schema is not None and not isinstance(self.json_schema, Mapping):
            raise DllmError("json_schema must be a mapping, or JSON text of one")
        try:
            json.dumps(self.json_schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise DllmError(f"json_schema is no JSON: {first_line(error)}") from error
        if self.max_depth is not None and (
            (self.json_schema is None and self.grammar is None)
            or not isinstance(self.max_depth, int)
            or isinstance(self.max_depth, bool)
            or self.max_depth < 1
        ):
            raise DllmError(
                f"max_depth={self.max_depth!r} must be an integer of at least 1, beside a json_schema or a grammar"
            )

        if self.where not in (None, "holes"):
            raise DllmError(f"where={self.where!r} must be 'holes', or left out")

    @classmethod
    def parse(cls, given: object) -> Constraint:
        """A constraint as it is, or a mapping of its fields. Errors: anything else."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise DllmError(
                f"constraint={given!r} must be a dllm.Constraint, or a mapping such as {{'regex': '[0-9]+'}}"
            )
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise unknown("parameter", str(name), known, of="constraint")
        return cls(**given)

    @property
    def asked(self) -> dict[str, object]:
        """The same for the process that compiles it."""
        kind = next(name for name in KINDS if vars(self)[name] is not None)
        what = vars(self)[kind]
        return {"kind": kind, "what": list(what) if kind == "choices" else what, "max_depth": self.max_depth}


KINDS = ("regex", "choices", "json_schema", "grammar")


def _check_choices(choices: Sequence[str]) -> None:
    listed = isinstance(choices, Sequence) and not isinstance(choices, str)
    if not listed or not all(isinstance(c, str) for c in choices) or not choices:
        raise DllmError(f"choices={choices!r} must be a list of strings")
    if len(set(choices)) < len(choices):
        twice = next(c for c in choices if list(choices).count(c) > 1)
        raise DllmError(f"choices has {twice!r} twice")
