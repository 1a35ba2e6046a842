"""The one reader of what a user writes: specifications and their parameters, YAML files and `--set key=value`.

    name                        a sampler, cache, lookahead, search, length controller or drafter
    name:key=value,key=value    with parameters; a value is YAML: 3, 1e-3, true, null, word, "any text", [1, 2], {a: 1}
    name:preset,key=value       samplers only
    a:key=value+b               a composition, samplers only

A number with an exponent is a number (`1e-3`), and so are `inf` and `nan`, as Python writes them; PyYAML, which follows
YAML 1.1, takes them for text. `3:16` is text, which PyYAML takes for a number to the base of 60. An anchor that refers
to itself is an error.

A specification or a file becomes a dataclass: kinds come from the annotations, ranges and choices from `param`. This is
written by hand. pydantic would take over `fit` and `schema`, about a hundred lines, but reads "3" and true as integers
unless it is strict, and no mapping or list for a dataclass or tuple when it is; its errors would have to be put into
our words one kind at a time, and every import of the package would wait for it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, field, fields, is_dataclass
from functools import cache, cached_property, singledispatch
from importlib.metadata import EntryPoint, entry_points
from inspect import Parameter, cleandoc, signature
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from dllm.errors import DllmError, first_line, nearest, unknown

log = logging.getLogger(__name__)
P = TypeVar("P")
T = TypeVar("T")
Json: TypeAlias = dict[str, Any]  # plain values by key, as YAML and JSON have them

# What PyYAML raises on text that is malformed, and on dates and numbers that there are not.
ERRORS = (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError)


class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's safe loader with the differences above."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open: set[str] = set()

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        """The next node. Errors: an anchor inside of what it names."""
        event = self.peek_event()
        anchor = getattr(event, "anchor", None)  # foreign
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
_EXPONENT = re.compile(r"^[-+]?(?:(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]{1,3}|inf|nan)$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789in"))
# YAML 1.1 reads 3:16 as 196, minutes and seconds.
for _sign in "-+0123456789":
    Loader.yaml_implicit_resolvers[_sign].insert(
        0, ("tag:yaml.org,2002:str", re.compile(r"^[-+]?[0-9.]+(?::[0-9.]+)+$"))
    )


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


# ------------------------------------------------------------------------------------------------------- specifications

_TOKEN = re.compile(r"""(?s)"(?:[^"\\]|\\.)*"|'[^']*'|\+[0-9.]|.""")  # a quoted text, the plus of a number, or a sign
_WORD = re.compile(r"[\w./~-]+")


def split(text: str, at: str) -> list[str]:
    """The pieces of a specification between the signs `at` that stand outside of quotes, brackets and numbers."""
    pieces, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        if token == at and not depth:
            pieces.append("")
        else:
            pieces[-1] += token
    return pieces


class Named(NamedTuple):
    """A specification as it was written."""

    name: str
    preset: str | None
    params: dict[str, object]


def named(given: object, kind: str, table: Collection[str] | None = None, presets: bool = False) -> Named:
    """The parts of "name:key=value,..." or {"name": ..., key: value}; `kind` is what an error calls it.

    Errors: another form, a name that is not in the table, a value that is no YAML.
    """
    name, words, params = _pieces(given, kind, presets)
    if table is not None and name not in table:
        raise unknown(kind, name, table)
    for item in words[1 if presets else 0 :]:
        raise DllmError(f"{kind} {name!r}: {item!r} is not of the form key=value")
    if isinstance(given, str):
        params = {key: _parameter(str(text), f"{kind} {name!r}: {key}") for key, text in params.items()}
    return Named(name, words[0] if words else None, params)


def _pieces(given: object, kind: str, presets: bool) -> tuple[str, list[str], dict[str, object]]:
    """Name, words without a value, and parameters, which are still text where the whole is."""
    if isinstance(given, str):
        name, _, rest = given.partition(":")
        items = [item.strip().partition("=") for item in split(rest, ",") if item.strip()]
        texts: Json = {key.strip(): text for key, equals, text in items if equals}
        return name.strip(), [key for key, equals, _ in items if not equals], texts
    if not isinstance(given, Mapping):
        raise DllmError(f"a {kind} is a name, a mapping with the key 'name', or an object, not {given!r}")
    if "name" not in given:
        raise DllmError(f"a {kind} given as a mapping needs the key 'name'; got {list(given)}")
    words = [given["preset"]] if presets and given.get("preset") is not None else []
    params = {key: item for key, item in given.items() if key != "name" and not (presets and key == "preset")}
    if odd := [word for word in (given["name"], *words, *params) if not isinstance(word, str)]:
        raise DllmError(f"the name of a {kind}, its preset and its keys are words, not {odd[0]!r}")
    return given["name"], words, params


def _parameter(text: str, where: str) -> object:
    try:
        return yaml.load(text, Loader) if text.strip() else ""
    except ERRORS:
        raise DllmError(f"{where}={text!r} is no value: a number, a word, or a list in brackets") from None


def render(name: str, *words: str, **params: object) -> str:
    """A specification as text that `named` reads back."""
    said = [*words, *(f"{key}={show(value)}" for key, value in params.items())]
    return name + (":" + ",".join(said) if said else "")


def show(value: object) -> str:
    """A value as YAML on one line; what has no such form (a function) by its name."""
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) and _is_text(value) else '"' + "".join(map(_escaped, value)) + '"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{show(key)}: {show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(show, value))}]"
    return "null" if value is None else getattr(value, "__name__", repr(value))  # foreign


def _is_text(word: str) -> bool:
    """Whether YAML reads the word as itself. Of 2020-13-45 it says that there is no such day."""
    try:
        return bool(yaml.load(word, Loader) == word)
    except ERRORS:
        return False


def _escaped(sign: str) -> str:
    return sign if sign.isprintable() and sign not in '"\\' else f"\\U{ord(sign):08x}"


# ----------------------------------------------------------------------------------------------------------- parameters


class Limits(NamedTuple):
    """What `param` says of a field."""

    why: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: Collection[object] = ()

    def bars(self, number: float) -> str:
        """The range that a number is outside of, empty where it is inside."""
        low, high, above = self.low, self.high, self.above
        within = (low is None or number >= low) and (high is None or number <= high)
        if within and (above is None or number > above):
            return ""
        if high is None:
            return f"at least {low}" if above is None else f"more than {above}"
        start = f"[{low}" if low is not None else f"({above}"
        return f"at most {high}" if low is None and above is None else f"in {start}, {high}]"


FREE = Limits()


def limits_of(member: Field[object]) -> Limits:
    """The limits of a field; what else its metadata says is of no concern here."""
    return Limits(**{key: member.metadata[key] for key in Limits._fields if key in member.metadata})


def param(
    default: T,
    why: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Collection[object] = (),
) -> T:
    """A documented field of a dataclass: its default, the reason for it, and what it may be.

    Bounds: `low` and `high` are allowed, `above` itself is not. A default that can be changed is copied.
    """
    limits = Limits(why, low, high, above, choices)._asdict()
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata=limits)  # type: ignore[return-value]
    return field(default=default, metadata=limits)


def _is_float(value: Real) -> bool:
    """Whether a number is one as a float: no NaN, and no integer beyond all floats."""
    try:
        return not math.isnan(value)
    except OverflowError:
        return False


class Kind(NamedTuple):
    """An annotation that is checked."""

    fits: Callable[[object], bool]
    words: str
    json: str  # its name in JSON Schema


KINDS = {
    "int": Kind(lambda v: isinstance(v, Integral) and not isinstance(v, bool), "an integer", "integer"),
    "float": Kind(lambda v: isinstance(v, Real) and not isinstance(v, bool) and _is_float(v), "a number", "number"),
    "bool": Kind(lambda v: isinstance(v, bool), "true or false", "boolean"),
    "str": Kind(lambda v: isinstance(v, str), "text", "string"),
}


def misfit(kind: object, given: object, limits: Limits = FREE) -> str:
    """What a value of this annotation and within these limits must be, empty where it is that.

    Only the annotations of KINDS and their unions are checked.
    """
    if limits.choices:
        return "" if given in limits.choices else f"one of {', '.join(map(repr, limits.choices))}"
    names = (kind.__name__ if isinstance(kind, type) else str(kind)).split(" | ")
    if not set(names) <= {*KINDS, "None"} or (given is None and "None" in names):
        return ""
    kinds = [KINDS[name] for name in names if name != "None"]
    if not any(kind.fits(given) for kind in kinds):
        return " or ".join(kind.words for kind in kinds)
    return limits.bars(given) if isinstance(given, int | float) else ""


def number(kind: object, given: object) -> object:
    """What was given, but the number that a text says where one is asked for (plain PyYAML reads 1e-3 as text)."""
    if isinstance(given, str) and misfit(kind, given) and not misfit(kind, read := value(given)):
        return read
    return given


@cache
def parameters(make: Callable[..., object]) -> Mapping[str, tuple[Parameter, Limits]]:
    """What a user may set of a dataclass or function, with its limits: what has a default.

    Keyword-only fields of a dataclass are not the user's unless they are a `param` (what a cache policy knows of the
    model is none).
    """
    members = {f.name: f for f in fields(make)} if isinstance(make, type) and is_dataclass(make) else {}
    given = {name: p for name, p in signature(make).parameters.items() if p.default is not p.empty}
    if not members:
        return {name: (p, FREE) for name, p in given.items()}
    return {
        name: (p, limits_of(members[name]))
        for name, p in given.items()
        if not members[name].kw_only or "why" in members[name].metadata
    }


def settings(of: str, make: Callable[..., object], given: Mapping[str, object]) -> Json:
    """Keywords for `make`, checked. Errors: an unknown name, with the nearest one, another kind, out of range."""
    known, out = parameters(make), dict[str, object]()
    for key, value in given.items():
        if key not in known:
            raise unknown("parameter", str(key), known or ("(none)",), of=of)
        parameter, limits = known[key]
        out[key] = number(parameter.annotation, value)
        if what := misfit(parameter.annotation, out[key], limits):
            if near := nearest(str(value), (c for c in limits.choices if isinstance(c, str))):
                what += f"; did you mean {near!r}?"
            raise DllmError(f"{of}: {key}={value!r} must be {what} (default {parameter.default!r})")
    return out


def check(made: object, of: str) -> None:
    """The fields of a dataclass, for its `__post_init__`. Errors as `settings` has them."""
    make: Callable[..., object] = type(made)
    given = {name: vars(made)[name] for name in parameters(make)}
    for name, value in settings(of, make, given).items():
        object.__setattr__(made, name, value)  # a number that came as text


# --------------------------------------------------------------------------------------------------------------- files

Keys: TypeAlias = tuple[str | int, ...]  # from the top of a file down: ("tasks", 0, "name")


class Source:
    """Where every key was given (a file and its line, or a `--set`), so that an error can say so."""

    def __init__(self, name: str, places: Mapping[Keys, str] | None = None):
        self.name, self.places = name, dict(places or {})

    def place(self, keys: Keys) -> str:
        """Where this key, or else the nearest one around it, was given."""
        ends = range(len(keys), 0 if keys else -1, -1)
        return next((self.places[keys[:end]] for end in ends if keys[:end] in self.places), self.name)

    def error(self, keys: Keys, message: object) -> DllmError:
        """The error with the place and the name of the key."""
        key = ".".join(map(str, keys))
        return DllmError(f"{self.place(keys)}: {key + ': ' if key else ''}{message}")

    def placed(self, keys: Keys, place: str) -> Source:
        """The same with this key, and all below it, given elsewhere."""
        kept = {key: at for key, at in self.places.items() if key[: len(keys)] != keys}
        return Source(self.name, {**{keys[:end]: place for end in range(1, len(keys))}, **kept, keys: place})


NOWHERE = Source("the configuration")


class _Reader:
    """Builds the values of one text and notes where each key stands."""

    MOST = 100_000  # values; aliases of aliases would multiply without end

    def __init__(self, text: str, name: str):
        self.loader, self.name = Loader(text), name
        self.places: dict[Keys, str] = {}
        self.own: dict[int, set[int]] = {}  # the keys that stand in a mapping itself, not in what it merges (`<<`)

    def read(self) -> tuple[Json, Source]:
        node = self.loader.get_single_node()
        if node is None:
            raise DllmError(f"{self.name}: the file is empty")
        if not isinstance(node, yaml.MappingNode):
            raise DllmError(f"{self.place(node)}: expected `key: value` pairs")
        return self.pairs(node, ()), Source(self.name, self.places)

    def place(self, node: yaml.Node) -> str:
        return f"{self.name}, line {node.start_mark.line + 1}"

    def value(self, node: yaml.Node, keys: Keys) -> object:
        self.places.setdefault(keys, self.place(node))
        if len(self.places) > self.MOST:
            raise DllmError(f"{self.place(node)}: more than {self.MOST} values, aliases written out")
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*keys, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self.pairs(node, keys)
        try:
            return self.loader.construct_object(node, deep=True)
        except ERRORS as error:
            raise DllmError(f"{self.place(node)}: {getattr(error, 'problem', None) or error}") from None  # foreign

    def pairs(self, node: yaml.MappingNode, keys: Keys) -> dict[str, object]:
        own = self.own.setdefault(id(node), {id(key) for key, _ in node.value})
        self.loader.flatten_mapping(node)
        out: dict[str, object] = {}
        given = set()
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise DllmError(f"{self.place(key_node)}: a key is a word, not a list or a mapping")
            key = str(self.loader.construct_object(key_node))
            if key in given and id(key_node) in own:
                raise DllmError(f"{self.place(key_node)}: key {key!r} is given twice")
            if id(key_node) in own:
                given.add(key)
            self.places[(*keys, key)] = self.place(key_node)
            out[key] = self.value(child, (*keys, key))
        return out


def parse(text: str, name: str) -> tuple[Json, Source]:
    """YAML text to plain values and the lines of its keys. Errors: malformed, not a mapping, a key given twice."""
    try:
        return _Reader(text, name).read()
    except DllmError:
        raise
    except ERRORS as error:
        mark = getattr(error, "problem_mark", None)  # foreign
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "problem", None)  # foreign
        raise DllmError(f"{name}{line}: not valid YAML: {said or first_line(error)}") from None


def read(path: str | Path, what: str = "configuration", _seen: tuple[Path, ...] = ()) -> tuple[Json, Source]:
    """A file with its `extends:` chain merged in; the nearer file wins key by key, and lists are replaced whole."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = unknown("file", path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        raise DllmError(f"there is no {what} {path}{f' ({near})' if near else ''}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DllmError(f"cannot read {path}: {error}") from None
    data, source = parse(text, str(path))
    base = data.pop("extends", None)
    if base is None:
        return data, source
    parent = (path.parent / str(base)).resolve()
    if parent in (*_seen, path.resolve()):
        raise source.error(("extends",), f"{base} extends this file again")
    data_base, source_base = read(parent, what, (*_seen, path.resolve()))
    return _merged(data_base, data), Source(str(path), {**source_base.places, **source.places})


def merge(base: object, top: object) -> object:
    """`top` over `base`. Mappings merge, except that another `name` (of a sampler, a model) drops the old one's
    parameters."""
    if not (isinstance(base, dict) and isinstance(top, dict)) or ("name" in top and top["name"] != base.get("name")):
        return top
    return _merged(base, top)


def _merged(base: Json, top: Json) -> Json:
    return {**base, **{key: merge(base[key], item) if key in base else item for key, item in top.items()}}


def assignment(text: str) -> tuple[Keys, object]:
    """The keys and the value of a `--set key.sub=value`."""
    key, equals, said = text.partition("=")
    keys = dotted(key.strip())
    if not equals or not keys:
        raise DllmError(f"--set {text!r}: write key=value, for example --set sampler.name=credit")
    return keys, value(said)


def dotted(text: str) -> Keys:
    """`tasks.0.name` as keys; digits are a position in a list."""
    return tuple(int(part) if part.isdigit() else part for part in text.split(".") if part)


def assign(data: object, keys: Keys, item: object, place: str) -> Any:
    """The plain values with one of them changed; a text on the way there is the `name` of what gets a key."""
    if not keys:
        return item
    head, rest = keys[0], keys[1:]
    if isinstance(data, list):
        if not isinstance(head, int) or not 0 <= head < len(data):
            raise DllmError(f"{place}: {head!r} is not one of the positions 0 … {len(data) - 1}")
        return [*data[:head], assign(data[head], rest, item, place), *data[head + 1 :]]
    inside = with_name(data) if isinstance(data, str | dict) else {}
    return {**inside, str(head): assign(inside.get(str(head)), rest, item, place)}


def override(data: Json, source: Source, text: str) -> tuple[Json, Source]:
    """The plain values of a file with a `--set key.sub=value` applied, and where each was given."""
    (keys, item), place = assignment(text), f"--set {text}"
    return assign(data, keys, item, place), source.placed(keys, place)


def with_name(data: Any) -> Any:
    """A text as the mapping that it stands for, {"name": text}; anything else as it is."""
    return {"name": data} if isinstance(data, str) else data


# ---------------------------------------------------------------------------------------------------------- dataclasses


def build(cls: type[T], data: object, source: Source = NOWHERE, keys: Keys = ()) -> T:
    """A dataclass from plain values, each checked; a text is its `name`. Errors: unknown or missing keys, misfits."""
    members = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    data = with_name(data) if "name" in members else data
    if not isinstance(data, Mapping):
        raise source.error(keys, f"expected `key: value` pairs, found {data!r}")
    for key in data:
        if key not in members:
            raise source.error((*keys, key), unknown("key", str(key), members))
    for name, member in members.items():
        if name not in data and member.default is MISSING and member.default_factory is MISSING:
            raise source.error(keys, f"{name!r} is missing")
    hints = get_type_hints(cls)
    values = {key: fit(hints[key], item, source, (*keys, key), limits_of(members[key])) for key, item in data.items()}
    try:
        return cls(**values)
    except DllmError as error:  # what a kind alone does not say
        raise source.error(keys, error) from None


def fit(hint: Any, data: Any, source: Source, keys: Keys, limits: Limits = FREE) -> object:
    """A value as its annotation says: integer to float and list to tuple are the only conversions."""
    args = get_args(hint)
    match _form(hint):
        case "dataclass":
            return data if isinstance(data, hint) else build(hint, data, source, keys)
        case "literal":
            if data not in args:
                raise source.error(keys, unknown("value", str(data), map(str, args)))
        case "tuple":
            items = data if isinstance(data, list | tuple) else [data]
            return tuple(fit(args[0], item, source, (*keys, i)) for i, item in enumerate(items))
        case "mapping":
            if not isinstance(data, Mapping):
                raise source.error(keys, f"expected `key: value` pairs, found {data!r}")
            return {key: fit(args[1], item, source, (*keys, key)) for key, item in data.items()}
        case "union":
            return _one_of(hint, data, source, keys, limits)
        case _:
            data = number(hint, data)
            if what := misfit(hint, data, limits):
                raise source.error(keys, f"must be {what}, found {data!r}")
    return float(data) if hint is float else data


def _one_of(hint: object, data: object, source: Source, keys: Keys, limits: Limits) -> object:
    options = [option for option in get_args(hint) if option is not NoneType]
    if data is None and len(options) < len(get_args(hint)):
        return None
    for option in options:
        try:
            return fit(option, data, source, keys, limits)
        except DllmError:
            if len(options) == 1 or (_form(option) == "plain" and not misfit(option, data)):  # only its limits bar it
                raise
    raise source.error(keys, f"{data!r} is none of {', '.join(map(_words, options))}")


def _words(hint: Any) -> str:
    """What a value of this annotation is."""
    match _form(hint):
        case "literal":
            return " or ".join(map(repr, get_args(hint)))
        case "tuple":
            return "a list"
        case "mapping":
            return "`key: value` pairs"
        case _:
            return KINDS[hint.__name__].words


def _form(hint: object) -> str:
    """How an annotation is read."""
    origin = get_origin(hint)
    if is_dataclass(hint):
        return "dataclass"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    return {Literal: "literal", tuple: "tuple", Union: "union", UnionType: "union"}.get(origin, "plain")


@singledispatch
def plain(made: object) -> Any:
    """Plain YAML values that `build` makes the same of; what a dataclass does not show is left out."""
    if is_dataclass(made):
        return {f.name: plain(vars(made)[f.name]) for f in fields(made) if f.repr}
    if isinstance(made, Mapping):
        return {str(key): plain(item) for key, item in made.items()}
    return [plain(item) for item in made] if isinstance(made, list | tuple) else made


def flat(value: object, kinds: type | UnionType, path: str = "") -> Iterator[tuple[str, object]]:
    """Nested values as `a.b.0`; only what is of these kinds is gone into."""
    if isinstance(value, kinds) and isinstance(value, Mapping | list):
        for key, child in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from flat(child, kinds, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


# --------------------------------------------------------------------------------------------------------- JSON Schema


def schema(hint: Any, limits: Limits = FREE) -> Json:
    """The JSON Schema (2020-12) of what `fit` reads."""
    args = get_args(hint)
    match _form(hint):
        case "dataclass":
            found = keys_of(hint)
            return or_text(found) if "name" in found["properties"] else found
        case "literal":
            return {"enum": list(args)}
        case "tuple":
            return many(schema(args[0]))
        case "mapping":
            return {"type": "object", "additionalProperties": schema(args[1])}
        case "union":
            return {"anyOf": [{"type": "null"} if a is NoneType else schema(a, limits) for a in args]}
    if limits.choices:
        return {"enum": list(limits.choices)}
    bounds = {"minimum": limits.low, "maximum": limits.high, "exclusiveMinimum": limits.above}
    kind = KINDS.get(hint.__name__) if isinstance(hint, type) else None
    return {"type": kind.json} | {key: bound for key, bound in bounds.items() if bound is not None} if kind else {}


def ref(name: str) -> Json:
    """The schema that stands under this name in the file's `$defs`."""
    return {"$ref": f"#/$defs/{name}"}


def many(one: Json) -> Json:
    """The schema of one value or a list of such."""
    return {"anyOf": [one, {"type": "array", "items": one}]}


def or_text(one: Json) -> Json:
    """The schema of a mapping for which a text may stand."""
    return {"anyOf": [{"type": "string"}, one]}


def keys_of(cls: type) -> Json:
    """The schema of a dataclass as a mapping."""
    properties: Json = {}
    try:
        hints = get_type_hints(cls)
    except NameError:  # a class of another package, with names that only type checkers import
        hints = {f.name: object for f in fields(cls)}
    for f in fields(cls):
        limits = limits_of(f)
        why = {"description": limits.why} if limits.why else {}
        default = {"default": f.default} if isinstance(f.default, int | float | str) else {}
        properties[f.name] = {**schema(hints[f.name], limits), **why, **default}
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    about = cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    return _mapping(properties, required, about)


def _mapping(properties: Json, required: list[str], about: str) -> Json:
    known = {"properties": properties, "required": required, "additionalProperties": False}
    return {"type": "object", "description": about, **known}


def names_of(
    classes: Mapping[str, type], presets: Mapping[str, Collection[str]] = MappingProxyType({}), composed: bool = False
) -> Json:
    """The schema of what `named` reads for a table of classes; some have presets, and they may be composed with "+"."""
    forms: list[Json] = []
    for name, cls in classes.items():
        known = keys_of(cls)
        own: Json = {"name": {"const": name}}
        if presets.get(name):
            own["preset"] = {"enum": list(presets[name])}
        own |= {key: known["properties"][key] for key in parameters(cls)}
        forms.append(_mapping(own, ["name"], known["description"]))
    part = rf"\s*(?:{'|'.join(classes)})\s*(?::(?:[^+]|\+[0-9.])*)?"
    text = {"type": "string", "pattern": rf"^{part}(?:\+{part})*$" if composed else f"^{part}$"}
    return {"anyOf": [{"enum": list(classes)}, text, *forms]}


def document(known: Json) -> Json:
    """The schema of a whole file, which may name the file that it `extends:` and then leave keys to it."""
    base = {"extends": {"type": "string", "description": "another file as the base; the nearer one wins key by key"}}
    needs = {"anyOf": [{"required": ["extends"]}, {"required": known["required"]}]}
    body = {key: value for key, value in known.items() if key != "required"}
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **body, "properties": {**base, **known["properties"]}, **needs}


# ------------------------------------------------------------------------------------------------------------- plugins


class Plugins(Generic[P]):
    """Classes that other packages bring by an entry point group, loaded when they are first asked for.

    group   the entry point group.
    kind    what an error calls one of them.
    base    what each derives from; `public` is its name as an author writes it.
    own     names that are taken.
    """

    def __init__(self, group: str, kind: str, base: type[P], public: str, own: Collection[str] = ()) -> None:
        self.group, self.kind, self.base, self.public, self.own = group, kind, base, public, own
        self.found: dict[str, type[P] | DllmError] = {}

    @cached_property
    def points(self) -> dict[str, EntryPoint]:
        """The installed ones by name, not loaded."""
        return {point.name: point for point in entry_points(group=self.group) if point.name not in self.own}

    def refresh(self) -> None:
        """Look again what is installed."""
        vars(self).pop("points", None)
        self.found.clear()

    def names(self) -> list[str]:
        """Those that load."""
        return [name for name in self.points if not isinstance(self._found(name), DllmError)]

    def load(self, name: str) -> type[P]:
        """The class of a name in `points`. Errors: it does not load, or is another class; the package is named."""
        found = self._found(name)
        if isinstance(found, DllmError):
            raise DllmError(str(found))
        return found

    @contextmanager
    def blamed(self, name: str) -> Iterator[None]:
        """What goes wrong in another package's code is said as that."""
        try:
            yield
        except DllmError:
            raise
        except Exception as error:
            if name not in self.points:
                raise
            raise DllmError(f"{self._whose(name)} failed: {type(error).__name__}: {first_line(error)}") from error

    def _found(self, name: str) -> type[P] | DllmError:
        """The class, or why there is none; that is said once as a warning."""
        if name not in self.found:
            self.found[name] = self._load(name)
            if isinstance(why := self.found[name], DllmError):
                log.warning("%s", why)
        return self.found[name]

    def _load(self, name: str) -> type[P] | DllmError:
        try:
            found = self.points[name].load()
        except (Exception, SystemExit) as error:
            said = f"cannot be loaded: {type(error).__name__}: {first_line(Exception(error))}"
            return DllmError(f"{self._whose(name)} {said}")
        if isinstance(found, type) and issubclass(found, self.base):
            return found
        return DllmError(f"{self._whose(name)} is no class of {self.public}")

    def _whose(self, name: str) -> str:
        package = self.points[name].dist
        return f"{self.kind} {name!r} of the package {package.name if package else 'unknown'!r}"
