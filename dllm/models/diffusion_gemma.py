"""DiffusionGemma through transformers' own class and its own decoder: the sampler `native`, and no other.

It is no masked model: a canvas of random tokens is denoised, any token may change at any step, and the previous step's
logits are fed back. None of the schedulers here applies, so nothing is pretended: `decode` calls the native loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Unpack

import torch
from torch import Tensor

from dllm.errors import DllmError, first_line
from dllm.models.family import RawConfig, special_ids
from dllm.models.foreign import ForeignModel, describe
from dllm.models.model import Decoded, ForwardOptions
from dllm.models.tokenizer import Tokenizer
from dllm.spec import named, settings

ARCHITECTURE = "DiffusionGemmaForBlockDiffusion"


@dataclass(frozen=True)
class Native:
    """Parameters of the sampler `native`; the defaults are those of the published generation config, for checkpoints
    that come without one."""

    max_denoising_steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    entropy_bound: float = 0.1


class DiffusionGemma(ForeignModel):
    """The native model; `forward` and the samplers of this toolkit do not apply to it."""

    def forward(self, ids: Tensor, pos: Tensor | None = None, **plan: Unpack[ForwardOptions]) -> NoReturn:
        """Errors: always."""
        raise DllmError('DiffusionGemma is no masked model: it is decoded with sampler="native" only')

    def options(self, spec: object) -> dict[str, object]:
        """Parameters of the sampler `native`, given as its name or a mapping; other samplers are refused."""
        name, _, given = named("native" if spec is None else spec, "sampler")
        if name != "native":
            raise DllmError(f'DiffusionGemma is decoded with sampler="native" only, not {spec!r}')
        return settings("sampler 'native'", Native, given)

    @torch.no_grad()
    def decode(self, prompt: list[int], max_new_tokens: int, seed: int, options: Mapping[str, object]) -> Decoded:
        """Denoise canvases until end-of-text or at least `max_new_tokens`, of which the answer keeps that many."""
        from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

        if not prompt:
            raise DllmError("DiffusionGemma needs a prompt")
        network: Any = self.transformer
        values, calls = {**_published(network.generation_config), **options}, 0
        values["sampler_config"] = EntropyBoundSamplerConfig(entropy_bound=values.pop("entropy_bound"))

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        hook = network.model.decoder.register_forward_pre_hook(count)
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                out = network.generate(
                    torch.tensor([prompt], device=self.device), max_new_tokens=max_new_tokens,
                    return_dict_in_generate=True, pad_token_id=self.pad_id, eos_token_id=list(self.eos_ids), **values,
                )  # fmt: skip
        finally:
            hook.remove()
        ids = out.sequences[0, len(prompt) :].tolist()[:max_new_tokens]
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        return Decoded(ids[:end], calls, end is not None)


def _published(own: object) -> dict[str, Any]:
    """The checkpoint's own settings where it has them, else the published ones."""
    values = {name: getattr(own, name, None) for name in vars(Native())}  # foreign
    values["entropy_bound"] = getattr(getattr(own, "sampler_config", None), "entropy_bound", None)  # foreign
    return {**vars(Native()), **{name: value for name, value in values.items() if value is not None}}


def load_native(folder: Path, raw: RawConfig, dtype: torch.dtype | None, tokenizer: Tokenizer | None) -> DiffusionGemma:
    """The checkpoint through transformers' class; special ids as its config has them (there is no mask id)."""
    try:
        from transformers import DiffusionGemmaForBlockDiffusion
    except ImportError as error:
        raise DllmError("this transformers has no DiffusionGemma; install a newer one") from error
    try:
        network = DiffusionGemmaForBlockDiffusion.from_pretrained(
            folder, dtype="auto" if dtype is None else dtype, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise DllmError(f"{folder} cannot be loaded by transformers: {first_line(error)}") from error
    ids = {name: value for name, value in special_ids(raw).items() if value not in (None, ())} | {"mask_id": None}
    config = describe(network, "diffusion_gemma", **ids, block_size=network.config.canvas_length)
    model = DiffusionGemma(config, network.train(False), tokenizer)
    model.own_decoder = model
    return model
