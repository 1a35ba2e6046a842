"""`Model`: a transformer with its tokenizer and special ids, as the engine, the samplers and the drafters see it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dllm.errors import DllmError, first_line
from dllm.models.checkpoint import save_weights
from dllm.models.config import ModelConfig
from dllm.models.families import FAMILIES, SHIFT, read_config
from dllm.models.family import RawConfig
from dllm.models.files import replaced_checkpoint
from dllm.models.parallel import layer_devices
from dllm.models.settings import SamplerSetting, write_settings
from dllm.models.transformer import KeysValues, KVStore, Transformer

NO_TOKENIZER = "there is no tokenizer.json, tokenizer.model, vocab.txt, or vocab.json with merges.txt"


class Model:
    """A loaded or freshly built masked-diffusion (or causal) model.

    `transformer` is the nn.Module to train; `forward` and `logits` are for decoding and record no gradients. Row
    `source(pos)` of `forward` predicts position `pos`, whether or not the checkpoint is shifted.
    """

    supports_cache = True
    relative = True  # positions enter as differences only: a canvas of masks alone predicts the same in every column

    def __init__(self, config: ModelConfig, transformer: Transformer | None = None, tokenizer: Any = None) -> None:
        self.config = config
        self.transformer = Transformer(config) if transformer is None else transformer
        self.tokenizer = tokenizer
        self.sampler_settings: dict[str, SamplerSetting] = {}  # by sampler: what a name without parameters takes

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.transformer.parameters())
        return f"Model({self.config.architecture}, {size / 1e6:.3g} M parameters, {self.dtype}, {self.device})"

    @property
    def family(self) -> str:
        return self.config.family

    @property
    def device(self) -> torch.device:
        return self.transformer.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.norm.weight.dtype

    @property
    def shift(self) -> int:
        return self.config.shift

    @property
    def block_size(self) -> int | None:
        return self.config.block_size

    @property
    def mask_id(self) -> int | None:
        return self.config.mask_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.config.eos_ids

    @property
    def pad_id(self) -> int | None:
        return self.config.pad_id

    @property
    def bos_id(self) -> int | None:
        return self.config.bos_id

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_positions(self) -> int:
        return self.config.max_positions

    @torch.no_grad()
    def forward(self, ids: Tensor, pos: Tensor | None = None, **plan: Any) -> Tensor:
        """Hidden states (N, Q, D) of tokens `ids` at positions `pos`; `plan`: keywords of `Transformer.forward`."""
        return self.transformer(ids, pos, **plan)

    @torch.no_grad()
    def forward_kv(self, ids: Tensor, pos: Tensor, **plan: Any) -> tuple[Tensor, list[KeysValues]]:
        """As `forward` with a store; also the keys and values that each layer computed for the tokens."""
        return self.transformer(ids, pos, kv=True, **plan)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab_size) in at least float32; the mask token can never be predicted."""
        logits = self.transformer.head(hidden)
        logits = logits.to(self.device)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.mask_id is not None and self.mask_id < logits.shape[-1]:
            logits[..., self.mask_id] = -torch.inf
        return logits

    def source(self, pos: Tensor) -> Tensor:
        """Position whose hidden state predicts `pos`; position 0 of a shifted model reads itself."""
        return (pos - self.shift).clamp(min=0)

    def new_store(self, lanes: int, slots: int) -> KVStore:
        """An empty key/value store for `lanes` rows of up to `slots` positions."""
        network = self.transformer  # its config counts the heads of this process
        return KVStore.allocate(network.config, lanes, slots, self.dtype, layer_devices(network))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation and the opening of the answer, by the tokenizer's template or else the family's."""
        if self.tokenizer is None:
            raise DllmError(f"this model has no tokenizer ({NO_TOKENIZER}): pass ids, or load it with tokenizer=")
        if self.tokenizer.chat_template:
            return list(by_template(self.tokenizer, messages, add_generation_prompt=True))
        family = FAMILIES.get(self.family)
        if family is None or family.chat is None or family.turn_end not in self.tokenizer.get_vocab():
            raise DllmError("this checkpoint has no chat template and its tokenizer no chat tokens: pass plain text")
        return list(self.tokenizer(family.chat(list(messages)), add_special_tokens=False)["input_ids"])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Model:
        """Move or cast in place; returns the model itself."""
        self.transformer.to(device=device, dtype=dtype)
        return self

    def compile(self) -> None:
        """Compile the backbone with torch.compile, once; shapes stay dynamic. The first forwards pay for it."""
        if self.transformer._compiled_call_impl is None:
            self.transformer.compile(dynamic=True)

    def save(
        self,
        folder: str | Path,
        shard_bytes: int = 5 * 10**9,
        *,
        extra: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Path:
        """Write config.json, safetensors and tokenizer in the family's official layout; `load` reads it back.

        A checkpoint that `folder` holds is replaced whole, weights of every shape and tokenizer included; after an
        error, or a kill at any moment, it is still there, or the new one is. shard_bytes: above this, several weight
        files. extra: further JSON files, name -> content. Errors: a quantized or split model, a disk that is full.
        """
        if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
            raise DllmError(f"shard_bytes is a positive number of bytes, not {shard_bytes!r}")
        try:
            with replaced_checkpoint(folder) as draft:
                self._write(draft, shard_bytes)
                for name, content in (extra or {}).items():
                    _dump(content, draft / name)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(draft)
                if self.sampler_settings:
                    write_settings(draft, self.sampler_settings.values())
                for name in ("config.json", "tokenizer_config.json"):
                    _without_absent_code(draft / name, Path(folder))
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has many names
            said = first_line(error)
            raise DllmError(f"could not save the model in {folder}: {said}; a checkpoint there still loads") from error
        return Path(folder)

    def _write(self, folder: Path, shard_bytes: int) -> None:
        """Weights and configuration into an empty folder."""
        if any(whole(value) is not value for value in self.transformer.state_dict().values()):
            raise DllmError("a quantized or split model cannot be saved; save it before quantization= or device_map=")
        family = FAMILIES[self.family]
        save_weights(self.transformer, family, folder, shard_bytes)
        dtype = str(self.dtype).removeprefix("torch.")
        values = {**self.config.raw, **family.write(self.config), "torch_dtype": dtype}
        values.pop("dtype", None)
        values.pop(SHIFT, None)
        if read_config(RawConfig(values))[1].shift != self.shift:  # the caller settled it otherwise than the family
            values[SHIFT] = self.shift
        generation = {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id, "bos_token_id": self.bos_id}
        _dump(values, folder / "config.json")
        _dump(generation, folder / "generation_config.json")

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with configuration, dtype or weights (up to 4096 values of each are read)."""
        return fingerprint(self.transformer, repr(self.config))

    def identity(self) -> str:
        """What decides an answer beside the arguments: the fingerprint, and a mark of the own sampler settings."""
        if not self.sampler_settings:
            return self.fingerprint()
        settings = json.dumps({name: s.parameters for name, s in self.sampler_settings.items()}, sort_keys=True)
        return f"{self.fingerprint()}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def by_template(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, tokenize: bool = True, **how: Any) -> Any:
    """Ids (or text) of a conversation by the tokenizer's own template. Errors: whatever the template objects to."""
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=tokenize, return_dict=False, **how)
    except Exception as error:  # a template can raise whatever it likes
        raise DllmError(f"the tokenizer's chat template cannot write this: {first_line(error)}") from error


def _without_absent_code(path: Path, folder: Path) -> None:
    """Drop from a configuration the classes whose code comes neither with the checkpoint nor from a repository."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(classes := content.pop("auto_map", None), dict):
        return

    def present(name: Any) -> bool:
        module = f"{str(name).split('.')[0]}.py"
        return name is None or "--" in str(name) or any((place / module).is_file() for place in (path.parent, folder))

    kept = {k: v for k, v in classes.items() if all(map(present, v if isinstance(v, list) else [v]))}
    _dump({**content, **({"auto_map": kept} if kept else {})}, path)


def _dump(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def fingerprint(network: nn.Module, head: str = "") -> str:
    """Sixteen hex digits of a network's parameters (up to 4096 values of each) and of the text `head`."""
    digest = hashlib.sha256(head.encode())
    for name, value in sorted(network.named_parameters()):
        flat = whole(value.detach()).flatten()
        sample = flat[:: max(1, len(flat) // 4096)]
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(sample.cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def whole(value: Tensor) -> Tensor:
    """An ordinary tensor: a quantized one expanded, one split over processes gathered, any other as it is."""
    for method in ("dequantize", "full_tensor"):
        if type(value) is not Tensor and hasattr(type(value), method):
            return getattr(value, method)()
    return value
