"""Packages beside dllm: installs what a page of docs shows, word for word, for the length of a test."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@contextmanager
def installed(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, refresh: Callable[[], None]) -> Iterator[Path]:
    """The package of the page: its first block of a file, under the entry point that it declares; yields the file.

    `refresh` makes dllm look again what is installed.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    code = re.search(r"```python\n(# \S+\.py\n.*?)```", text, re.DOTALL)
    entry = re.search(r"```toml\n(\[project.entry-points.*?)```", text, re.DOTALL)
    assert code and entry
    ((group, ((name, target),)),) = (
        (group, points.items()) for group, points in tomllib.loads(entry[1])["project"]["entry-points"].items()
    )
    package, info = folder / "my_package", folder / "my_package-1.0.dist-info"
    package.mkdir(), info.mkdir()
    (package / "__init__.py").touch()
    file = package / f"{target.partition(':')[0].removeprefix('my_package.')}.py"
    file.write_text(code[1], encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    refresh()
    yield file
    refresh()
    for module in [m for m in sys.modules if m.startswith("my_package")]:
        del sys.modules[module]
