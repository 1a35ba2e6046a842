"""From a name to a model: the embedded one, a folder, or a Hugging Face id. Loading executes no code."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dllm.errors import DllmError, first_line, out_of_memory, unknown
from dllm.files import current
from dllm.models import diffusion_gemma
from dllm.models.checkpoint import load_weights
from dllm.models.config import ModelConfig
from dllm.models.families import read_config
from dllm.models.family import Family, RawConfig
from dllm.models.foreign import load_network, read_network, wrap
from dllm.models.model import Model
from dllm.models.parallel import device_plan, process_device, split_over_processes
from dllm.models.quantize import quantize
from dllm.models.settings import read_settings
from dllm.models.special import resolve
from dllm.models.transformer import Transformer

__all__ = ["Model", "load", "load_verifier"]

log = logging.getLogger(__name__)
ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = ("tiny", "tiny-ar")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]  # no code, no pickles
DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


def load(
    name_or_path: Any,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    backend: str = "native",
    mask_id: int | None = None,
    eos_ids: int | Sequence[int] | None = None,
    block_size: int | None = None,
    shift: int | None = None,
    tokenizer: Any = None,
    device_map: str | Mapping[str, Any] | None = None,
    quantization: str | None = None,
    revision: str | None = None,
) -> Model:
    """Load a masked-diffusion model: "tiny" (embedded), a checkpoint folder, or a Hugging Face id.

    dtype         None: as stored on an accelerator, float32 on the CPU; "auto": as stored; or a name or torch dtype.
    device        "cuda", "mps", "cpu", or "auto": the best there is.
    backend       "native": the families known here; "transformers": any class that transformers itself has, without a
                  cache. A transformers model that is already loaded may be passed in place of a name.
    mask_id, eos_ids, block_size, shift   settle what the checkpoint's files leave open or contradict.
    device_map    "auto" or "balanced": layers over all devices (accelerate); a dict module name -> device;
                  "tensor": every layer split over the processes of torchrun.
    quantization  "int8" or "int4": weight-only, through torchao.
    """
    place = pick_device(device)
    if backend not in ("native", "transformers"):
        raise unknown("backend", backend, ("native", "transformers"))
    if not isinstance(name_or_path, (str, Path)):
        return _wrapped(name_or_path, None, tokenizer, mask_id, eos_ids, shift)
    folder = locate(name_or_path, revision)
    raw = read_json_config(folder, str(name_or_path))
    tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
    kind = pick_dtype(dtype, place)
    if backend == "transformers":
        if device_map or quantization or block_size:
            raise DllmError('device_map, quantization and block_size are for backend="native"')
        return _wrapped(load_network(folder, kind).to(place), folder, tokenizer, mask_id, eos_ids, shift)
    if raw.architecture == diffusion_gemma.ARCHITECTURE:
        if device_map or quantization or block_size or shift or mask_id is not None:
            raise DllmError("DiffusionGemma takes dtype, device and tokenizer only")
        return diffusion_gemma.load_native(folder, raw, kind, tokenizer).to(place)
    family, config = read_config(raw)
    config = _settled(config, block_size, shift)
    config = resolve(config, family, tokenizer, optional_json(folder / "generation_config.json"), mask_id, eos_ids)
    try:
        transformer = _build(folder, family, config, kind, place, device_map)
        if quantization is not None:
            quantize(transformer, quantization)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        hint = 'try a smaller dtype or device_map="auto"'
        raise DllmError(f"{name_or_path} does not fit on {place}: {first_line(error)}; {hint}") from error
    model = Model(config, transformer.eval(), tokenizer)
    model.sampler_settings = read_settings(folder)
    return model


def _build(
    folder: Path,
    family: Family,
    config: ModelConfig,
    dtype: torch.dtype | None,
    place: torch.device,
    device_map: str | Mapping[str, Any] | None,
) -> Transformer:
    if device_map == "tensor":
        place = process_device(place)
    where = (lambda _: place) if device_map in (None, "tensor") else device_plan(config, device_map, dtype)
    transformer = load_weights(folder, family, config, dtype, where)
    transformer.spread = len({p.device for p in transformer.parameters()}) > 1
    if device_map == "tensor":
        split_over_processes(transformer)
    return transformer


def _wrapped(
    network: Any,
    folder: Path | None,
    tokenizer: Any,
    mask_id: int | None,
    eos_ids: int | Sequence[int] | None,
    shift: int | None,
) -> Model:
    if not hasattr(network, "config") or not hasattr(network, "parameters"):
        raise DllmError(f"a model is a name, a folder or a loaded transformers model, not {type(network).__name__}")
    generation = optional_json(folder / "generation_config.json") if folder is not None else {}
    config = resolve(read_network(network, shift or 0), None, tokenizer, generation, mask_id, eos_ids)
    model = wrap(network, config, tokenizer)
    model.sampler_settings = read_settings(folder) if folder is not None else {}
    return model


def _settled(config: ModelConfig, block_size: int | None, shift: int | None) -> ModelConfig:
    """The caller's word on alignment and blocks; a checkpoint trained otherwise than its family needs it."""
    if shift not in (None, 0, 1):
        raise DllmError(f"shift is 0 or 1, not {shift}")
    config = config if shift is None else replace(config, shift=shift)
    if block_size is None:
        return config
    if config.block_size is None:
        raise DllmError(f"{config.architecture} attends to everything; block_size= is for block-causal models")
    if block_size < 1:
        raise DllmError(f"block_size must be positive, not {block_size}")
    return replace(config, block_size=block_size)


def load_verifier(name_or_path: Any, *, dtype: str | torch.dtype | None = None, device: str = "auto") -> Any:
    """An autoregressive transformers model: "tiny-ar" (embedded), a folder, a Hugging Face id, or a loaded one.

    Its tokenizer, where the folder has one, is kept as `.tokenizer`.
    """
    if not isinstance(name_or_path, (str, Path)):
        return name_or_path
    from transformers import AutoModelForCausalLM

    folder, place = locate(name_or_path, None), pick_device(device)
    kind = pick_dtype(dtype, place)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if kind is None else kind, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        what = f"{name_or_path} is no causal language model that transformers can load"
        raise DllmError(f"{what}: {first_line(error)}") from error
    model.eval()
    model.tokenizer = load_tokenizer(folder)
    return model.to(place)  # type: ignore[arg-type]


def locate(name: str | Path, revision: str | None) -> Path:
    """The folder to read a checkpoint from, downloaded if it is a Hugging Face id."""
    if name in EMBEDDED:
        folder = ASSETS / str(name)
        if not (folder / "config.json").is_file():
            raise DllmError(f"the embedded model {name!r} is not in this installation; name a folder or a hub id")
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return current(folder)
    if folder.exists():
        raise DllmError(f"{name} is a file; a checkpoint is a folder with config.json and safetensors")
    if isinstance(name, Path) or name.startswith((".", "/", "~")):
        raise DllmError(f"no such folder: {name}")
    if HUB_ID.fullmatch(name):
        return _download(name, revision)
    if re.fullmatch(r"[\w.-]+", name):
        error = unknown("model", name, EMBEDDED)
        raise DllmError(f"{error} (or name a folder or a Hugging Face id; a prompt is passed as prompt=...)")
    raise DllmError(f"{name[:60]!r} is neither a folder nor a Hugging Face id; a prompt is passed as prompt=...")


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except Exception as error:  # the many network and authorisation errors of several libraries
        what = f"{name} is no folder here and did not come from the Hugging Face hub"
        raise DllmError(f"{what}: {first_line(error)}") from error


def read_json_config(folder: Path, name: str = "") -> RawConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise DllmError(f"{folder} is no checkpoint: it has no config.json")
    raw = RawConfig(optional_json(path))
    raw.name = name
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        raw.qualify_code()
    return raw


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file. Errors: not JSON, no object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DllmError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DllmError(f"{path} does not hold a JSON object")
    return value


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder from its data files alone; None when it has none."""
    if (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast as Tokenizer
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():  # Dream ships only Qwen2's BPE files
        from transformers import Qwen2Tokenizer as Tokenizer
    else:
        return None
    try:
        return Tokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise DllmError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error


def pick_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise unknown("device", str(device), ("auto", "cuda", "mps", "cpu")) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise DllmError('device="cuda" was asked for, but torch sees no CUDA device; use device="cpu" or "auto"')
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise DllmError(f"there is no device {place}: torch sees {torch.cuda.device_count()}")
    if place.type == "mps" and not _has_mps():
        raise DllmError('device="mps" was asked for, but torch sees none; use device="cpu" or "auto"')
    return place


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """None = as stored, which is slow and coarse on a CPU (bf16), so there the default is float32."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else None
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise unknown("dtype", str(dtype), [*DTYPES, "auto"])
    return DTYPES[dtype]
