"""`backend="transformers"`: any native transformers model as a masked-diffusion model. No cache, full forwards only."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from dllm.errors import DllmError, first_line, unknown
from dllm.models.config import ModelConfig
from dllm.models.family import RawConfig, special_ids
from dllm.models.files import optional_json, write_json
from dllm.models.model import ForwardOptions, Model
from dllm.models.native import NativeModel
from dllm.models.tokenizer import Tokenizer
from dllm.models.transformer import KVStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_CACHE = 'backend="transformers" has no cache: use cache="none"'
ATTENTION = ("sdpa", "eager")  # those that take a mask of any shape


class ForeignModel(NativeModel):
    """A transformers model in place of the backbone; its "hidden states" are already logits (N, Q, V)."""

    supports_cache = False
    relative = False  # as far as is known

    def __init__(self, config: ModelConfig, network: PreTrainedModel, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, network, tokenizer)  # type: ignore[arg-type]
        # the mask is added to the scores; others choose by it
        self.adds_mask = getattr(network.config, "_attn_implementation", None) == "eager"  # foreign
        self.takes = inspect.signature(network.forward).parameters

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter."""
        return next(self.transformer.parameters()).dtype

    @torch.no_grad()
    def forward(self, ids: Tensor, pos: Tensor | None = None, **plan: Unpack[ForwardOptions]) -> Tensor:
        """Logits (N, Q, V) of whole rows; `visible` (N, 1|Q, Q) and padding (pos = -1) are honoured, a store is not."""
        visible = plan.pop("visible", None)
        plan.pop("known", None)
        if any(value is not None for value in plan.values()):
            raise DllmError(NO_CACHE)
        n, q = ids.shape
        pos = torch.arange(q, device=ids.device).expand(n, q) if pos is None else pos.expand(n, q)
        seen = (pos >= 0)[:, None, :] if visible is None else visible & (pos >= 0)[:, None, :]  # (N, 1|Q, Q)
        seen = (seen.expand(n, q, q) | (pos < 0)[:, :, None])[:, None]  # (N, 1, Q, Q); padding sees everything
        if self.adds_mask:
            seen = torch.zeros(seen.shape, dtype=self.dtype, device=ids.device).masked_fill(
                ~seen, torch.finfo(self.dtype).min
            )
        others = {"position_ids": pos.clamp(min=0), "use_cache": False}
        others = {name: value for name, value in others.items() if name in self.takes}
        logits: Tensor = self.transformer(input_ids=ids, attention_mask=seen, **others).logits
        return logits

    def compile(self) -> None:
        """Compile the network with torch.compile, once; the first forwards pay for it."""
        if self.transformer._compiled_call_impl is None:
            self.transformer.compile(dynamic=True)

    forward_with, logits, head_rows = Model.forward_with, Model.logits, Model.head_rows

    def new_store(self, lanes: int, slots: int) -> KVStore:
        """Errors: always."""
        raise DllmError(NO_CACHE)

    def _write(self, folder: Path, shard_bytes: int) -> None:
        self.transformer.save_pretrained(folder, max_shard_size=shard_bytes)  # type: ignore[operator]
        if self.mask_id is not None:
            values = {**optional_json(folder / "config.json"), "mask_token_id": self.mask_id}
            write_json(folder / "config.json", values)


def load_network(folder: Path, dtype: torch.dtype | None, attention: str | None = None) -> PreTrainedModel:
    """A masked or causal language model of transformers' own classes; remote code is never run."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    if attention not in (None, *ATTENTION):
        raise unknown("attn_implementation", attention, ATTENTION)
    options = {"dtype": "auto" if dtype is None else dtype, "attn_implementation": attention or "sdpa"}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        masked = type(config) in AutoModelForMaskedLM._model_mapping
        auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        network: PreTrainedModel = auto.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, **options
        )
        return network
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DllmError(
            f"transformers has no class of its own for {folder}: {first_line(error)} "
            "(load it yourself and pass the loaded model to dllm.load)"
        ) from error


def describe(network: PreTrainedModel, family: str, shift: int = 0, **settled: Any) -> ModelConfig:
    """A `ModelConfig` of a network that is not ours: sizes for information, ids for the engine.

    Ids are those of its config object, or as they are `settled`.
    """
    raw = RawConfig({**network.config.get_text_config().to_dict(), "architectures": [type(network).__name__]})
    ids = {**special_ids(raw), **settled}
    heads = raw.get("num_attention_heads") or 1
    hidden = raw.get("hidden_size") or 1
    return ModelConfig(
        family=family,
        architecture=raw.architecture,
        vocab_size=raw.need("vocab_size"),
        embedding_rows=raw["vocab_size"],
        hidden_size=hidden,
        n_layers=raw.get("num_hidden_layers") or 1,
        n_heads=heads,
        n_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        intermediate_size=raw.get("intermediate_size") or 1,
        max_positions=raw.get("max_position_embeddings") or 2**31,
        shift=shift,
        **ids,
    )


def wrap(network: PreTrainedModel, config: ModelConfig, tokenizer: Tokenizer | None) -> ForeignModel:
    """Attention is made bidirectional where a config says causal: a masked-diffusion model attends to everything."""
    attention = getattr(network.config, "_attn_implementation", None)  # foreign
    if attention not in (None, *ATTENTION):
        raise DllmError(f"attention by {attention!r} takes no mask of this shape: load it with one of {ATTENTION}")
    if getattr(network.config, "is_causal", None) is not False:  # foreign
        network.config.is_causal = False
    return ForeignModel(config, network.train(False), tokenizer)
