"""Functions of Python: small programs that assertions describe, graded by a small interpreter."""

from __future__ import annotations

import ast
import operator
import random
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from dllm.tasks.base import Example

ATOM = 3  # how tightly an expression binds
PRODUCT = 2
SUM = 1


class _Op(NamedTuple):
    """One step of a chain: how it is asked for, and how it is written around an expression."""

    say: str
    code: str
    needs: int
    gives: int


def _op(rng: random.Random) -> _Op:
    k, m = rng.randint(1, 10), rng.randint(2, 9)
    twice_as_often = (
        _Op(f"add {k} to {{}}", f"{{}} + {k}", SUM, SUM),
        _Op(f"subtract {k} from {{}}", f"{{}} - {k}", SUM, SUM),
        _Op(f"multiply {{}} by {m}", f"{{}} * {m}", PRODUCT, PRODUCT),
    )
    others = (
        _Op("double {}", "{} * 2", PRODUCT, PRODUCT),
        _Op("triple {}", "{} * 3", PRODUCT, PRODUCT),
        _Op("square {}", "{} ** 2", ATOM, PRODUCT),
        _Op("negate {}", "-{}", ATOM, SUM),
        _Op(f"take {{}} modulo {m}", f"{{}} % {m}", PRODUCT, PRODUCT),
        _Op(f"divide {{}} by {m} rounding down", f"{{}} // {m}", PRODUCT, PRODUCT),
        _Op("take the absolute value of {}", "abs({})", 0, ATOM),
    )
    return rng.choice((*(op for op in twice_as_often for _ in range(2)), *others))


def _steps(rng: random.Random, code: str, binds: int, what: str, n: int) -> tuple[list[str], str]:
    """`n` operations one after another: what to ask, and the expression."""
    asks = []
    for i in range(n):
        op = _op(rng)
        asks.append(op.say.format(what if i == 0 else "it"))
        code, binds = op.code.format(f"({code})" if binds < op.needs else code), op.gives
    return asks, code


def _one_argument(rng: random.Random) -> tuple[str, list[str], str]:
    return "x", *_steps(rng, "x", ATOM, "x", rng.choices((1, 2), (30, 70))[0])


def _two_arguments(rng: random.Random) -> tuple[str, list[str], str]:
    ask, code, binds = rng.choice(
        (
            ("add x and y", "x + y", SUM),
            ("subtract y from x", "x - y", SUM),
            ("multiply x and y", "x * y", PRODUCT),
            ("take the larger of x and y", "max(x, y)", ATOM),
            ("take the smaller of x and y", "min(x, y)", ATOM),
        )
    )
    asks, code = _steps(rng, code, binds, "it", rng.randint(0, 1))
    return "x, y", [ask, *asks], code


def _condition(rng: random.Random, name: str) -> tuple[str, str]:
    k = rng.randint(1, 10)
    return rng.choice(
        (
            (f"greater than {k}", f"{name} > {k}"),
            (f"less than {k}", f"{name} < {k}"),
            ("even", f"{name} % 2 == 0"),
            ("odd", f"{name} % 2 == 1"),
        )
    )


def _conditional(rng: random.Random) -> tuple[str, list[str], str]:
    words, test = _condition(rng, "x")
    (yes,), code_yes = _steps(rng, "x", ATOM, "x", 1)
    (no,), code_no = _steps(rng, "x", ATOM, "x", 1)
    return "x", [f"if x is {words} {yes} otherwise {no}"], f"{code_yes} if {test} else {code_no}"


def _reduce(rng: random.Random) -> tuple[str, list[str], str]:
    ask, code = rng.choice(
        (
            ("sum", "sum(xs)"),
            ("count", "len(xs)"),
            ("take the largest of", "max(xs)"),
            ("take the smallest of", "min(xs)"),
        )
    )
    asks, code = _steps(rng, code, ATOM, "it", rng.randint(0, 1))
    return "xs", [f"{ask} the items of xs" if ask == "count" else f"{ask} xs", *asks], code


def _every(rng: random.Random) -> tuple[str, list[str], str]:
    (first, *more), code = _steps(rng, "v", ATOM, "each item of xs", rng.randint(1, 2))
    return "xs", [first, *more], f"[{code} for v in xs]"


def _keep(rng: random.Random) -> tuple[str, list[str], str]:
    words, test = _condition(rng, "v")
    return "xs", [f"keep the items of xs that are {words}"], f"[v for v in xs if {test}]"


def _order(rng: random.Random) -> tuple[str, list[str], str]:
    ask, code = rng.choice(
        (
            ("sort xs", "sorted(xs)"),
            ("reverse xs", "xs[::-1]"),
            ("sort xs from high to low", "sorted(xs, reverse=True)"),
        )
    )
    k = rng.randint(1, 9)
    more, cut = rng.choice(
        (([], ""), ([f"keep the first {k} items"], f"[:{k}]"), ([f"drop the first {k} items"], f"[{k}:]"))
    )
    return "xs", [ask, *more], code + cut


KINDS = (
    (_one_argument, 40),
    (_two_arguments, 16),
    (_conditional, 14),
    (_reduce, 10),
    (_every, 8),
    (_keep, 6),
    (_order, 6),
)


def draw_function(rng: random.Random) -> Example:
    """A one-line description and the two-line Python function `f` that it asks for."""
    kind = rng.choices([k for k, _ in KINDS], [w for _, w in KINDS])[0]
    arguments, asks, code = kind(rng)
    answer = f"def f({arguments}):\n    return {code}"
    meta = {"key": code, "inputs": _inputs(arguments), "entry": "f"}
    return Example(f"Write f({arguments}): {', then '.join(asks)}.", answer, meta)


def _inputs(arguments: str) -> list[tuple[object, ...]]:
    """Arguments on which two functions are compared: small, large, zero, negative, both parities."""
    numbers = (-17, -4, -1, 0, 1, 2, 3, 5, 8, 10, 13, 16, 19, 21, 50)
    if arguments == "x":
        return [(n,) for n in numbers]
    if arguments == "x, y":
        return [*zip(numbers, reversed(numbers), strict=True), (7, 7), (2, 30), (30, 2)]
    return [([3, 1, 2],), ([10, -5, 7, 0, 22, 4, 13, 9, 18, -8, 1],), ([6],), ([-3, 20, 15, 15, 2, 11, 8, 5, 1, 12],)]


def grade_function(example: Example, text: str) -> bool:
    """True where the function agrees with the reference on every input; runs the parsed tree, never `exec`."""
    try:
        mine, reference = Interpreter(text), Interpreter(example.answer)
        return all(mine(*args) == reference(*args) for args in example.meta["inputs"])
    except (SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError, MemoryError):
        return False


class Interpreter:
    """Runs `def f(...): return expression` on a whitelist of syntax: arithmetic, comparisons, lists, six builtins.

    Raises ValueError on any other syntax, and on numbers beyond 10^18 or lists beyond 1000 items.
    """

    OPERATORS: ClassVar[dict[type, Callable[..., object]]] = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Mod: operator.mod,
        ast.FloorDiv: operator.floordiv,
        ast.Gt: operator.gt,
        ast.Lt: operator.lt,
        ast.Eq: operator.eq,
        ast.GtE: operator.ge,
        ast.LtE: operator.le,
        ast.NotEq: operator.ne,
    }
    CALLS: ClassVar[dict[str, Callable[..., object]]] = {
        "abs": abs, "max": max, "min": min, "sum": sum, "len": len, "sorted": sorted,
    }  # fmt: skip

    def __init__(self, source: str) -> None:
        body = ast.parse(source.strip()).body
        if len(body) != 1 or not isinstance(body[0], ast.FunctionDef) or body[0].name != "f":
            raise ValueError("expected one function f")
        function = body[0]
        if len(function.body) != 1 or not isinstance(function.body[0], ast.Return) or function.body[0].value is None:
            raise ValueError("expected one return statement")
        self.names = [a.arg for a in function.args.args]
        self.expression = function.body[0].value

    def __call__(self, *args: object) -> object:
        return self.run(self.expression, dict(zip(self.names, args, strict=True)))

    def run(self, node: ast.expr, env: dict[str, object]) -> Any:
        """The value of an expression whose names stand for `env`."""
        value = self._run(node, env)
        if (isinstance(value, int) and abs(value) > 10**18) or (isinstance(value, list) and len(value) > 1000):
            raise ValueError("too large")
        return value

    def _run(self, node: ast.expr, env: dict[str, object]) -> object:
        go = self.run
        match node:
            case ast.Constant(value=int() as value):
                return value
            case ast.Name(id=name) if name in env:
                return env[name]
            case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)) if power <= 4:
                return go(left, env) ** power
            case ast.BinOp(left=left, op=op, right=right) if type(op) in self.OPERATORS:
                a, b = go(left, env), go(right, env)
                if not (isinstance(a, int) and isinstance(b, int)):
                    raise ValueError("arithmetic on numbers only")
                return self.OPERATORS[type(op)](a, b)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -go(operand, env)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in self.OPERATORS:
                return self.OPERATORS[type(op)](go(left, env), go(right, env))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return go(body if go(test, env) else orelse, env)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in self.CALLS:
                if any(k.arg != "reverse" for k in keywords):
                    raise ValueError("unknown keyword")
                return self.CALLS[name](*(go(a, env) for a in args), **{str(k.arg): go(k.value, env) for k in keywords})
            case ast.Subscript(value=value, slice=ast.Slice(lower=lo, upper=hi, step=step)):
                return go(value, env)[slice(*(None if part is None else go(part, env) for part in (lo, hi, step)))]
            case ast.ListComp(elt=elt, generators=[ast.comprehension(target=ast.Name(id=name), iter=items, ifs=ifs)]):
                rows = [{**env, name: item} for item in go(items, env)]
                return [go(elt, row) for row in rows if all(go(test, row) for test in ifs)]
        raise ValueError(f"{type(node).__name__} is not allowed")
