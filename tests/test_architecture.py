"""The architecture, read from the sources: rooms, arrows one way, no circle, no import inside a function."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [  # a room imports from its own and from those in earlier lines (docs/architecture.md)
    {"errors"},
    {"spec", "tasks", "assets"},
    {"models"},
    {"decoding"},
    {"samplers", "lookahead"},
    {"call"},
    {"drafting"},
    {"training", "serve"},
    {"eval"},
    {"bench"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in (("dllm", "dllm"), ("samplers", "dllm.samplers"), ("eval", "dllm.eval")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = (package, *path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def imports(name: str, inside: bool = False) -> Iterator[tuple[str, int]]:
    """Our modules that this one imports, with the line; `inside` functions only. Those for type checkers count."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in {id(n): n for f in (functions if inside else [tree]) for n in ast.walk(f)}.values():
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}:{node.lineno}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if (found := full if full in MODULES else node.module) in MODULES:
                    yield str(found), node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in MODULES)


def test_four_modules_lie_loose():
    assert {p.name for p in (ROOT / "dllm").glob("*.py")} == {"__init__.py", "__main__.py", "errors.py", "spec.py"}


def test_every_room_has_its_place():
    assert {room(name) for name in MODULES} - {"__init__"} == set(HEIGHT)


@pytest.mark.parametrize(
    "layer", [rooms for rooms in LAYERS if rooms != {"assets"}], ids=lambda rooms: "+".join(sorted(rooms))
)
def test_arrows_point_one_way(layer):
    wrong = [
        f"{MODULES[name].relative_to(ROOT)}:{line} imports {other}"
        for name in MODULES
        if room(name) in layer
        for other, line in imports(name)
        if room(other) != room(name) and room(other) != "__init__" and HEIGHT[room(other)] >= HEIGHT[room(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle():
    lazy = {"dllm"}  # the package itself imports for checkers alone
    todo = {name: {other for other, _ in imports(name)} - {name} for name in MODULES.keys() - lazy}
    while free := [name for name, others in todo.items() if not others & todo.keys()]:
        for name in free:
            del todo[name]
    assert not todo, f"these modules import each other: {sorted(todo)}"


def test_no_import_inside_a_function():
    """Outside of the command line, which starts without torch; the packages' lazy names import by string."""
    wrong = [
        f"{MODULES[name].relative_to(ROOT)}:{line} imports {other}"
        for name in MODULES
        if room(name) != "cli"
        for other, line in imports(name, inside=True)
    ]
    assert not wrong, "\n".join(wrong)


def test_canvas_has_one_writer():
    """Whatever replaces tokens goes through `Canvas`: `write`, `apply`, `cut`. Calls lay canvases out, and no more."""
    laid_out, wrong = set(), []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func).rpartition(".")[2]
            replaced = {word.arg for word in node.keywords}
            if called == "Canvas":
                laid_out.add(name)
            # a plan, which has ids too, never gets new ones without their positions
            if called == "_replace" and replaced & {"ids", "masked", "frozen"} and "pos" not in replaced:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert laid_out == {"dllm.call.job", "dllm.bench.runtime", "dllm.samplers.questions"}
    assert {place.partition(":")[0] for place in wrong} == {"dllm/decoding/canvas.py"}, wrong


def test_the_page_is_true():
    """docs/architecture.md: its table of rooms is the order of the layers, and what it names as homes exists."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms, homes = (re.findall(r"^\| (`.+?) \|", part, re.M) for part in page.split("## One home each"))
    order = [set(re.findall(r"`(\w+)`", row)) for row in rooms]
    assert [row for row in order if row & HEIGHT.keys()] == [r - {"assets"} for r in LAYERS if r != {"__main__"}]
    named = [name for row in homes for name in re.findall(r"`([\w/]+)`", row)]
    assert named
    assert [n for n in named if f"dllm.{n.replace('/', '.')}" not in MODULES] == []
