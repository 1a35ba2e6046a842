"""Files and checkpoint folders that are replaced whole: a save that is cut short leaves the old content or the new."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dllm.errors import DllmError

DRAFT, READY = ".saving", ".saved"  # folders of a checkpoint that is being written, and of one that is complete
INDEX = "model.safetensors.index.json"

# What a checkpoint's folder holds of a checkpoint: its weights in every shape, configuration and tokenizer.
OWNED = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)"
    r"|(model\.safetensors|pytorch_model\.bin)\.index\.json"
    r"|(config|generation_config|adapter_config|recast|drafter|sampler_settings)\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|merges\.txt|vocab\.txt|chat_template\.jinja"
)


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A draft to write that takes the place of the file `path` at the end; after an error `path` is what it was."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    draft = path.with_name(f"{path.name}.new")
    try:
        yield draft
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def replaced_checkpoint(folder: str | Path) -> Iterator[Path]:
    """An empty folder to write a checkpoint to, which takes the place of the one in `folder` at the end.

    Other files in `folder` stay. After an error, or a kill at any moment, `current(folder)` holds the old checkpoint or
    the new one, never a part of either.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _finish(folder)
    draft = folder / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        for file in draft.rglob("*"):
            _sync(file)
        os.replace(draft, folder / READY)  # from here on the new checkpoint counts
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _finish(folder)


def current(folder: Path) -> Path:
    """Where to read the checkpoint of `folder`: there, or in the complete copy that an interrupted save left in it."""
    return folder / READY if (folder / READY).is_dir() else folder


def _finish(folder: Path) -> None:
    """Put the files of a complete copy in their places and remove what they replace. It may be cut short anywhere."""
    ready = folder / READY
    if not ready.is_dir():
        return
    new = {file.relative_to(ready) for file in ready.rglob("*") if file.is_file()}
    stale = _shards(folder) | {file.name for file in folder.iterdir() if OWNED.fullmatch(file.name)}
    for name in sorted(new):  # linked, so that the copy stays complete until the end
        (folder / name).parent.mkdir(exist_ok=True)
        with replaced(folder / name) as draft:
            draft.unlink(missing_ok=True)
            try:
                os.link(ready / name, draft)
            except OSError:  # a file system without links
                shutil.copyfile(ready / name, draft)
    for old in stale - set(map(str, new)):
        (folder / old).unlink(missing_ok=True)
    _sync(folder)
    with suppress(FileNotFoundError):
        os.replace(ready, folder / DRAFT)
    shutil.rmtree(folder / DRAFT, ignore_errors=True)


def _shards(folder: Path) -> set[str]:
    """The files that the index of `folder` names, whatever they are called."""
    try:
        named = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()
    return {name for name in named if isinstance(name, str) and Path(name).name == name and (folder / name).is_file()}


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file. Errors: not JSON, no object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DllmError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DllmError(f"{path} does not hold a JSON object")
    return value


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """A JSON file as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
