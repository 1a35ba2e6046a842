"""Names, specifications, the catalogue, and a sampler that joins from another package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugin_kit import installed
from scripted import Scripted, peaks
from typer.testing import CliRunner

import dllm
from dllm.cli import app
from dllm.decoding.cache import registry as caches
from dllm.decoding.invariants import Checked
from dllm.errors import DllmError
from dllm.lookahead.setting import Lookahead
from dllm.samplers import catalog, registry

DOCS = Path(__file__).parent.parent / "docs"


def forget() -> None:
    """What is installed, and what was said of it."""
    registry.OTHERS.refresh()
    catalog.clash.cache_clear()
    catalog.describe.cache_clear()


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package of docs/adding-a-sampler.md, installed beside dllm."""
    with installed("adding-a-sampler.md", tmp_path, monkeypatch, forget):
        yield


def test_a_sampler_from_another_package(outside: None) -> None:
    assert "odd_even" in registry.names()
    model = Scripted(peaks([(1, 0.8)] * 6, 8))
    arguments: dict[str, Any] = {"max_new_tokens": 6, "block_length": 6, "early_stop": False, "trace": True}
    out = dllm.generate(model, [0], sampler="odd_even+credit", check=Checked(), **arguments)
    assert [sorted(c for c, _ in pairs) for pairs in out.trace.commits] == [[2, 4, 6], [1, 3, 5]]
    shown = json.loads(CliRunner().invoke(app, ["samplers", "odd_even", "--json"]).stdout)
    assert shown["source"] == "this page" and "credit" in shown["composes_with"]
    with pytest.raises(DllmError, match=r"tau=2 must be in \[0, 1\]"):
        dllm.generate(model, [0], sampler="odd_even:tau=2", **arguments)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_thing", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("raise SystemExit(3)", "cannot be loaded: SystemExit: 3"),
        ("OddEven = 3", "is no class of dllm.samplers.base.Method"),
        ("class OddEven: pass", "is no class of dllm.samplers.base.Method"),
    ],
)
def test_a_broken_sampler_of_another_package_breaks_nothing_else(
    outside: None, tmp_path: Path, code: str, said: str
) -> None:
    (tmp_path / "my_package" / "odd_even.py").write_text(code, encoding="utf-8")
    listed = CliRunner().invoke(app, ["samplers", "--json"])
    assert listed.exit_code == 0 and "odd_even" not in [e["name"] for e in json.loads(listed.stdout)]
    assert registry.parse("threshold")[0].name == "threshold"
    for call in (lambda: registry.parse("odd_even"), lambda: registry.parse("credit+odd_even:tau=0.5")):
        with pytest.raises(DllmError, match=f"sampler 'odd_even' of the package 'my-package' {re.escape(said)}"):
            call()


def test_one_that_breaks_when_it_is_built_is_named(outside: None, tmp_path: Path) -> None:
    path = tmp_path / "my_package" / "odd_even.py"
    path.write_text(
        path.read_text(encoding="utf-8").replace("def bundle(", "def bundle(self, context): 1 / 0\n\n    def other(")
    )
    listed = CliRunner().invoke(app, ["samplers", "--json"])
    assert listed.exit_code == 0 and "threshold" in [e["name"] for e in json.loads(listed.stdout)]
    with pytest.raises(DllmError, match="sampler 'odd_even' of the package 'my-package' failed: ZeroDivisionError"):
        dllm.generate(Scripted(peaks([(1, 0.8)] * 6, 8)), [0], sampler="odd_even", max_new_tokens=6)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("threshold:tau=7", r"tau=7 must be in \[0, 2\]"),
        ("threshold:tau=-0.1", r"tau=-0.1 must be in \[0, 2\]"),
        ("localleap:kappa=75", r"kappa=75 must be in \[0, 2\]"),
        ({"name": "wino", "tau_verify": 90}, r"tau_verify=90 must be in \[0, 2\]"),
        ("wino:share=1.01", r"share=1.01 must be in \[0, 1\]"),
    ],
)
def test_a_bar_for_a_confidence_is_no_percentage(spec: Any, said: str) -> None:
    with pytest.raises(DllmError, match=said):
        registry.parse(spec)


def test_a_bar_above_one_switches_its_rule_off() -> None:
    model = Scripted(peaks([(1, 1.0)] * 6, 8))
    for spec in ("threshold:tau=1.1", "klass:kappa=2", "localleap:kappa=1.5", "credit:tau=2"):
        assert dllm.generate(model, [0], sampler=spec, max_new_tokens=6, block_length=6).nfe == 6


def test_numbers_are_read_as_python_writes_them() -> None:
    tenth = registry.parse("threshold:tau=0.1")
    assert registry.parse("threshold:tau=1e-1") == registry.parse("threshold:tau=.1") == tenth
    assert registry.parse("adablock:delimiters=[8, 2e1],tau=8E-1")[0].delimiters == [8, 20.0]
    assert Lookahead.parse("4:delta=1e-3") == Lookahead(4, delta=0.001)
    assert caches.policy("dllm_cache:rho=2.5e-1") == caches.policy({"name": "dllm_cache", "rho": 0.25})


def test_two_copies_of_the_toolkit_are_not_mixed(tmp_path: Path) -> None:
    """A checkout in the working folder hides `dllm`; its samplers would come from the installed copy."""
    root = Path(dllm.__file__).parent
    shutil.copytree(
        root, tmp_path / "dllm", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__", "samplers", "eval")
    )
    tried = ("dllm.generate", "import dllm.samplers", "import dllm.eval")
    lines = [f"try: {one}\nexcept ValueError as error: print(error)" for one in tried]
    code = "\n".join(["import sys", "sys.path.insert(0, sys.argv[1])", "import dllm", *lines])
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    said = found.stdout.splitlines()
    assert len(said) == 3 and all("two copies are mixed" in line and str(tmp_path) in line for line in said), found


def test_it_is_gone_with_its_package() -> None:
    assert "odd_even" not in registry.names()
    with pytest.raises(DllmError, match="unknown sampler 'odd_even'"):
        registry.method("odd_even")


def test_one_specification_in_four_notations() -> None:
    text = registry.parse("adablock:delimiters=[8, 85],tau=0.8+credit:dinfer")
    mapping = [{"name": "adablock", "delimiters": [8, 85], "tau": 0.8}, {"name": "credit", "preset": "dinfer"}]
    assert text == registry.parse(mapping) == registry.parse(text) == registry.parse([text[0], "credit:dinfer"])


def test_every_sampler_is_described() -> None:
    for name in registry.names():
        entry = catalog.describe(name)
        assert entry["summary"] and entry["source"] and entry["cost"]
        assert entry["asks"] is None and entry["owns"], name
        for parameter in entry["parameters"]:
            assert parameter["why"], (name, parameter)
        for other in entry["composes_with"]:
            assert name in catalog.describe(other)["composes_with"]  # composing is symmetric
    assert "both decide the select" in str(catalog.clash("threshold", "localleap"))


def test_the_command_prints_parameters_with_reasons() -> None:
    result = CliRunner().invoke(app, ["samplers", "localleap"])
    assert result.exit_code == 0
    for word in ("kappa", "0.75", "2510.07081", "composes with", "adablock"):
        assert word in result.stdout
    overview = CliRunner().invoke(app, ["samplers"]).stdout
    assert "K[arg-max]" in overview and all(name in overview for name in registry.names())  # brackets are no markup
    everything = json.loads(CliRunner().invoke(app, ["samplers", "--json"]).stdout)
    assert [e["name"] for e in everything] == registry.names()


def test_the_page_has_every_sampler_and_its_picture() -> None:
    page = (DOCS / "samplers.md").read_text(encoding="utf-8")
    for name in registry.names():
        assert f"\n## {name}\n" in page, f"run `dllm samplers --write-docs docs`: {name} is missing"
        if f"samplers/{name}.png" in page:
            assert (DOCS / "samplers" / f"{name}.png").stat().st_size > 500
    pictured = [path.stem for path in (DOCS / "samplers").glob("*.png")]
    assert page == catalog.markdown(pictured), "run `dllm samplers --write-docs docs`"
