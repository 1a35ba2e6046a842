"""What a type checker sees of an installed dllm (pytest runs it on the editable install, .ci/run on the wheel too), and
that every list of decoding arguments says the same.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

import dllm
from dllm.call.arguments import RULES, Arguments, DecodingArguments
from dllm.cli.generate import chat, generate
from dllm.drafting.front import SpeculateOptions
from dllm.errors import DllmError
from dllm.eval.config import GenerateSpec
from dllm.eval.worker import VERIFIER_ARGUMENTS
from dllm.spec import Limits, misfit

pytest.importorskip("mypy", reason="types are checked with mypy: pip install -e '.[test]'")

REVEALED = {  # expression -> its type, as mypy writes it
    'dllm.generate(m, "x")': "dllm.call.output.Output",
    "dllm.generate(m)": "dllm.call.output.Output",
    "dllm.generate(m, [1, 2], temperature=0.5)": "dllm.call.output.Output",
    'dllm.generate(m, [{"role": "user", "content": "x"}])': "dllm.call.output.Output",
    'dllm.generate(prompt="x").tokens_per_forward': "float",
    'dllm.generate(m, ["x", "y"])': "list[dllm.call.output.Output]",
    "dllm.generate(m, [[1, 2], [3]], n=4)": "list[dllm.call.output.Output]",
    'dllm.generate(m, "x", n=4)': "dllm.call.output.Output | list[dllm.call.output.Output]",
    "dllm.generate(m, input_ids=[1, 2])": "dllm.call.output.Output | list[dllm.call.output.Output]",
    'next(dllm.stream(m, "x")).output': "dllm.call.output.Output | None",
    'dllm.Engine(m).submit("x", sampler="klass").result()': "dllm.call.output.Output",
    'dllm.Engine(m).submit(["x", "y"]).result()': "list[dllm.call.output.Output]",
    'dllm.generate(m, "x", trace=True).trace': "dllm.decoding.trace.Trace | None",
    'dllm.score(m, "x", "y")': "float",
    'dllm.cache_error(m, "x", cache="dual")[0].max': "float",
    'dllm.speculate("tiny-ar", m, "x")': "dllm.drafting.request.SpecResult",
    'dllm.speculate("tiny-ar", prompt=["x", "y"])': "list[dllm.drafting.request.SpecResult]",
    "m.mask_id": "int | None",
    'dllm.samplers.registry.parse("threshold")': "list[dllm.samplers.base.Method]",
    "dllm.eval.config.GenerateSpec().top_k": "int | None",
    "dllm.samplers.Needs().revises": "bool",
    "dllm.drafting.ADL().k_min": "int",
    "dllm.DllmError": "def (*args: object) -> dllm.errors.DllmError",
}
ERRORS = {  # line -> what is wrong with it
    'dllm.generate(m, "x", temprature=0.5)': "temprature",
    'dllm.generate(m, "x", temperature="hot")': "No overload variant",
    'dllm.stream(m, "x", max_tokens=5)': "max_tokens",
    'dllm.speculate("tiny-ar", m, "x", temprature=0.5)': "temprature",
    'dllm.generte(m, "x")': "generte",
}
SETTINGS = """
[mypy]
strict = true
[mypy-torch.*,transformers.*,numpy.*,scipy.*,datasets.*,lm_eval.*,ray.*,peft.*,matplotlib.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[int, str]:
    """What mypy says of each line of a user's file that lies outside of the checkout."""
    folder = tmp_path_factory.mktemp("user")
    modules = ("dllm", "dllm.drafting", "dllm.eval.config", "dllm.samplers.registry")
    head = "".join(f"import {name}\n" for name in modules) + "m = dllm.load('tiny')\n"
    lines = [*(f"reveal_type({expression})" for expression in REVEALED), *ERRORS]
    (folder / "mine.py").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    (folder / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    cache = pytestconfig.cache.mkdir("mypy") if pytestconfig.cache else folder
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), "mine.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    told: dict[int, str] = {}
    for line in done.stdout.splitlines():
        if line.startswith("mine.py:"):
            number, text = int(line.split(":")[1]) - head.count("\n") - 1, line.partition(": ")[2]
            told[number] = f"{told[number]}\n{text}" if number in told else text
    assert told, done.stdout + done.stderr
    return told


@pytest.mark.parametrize("expression", REVEALED)
def test_types_reach_the_user(said: dict[int, str], expression: str) -> None:
    assert said[list(REVEALED).index(expression)] == f'note: Revealed type is "{REVEALED[expression]}"'


@pytest.mark.parametrize("line", ERRORS)
def test_a_slip_is_a_type_error(said: dict[int, str], line: str) -> None:
    told = said[len(REVEALED) + list(ERRORS).index(line)]
    assert told.startswith("error") and ERRORS[line] in told


def test_nothing_else_is_wrong(said: dict[int, str]) -> None:
    assert set(said) == set(range(len(REVEALED) + len(ERRORS))), said


def test_one_table_of_arguments() -> None:
    """The arguments of a signature, those that are checked, and the rules name the same things with the same types."""
    checked = get_type_hints(Arguments)
    assert {**get_type_hints(DecodingArguments), "n": int} == checked
    flags = {name for name, kind in checked.items() if kind in (bool, bool | None)}
    numbers = {name for name, kind in checked.items() if kind in (int, float, int | None, float | None)}
    functions = {"check", "logits_processor", "stopping_criteria", "on_step"}
    assert flags | numbers | functions == set(RULES)
    assert {name for name, rule in RULES.items() if rule.kind is bool} == flags


@pytest.mark.parametrize("name", [f.name for f in fields(GenerateSpec)])
def test_a_file_takes_what_a_call_takes(name: str) -> None:
    """`generate:` of an evaluation has arguments of a call, with the same bounds."""
    spec, kind = GenerateSpec.__dataclass_fields__[name], get_type_hints(Arguments)[name]
    rule = RULES.get(name)
    for value in (True, -1, 0, 1, 2, 0.5, -0.5, "x") if kind != bool | None and rule is not None else ():
        refused = bool(misfit(spec.type, value, Limits(**spec.metadata)))
        if refused:
            with pytest.raises(DllmError, match=f"{name}="):
                rule.check(name, value)
        else:
            rule.check(name, value)


def test_commands_have_the_defaults_of_a_call() -> None:
    defaults = {f.name: f.default for f in fields(Arguments)}
    for command in (generate, chat):
        given = {name: p.default for name, p in inspect.signature(command).parameters.items() if name in defaults}
        given.pop("trace", None)  # a file
        assert given and given == {name: defaults[name] for name in given}


def test_a_verifier_takes_arguments_of_a_call() -> None:
    shared = DecodingArguments.__annotations__.keys() & SpeculateOptions.__annotations__.keys()
    assert {*VERIFIER_ARGUMENTS, "seed", "logits_processor"} == shared  # a file holds no processors


def test_the_lazy_names_are_those_that_checkers_see() -> None:
    tree = ast.parse(Path(dllm.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert set(dllm.__all__) == {*seen, "DllmError", "__version__"}
    for name, module in seen.items():
        assert getattr(dllm, name) is getattr(import_module(str(module)), name)
