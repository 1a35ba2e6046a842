"""Both sides of the boundary between a generated program and its check. Runs alone, by `python -c`, in a sandbox.

The program and its check are two processes. The program's side executes the program and then answers what it is
asked: call this function, read this name. The check's side executes the check, whose unknown names stand for those
of the program. Neither the check nor its outcome is ever in the program's process, and what the program hands over is
rebuilt here as plain values of Python's own types, so an object that calls itself equal to everything is equal to
nothing. Everything else of the program's stays where it is, behind a `Remote`.

Messages are JSON, one a line, over stdin and stdout. Only the standard library is imported.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import copy
import importlib
import itertools
import json
import operator
import os
import sys
import traceback
import types
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, MappingView, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")
Message = dict[str, Any]  # JSON of the other side, which may hold anything
Opaque = Callable[[object], object]  # how an object that does not cross is spoken of
Remotely = Callable[[Message], object]  # what stands here for an object of the other side's
Known = dict[str, type[BaseException]]  # exceptions of the other side's by their names
NOTHING = object()

# Value types that cross, by their full name, and the arguments that build one anew.
PARTS: dict[str, Callable[[Any], list[Any]]] = {
    "builtins.tuple": lambda v: [list(v)],
    "builtins.set": lambda v: [list(v)],
    "builtins.frozenset": lambda v: [list(v)],
    "builtins.dict": lambda v: [[[k, v[k]] for k in v]],
    "builtins.bytes": lambda v: [list(v)],
    "builtins.bytearray": lambda v: [list(v)],
    "builtins.complex": lambda v: [v.real, v.imag],
    "builtins.range": lambda v: [v.start, v.stop, v.step],
    "builtins.slice": lambda v: [v.start, v.stop, v.step],
    "collections.deque": lambda v: [list(v), v.maxlen],
    "collections.Counter": lambda v: [dict(v)],
    "collections.OrderedDict": lambda v: [[[k, v[k]] for k in v]],
    "collections.defaultdict": lambda v: [v.default_factory, dict(v)],
    "decimal.Decimal": lambda v: [str(v)],
    "fractions.Fraction": lambda v: [v.numerator, v.denominator],
    "datetime.timezone": lambda v: [v.utcoffset(None)],
    "datetime.date": lambda v: [v.year, v.month, v.day],
    "datetime.datetime": lambda v: [v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.tzinfo],
    "datetime.time": lambda v: [v.hour, v.minute, v.second, v.microsecond, v.tzinfo],
    "datetime.timedelta": lambda v: [v.days, v.seconds, v.microseconds],
}
# How the value of a builtin's subclass is read, whatever the subclass has to say to it.
PLAIN: tuple[tuple[type, Callable[[Any], object]], ...] = (
    (int, int.__int__),
    (float, float.__float__),
    (str, str.__str__),
    (bytes, bytes),
    (list, lambda v: [*list.__iter__(v)]),
    (tuple, lambda v: (*tuple.__iter__(v),)),
    (dict, lambda v: dict(dict.items(v))),
    (set, lambda v: {*set.__iter__(v)}),
    (frozenset, lambda v: frozenset(frozenset.__iter__(v))),
)


def encode(value: object, opaque: Opaque) -> object:
    """`value` as JSON: plain values in full, anything else as `opaque` says."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list and isinstance(value, list):
        return [encode(item, opaque) for item in value]
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in PARTS and type(getattr(value, "tzinfo", None)).__name__ in ("NoneType", "timezone"):  # foreign
        return {"kind": name, "parts": [encode(part, opaque) for part in PARTS[name](value)]}
    if isinstance(value, type) and value in vars(builtins).values():
        return {"type": value.__name__}
    return opaque(value)


def decode(data: object, remote: Remotely) -> object:
    """The value of `encode`'s JSON, built of exact types; `remote` says what the other side's objects are here."""
    if isinstance(data, list):
        return [decode(item, remote) for item in data]
    if not isinstance(data, dict):
        return data
    if "type" in data:
        found = vars(builtins).get(data["type"])
        if not isinstance(found, type):
            raise TypeError("not a builtin type")
        return found
    if "kind" in data:
        if data["kind"] not in PARTS:
            raise TypeError("not a value that crosses")
        module, _, name = data["kind"].rpartition(".")
        return vars(importlib.import_module(module))[name](*(decode(part, remote) for part in data["parts"]))
    return remote(data)


def spread(arguments: Iterable[object], named: Mapping[str, object], opaque: Opaque) -> Message:
    """The arguments of a call as JSON."""
    return {
        "arguments": [encode(value, opaque) for value in arguments],
        "named": {key: encode(value, opaque) for key, value in named.items()},
    }


class ProgramError(Exception):
    """What the other side raised, where it is no builtin exception that may be expected."""


def lineage(kind: type) -> list[str]:
    """The names of an exception class and its bases, the nearest first."""
    return [str(base.__name__) for base in kind.__mro__]


def exception(names: Sequence[object], known: Known) -> type[BaseException]:
    """The exception class of a `lineage`: a builtin as far as it may cross, or one of ours, in `known`, that stands for
    it under that builtin."""
    name, *bases = map(str, names or ["object"])
    kind = vars(builtins).get(name)
    stops = (StopIteration, StopAsyncIteration)  # they would end a loop of the check early
    if isinstance(kind, type) and issubclass(kind, Exception | SystemExit) and not issubclass(kind, stops):
        return kind
    if not bases or name in ("BaseException", "object"):
        return ProgramError
    if name not in known:
        known[name] = cast("type[BaseException]", type(name, (exception(bases, known),), {}))
    return known[name]


def raised(problem: BaseException, opaque: Opaque) -> Message:
    """An exception as JSON: its lineage and its arguments."""
    try:
        arguments = [encode(value, opaque) for value in problem.args]
    except Exception:
        arguments = [str(problem)[:1000]]
    return {"raised": [lineage(type(problem)), arguments]}


def error(said: tuple[Sequence[object], Sequence[object]], known: Known, remote: Remotely) -> BaseException:
    """The exception that the other side raised, of its lineage and its arguments."""
    names, arguments = said
    values = [decode(value, remote) for value in arguments]
    try:
        return exception(names, known)(*values)
    except TypeError:  # a builtin that wants other arguments
        return ProgramError(*values)


class Line:
    """One side's end: messages in and out. The file descriptors of stdin and stdout are taken away from the code."""

    def __init__(self) -> None:
        self.into, self.out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(2, 1)  # what is printed goes where errors go

    def say(self, message: object) -> None:
        """Send a message."""
        self.out.write(json.dumps(message).encode() + b"\n")
        self.out.flush()

    def hear(self) -> Message | None:
        """The next message; None where the other end is closed."""
        line = self.into.readline()
        heard: Message | None = json.loads(line) if line else None
        return heard


# ------------------------------------------------------------------------------------------------- the program's side


class Program:
    """Executes the program and answers what is asked of its names and objects."""

    def __init__(self, line: Line, source: str) -> None:
        self.line = line
        self.objects: list[object] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self.module = types.ModuleType("answer")
        sys.modules["answer"] = self.module
        exec(compile(source, "answer.py", "exec", dont_inherit=True), self.module.__dict__)

    def serve(self) -> None:
        """Answer until the check is gone."""
        self.line.say("ready")
        while (asked := self.line.hear()) is not None:
            self.line.say(self.reply(asked))

    def reply(self, asked: Message) -> Message:
        """The answer to a question, or what went wrong."""
        try:
            return self.answer(asked)
        except BaseException as error:
            ended = asked["do"] == "next" and isinstance(error, StopIteration)
            return {"end": True} if ended else raised(error, self.theirs)

    def answer(self, asked: Message) -> Message:
        """The answer to a question, and what a call did to its arguments."""
        arguments = [decode(value, self.mine) for value in asked["arguments"]]
        named = {key: decode(value, self.mine) for key, value in asked["named"].items()}
        result = getattr(self, "do_" + asked["do"])(*arguments, **named)  # foreign
        if asked["do"] == "name" and isinstance(result, types.ModuleType):
            return {"module": result.__name__}
        reply = {"value": encode(result, self.theirs)}
        if asked["do"] == "call":
            reply["after"] = spread(arguments[1:], named, self.theirs)
        return reply

    def mine(self, data: Message) -> object:
        """An object that the check speaks of: one that was handed over, or a function of the check's."""
        if "object" in data:
            return self.objects[data["object"]]

        def function(*arguments: object, **named: object) -> Any:
            return self.call_back(data["callback"], arguments, named)

        function.__name__ = function.__qualname__ = data["shown"]
        # Of an iterator every call takes one item, as a list; the empty one is its end.
        return (items[0] for items in iter(function, [])) if data["walk"] else function

    def call_back(self, number: int, arguments: Iterable[object], named: Mapping[str, object]) -> object:
        """Call a function of the check's, which may in turn ask the program."""
        self.line.say({"callback": number, **spread(arguments, named, self.theirs)})
        while "do" in (heard := self.line.hear() or {"raised": [["EOFError"], []]}):
            self.line.say(self.reply(heard))
        if "raised" in heard:
            raise error(heard["raised"], {}, self.mine)
        return decode(heard["value"], self.mine)

    def theirs(self, value: object) -> object:
        """How an object that does not cross is spoken of. The value of a builtin's subclass goes with it."""
        kind, plain = type(value), NOTHING
        if isinstance(value, type) and issubclass(value, Exception):
            return {"error": lineage(value)}
        base, read = next(((b, r) for b, r in PLAIN if isinstance(value, b)), (None, None))
        if read is not None:
            plain = encode(read(value), self.theirs)
            standard = kind.__module__.partition(".")[0] in sys.stdlib_module_names  # Counter, defaultdict …
            if standard or base in (int, float, str, bytes):
                return plain
        self.objects.append(value)
        spoken = {"object": len(self.objects) - 1, "shown": kind.__name__}
        if kind is types.CoroutineType:
            return {**spoken, "awaited": True}
        return spoken if plain is NOTHING else {**spoken, "plain": plain}

    def do_name(self, name: str) -> object:
        """What the program calls so."""
        if name not in self.module.__dict__:
            raise NameError(f"name {name!r} is not defined")
        return self.module.__dict__[name]

    do_get, do_set, do_item, do_put, do_drop = getattr, setattr, operator.getitem, operator.setitem, operator.delitem
    do_iter, do_next, do_len, do_bool, do_str, do_repr, do_hash = iter, next, len, bool, str, repr, hash
    do_reversed, do_same, do_isinstance, do_issubclass = reversed, operator.eq, isinstance, issubclass
    do_call, do_copy = operator.call, staticmethod(copy.deepcopy)

    def do_operate(self, name: str, *operands: object) -> object:
        """The value of an operator."""
        return vars(operator)[name](*operands)

    def do_await(self, coroutine: Coroutine[object, object, object]) -> object:
        """What a coroutine comes to."""
        import asyncio

        self.loop = self.loop or asyncio.new_event_loop()
        return self.loop.run_until_complete(coroutine)


# --------------------------------------------------------------------------------------------------- the check's side


def _asks(do: str, kind: type = object) -> Callable[..., Any]:
    """A method that asks the program; `kind` is what Python itself requires of the answer."""
    return lambda self, /, *arguments, **named: Check.only.fit(kind, do, self, *arguments, **named)


class Remote:
    """An object of the program's. It may be called, read and walked through; whether it equals a value of the check's
    is never asked of it."""

    __slots__ = ("_object", "_plain", "_shown")
    _object: int
    _plain: object
    _shown: str

    def __init__(self, number: int, shown: str, plain: object) -> None:
        for name, value in (("_object", number), ("_shown", shown), ("_plain", plain)):
            object.__setattr__(self, name, value)

    __call__, __getattr__, __setattr__ = _asks("call"), _asks("get"), _asks("set")
    __getitem__, __setitem__, __delitem__ = _asks("item"), _asks("put"), _asks("drop")
    __iter__, __reversed__, __next__ = _asks("iter"), _asks("reversed"), _asks("next")
    __len__, __bool__, __str__, __repr__ = _asks("len", int), _asks("bool", bool), _asks("str", str), _asks("repr", str)

    def __enter__(self) -> object:
        return Check.only.ask("call", Check.only.ask("get", self, "__enter__"))

    def __exit__(self, kind: object, problem: object, trace: object) -> None:
        leave = Check.only.ask("get", self, "__exit__")
        Check.only.ask("call", leave, None, None, None)  # what went wrong in the check is not the program's to forgive

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Remote) and Check.only.fit(bool, "isinstance", instance, self)

    def __subclasscheck__(self, kind: object) -> bool:
        return isinstance(kind, Remote) and Check.only.fit(bool, "issubclass", kind, self)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return Remote if self._plain is NOTHING else type(self._plain)

    def __eq__(self, other: object) -> bool:
        return other is not None and bool(self._with(other, "eq"))

    def _with(self, other: object, name: str) -> object:
        """An operation on two of the program's objects is the program's own; on a value, and where both have one, it is
        that of the values."""
        if isinstance(other, Remote) and self._plain is NOTHING and other._plain is NOTHING:
            only = Check.only
            return only.fit(bool, "same", self, other) if name == "eq" else only.ask("operate", name, self, other)
        mine, theirs = self._plain, other._plain if isinstance(other, Remote) else other
        if mine is NOTHING or theirs is NOTHING:
            raise TypeError(f"the program's {self._shown} cannot be compared with a value")
        return vars(operator)[name](mine, theirs)

    def __hash__(self) -> int:
        return Check.only.fit(int, "hash", self) if self._plain is NOTHING else hash(self._plain)

    def __deepcopy__(self, memo: object) -> object:
        return Check.only.ask("copy", self)


for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "and", "or", "xor", "lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_name}__", lambda self, other, name=f"__{_name}__": self._with(other, name))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(Remote, f"__{_name}__", lambda self, name=f"__{_name}__": Check.only.ask("operate", name, self))


class Scope(dict[str, object]):
    """The check's names: its own, then Python's, then the program's; `entries` are the program's before Python's."""

    entries: tuple[str, ...] = ()

    def __missing__(self, name: str) -> object:
        if name not in self.entries and (name.startswith("__") or name in vars(builtins)):
            raise KeyError(name)
        return Check.only.name(name)


class Check:
    """Executes the check, of which there is one in a process."""

    only: Check

    def __init__(self, line: Line) -> None:
        self.line = line
        self.callbacks: list[Callable[..., object]] = []
        self.errors: Known = {}
        self.modules: set[str] = set()
        self.pending: list[tuple[object, object]] = []  # arguments of the last call, and what they became
        Check.only = self

    def run(self, header: Message) -> None:
        """`context` is code that comes with the check (the head of the function that was asked for, with its
        helpers); `entries` are the program's names even where Python or the context knows them too."""
        scope = Scope(__name__="check")
        for body in ("", "\n    pass"):  # the head of a function may come without one
            with contextlib.suppress(SyntaxError):
                exec(compile(header["context"] + body, "context.py", "exec", dont_inherit=True), scope)
                break
        tree = ast.parse(header["check"], "check.py")
        code = compile(header["check"], "check.py", "exec", dont_inherit=True)
        scope.entries = tuple(header["entries"] or self.guessed(tree, code, scope))
        for name in scope.entries:
            scope.pop(name, None)
        self.modules = _modules(tree) - set(scope.entries)
        scope[SETTLE] = self.settle
        exec(compile(Settling().visit(tree), "check.py", "exec", dont_inherit=True), scope)

    def guessed(self, tree: ast.Module, code: types.CodeType, scope: Scope) -> Sequence[str]:
        """A check that knows only Python's names (`assert sum(10, 15) == 150`) means the one that the program defines,
        of those that it calls on values alone: another (`abs(max(1, 2) - 3)`) is the check's tool. Errors: `NameError`
        where it defines none of them, or several."""
        names = set(_names(code, ("LOAD_NAME", "LOAD_GLOBAL"))) - set(_names(code, ("STORE_NAME",))) - set(scope)
        if not names <= vars(builtins).keys() or not names:
            return ()
        calls = [
            n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in names
        ]
        tools = {call.func.id for call in calls if any(n is not call and n in calls for n in ast.walk(call))}  # type: ignore[attr-defined]
        defined = []
        for name in sorted({call.func.id for call in calls} - tools or names):  # type: ignore[attr-defined]
            with contextlib.suppress(NameError):
                self.name(name)
                defined.append(name)
        if len(defined) != 1:
            raise NameError(
                f"which of {', '.join(sorted(names))} is the program's? The program defines none, or several"
            )
        return defined

    def name(self, name: str) -> object:
        """A name of the program's. A module of the standard library is this side's own."""
        found = self.ask("name", name)
        return importlib.import_module(name) if name in self.modules else found

    def fit(self, kind: type[T], do: str, /, *arguments: object, **named: object) -> T:
        """An answer of the kind that Python itself requires."""
        value = self.ask(do, *arguments, **named)
        if not isinstance(value, kind):
            raise TypeError(f"{do} gave no {kind.__name__}")
        return value

    def ask(self, do: str, /, *arguments: object, **named: object) -> object:
        """The program's answer. Errors: what the program raised."""
        self.line.say({"do": do, **spread(arguments, named, self.mine)})
        self.pending = []
        while "callback" in (reply := self.hear()):
            self.line.say(self.called(**reply))
        if "end" in reply and do == "next":
            raise StopIteration
        if "value" in reply:
            if do == "call" and (after := reply.get("after")):
                self.pending = [(given, after["arguments"][i]) for i, given in enumerate(arguments[1:])]
                self.pending += [(given, after["named"][name]) for name, given in named.items()]
            if reply["value"] is None:  # by convention, a function that works in place
                self.settle()
            return decode(reply["value"], self.theirs)
        if "module" in reply and do == "name" and reply["module"].partition(".")[0] in sys.stdlib_module_names:
            return importlib.import_module(reply["module"])
        raise error(reply.get("raised", (["RuntimeError"], ["no answer"])), self.errors, self.theirs)

    def settle(self, given_back: bool = True) -> None:
        """Give the arguments of the last call what the program left in its copies of them, or forget it."""
        pending, self.pending = self.pending, []
        for given, after in pending:
            filled = given_back and type(given) in (list, bytearray, dict, set)
            if filled and type(left := decode(after, self.theirs)) is type(given):
                _put_back(given, left)

    def hear(self) -> Message:
        """The next message. Without one the check has failed."""
        reply = self.line.hear()
        if not isinstance(reply, dict):  # past every `except` of the check
            print("the program ended before it had answered", file=sys.stderr, flush=True)
            os._exit(1)
        return reply

    def called(self, callback: int, arguments: list[object], named: dict[str, object]) -> Message:
        """The program calls a function that the check has handed over."""
        try:
            values = [decode(value, self.theirs) for value in arguments]
            words = {key: decode(value, self.theirs) for key, value in named.items()}
            return {"value": encode(self.callbacks[callback](*values, **words), self.mine)}
        except Exception as problem:
            return raised(problem, self.mine)

    def mine(self, value: object) -> object:
        """How an object of the check's is spoken of."""
        if isinstance(value, Remote):
            return {"object": value._object}
        if isinstance(value, MappingView):
            return encode([*value], self.mine)  # type: ignore[misc]
        if (walk := isinstance(value, Iterator)) or callable(value):
            function = partial(_next, value) if isinstance(value, Iterator) else value
            self.callbacks.append(cast("Callable[..., object]", function))
            shown = str(getattr(value, "__name__", "function"))  # foreign
            return {"callback": len(self.callbacks) - 1, "shown": shown, "walk": walk}
        raise TypeError(
            f"the check cannot hand a {type(value).__name__} to the program: only plain values and functions cross"
        )

    def theirs(self, data: Message) -> object:
        """What stands here for an object of the program's."""
        if "error" in data:
            return exception(data["error"], self.errors)
        plain = decode(data["plain"], self.theirs) if "plain" in data else NOTHING
        remote = Remote(int(data["object"]), str(data["shown"]), plain)
        return self.awaited(remote) if "awaited" in data else remote

    async def awaited(self, remote: Remote) -> object:
        """A coroutine of the program's, which runs there."""
        return self.ask("await", remote)


def _next(walk: Iterator[object]) -> list[object]:
    """The next item of an iterator, if there is one."""
    return [*itertools.islice(walk, 1)]


SETTLE = "__settle__"


class Settling(ast.NodeTransformer):
    """After a call whose value is let go (`sort(x)`), which is made for what it does, its arguments are settled."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | list[ast.stmt]:
        """A call with what settles its arguments around it."""
        if not isinstance(node.value, ast.Call):
            return node
        around = ast.parse(f"{SETTLE}(False)\n{SETTLE}(True)")
        for part in ast.walk(around):
            ast.copy_location(part, node)
        return [around.body[0], node, around.body[1]]


def _modules(tree: ast.Module) -> set[str]:
    """Names that a check uses only for what a module of the standard library has (`math.isclose`): its own tools."""
    used: dict[str, set[str | None]] = {}
    inside = {n.value: n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in sys.stdlib_module_names:
            used.setdefault(node.id, set()).add(inside.get(node))
    found = set()
    for name, attributes in used.items():
        with contextlib.suppress(ImportError):
            if attributes <= set(dir(importlib.import_module(name))):
                found.add(name)
    return found


def _names(code: types.CodeType, operations: Sequence[str]) -> Iterator[str]:
    """The names that these operations of a code object touch, those of its functions included."""
    import dis

    for instruction in dis.get_instructions(code):
        if instruction.opname in operations:
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant, operations)


def _put_back(given: object, after: Any) -> None:
    """Give an argument the content that the program left in its copy."""
    if isinstance(given, list | bytearray):
        given[:] = after
    elif isinstance(given, dict | set):
        given.clear()
        given.update(after)


# ------------------------------------------------------------------------------------------------------------ the guard

# System calls that reach memory or keys beyond the limits, other processes, or the means to leave: (x86-64, arm64).
DENIED = {
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "shmdt": (67, 197),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "userfaultfd": (323, 282),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "perf_event_open": (298, 241), "bpf": (321, 280),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41),
    "mount": (165, 40), "umount2": (166, 39), "mount_setattr": (442, 442), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
}  # fmt: skip
CLONE, CLONE3, SOCKET, KEYCTL = (56, 220), (435, 435), (41, 198), DENIED["keyctl"]
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1), "arm64": (0xC00000B7, 1)}
NEW_NAMESPACE = 0x7E020000  # CLONE_NEWUSER and its like
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: a new network namespace leaves the others (vsock) open


def guard() -> None:
    """Join a new session keyring and give up, for good, the system calls of `DENIED`. Raises OSError."""
    import ctypes
    import struct

    audit, column = ARCHITECTURES[os.uname().machine]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(KEYCTL[column], 1, None)  # KEYCTL_JOIN_SESSION_KEYRING; where it is denied, it is denied to all
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, no_call, no_family, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x00050061, 0x80000000
    steps = [
        (load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill),  # another architecture's numbers mean other calls
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, refuse),
    ]  # fmt: skip
    for numbers in DENIED.values():
        steps += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    steps += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, no_call)]  # libraries then use clone, whose flags can be read
    steps += [(equal, 0, 3, CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, NEW_NAMESPACE), (give, 0, 0, refuse)]
    steps += [(load, 0, 0, 0), (equal, 0, 2 + len(FAMILIES), SOCKET[column]), (load, 0, 0, 16)]
    steps += [(equal, len(FAMILIES) - i, 0, family) for i, family in enumerate(FAMILIES)]
    steps += [(give, 0, 0, no_family), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
    for arguments in ((38, 1, 0, 0, 0), (22, 2, ctypes.addressof(program), 0, 0)):  # no new privileges; the filter
        if libc.prctl(*map(ctypes.c_ulong, arguments)):
            raise OSError(ctypes.get_errno(), "no filter of system calls")


def limit(limits: Mapping[str, int]) -> None:
    """Set the limits that this system has: soft and hard, for this process and all it starts."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, value in limits.items():
        if (kind := vars(resource).get("RLIMIT_" + name)) is not None:
            hard = resource.getrlimit(kind)[1]
            bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (bound, bound))


def main() -> None:
    """Be the side that the header says."""
    sys.set_int_max_str_digits(0)
    line = Line()
    header = line.hear() or {}
    limit(header["limits"])
    if header["guard"]:
        guard()
    try:
        if "program" in header:
            Program(line, header["program"]).serve()
        else:
            Check(line).run(header)
            line.say("passed")
        failed = 0
    except BaseException:
        traceback.print_exc()
        failed = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the program may have closed it
            stream.flush()
    os._exit(failed)


if __name__ == "__main__":
    main()
