"""From a JSON schema to a pattern of compact JSON: at most one space where JSON allows any.

Every keyword is honoured or refused by name. Properties come in the order of the schema, and no others beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm.decoding.constraints.pattern import of_pattern
from dllm.errors import DllmError

SPACE = "[ ]?"
SIGN = r'(?:[^"\\\x00-\x1f\x7f]|\\["\\/bfnrt])'  # one character of a string
ESCAPED = [*range(0x20), ord('"'), ord("\\"), 0x7F]  # bytes that a string does not hold as they are
INTEGER = "-?(?:0|[1-9][0-9]*)"
FORMATS = {
    "date": "[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])",
    "time": "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}
FORMATS["date-time"] = f"{FORMATS['date']}T{FORMATS['time']}"
SIMPLE = {
    "null": "null",
    "boolean": "(?:true|false)",
    "integer": INTEGER,
    "number": rf"{INTEGER}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?",
}
NOTES = {  # what says nothing of the document
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id", "$comment",
    "$defs", "definitions",
}  # fmt: skip

KNOWN = {
    "$ref", "const", "enum", "anyOf", "type", "properties", "required", "additionalProperties", "items", "minItems",
    "maxItems", "minLength", "maxLength", "pattern", "format",
}  # fmt: skip
TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),), "boolean": (bool,), "integer": (int,), "number": (int, float), "string": (str,),
    "array": (list,), "object": (dict,),
}  # fmt: skip


def pattern(schema: object, max_depth: int | None = None) -> str:
    """The pattern of the documents that a schema allows. Errors: keywords that are not enforced; a schema that refers
    to itself, unless `max_depth` says how often it may."""
    found = _Writer(schema, max_depth).write(schema, "", ())
    if found is None:
        raise DllmError(f"json_schema: no document fits within max_depth={max_depth}; allow more")
    return found


def _any(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"


def _literal(value: object) -> str:
    """The pattern of one value."""
    if isinstance(value, Mapping):
        pairs = [f"{_literal(str(k))}:{SPACE}{_literal(v)}" for k, v in value.items()]
        return rf"\{{{f',{SPACE}'.join(pairs)}\}}"
    if isinstance(value, list):
        return rf"\[{f',{SPACE}'.join(map(_literal, value))}\]"
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise DllmError(f"json_schema: {value!r} is no value of JSON") from error
    return re.sub(r"[^\w\s]", lambda m: m[0] if ord(m[0]) > 127 else "\\" + m[0], text)


@dataclass(frozen=True)
class _Writer:
    """Writes the parts of one schema; None stands for what no document within the depth can be."""

    whole: object
    max_depth: int | None

    def write(self, schema: object, at: str, refs: tuple[str, ...]) -> str | None:
        """The pattern of a part. `at`: where it stands; `refs`: the references that led there."""
        where = f"json_schema{f' at {at}' if at else ''}"
        if not isinstance(schema, Mapping):
            raise DllmError(
                f"{where}: {json.dumps(schema, default=repr)} is no schema that says what to write; give it a type"
            )
        rest = {str(k): v for k, v in schema.items() if k not in NOTES}
        if foreign := sorted(rest.keys() - KNOWN):
            raise _unenforced(foreign, where)
        found = self.part(rest, at, where, refs)
        if rest:
            raise _unenforced(sorted(rest), where)
        return found

    def part(self, rest: dict[str, Any], at: str, where: str, refs: tuple[str, ...]) -> str | None:
        """Takes what it honours out of `rest`."""
        if "$ref" in rest:
            return self.referred(str(rest.pop("$ref")), where, refs)
        for name in ("const", "enum"):
            if name in rest:
                values = _list(rest, name, where) if name == "enum" else [rest.pop(name)]
                kind = rest.pop("type", list(TYPES))
                fitting = [v for v in values if any(_is(v, k) for k in (kind if isinstance(kind, list) else [kind]))]
                if not fitting:
                    raise DllmError(f"{where}: {name} has no value of type {json.dumps(kind)}")
                return _any([_literal(v) for v in fitting])
        if "anyOf" in rest:
            options = _list(rest, "anyOf", where)
            return self.either([self.write(s, f"{at}/anyOf/{i}".strip("/"), refs) for i, s in enumerate(options)])
        kind = _list(rest, "type", where) if isinstance(rest.get("type"), list) else rest.pop("type", None)
        if isinstance(kind, list):
            options, used = [], set[str]()
            for one in kind:
                own = dict(rest)
                options.append(self.typed(one, own, at, where, refs))
                used |= rest.keys() - own.keys()
            for name in used:
                del rest[name]
            return self.either(options)
        return self.typed(kind, rest, at, where, refs)

    @staticmethod
    def either(options: Sequence[str | None]) -> str | None:
        """Any of these."""
        kept = [o for o in options if o is not None]
        return _any(kept) if kept else None

    def referred(self, ref: str, where: str, refs: tuple[str, ...]) -> str | None:
        """What a reference stands for."""
        if ref != "#" and not ref.startswith("#/"):
            raise DllmError(f"{where}: $ref {ref!r} is no path within the schema, such as #/$defs/name; write it out")
        if ref in refs:
            if self.max_depth is None:
                raise DllmError(f"{where}: {ref} refers to itself; say how deep with max_depth")
            if refs.count(ref) >= self.max_depth:
                return None
        target: Any = self.whole
        for step in ref[1:].split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, Mapping) or key not in target:
                raise DllmError(f"{where}: there is no {ref}")
            target = target[key]
        return self.write(target, ref[1:].strip("/"), (*refs, ref))

    def typed(self, kind: object, rest: dict[str, Any], at: str, where: str, refs: tuple[str, ...]) -> str | None:
        """A value of one type."""
        if kind == "object":
            return self.object(rest, at, where, refs)
        if kind == "array":
            return self.array(rest, at, where, refs)
        if kind == "string":
            return self.string(rest, where)
        if kind in SIMPLE:
            return SIMPLE[str(kind)]
        raise DllmError(
            f"{where}: say what it is: type, enum, const, anyOf or $ref{'' if kind is None else f', not {kind!r}'}"
        )

    def object(self, rest: dict[str, Any], at: str, where: str, refs: tuple[str, ...]) -> str | None:
        """An object with these properties, in this order."""
        properties, needed = rest.pop("properties", {}), rest.pop("required", [])
        if not isinstance(properties, Mapping):
            raise DllmError(f"{where}: properties must be a mapping from names to schemas")
        if not isinstance(needed, list) or not all(isinstance(name, str) for name in needed):
            raise DllmError(f"{where}: required must be a list of names")
        if rest.get("additionalProperties") in (False, True):  # no others are written
            del rest["additionalProperties"]
        if missing := sorted(set(needed) - set(properties)):
            raise DllmError(f"{where}: {', '.join(missing)} is required and no property")
        items = list[tuple[str, bool]]()
        for name, schema in properties.items():
            value = self.write(schema, f"{at}/{name}".strip("/"), refs)
            if value is not None:
                items.append((f"{_literal(name)}:{SPACE}{value}", name in needed))
            elif name in needed:
                return None
        comma = f",{SPACE}"
        first = next((i for i, (_, must) in enumerate(items) if must), None)

        def behind(i: int) -> str:
            return "".join(comma + text if must else f"(?:{comma}{text})?" for text, must in items[i + 1 :])

        if first is not None:
            body = "".join(f"(?:{text}{comma})?" for text, _ in items[:first]) + items[first][0] + behind(first)
        else:
            body = f"(?:{'|'.join(text + behind(i) for i, (text, _) in enumerate(items))})?" if items else ""
        return rf"\{{{body}\}}"

    def array(self, rest: dict[str, Any], at: str, where: str, refs: tuple[str, ...]) -> str | None:
        """An array of items that are alike."""
        if "items" not in rest:
            raise DllmError(f"{where}: say what the items are: items")
        low, high = _bounds(rest, "minItems", "maxItems", where)
        item = self.write(rest.pop("items"), f"{at}/items".strip("/"), refs)
        if item is None or high == 0:
            return r"\[\]" if low == 0 else None
        more = "" if high is None else high - 1
        body = f"{item}(?:,{SPACE}{item}){{{max(low - 1, 0)},{more}}}"
        return rf"\[{body}\]" if low else rf"\[(?:{body})?\]"

    def string(self, rest: dict[str, Any], where: str) -> str:
        """A string."""
        if (name := rest.pop("format", None)) is not None:
            if name not in FORMATS:
                raise DllmError(f"{where}: format {name!r} is not known; known: {', '.join(FORMATS)}")
            return f'"{FORMATS[name]}"'
        if (shape := rest.pop("pattern", None)) is not None:
            if not (isinstance(shape, str) and re.fullmatch(r"\^(?:[^\\]|\\.)*\$", shape, re.DOTALL)):
                raise DllmError(
                    f"{where}: pattern {shape!r} must begin with ^ and end with $: it says all of the string"
                )
            if (of_pattern(shape).delta[:, ESCAPED] >= 0).any():
                raise DllmError(f"{where}: pattern {shape!r} allows what JSON escapes: quotes, backslashes or controls")
            return f'"(?:{shape[1:-1]})"'
        low, high = _bounds(rest, "minLength", "maxLength", where)
        return f'"{SIGN}{{{low},{"" if high is None else high}}}"'


def _bounds(rest: dict[str, Any], least: str, most: str, where: str) -> tuple[int, int | None]:
    low, high = rest.pop(least, 0), rest.pop(most, None)
    for name, value in ((least, low), (most, high)):
        if (name == least or value is not None) and not (_is(value, "integer") and value >= 0):
            raise DllmError(f"{where}: {name}={value!r} must be an integer of at least 0")
    if high is not None and high < low:
        raise DllmError(f"{where}: {most}={high} is below {least}={low}")
    return low, high


def _list(rest: dict[str, Any], name: str, where: str) -> list[Any]:
    """A keyword whose value lists something."""
    values = rest.pop(name)
    if not isinstance(values, list) or not values:
        raise DllmError(f"{where}: {name} must be a list that is not empty")
    return values


def _is(value: object, kind: object) -> bool:
    return isinstance(value, TYPES.get(str(kind), ())) and (not isinstance(value, bool) or kind == "boolean")


def _unenforced(names: Sequence[str], where: str) -> DllmError:
    said = ", ".join(names) + " cannot be enforced here" + (" (anyOf can)" if "oneOf" in names else "")
    return DllmError(f"{where}: {said}; leave it out, and check the answers")
