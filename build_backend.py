"""setuptools' backend, with an editable install that type checkers can follow.

`samplers/` and `eval/` lie beside `dllm/` and install inside it (docs/architecture.md). In an editable install that is
done by setuptools' finder, which exists at run time only. Here a tree of links, `build/editable/dllm`, shows the
package as it is installed, and a `.pth` file puts it on the path, where checkers and editors look too. The finder
stays: it serves a Python that is started in the checkout, where `./dllm` comes first, and an install that lost it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

ROOT = Path(__file__).resolve().parent
TREE = ROOT / "build" / "editable"


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """setuptools' editable wheel, and the tree of links; where links cannot be made (Windows), without it."""
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    try:
        link()
    except OSError:
        return name
    add(Path(wheel_directory, name), "dllm_toolkit.pth", os.fsencode(f"{TREE}\n"))
    return name


def link() -> None:
    """Folders are linked whole, so that new files in them appear; a new file or folder of `dllm/` itself asks for
    another install."""
    shutil.rmtree(TREE, ignore_errors=True)
    (TREE / "dllm").mkdir(parents=True)
    for child in [*(ROOT / "dllm").iterdir(), ROOT / "samplers", ROOT / "eval"]:
        if child.name != "__pycache__":
            (TREE / "dllm" / child.name).symlink_to(os.path.relpath(child, TREE / "dllm"), child.is_dir())


def add(wheel: Path, name: str, content: bytes) -> None:
    """Add a file to a wheel and to its record."""
    with zipfile.ZipFile(wheel) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    record = next(entry for entry in files if entry.endswith(".dist-info/RECORD"))
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    files[record] += f"{name},sha256={digest},{len(content)}\n".encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in {name: content, **files}.items():
            archive.writestr(entry, data)
