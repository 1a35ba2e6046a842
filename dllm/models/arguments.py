"""The arguments of `dllm.load`: one table that Python, the command line, YAML, lm-eval and the benches read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from dllm import spec
from dllm.errors import DllmError, unknown
from dllm.models.config import is_id, is_ids

if TYPE_CHECKING:
    import torch

    from dllm.models.tokenizer import Tokenizer

BACKENDS = ("native", "transformers")

# arguments of transformers and of other codes -> what there is here
RENAMED = {
    "torch_dtype": "it is dtype=...",
    "load_in_8bit": 'it is quantization="int8"',
    "load_in_4bit": 'it is quantization="int4"',
    "quantization_config": 'it is quantization="int8" or "int4"',
    "mask_token_id": "it is mask_id=...",
    "eos_token_id": "it is eos_ids=...",
    "use_auth_token": "it is token=...",
    "trust_remote_code": "code that comes with a checkpoint is never run",
}


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


# what a value may be, and in words; a field that is not here takes anything, and its reader checks it
KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "mask_id": (is_id, "an id (a whole number)"),
    "eos_ids": (is_ids, "an id or a list of ids (whole numbers)"),
    "block_size": (is_id, "a whole number of columns"),
    "shift": (is_id, "0 or 1"),
    "device_map": (lambda v: _text(v) or isinstance(v, Mapping), "a name, or module names with their devices"),
    "quantization": (_text, "a name"),
    "revision": (_text, "a branch, tag or commit as text"),
    "token": (lambda v: isinstance(v, bool) or _text(v), "text, or true for the one that is stored"),
    "cache_dir": (lambda v: _text(v) or isinstance(v, Path), "a folder"),
    "local_files_only": (lambda v: isinstance(v, bool), "true or false"),
    "subfolder": (_text, "a folder inside the checkpoint's"),
    "attn_implementation": (_text, "a name"),
}
# fields whose text means something else as YAML ("1e5" is a revision, "[1, 2]" are two ids)
READ_AS_YAML = ("mask_id", "eos_ids", "block_size", "shift", "device_map", "local_files_only", "token")


class LoadOptions(TypedDict, total=False):
    """The arguments of `LoadArguments`, for signatures."""

    dtype: str | torch.dtype | None
    device: str | torch.device
    backend: str
    mask_id: int | None
    eos_ids: int | Sequence[int] | None
    block_size: int | None
    shift: int | None
    tokenizer: Tokenizer | str | Path | None
    device_map: str | Mapping[str, object] | None
    quantization: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    subfolder: str | None
    attn_implementation: str | None


@dataclass(frozen=True, kw_only=True)
class LoadArguments:
    """What decides how a checkpoint is found, read and placed. Errors: values of another kind.

    dtype         None: as stored on an accelerator, float32 on the CPU; "auto": as stored; or a name or torch dtype.
    device        "cuda", "mps", "cpu", or "auto": the best there is.
    backend       "native": the families known here; "transformers": any class that transformers itself has, without a
                  cache.
    mask_id, eos_ids, block_size, shift   settle what the checkpoint's files leave open or contradict.
    tokenizer     a tokenizer, or the folder or Hugging Face id of one; None: the checkpoint's own.
    device_map    "auto" or "balanced": layers over all devices (accelerate); a dict module name -> device;
                  "tensor": every layer split over the processes of torchrun.
    quantization  "int8" or "int4": weight-only, through torchao.
    revision, token, cache_dir, local_files_only   how a Hugging Face id is downloaded, as transformers has them.
    subfolder     where in the folder or repository the checkpoint is.
    attn_implementation   "sdpa" (the native backbone's only one) or "eager", for backend="transformers".
    """

    dtype: object = None
    device: object = "auto"
    backend: str = "native"
    mask_id: int | None = None
    eos_ids: int | tuple[int, ...] | None = None
    block_size: int | None = None
    shift: int | None = None
    tokenizer: object = None
    device_map: str | dict[str, object] | None = None
    quantization: str | None = None
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: object = None
    local_files_only: bool = False
    subfolder: str | None = None
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        for f in fields(LoadArguments):
            if vars(self)[f.name] is None:
                object.__setattr__(self, f.name, f.default)
        if isinstance(self.eos_ids, list):
            object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        for name, (fits, what) in KINDS.items():
            value = vars(self)[name]
            if value is not None and not fits(value):
                raise DllmError(f"{name} is {what}, not {value!r}")
        if self.backend not in BACKENDS:
            raise unknown("backend", str(self.backend), BACKENDS)
        if self.shift not in (None, 0, 1):
            raise DllmError(f"shift is 0 or 1, not {self.shift}")

    @staticmethod
    def of(given: Mapping[str, Any]) -> LoadArguments:
        """The arguments given by name; None stands for the default. Errors: unknown names, wrong kinds."""
        known = {f.name for f in fields(LoadArguments)}
        for name in given:
            if name in RENAMED:
                raise DllmError(f"dllm.load has no {name!r}: {RENAMED[name]}")
            if name not in known:
                raise unknown("argument", str(name), known, of="dllm.load")
        return LoadArguments(**given)

    @staticmethod
    def read(given: Mapping[str, object]) -> LoadArguments:
        """The same from a command line: text is read as the field asks."""
        return LoadArguments.of({name: _read(name, value) for name, value in given.items()})

    def given(self) -> dict[str, Any]:
        """The arguments that are not at their defaults."""
        return {f.name: v for f in fields(LoadArguments) if (v := vars(self)[f.name]) != f.default}

    @property
    def elsewhere(self) -> dict[str, Any]:
        """The same for another repository than that of the name."""
        return {name: value for name, value in self.hub.items() if name not in ("revision", "subfolder")}

    @property
    def hub(self) -> dict[str, Any]:
        """Those that decide where the files come from."""
        names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
        return {name: value for name, value in self.given().items() if name in names}


@dataclass(frozen=True)
class Checkpoint(LoadArguments):
    """A checkpoint and how it is loaded, as plain values that can be compared, stored and sent to another process."""

    name: str = "tiny"

    def __hash__(self) -> int:
        return hash((self.name, repr(self)))

    def plain(self) -> dict[str, object]:
        """The name and what is not at its default; the token, a secret, is left out."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in self.given().items() if k != "token"}
        return {"name": self.name, **values}


spec.plain.register(Checkpoint, Checkpoint.plain)


def _read(name: str, value: object) -> object:
    if not isinstance(value, str):
        return str(value) if name in ("revision", "subfolder", "cache_dir") and is_id(value) else value
    if value.lower() == "none":
        return None
    return spec.value(value) if name in READ_AS_YAML else value


def pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """["key=value", ...] as a mapping. Errors: no key, no equals sign, a key given twice."""
    out: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise DllmError(f"{option} {text!r}: write key=value, for example {option} mask_id=126336")
        if key.strip() in out:
            raise DllmError(f"{option} gives {key.strip()} twice")
        out[key.strip()] = value.strip()
    return out
