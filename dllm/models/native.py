"""`NativeModel`: the backbone of this package with its tokenizer and special ids; it saves what `load` reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Self, Unpack

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dllm.errors import DllmError, first_line
from dllm.models.checkpoint import save_weights
from dllm.models.config import Json, ModelConfig, is_id
from dllm.models.families import BLOCKS, FAMILIES, SHIFT, read_config
from dllm.models.family import RawConfig
from dllm.models.files import optional_json, replaced_checkpoint, write_json
from dllm.models.fused import singles
from dllm.models.model import ForwardOptions, Model, rows_of, shut
from dllm.models.settings import SamplerSetting, write_settings
from dllm.models.tokenizer import Message, Tokenizer
from dllm.models.transformer import Flags, KVStore, Outputs, Rows, Transformer


class NativeModel(Model):
    """The backbone with its tokenizer and special ids, loaded or freshly built: masked-diffusion, or causal.

    `transformer` is the nn.Module to train, `config` what it was built from; `forward` and `logits` are for decoding.
    """

    supports_cache = True
    relative = True

    def __init__(
        self, config: ModelConfig, transformer: Transformer | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        self.config = config
        self.transformer = Transformer(config) if transformer is None else transformer
        self.tokenizer = tokenizer
        self.family, self.shift, self.block_size = config.family, config.shift, config.block_size
        self.mask_id, self.eos_ids = config.mask_id, config.eos_ids
        self.pad_id, self.bos_id = config.pad_id, config.bos_id
        self.vocab_size, self.embedding_rows = config.vocab_size, config.embedding_rows
        self.max_positions = config.max_positions
        ours = isinstance(self.transformer, Transformer)
        whole = ours and self.transformer.config.n_heads == config.n_heads  # the heads are not split over processes
        self.attention_layers = config.n_layers if whole else 0
        self.sampler_settings: dict[str, SamplerSetting] = {}
        self.generation_config: dict[str, object] = {}

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.transformer.parameters())
        return f"Model({self.config.architecture}, {size / 1e6:.3g} M parameters, {self.dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        """Of the embedding. Every step asks: `parameters()` would walk the modules each time."""
        return self.transformer.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the last norm; quantized layers keep others."""
        return self.transformer.norm.weight.dtype

    @torch.no_grad()
    def forward(self, ids: Tensor, pos: Tensor | None = None, **options: Unpack[ForwardOptions]) -> Tensor:
        """See `Model.forward`."""
        hidden: Tensor = self.transformer(ids, pos, **options)
        return hidden

    @torch.no_grad()
    def forward_with(
        self,
        ids: Tensor,
        pos: Tensor | None = None,
        *,
        rows: Rows | None = None,
        kv: bool = False,
        **options: Unpack[ForwardOptions],
    ) -> Outputs:
        """See `Model.forward_with`."""
        flags = Flags(options.get("fresh"), options.get("keep"), options.get("visible"))
        lane, store, known = options.get("lane"), options.get("store"), options.get("known")
        return self.transformer.outputs(ids, pos, flags, lane, store, known, rows, kv)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        return shut(self.transformer.head(hidden).to(self.device), self.mask_id)

    def head_rows(self, ids: Tensor) -> Tensor | None:
        """See `Model.head_rows`."""
        rows = rows_of(self.transformer.head_weight, ids)
        return None if rows is None else rows.to(self.transformer.norm.weight.device)

    def new_store(self, lanes: int, slots: int) -> KVStore:
        """An empty key/value store for `lanes` rows of up to `slots` positions."""
        return self.transformer.new_store(lanes, slots)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation and the opening of the answer, by the tokenizer's template or else the family's."""
        tokenizer, family = self.tokenizer, FAMILIES.get(self.family)
        if tokenizer is None or tokenizer.chat_template or family is None or family.chat is None:
            return super().chat(messages)
        if family.turn_end not in tokenizer.get_vocab():
            return super().chat(messages)
        return list(tokenizer(family.chat(list(messages)), add_special_tokens=False)["input_ids"])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move or cast in place; returns the model itself."""
        self.transformer.to(device=device, dtype=dtype)
        return self

    def compile(self) -> None:
        """Compile the layers with torch.compile, once; the first forward of a kind pays for it."""
        if self.transformer.step is None:
            self.transformer.compile_layers()

    def save(
        self, folder: str | Path, shard_bytes: int = 5 * 10**9, *, extra: Mapping[str, Json] | None = None
    ) -> Path:
        """Write config.json, safetensors and tokenizer in the family's official layout; `load` reads it back.

        A checkpoint that `folder` holds is replaced whole, weights of every shape and tokenizer included; after an
        error, or a kill at any moment, it is still there, or the new one is. shard_bytes: above this, several weight
        files. extra: further JSON files, name -> content. Errors: a quantized or split model, a disk that is full.
        """
        if not is_id(shard_bytes) or shard_bytes < 1:
            raise DllmError(f"shard_bytes is a positive number of bytes, not {shard_bytes!r}")
        try:
            with replaced_checkpoint(folder) as draft:
                self._write(draft, shard_bytes)
                for name, content in (extra or {}).items():
                    write_json(draft / name, content)
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
        values.pop(BLOCKS, None)
        read = read_config(RawConfig(values))[1]
        if read.shift != self.shift:  # the caller settled it otherwise than the family
            values[SHIFT] = self.shift
        if read.block_size != self.block_size:
            values[BLOCKS] = self.block_size
        ids = {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id, "bos_token_id": self.bos_id}
        generation = {**self.generation_config, **ids}
        write_json(folder / "config.json", values)
        write_json(folder / "generation_config.json", generation)

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with configuration, dtype or weights (up to 4096 values of each are read)."""
        return fingerprint(self.transformer, repr(self.config))

    def identity(self) -> str:
        """What decides an answer beside the arguments: the fingerprint, and a mark of the own sampler settings."""
        if not self.sampler_settings:
            return self.fingerprint()
        settings = json.dumps({name: s.parameters for name, s in self.sampler_settings.items()}, sort_keys=True)
        return f"{self.fingerprint()}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def _without_absent_code(path: Path, folder: Path) -> None:
    """Drop from a configuration the classes whose code comes neither with the checkpoint nor from a repository."""
    content = optional_json(path)
    if not isinstance(classes := content.pop("auto_map", None), dict):
        return

    def present(name: object) -> bool:
        module = f"{str(name).split('.')[0]}.py"
        return name is None or "--" in str(name) or any((place / module).is_file() for place in (path.parent, folder))

    kept = {k: v for k, v in classes.items() if all(map(present, v if isinstance(v, list) else [v]))}
    write_json(path, {**content, **({"auto_map": kept} if kept else {})})


def fingerprint(network: nn.Module, head: str = "") -> str:
    """Sixteen hex digits of a network's parameters (up to 4096 values of each) and of the text `head`."""
    digest = hashlib.sha256(head.encode())
    for name, value, fused, part in sorted(singles(network), key=itemgetter(0)):
        alone = whole(value.detach())
        alone = alone if fused is None else fused.apart(alone)[part]
        flat, shape = alone.flatten(), tuple(value.shape if fused is None else alone.shape)
        sample = flat[:: max(1, len(flat) // 4096)]
        digest.update(f"{name}{shape}{value.dtype}".encode())
        digest.update(sample.cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def whole(value: Tensor) -> Tensor:
    """An ordinary tensor: a quantized one expanded, one split over processes gathered, any other as it is."""
    for method in ("dequantize", "full_tensor"):
        if type(value) is not Tensor and hasattr(type(value), method):  # foreign
            value = getattr(value, method)()  # foreign
    return value
