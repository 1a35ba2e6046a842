"""Names, specifications, the catalogue, and a sampler that joins from another package."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, peaks
from typer.testing import CliRunner

import dllm
from dllm import invariants
from dllm.cli import app
from dllm.errors import DllmError
from dllm.samplers import catalog, registry

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package of docs/adding-a-sampler.md, installed beside dllm."""
    page = (DOCS / "adding-a-sampler.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(# samplers/odd_even.py.*?)```", page, re.DOTALL)
    entry = re.search(r"^odd_even = \"my_package\.(.*)\"$", page, re.MULTILINE)
    assert code and entry
    package, info = tmp_path / "my_package", tmp_path / "my_package-1.0.dist-info"
    package.mkdir(), info.mkdir()
    (package / "__init__.py").touch()
    (package / "odd_even.py").write_text(code[1], encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[dllm.samplers]\nodd_even = my_package.{entry[1]}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    caches = (registry._external, catalog.clash, catalog.describe)
    for known in caches:
        known.cache_clear()
    yield
    for known in caches:
        known.cache_clear()
    for name in [n for n in sys.modules if n.startswith("my_package")]:
        del sys.modules[name]


def test_a_sampler_from_another_package(outside: None) -> None:
    assert "odd_even" in registry.names()
    model = Scripted(peaks([(1, 0.8)] * 6, 8))
    arguments: dict[str, Any] = {"max_new_tokens": 6, "block_length": 6, "early_stop": False, "trace": True}
    with invariants.asserted():
        out = dllm.generate(model, [0], sampler="odd_even+credit", **arguments)
    assert [sorted(c for c, _ in pairs) for pairs in out.trace.commits] == [[2, 4, 6], [1, 3, 5]]
    shown = json.loads(CliRunner().invoke(app, ["samplers", "odd_even", "--json"]).stdout)
    assert shown["source"] == "this page" and "credit" in shown["composes_with"]
    with pytest.raises(DllmError, match=r"tau=2 must be in \[0, 1\]"):
        dllm.generate(model, [0], sampler="odd_even:tau=2", **arguments)


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
