"""The training loop: resumable to the bit on one CPU, because a step depends on the state and its number alone."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dllm.errors import DllmError
from dllm.models.config import ModelConfig
from dllm.models.hub import load, pick_device
from dllm.models.native import NativeModel
from dllm.models.recast import Recast
from dllm.models.transformer import Transformer
from dllm.tasks.base import Example
from dllm.tasks.registry import task
from dllm.training import checkpoint
from dllm.training.config import DataSpec, ModelSpec, TrainConfig
from dllm.training.data import Batch, Batches, JsonLines, Pair, Source, TaskMix
from dllm.training.log import Curve
from dllm.training.lora import add_lora, merge_lora
from dllm.training.objectives import Autoregressive, Diffusion, Loss
from dllm.training.optim import build_optimizers
from dllm.training.steps import run_steps
from dllm.training.tokenizer import embedded_tokenizer

logger = logging.getLogger(__name__)


class Trainer:
    """One run of a recipe.

    `resume` goes on from the checkpoint in `config.output`; without it the folder must hold none. `model` replaces
    the one that the recipe describes.
    """

    def __init__(self, config: TrainConfig, resume: bool = False, model: NativeModel | None = None) -> None:
        self.config = config
        self.folder = Path(config.output)
        self.path = self.folder / checkpoint.CHECKPOINT
        saved = checkpoint.begin(config, resume)
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.device = pick_device(config.device)
        self.model = build_model(config) if model is None else model
        self.model.to(self.device)
        self.backbone: Transformer = self.model.transformer
        if config.lora.rank:
            add_lora(self.backbone, config.lora)
        self.batches = make_batches(config, self.model)
        self.objective = make_objective(config, self.model)
        self.optimizers = build_optimizers(self.backbone, config.optimizer, config.schedule)
        self.step = 0
        if saved is not None:
            self._restore(saved)
        self.curve = Curve(self.folder, self.step, config.tensorboard)

    def run(self) -> NativeModel:
        """Train to the last step, save the model in `output/model` in its family's layout, and return it.

        Ctrl-C ends the step that it falls into, saves, and raises KeyboardInterrupt; a second one strikes at once.
        """
        config, started, spent = self.config, time.monotonic(), self.curve.seconds
        seen: list[tuple[float, int, int]] = []  # since the last line of the log: loss, correct tokens, tokens
        self.backbone.train()
        feed = self.batches.from_step(self.step * config.accumulate)

        def take(step: int) -> dict[str, str] | None:
            for part in range(config.accumulate):
                seen.append(self._backward(next(feed), step, part))
            if not self.optimizers.step(step):
                self._fail(step, "gradient")
            self.step = step + 1
            if self.step % config.log_every and self.step != config.schedule.steps:
                return None
            losses, correct, tokens = zip(*seen, strict=True)
            loss, accuracy = sum(losses) / len(seen), sum(correct) / max(1, sum(tokens))
            seen.clear()
            rows = self.step * config.batch_size * config.accumulate
            seconds, rate = spent + time.monotonic() - started, config.schedule.rate(step)
            self.curve.add(step=self.step, loss=loss, accuracy=accuracy, rate=rate, rows=rows, seconds=seconds)
            return {"loss": f"{loss:.4f}", "accuracy": f"{accuracy:.4f}"}

        run_steps("training", self.step, config.schedule.steps, take, lambda _: self.save(), config.save_every)
        return self.export()

    def save(self) -> None:
        """Write the checkpoint; the one before it survives any failure."""
        state = {
            "step": self.step,
            "recipe": checkpoint.recipe(self.config),
            "weights": {n: p.detach() for n, p in self.backbone.named_parameters() if p.requires_grad},
            "optimizers": self.optimizers.state_dict(),
            "objective": self.objective.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        checkpoint.save_atomically(state, self.path)

    def export(self) -> NativeModel:
        """The model as it is now, adapters merged, also written to `output/model`."""
        backbone = merge_lora(self.backbone) if self.config.lora.rank else self.backbone
        model = NativeModel(self.model.config, backbone.eval(), self.model.tokenizer)
        model.save(self.folder / "model")
        return model

    def _backward(self, batch: Batch, step: int, part: int) -> tuple[float, int, int]:
        """Add to the gradients. Returns the loss, the correct tokens and the tokens of the batch."""
        generator = torch.Generator().manual_seed((self.config.seed << 40) + step * self.config.accumulate + part)
        with mixed(self.config.precision, self.device):
            loss: Loss = self.objective(self.backbone, batch, generator)
        value = loss.value.item()
        if not math.isfinite(value):
            self._fail(step, "loss")
        (loss.value / self.config.accumulate).backward()  # type: ignore[no-untyped-call]
        return value, int(loss.correct), loss.tokens

    def _fail(self, step: int, what: str) -> None:
        kept = f"the last good state is in {self.path}" if self.path.exists() else "no checkpoint had been written yet"
        raise DllmError(f"step {step + 1}: the {what} is not finite; {kept}. Lower optimizer.lr or look at the data")

    def _restore(self, saved: Mapping[str, Any]) -> None:
        if {n for n, p in self.backbone.named_parameters() if p.requires_grad} != saved["weights"].keys():
            raise DllmError(f"{self.path} holds other weights than this recipe trains")
        self.backbone.load_state_dict(saved["weights"], strict=False)
        self.optimizers.load_state_dict(saved["optimizers"])
        self.objective.load_state_dict(saved["objective"])
        torch.set_rng_state(saved["random"])
        if saved["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["random_cuda"], self.device)
        self.step = saved["step"]
        logger.info("going on from step %d of %s", self.step, self.path)


def train(config: TrainConfig, resume: bool = False, model: NativeModel | None = None) -> NativeModel:
    """Run a recipe from the start, or from its checkpoint; returns the trained model."""
    return Trainer(config, resume, model).run()


def mixed(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward: bfloat16 is mixed precision, whose weights stay as they are."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def build_model(config: TrainConfig) -> NativeModel:
    """The model that a recipe starts from: a loaded one in float32, or a fresh one with the embedded tokenizer.

    A diffusion run may start from a Llama-like causal model: its weights then open a LLaDA, which has the same tensors.
    """
    spec, causal = config.model, config.objective == "autoregressive"
    if spec.start is None:
        return fresh_model(spec, causal)
    model = load(spec.start, dtype=torch.float32, device="cpu")
    return as_diffusion(model) if model.config.causal and not causal else model


def as_diffusion(twin: NativeModel) -> NativeModel:
    """A LLaDA with the weights of a causal Llama: no causal mask, no shift, the tokenizer's mask token."""
    mask_id = getattr(twin.tokenizer, "mask_token_id", None)  # foreign
    if twin.config.architecture != "LlamaForCausalLM" or mask_id is None:
        raise DllmError(
            "a diffusion run starts from a LlamaForCausalLM whose tokenizer has a mask token, or from a dLLM"
        )
    return Recast.of("model.start", twin.config, int(mask_id)).apply(twin)


def fresh_model(spec: ModelSpec, causal: bool) -> NativeModel:
    """Random weights: LLaDA layout, or Llama layout for a causal twin. Residual outputs start smaller (GPT-2)."""
    tokenizer = embedded_tokenizer(spec.max_positions)
    if spec.hidden_size % (2 * spec.heads):
        raise DllmError("model.hidden_size must be an even multiple of model.heads")
    config = ModelConfig(
        family="causal" if causal else "llada",
        architecture="LlamaForCausalLM" if causal else "LLaDAModelLM",
        vocab_size=len(tokenizer), embedding_rows=len(tokenizer),
        hidden_size=spec.hidden_size, n_layers=spec.layers, n_heads=spec.heads, n_kv_heads=spec.heads,
        head_dim=spec.hidden_size // spec.heads, intermediate_size=spec.intermediate_size, norm_eps=1e-5,
        rope_theta=spec.rope_theta, rope_full_precision=not causal, max_positions=spec.max_positions,
        shift=int(causal), causal=causal, mask_id=None if causal else tokenizer.mask_token_id,
        eos_ids=(tokenizer.eos_token_id,), pad_id=tokenizer.pad_token_id,
    )  # fmt: skip
    backbone = Transformer(config)
    for name, parameter in backbone.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * spec.layers))
    return NativeModel(config, backbone, tokenizer)


def make_objective(config: TrainConfig, model: NativeModel) -> Diffusion | Autoregressive:
    """The recipe's objective. DllmError where it does not fit the model."""
    causal = model.config.causal
    if causal != (config.objective == "autoregressive"):
        kind = "causal" if causal else "masked-diffusion"
        raise DllmError(f"objective {config.objective!r} does not fit a {kind} model")
    if causal:
        return Autoregressive()
    assert model.mask_id is not None
    return Diffusion(model.mask_id, model.config.vocab_size, config.loss, config.masks)


def make_batches(config: TrainConfig, model: NativeModel) -> Batches:
    """The recipe's data in batches, as this model reads prompts."""
    if not model.eos_ids:
        raise DllmError("training needs an end token: the model's configuration and tokenizer name none")
    data = config.data
    data = replace(data, max_length=min(data.max_length, model.max_positions))
    return Batches(_source(data), encoder(model, data.chat), model.eos_ids[0], config.batch_size, data, config.seed)


def _source(data: DataSpec) -> Source:
    for name in data.tasks:
        task(name)  # an unknown one is an error before training starts
    return JsonLines(data.jsonl) if data.jsonl else TaskMix(data.tasks)


def encoder(model: NativeModel, chat: bool = True) -> Callable[[Example], Pair]:
    """Example -> ids: the prompt as `generate` would feed it, the answer as plain text."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise DllmError("training on text needs a tokenizer: the model has none")
    templated = chat and bool(tokenizer.chat_template)

    def encode(example: Example) -> Pair:
        if templated:
            prompt = model.chat([{"role": "user", "content": example.prompt}])
        else:
            prompt = list(tokenizer(example.prompt, add_special_tokens=False)["input_ids"])
        return Pair(prompt, list(tokenizer(example.answer, add_special_tokens=False)["input_ids"]))

    return encode
