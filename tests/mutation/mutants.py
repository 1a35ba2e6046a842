"""The mutants of a tree: every small edit that the operators can make, in the order of a seeded draw.

The operators are cosmic-ray's and three of our own, chosen so that each edit could be a slip: a boundary moved, a term
forgotten, `any` for `all`. Edits that change no behaviour that a test could see are left out: annotations, docstrings,
the texts of errors and log lines, what only a type checker reads.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import parso
import parso.python.tree  # cosmic-ray imports parso in an order that fails by itself
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator

CORE = [
    *(f"ReplaceBinaryOperator_{pair}" for pair in (
        "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul",
        "BitAnd_BitOr", "BitOr_BitAnd", "BitXor_BitAnd", "LShift_RShift", "RShift_LShift",
    )),
    *(f"ReplaceComparisonOperator_{pair}" for pair in (
        "Lt_LtE", "Lt_Gt", "LtE_Lt", "LtE_GtE", "Gt_GtE", "Gt_Lt", "GtE_Gt", "GtE_LtE",
        "Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is",
    )),
    "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Invert",
    "AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue",
    "NumberReplacer", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop",
]  # fmt: skip

SWAPS = [
    ("any", "all"), ("min", "max"), ("argmin", "argmax"), ("amin", "amax"), ("cummin", "cummax"),
    ("zeros", "ones"), ("zeros_like", "ones_like"), ("floor", "ceil"),
]  # fmt: skip
OTHER = {a: b for pair in SWAPS for a, b in (pair, pair[::-1])}
LOGGERS = ("log", "logger", "logging", "warnings")
AUGMENTED = {f"{op}=" for op in ("+", "-", "*", "/", "//", "%", "&", "|", "^")}


class SwapName(Operator):
    """`any` for `all`, `min` for `max`, …"""

    def mutation_positions(self, node):
        if node.type == "name" and node.value in OTHER:
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        node.value = OTHER[node.value]
        return node

    @classmethod
    def examples(cls):
        return ()


class DropTerm(Operator):
    """`a & b` becomes `a`, or `b`; the same for sums, products, `and`, `or`."""

    CHAINS = ("and_test", "or_test", "expr", "and_expr", "xor_expr", "arith_expr", "term")

    def mutation_positions(self, node):
        if node.type in self.CHAINS:
            for term in node.children[::2]:
                yield term.start_pos, term.end_pos

    def mutate(self, node, index):
        prefix = node.get_first_leaf().prefix
        del node.children[max(2 * index - 1, 0) : max(2 * index - 1, 0) + 2]
        node.get_first_leaf().prefix = prefix
        return node

    @classmethod
    def examples(cls):
        return ()


class DropStatement(Operator):
    """A call, an augmented assignment or a `raise` becomes `pass`."""

    def mutation_positions(self, node):
        if node.type != "simple_stmt":
            return
        what = node.children[0]
        augmented = what.type == "expr_stmt" and what.children[1].get_code().strip() in AUGMENTED
        if augmented or what.type in ("raise_stmt", "atom_expr", "power"):
            yield what.start_pos, what.end_pos

    def mutate(self, node, index):
        node.children[0] = parso.python.tree.Keyword("pass", node.children[0].start_pos, node.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls):
        return ()


def operators() -> dict[str, Operator]:
    out = {name: plugins.get_operator(f"core/{name}")() for name in CORE}
    return out | {cls.__name__: cls() for cls in (SwapName, DropTerm, DropStatement)}


@dataclass(frozen=True)
class Mutant:
    area: str
    path: str  # of the mutated file, from the root
    line: int
    scope: str  # the function or class around it
    operator: str
    source: str  # the whole mutated file
    identity: str  # the same at another commit where the function around it is the same

    def diff(self, tree: Path) -> str:
        before = (tree / self.path).read_text().splitlines()
        lines = difflib.unified_diff(before, self.source.splitlines(), self.path, self.path, lineterm="", n=2)
        return "\n".join(lines)


class Scopes:
    """The functions and classes of a file, and the statements that a line belongs to."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.statements: list[tuple[int, int]] = []  # header lines of each statement
        self.scopes: list[tuple[int, int, str, bool]] = []  # first, last, name, is a function
        self._walk(ast.parse(source).body, "")

    def _walk(self, body: list[ast.stmt], inside: str) -> None:
        for node in body:
            below = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            last = min((child.lineno for child in below), default=(node.end_lineno or 0) + 1) - 1
            self.statements.append((node.lineno, max(last, node.lineno)))
            name = inside
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                name = f"{inside}.{node.name}".lstrip(".")
                self.scopes.append((node.lineno, node.end_lineno or 0, name, not isinstance(node, ast.ClassDef)))
            handlers = [s for h in ast.iter_child_nodes(node) if isinstance(h, ast.excepthandler) for s in h.body]
            self._walk([*below, *handlers], name)

    def at(self, line: int) -> tuple[str, str]:
        """Name and text of the innermost function or class around a line."""
        around = [s for s in self.scopes if s[0] <= line <= s[1]]
        if not around:
            return "", ""
        first, last, name, _ = max(around)
        return name, "\n".join(self.source.splitlines()[first - 1 : last])

    def statement(self, line: int) -> tuple[int, int]:
        """First and last line of the innermost statement around a line, without the statements inside it."""
        return max((s for s in self.statements if s[0] <= line <= s[1]), default=(line, line))

    def at_import(self, line: int) -> bool:
        """Whether the line runs when its module is imported: outside of functions, or in the head of one."""
        around = [s for s in self.scopes if s[0] <= line <= s[1] and s[3]]
        first, last = self.statement(line)
        return not around or (first, last) in {self.statement(s[0]) for s in around}


class _Visible(ast.NodeTransformer):
    """A module without what no test should look at."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if "TypeAlias" in ast.dump(node.annotation):
            node.value = None
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self._undocumented(node)

    def visit_arguments(self, node: ast.arguments) -> ast.AST:
        """`*` and `/` say how arguments are written in a call, not what they do."""
        node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
        node.defaults = [*node.defaults, *filter(None, node.kw_defaults)]
        node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._undocumented(node)

    def _undocumented(self, node: ast.AST) -> ast.AST:
        for call in node.decorator_list:
            if isinstance(call, ast.Call):
                call.keywords = [k for k in call.keywords if k.arg != "frozen"]
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            first.value = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc.args, node.exc.keywords = [], []
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("text")

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """What `zip(..., strict=True)` asserts is not tested: lengths that agree by construction."""
        node.keywords = [k for k in node.keywords if k.arg != "strict"]
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        of = getattr(getattr(node.value, "func", None), "value", None)
        return ast.Pass() if isinstance(of, ast.Name) and of.id in LOGGERS else self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        target = node.targets[0]
        alias = node.col_offset == 0 and isinstance(node.value, ast.BinOp) and isinstance(node.value.op, ast.BitOr)
        if alias or (isinstance(target, ast.Name) and target.id == "__all__"):
            node.value = ast.Constant(None)
        return self.generic_visit(node)


def visible(source: str) -> str | None:
    """What of a file's behaviour tests can see, as text; None where it is no Python."""
    try:
        return ast.dump(_Visible().visit(ast.parse(source)))
    except (SyntaxError, ValueError):
        return None


def files(tree: Path, patterns: list[str]) -> list[Path]:
    """The files of an area: those that the patterns match, without those of patterns that begin with '!'."""
    wanted = {p for pattern in patterns if pattern[0] != "!" for p in tree.glob(pattern)}
    return sorted(wanted - {p for pattern in patterns if pattern[0] == "!" for p in tree.glob(pattern[1:])})


def drawn(tree: Path, areas: dict[str, list[str]], seed: int) -> Iterator[Mutant]:
    """All mutants in the order of the seed. A mutant's place depends on nothing but itself, so that an edit elsewhere
    changes a draw little."""
    ops, candidates, seen = operators(), [], set()
    for area, patterns in areas.items():
        for path in files(tree, patterns):
            name, source = path.relative_to(tree).as_posix(), path.read_text()
            seen.add((name, visible(source)))
            nodes, scopes = list(ast_nodes(parso.parse(source))), Scopes(source)
            for operator, op in ops.items():
                places = [where for node in nodes for where in op.mutation_positions(node)]
                within: dict[str, int] = {}
                for occurrence, ((line, _), _) in enumerate(places):
                    scope, text = scopes.at(line)
                    within[scope] = nth = within.get(scope, -1) + 1
                    key = "|".join([name, scope, text, operator, str(nth)])
                    identity = hashlib.sha256(key.encode()).hexdigest()[:16]
                    rank = hashlib.sha256(f"{seed}|{identity}".encode()).hexdigest()
                    candidates.append((rank, area, name, line, scope, operator, occurrence, identity))
    sources = {name: (tree / name).read_text() for *_, name in {(c[2],) for c in candidates}}
    for _, area, name, line, scope, operator, occurrence, identity in sorted(candidates):
        mutated = mutate_code(sources[name], ops[operator], occurrence)
        looks = None if mutated is None else visible(mutated)
        if looks is None or (name, looks) in seen:
            continue
        seen.add((name, looks))
        yield Mutant(area, name, line, scope, operator, mutated, identity)
