"""The three tasks of the embedded pair: generators that are also its evaluation, each with a grader.

Every problem carries a key, the part of it that makes it *that* problem (the operations and numbers, the solution
grid); the split of a problem is a hash of its key, so that no test problem is a renamed training problem.
A stream is a pure function of (task, split, seed).
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations, product
from typing import Any, ClassVar

from dllm.errors import DllmError, unknown

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One problem: what the model reads, the reference answer, and what the grader needs."""

    prompt: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A named stream of problems and the rule that says whether an answer is right."""

    name: str
    draw: Callable[[random.Random], Example]
    grade: Callable[[Example, str], bool]
    split_of: Callable[[str], str]

    def stream(self, split: str, seed: int = 0) -> Iterator[Example]:
        """Endless examples of `split` (train, validation, test); the same for the same seed."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        rng = random.Random(f"{self.name}/{split}/{seed}")
        while True:
            example = self.draw(rng)
            if self.split_of(example.meta["key"]) == split:
                yield example

    def generate(self, split: str, n: int, seed: int = 0) -> list[Example]:
        """The first `n` examples of the stream with distinct prompts."""
        if n < 0:
            raise DllmError(f"n must not be negative, got {n}")
        found: dict[str, Example] = {}  # by prompt, in order
        for example in self.stream(split, seed):
            if len(found) == n:
                break
            found.setdefault(example.prompt, example)
        return list(found.values())


def hash_split(key: str) -> str:
    """90 % train, 5 % validation, 5 % test, by a hash of the key."""
    bucket = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


# ---------------------------------------------------------------------------------------------------- word problems
# Amounts stay within 1..60: they change by 1..9, by a product of at most 10, or are doubled or tripled. A model of a
# million parameters learns that many sums by heart in an hour on two cores, and the worked lines are still to be found.
MOST = 60
PRODUCTS = [(a, b) for a in range(2, 6) for b in range(2, 6) if a * b <= 10]

HE = (
    "Tom", "Ben", "Sam", "Leo", "Max", "Jack", "Omar", "Ivan", "Paul", "Luis", "Noah", "Adam", "Eric", "Hugo",
    "Liam", "Finn", "Carl", "Dan", "Karl", "Amir", "John", "Bob", "James", "Peter", "Mike", "David", "Tim", "Joe",
    "Alex", "Nick",
)  # fmt: skip
SHE = (
    "Ana", "Mia", "Eva", "Zoe", "Lily", "Emma", "Nora", "Rosa", "Sara", "Maya", "Ella", "Ruth", "Lucy", "Anna",
    "Kate", "Jane", "Lena", "Nina", "Olga", "Ines", "Alice", "Mary", "Sarah", "Julia", "Laura", "Clara", "Amy",
    "Sue", "Jill", "Betty",
)  # fmt: skip
ITEMS = (
    "apples", "pears", "books", "pens", "coins", "stamps", "marbles", "cards", "eggs", "shells", "stickers",
    "balls", "cookies", "flowers", "oranges", "lemons", "stones", "candles", "toys", "beads", "plums", "cups",
    "buttons", "pencils", "peaches", "tickets", "nuts", "keys", "roses", "muffins", "dollars", "bananas",
    "cherries", "cakes", "sweets", "dolls", "cars", "rocks", "hats", "fish",
)  # fmt: skip
BOXES = ("bags", "boxes", "packs", "baskets", "jars", "crates")
GAIN = ("buys", "finds", "gets", "wins", "collects", "receives")
LOSE = ("eats", "loses", "sells", "gives away", "drops", "uses")


class _Story:
    """Accumulates the sentences of a problem and the lines of its solution."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        he = rng.random() < 0.5
        self.name = rng.choice(HE if he else SHE)
        self.pronoun = "he" if he else "she"
        self.item = rng.choice(ITEMS)
        self.amount = rng.randint(2, 40)
        self.text = [f"{self.name} has {self.amount} {self.item}."]
        self.lines: list[str] = []
        self.key = [str(self.amount)]

    def say(self, rest: str, then: bool = True) -> None:
        """One sentence about the hero, opened by a name, a pronoun or `Then`."""
        opening = self.rng.choice((self.name, self.pronoun.capitalize(), f"Then {self.pronoun}"))
        self.text.append(f"{opening} {rest}.")

    def work(self, subject: str, a: int, op: str, b: int) -> int:
        """One worked line; the numbers and the operator enter the key."""
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]
        self.lines.append(f"{subject} {a} {op} {b} = {result} {self.item}.")
        self.key.append(f"{op}{b}")
        return result

    def change(self, op: str, by: int) -> None:
        self.amount = self.work(f"{self.name} has", self.amount, op, by)


def _gain(s: _Story) -> bool:
    k = s.rng.randint(1, 9)
    if s.amount + k > MOST:
        return False
    more = s.rng.choice(("more", s.item, f"more {s.item}"))
    s.say(f"{s.rng.choice(GAIN)} {k} {more}")
    s.change("+", k)
    return True


def _lose(s: _Story) -> bool:
    k = s.rng.randint(1, 9)
    if s.amount - k < 1:
        return False
    s.say(f"{s.rng.choice(LOSE)} {k}" + s.rng.choice(("", f" {s.item}", " of them")))
    s.change("-", k)
    return True


def _groups(s: _Story) -> bool:
    a, b = s.rng.choice(PRODUCTS)
    gain = s.rng.random() < 0.6
    if not 1 <= s.amount + (a * b if gain else -a * b) <= MOST:
        return False
    box = s.rng.choice(BOXES)
    s.say(f"{s.rng.choice(GAIN if gain else LOSE)} {a} {box} of {b} {s.item} each")
    total = s.work("They hold", a, "*", b)
    s.change("+" if gain else "-", total)
    return True


def _times(s: _Story) -> bool:
    k = s.rng.choice((2, 3))
    if s.amount * k > MOST:
        return False
    s.say(s.rng.choice((f"{('doubles', 'triples')[k - 2]} the number of {s.item}", f"ends up with {k} times as many")))
    s.change("*", k)
    return True


EVENTS = (_gain, _gain, _gain, _lose, _lose, _lose, _groups, _groups, _times)


def _question(s: _Story, question: str, optional: bool = True) -> None:
    if not (optional and s.rng.random() < 0.25):
        s.text.append(question)


def _chain(s: _Story) -> int:
    """Events that change one amount; sometimes it is shared out at the end."""
    target = s.rng.choices((1, 2, 3), (20, 45, 35))[0]
    done = 0
    while done < target and len(s.lines) < 4:
        if len(s.lines) == 3 or ((event := s.rng.choice(EVENTS)) is _groups and len(s.lines) > 2):
            event = s.rng.choice((_gain, _lose))
        done += event(s)
    shares = [k for k in (2, 3, 4, 5) if s.amount % k == 0]
    if shares and len(s.lines) < 4 and s.rng.random() < 0.2:
        k = s.rng.choice(shares)
        s.say(f"shares them equally among {k} friends")
        _question(s, f"How many {s.item} does each friend get?")
        return s.work("Each gets", s.amount, "/", k)
    ending = s.rng.choice(("have now", "have left", "have in the end", "have"))
    _question(s, f"How many {s.item} does {s.name} {ending}?")
    return s.amount


def _compare(s: _Story) -> int:
    """Two people; the second amount is told by the first; sometimes both are added."""
    other = s.rng.choice([n for n in HE + SHE if n != s.name])
    mine = s.rng.randint(2, 12)
    s.text, s.key, s.amount = [f"{s.name} has {mine} {s.item}."], ["compare", str(mine)], mine
    kind = s.rng.choice(("more", "fewer", "times"))
    if kind == "fewer" and mine < 3:
        kind = "more"
    if kind == "times":
        k = s.rng.choice((2, 3))
    else:
        k = s.rng.randint(1, min(9, mine - 1) if kind == "fewer" else 9)
    how = f"{k} times as many {s.item} as" if kind == "times" else f"{k} {kind} {s.item} than"
    s.text.append(f"{other} has {how} {s.name}.")
    theirs = s.work(f"{other} has", mine, {"more": "+", "fewer": "-", "times": "*"}[kind], k)
    if s.rng.random() < 0.6:
        they = s.rng.choice(("they", f"{s.name} and {other}"))
        _question(s, f"How many {s.item} do {they} have together?", optional=False)
        return s.work("They have", mine, "+", theirs)
    _question(s, f"How many {s.item} does {other} have?")
    return theirs


def draw_word_problem(rng: random.Random) -> Example:
    """One to four worked lines, then `#### result`, as in GSM8K (arXiv 2110.14168)."""
    s = _Story(rng)
    result = (_compare if rng.random() < 0.2 else _chain)(s)
    answer = "\n".join([*s.lines, f"#### {result}"])
    return Example(" ".join(s.text), answer, {"key": " ".join(s.key), "answer": result, "steps": len(s.lines)})


def grade_word_problem(example: Example, text: str) -> bool:
    """True where the last `#### number` is the result."""
    found = re.findall(r"####\s*(-?\d+)", text)
    return bool(found) and int(found[-1]) == example.meta["answer"]


# ----------------------------------------------------------------------------------------------------------- sudoku

Grid = tuple[int, ...]  # 16 digits, row by row
HELD_OUT = {"test": 32, "validation": 16}  # of 288 solution grids


def _valid(grid: Grid) -> bool:
    columns = all(len({grid[c + 4 * r] for r in range(4)}) == 4 for c in range(4))
    corners = (0, 2, 8, 10)
    return columns and all(len({grid[c], grid[c + 1], grid[c + 4], grid[c + 5]}) == 4 for c in corners)


@cache
def grids() -> tuple[Grid, ...]:
    """All 288 solved 4×4 grids, in the order of a hash."""
    rows = list(permutations((1, 2, 3, 4)))
    solved = [g for four in product(rows, repeat=4) if _valid(g := tuple(d for row in four for d in row))]
    return tuple(sorted(solved, key=lambda g: hashlib.blake2b(bytes(g), digest_size=8).digest()))


@cache
def _grid_split() -> dict[str, str]:
    names = [name for name, n in HELD_OUT.items() for _ in range(n)]
    return {_show(g): names[i] if i < len(names) else "train" for i, g in enumerate(grids())}


def _show(cells: Grid) -> str:
    text = "".join(str(c) if c else "_" for c in cells)
    return "\n".join(text[i : i + 4] for i in range(0, 16, 4))


@cache
def _agreeing(cell: int, digit: int) -> int:
    """The grids with `digit` in `cell`, as a bit set."""
    return sum(1 << i for i, g in enumerate(grids()) if g[cell] == digit)


def _solutions(puzzle: Grid) -> int:
    left = (1 << len(grids())) - 1
    for cell, digit in enumerate(puzzle):
        if digit:
            left &= _agreeing(cell, digit)
    return left.bit_count()


def draw_sudoku(rng: random.Random) -> Example:
    """A 4×4 grid with 4 to 10 blanks and one solution; the answer is the whole grid."""
    solution = rng.choice(grids())
    while True:
        blanks = set(rng.sample(range(16), rng.randint(4, 10)))
        puzzle = tuple(0 if i in blanks else c for i, c in enumerate(solution))
        if _solutions(puzzle) == 1:
            break
    meta = {"key": _show(solution), "blanks": len(blanks)}
    return Example(f"Solve this sudoku:\n{_show(puzzle)}", _show(solution), meta)


def grade_sudoku(example: Example, text: str) -> bool:
    """True where the sixteen digits are the solution (it is unique)."""
    return re.sub(r"\s", "", text) == re.sub(r"\s", "", example.answer)


# -------------------------------------------------------------------------------------------------------- functions

ATOM, PRODUCT, SUM = 3, 2, 1  # how tightly an expression binds


@dataclass(frozen=True)
class _Op:
    """One step of a chain: how it is asked for, and how it is written around an expression."""

    say: str
    code: str
    needs: int
    gives: int


def _ops(rng: random.Random) -> _Op:
    k, m = rng.randint(1, 10), rng.randint(2, 9)
    return rng.choice(
        (
            _Op(f"add {k} to", f"{{}} + {k}", SUM, SUM),
            _Op(f"add {k} to", f"{{}} + {k}", SUM, SUM),
            _Op(f"subtract {k} from", f"{{}} - {k}", SUM, SUM),
            _Op(f"subtract {k} from", f"{{}} - {k}", SUM, SUM),
            _Op(f"multiply {{}} by {m}", f"{{}} * {m}", PRODUCT, PRODUCT),
            _Op(f"multiply {{}} by {m}", f"{{}} * {m}", PRODUCT, PRODUCT),
            _Op("double", "{} * 2", PRODUCT, PRODUCT),
            _Op("triple", "{} * 3", PRODUCT, PRODUCT),
            _Op("square", "{} ** 2", ATOM, PRODUCT),
            _Op("negate", "-{}", ATOM, SUM),
            _Op(f"take {{}} modulo {m}", f"{{}} % {m}", PRODUCT, PRODUCT),
            _Op(f"divide {{}} by {m} rounding down", f"{{}} // {m}", PRODUCT, PRODUCT),
            _Op("take the absolute value of", "abs({})", 0, ATOM),
        )
    )


def _apply(op: _Op, code: str, binds: int) -> tuple[str, int]:
    return op.code.format(f"({code})" if binds < op.needs else code), op.gives


def _ask(op: _Op, what: str) -> str:
    return op.say.format(what) if "{}" in op.say else f"{op.say} {what}"


def _steps(rng: random.Random, code: str, binds: int, what: str, n: int) -> tuple[list[str], str]:
    """`n` operations one after another: what to ask, and the expression."""
    asks = []
    for i in range(n):
        op = _ops(rng)
        asks.append(_ask(op, what if i == 0 else "it"))
        code, binds = _apply(op, code, binds)
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


def _inputs(arguments: str) -> list[tuple[Any, ...]]:
    """Arguments on which two functions are compared: small, large, zero, negative, both parities."""
    numbers = (-17, -4, -1, 0, 1, 2, 3, 5, 8, 10, 13, 16, 19, 21, 50)
    if arguments == "x":
        return [(n,) for n in numbers]
    if arguments == "x, y":
        return [(a, b) for a, b in zip(numbers, reversed(numbers), strict=True)] + [(7, 7), (2, 30), (30, 2)]
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

    BINARY: ClassVar[dict[type, Callable[[Any, Any], Any]]] = {
        ast.Add: lambda a, b: a + b,
        ast.Sub: lambda a, b: a - b,
        ast.Mult: lambda a, b: a * b,
        ast.Mod: lambda a, b: a % b,
        ast.FloorDiv: lambda a, b: a // b,
        ast.Pow: lambda a, b: a**b,
    }
    COMPARE: ClassVar[dict[type, Callable[[Any, Any], Any]]] = {
        ast.Gt: lambda a, b: a > b,
        ast.Lt: lambda a, b: a < b,
        ast.Eq: lambda a, b: a == b,
        ast.GtE: lambda a, b: a >= b,
        ast.LtE: lambda a, b: a <= b,
        ast.NotEq: lambda a, b: a != b,
    }
    CALLS: ClassVar[dict[str, Callable[..., Any]]] = {
        "abs": abs,
        "max": max,
        "min": min,
        "sum": sum,
        "len": len,
        "sorted": sorted,
    }

    def __init__(self, source: str) -> None:
        body = ast.parse(source.strip()).body
        if len(body) != 1 or not isinstance(body[0], ast.FunctionDef) or body[0].name != "f":
            raise ValueError("expected one function f")
        function = body[0]
        if len(function.body) != 1 or not isinstance(function.body[0], ast.Return) or function.body[0].value is None:
            raise ValueError("expected one return statement")
        self.names = [a.arg for a in function.args.args]
        self.expression = function.body[0].value

    def __call__(self, *args: Any) -> Any:
        return self.run(self.expression, dict(zip(self.names, args, strict=True)))

    def run(self, node: ast.expr, env: dict[str, Any]) -> Any:
        value = self._run(node, env)
        if (isinstance(value, int) and abs(value) > 10**18) or (isinstance(value, list) and len(value) > 1000):
            raise ValueError("too large")
        return value

    def _run(self, node: ast.expr, env: dict[str, Any]) -> Any:
        go = self.run
        match node:
            case ast.Constant(value=int() as value):
                return value
            case ast.Name(id=name) if name in env:
                return env[name]
            case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)) if power <= 4:
                return go(left, env) ** power
            case ast.BinOp(left=left, op=op, right=right) if type(op) in self.BINARY and not isinstance(op, ast.Pow):
                a, b = go(left, env), go(right, env)
                if not (isinstance(a, int) and isinstance(b, int)):
                    raise ValueError("arithmetic on numbers only")
                return self.BINARY[type(op)](a, b)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -go(operand, env)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in self.COMPARE:
                return self.COMPARE[type(op)](go(left, env), go(right, env))
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


# -------------------------------------------------------------------------------------------------------- the table

TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task("word_problems", draw_word_problem, grade_word_problem, hash_split),
        Task("sudoku", draw_sudoku, grade_sudoku, lambda key: _grid_split()[key]),
        Task("functions", draw_function, grade_function, hash_split),
    )
}


def task(name: str) -> Task:
    """The task called `name`; a DllmError with the nearest name otherwise."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def generate(name: str, split: str, n: int, seed: int = 0) -> list[Example]:
    """`n` distinct problems of one task and split."""
    return task(name).generate(split, n, seed)


def grade(name: str, example: Example, text: str) -> bool:
    """Whether `text` solves `example`."""
    return task(name).grade(example, text)
