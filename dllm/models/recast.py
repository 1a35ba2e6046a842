"""An autoregressive Llama as a masked-diffusion model: its layers, or the first of them, under another attention.

The weights stay as they are. `Recast` is what a folder with an adapter says of it (`recast.json`), so that the adapter
can be merged into the base that it was trained on, and into no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dllm import spec
from dllm.errors import DllmError
from dllm.models.config import ModelConfig
from dllm.models.files import optional_json, write_json
from dllm.models.native import NativeModel
from dllm.models.transformer import Transformer

FILE = "recast.json"
SIZES = ("vocab_size", "hidden_size", "n_layers", "n_heads", "n_kv_heads", "intermediate_size")


@dataclass(frozen=True)
class Recast:
    """What becomes of a causal model.

    sizes       of the base, by the names of `ModelConfig`.
    layers      how many of its layers are kept, the first ones.
    mask_id     a token that no text holds.
    block_size  attention in blocks of so many tokens (1: a token sees those before it); None: everything.
    shift       1: position i is predicted in row i - 1, as the base does it.
    """

    base: str
    sizes: Mapping[str, int]
    layers: int
    mask_id: int
    block_size: int | None = None
    shift: int = 0

    @classmethod
    def of(
        cls,
        base: str,
        config: ModelConfig,
        mask_id: int,
        layers: int = 0,
        block_size: int | None = None,
        shift: int = 0,
    ) -> Recast:
        """For a base of this configuration; `layers` 0: all."""
        return cls(base, sizes(config), layers or config.n_layers, mask_id, block_size, shift)

    @classmethod
    def read(cls, folder: Path) -> Recast | None:
        """What a folder says; None: nothing. Errors: it says it wrong."""
        found = optional_json(folder / FILE)
        return spec.build(cls, found, spec.Source(str(folder / FILE))) if found else None

    def write(self, folder: Path) -> None:
        """Into the folder of an adapter."""
        write_json(folder / FILE, spec.plain(self))

    def apply(self, base: NativeModel) -> NativeModel:
        """The diffusion model, which shares the base's weights. Errors: another base, a mask that it does not have."""
        config = base.config
        mine = sizes(config)
        if other := [name for name in SIZES if mine[name] != self.sizes.get(name)]:
            said = ", ".join(f"{name} {mine[name]} (not {self.sizes.get(name)})" for name in other)
            raise DllmError(f"this is another base than {self.base!r}: {said}")
        if config.architecture != "LlamaForCausalLM":
            raise DllmError(f"only a LlamaForCausalLM becomes a dLLM here, not a {config.architecture}")
        if not 0 <= self.mask_id < config.vocab_size or self.mask_id in config.eos_ids:
            ends = f" or one of its end tokens {list(config.eos_ids)}" if config.eos_ids else ""
            raise DllmError(
                f"mask id {self.mask_id} lies outside the {config.vocab_size} ids of {self.base!r}{ends}: "
                "name a special token that no text holds"
            )
        small = cut(base, self.layers)
        config = replace(
            small.config, family="llada", architecture="LLaDAModelLM", causal=False, shift=self.shift,
            block_size=self.block_size, mask_id=self.mask_id, rope_full_precision=True, raw={},
            pad_id=None if config.pad_id == self.mask_id else config.pad_id,
        )  # fmt: skip
        network = Transformer(config)
        network.load_state_dict(small.transformer.state_dict(), assign=True)
        made = NativeModel(config, network.eval(), base.tokenizer)
        made.generation_config = base.generation_config
        return made


def sizes(config: ModelConfig) -> dict[str, int]:
    """What tells one base from another."""
    return {name: vars(config)[name] for name in SIZES}


def cut(model: NativeModel, layers: int) -> NativeModel:
    """The first `layers` layers with embedding, final norm and head, which are shared."""
    if not 1 <= layers <= model.config.n_layers:
        raise DllmError(f"layers must lie between 1 and the model's {model.config.n_layers}, got {layers}")
    config = replace(model.config, n_layers=layers)
    small = Transformer(config)
    wanted = small.state_dict()
    kept = {name: value for name, value in model.transformer.state_dict().items() if name in wanted}
    small.load_state_dict(kept, assign=True)
    return NativeModel(config, small, model.tokenizer)
