"""Aligning a masked-diffusion drafter with the autoregressive model it drafts for (DEER, arXiv 2512.15176).

The teacher is the verifier: its own greedy answers are the data. Stage one, continuation distillation: cut an answer
anywhere, mask what follows up to a block, put a separator behind the block, and predict the masked tokens at a random
masking rate t with weight 1 / t. Stage two, refinement: mask only the last R tokens completely, R uniform, and weight
token i of R by alpha^(R - i), most right behind the prefix, where a rejection costs most.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dllm.drafting.vocabulary import Vocabulary
from dllm.errors import DllmError, first_line
from dllm.models.hub import load, load_verifier, pick_device
from dllm.models.model import Model
from dllm.models.native import NativeModel
from dllm.models.transformer import Transformer
from dllm.tasks.registry import generate
from dllm.training import checkpoint
from dllm.training.config import AlignConfig, Taught
from dllm.training.data import Pair, read_prompts
from dllm.training.diffusion import noise_levels
from dllm.training.trainer import as_diffusion, mixed, patience

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class Rows(NamedTuple):
    """A batch: noisy ids (B, T), positions (B, T) with -1 for padding; and of the M masked tokens their rows, columns,
    targets and weights (M,).
    """

    ids: Tensor
    pos: Tensor
    row: Tensor
    column: Tensor
    target: Tensor
    weight: Tensor


def continuations(
    verifier: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 32,
    path: Path | None = None,
) -> list[Pair]:
    """The verifier's own greedy answers to prompts given as ids.

    With `path` each answer is kept in that file as soon as it is there, and those of an earlier run are not made again.
    """
    pad = verifier.generation_config.pad_token_id or 0
    end = verifier.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    kept = _kept(path)
    out = [Pair(list(p), kept[tuple(p)]) if tuple(p) in kept else None for p in prompts]
    order = sorted((i for i, c in enumerate(out) if c is None), key=lambda i: len(prompts[i]))
    for at in tqdm(range(0, len(order), batch_size), desc="teacher", unit="batch", leave=False):
        some = [list(prompts[i]) for i in order[at : at + batch_size]]
        width = max(map(len, some))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in some], device=verifier.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some], device=verifier.device)
        texts = verifier.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
        )[:, width:].tolist()
        for i, prompt, text in zip(order[at : at + batch_size], some, texts, strict=True):
            stop = next((n + 1 for n, t in enumerate(text) if t in ends), len(text))
            out[i] = Pair(prompt, text[:stop])
        if path is not None:
            lines = [json.dumps(out[i]) for i in order[at : at + batch_size]]
            with path.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
    return [c for c in out if c is not None and c.answer]


def _kept(path: Path | None) -> dict[tuple[int, ...], list[int]]:
    """prompt -> answer of an earlier run; a line that was cut off is dropped, from the file too."""
    if path is None or not path.exists():
        return {}
    try:
        *whole, rest = path.read_text(encoding="utf-8").split("\n")
        if rest:
            path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        return {tuple(prompt): answer for prompt, answer in map(json.loads, whole)}
    except (OSError, ValueError, TypeError) as error:
        raise DllmError(f"{path} is damaged ({first_line(error)}); delete it and run again") from None


def stage_one(
    data: Sequence[Pair],
    model: NativeModel,
    block: int,
    sep: int | None,
    rng: random.Random,
    generator: torch.Generator,
) -> Rows:
    """Continuation distillation: a random cut, at most `block` tokens behind it, masked at rate t, weight 1 / t."""
    t = noise_levels(len(data), generator)
    cut = [rng.randrange(len(c.answer)) for c in data]
    prefixes = [c.prompt + c.answer[:n] for c, n in zip(data, cut, strict=True)]
    targets = [(c.answer[n:] + [model.eos_ids[0]] * block)[:block] for c, n in zip(data, cut, strict=True)]
    masked = [torch.rand(block, generator=generator) < rate for rate in t]
    for m in masked:
        if not bool(m.any()):
            m[int(torch.randint(block, (1,), generator=generator))] = True
    weights = [torch.full((block,), 1 / float(rate)) for rate in t]
    return _rows(prefixes, targets, masked, weights, model, sep)


def stage_two(
    data: Sequence[Pair],
    model: NativeModel,
    max_suffix: int,
    alpha: float,
    sep: int | None,
    rng: random.Random,
) -> Rows:
    """Refinement: the last R tokens of a truncated answer, all masked, weights alpha^(R - i) for i = 1..R."""
    prefixes, targets, masked, weights = [], [], [], []
    for c in data:
        end = rng.randint(1, len(c.answer))
        r = rng.randint(1, min(max_suffix, end))
        prefixes.append(c.prompt + c.answer[: end - r])
        targets.append(c.answer[end - r : end])
        masked.append(torch.ones(r, dtype=torch.bool))
        weights.append(alpha ** torch.arange(r - 1, -1, -1, dtype=torch.float32))
    return _rows(prefixes, targets, masked, weights, model, sep)


def _rows(
    prefixes: list[list[int]],
    targets: list[list[int]],
    masked: list[Tensor],
    weights: list[Tensor],
    model: NativeModel,
    sep: int | None,
) -> Rows:
    assert model.mask_id is not None
    tail = [] if sep is None else [sep]
    clean = [torch.tensor(p + ts + tail) for p, ts in zip(prefixes, targets, strict=True)]
    ids = pad_sequence(clean, batch_first=True)  # (B, T)
    pos = pad_sequence([torch.arange(len(c)) for c in clean], batch_first=True, padding_value=-1)
    holes = [F.pad(ms, (len(p), len(tail))) for p, ms in zip(prefixes, masked, strict=True)]
    hidden = pad_sequence(holes, batch_first=True)  # (B, T)
    row, column = hidden.nonzero(as_tuple=True)
    weight = torch.cat(weights)[torch.cat(masked)]
    return Rows(ids.masked_fill(hidden, model.mask_id), pos, row, column, ids[row, column], weight)


def loss_of(model: NativeModel, rows: Rows) -> Tensor:
    """Weighted cross-entropy of the masked tokens, normalised by the weights: ()."""
    device = model.device
    hidden = model.transformer(rows.ids.to(device), rows.pos.to(device))  # (B, T, D)
    source = (rows.column - model.shift).clamp(min=0)
    logits = model.transformer.head(hidden[rows.row.to(device), source.to(device)])  # (M, V)
    nats = F.cross_entropy(logits.float(), rows.target.to(device), reduction="none")
    weight = rows.weight.to(device)
    return (nats * weight).sum() / weight.sum()


def shrink(model: NativeModel, layers: int) -> NativeModel:
    """A copy with the first `layers` layers: embedding, final norm and head as they are."""
    if not 1 <= layers <= model.config.n_layers:
        raise DllmError(f"layers must lie between 1 and the model's {model.config.n_layers}, got {layers}")
    small = Transformer(replace(model.config, n_layers=layers))
    wanted = small.state_dict()
    small.load_state_dict({k: v for k, v in model.transformer.state_dict().items() if k in wanted})
    return NativeModel(replace(model.config, n_layers=layers), small, model.tokenizer)


def align(
    model: NativeModel,
    data: Sequence[Pair],
    config: AlignConfig,
    saved: Mapping[str, Any] | None = None,
    save: Callable[[int, int, torch.optim.Optimizer | None], None] | None = None,
) -> list[float]:
    """Both stages, in place; returns the loss of every step.

    `save(stage, steps, optimizer)` is called now and then and at Ctrl-C, which ends a step; `saved` holds what it got.
    A step depends on its number and the state alone, so a run that goes on equals an uninterrupted one.
    """
    if not data:
        raise DllmError("the teacher gave no answers to learn from")
    sep = separator(model) if config.separator else None
    room = model.max_positions - max(config.block, min(config.max_suffix, config.max_new_tokens)) - 1
    fits = [c for c in data if len(c.prompt) + len(c.answer) <= room]
    if not fits:
        raise DllmError(f"every teacher answer is longer than the drafter's {model.max_positions} positions allow")
    known = [c for c in fits if max(*c.prompt, *c.answer) < model.vocab_size]
    if not known:
        raise DllmError(f"every teacher answer holds an id that the drafter's vocabulary of {model.vocab_size} lacks")
    if len(known) < len(data):
        log.warning("%d of %d teacher answers do not fit the drafter: left out", len(data) - len(known), len(data))
    data = known
    losses: list[float] = []
    model.transformer.train()
    for number, stage in enumerate((config.one, config.two), 1):
        optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01)
        first = stage.steps if saved is not None and saved["stage"] > number else 0
        if saved is not None and saved["stage"] == number:
            first = saved["step"]
            optimizer.load_state_dict(saved["optimizer"])
        steps = tqdm(range(first, stage.steps), f"stage {number}", initial=first, total=stage.steps, unit="step")
        with steps as bar, patience() as interrupted:
            for step in bar:
                rng = random.Random(f"{config.seed} {number} {step}")
                generator = torch.Generator().manual_seed(rng.getrandbits(60))
                some = rng.choices(data, k=config.batch_size)
                if number == 1:
                    rows = stage_one(some, model, config.block, sep, rng, generator)
                else:
                    rows = stage_two(some, model, config.max_suffix, config.alpha, sep, rng)
                for group in optimizer.param_groups:
                    group["lr"] = stage.lr * min(1.0, 10 * (step + 1) / stage.steps, 1 - step / stage.steps)
                with mixed(config.dtype, model.device):
                    loss = loss_of(model, rows)
                if not bool(torch.isfinite(loss)):
                    raise DllmError(f"the loss of stage {number} is not finite at step {step}: lower lr or alpha")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.transformer.parameters(), 1.0)
                optimizer.step()
                losses.append(float(loss.detach()))
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                if save is not None and ((step + 1) % config.save_every == 0 or interrupted.is_set()):
                    save(number, step + 1, optimizer)
                if interrupted.is_set():
                    log.warning("stopped in stage %d after step %d: go on with --resume", number, step + 1)
                    raise KeyboardInterrupt
    model.transformer.eval()
    return losses


def separator(model: NativeModel) -> int:
    """The tokenizer's separator, which closes a block in training and in drafting."""
    sep = getattr(model.tokenizer, "sep_token_id", None)  # foreign
    if sep is None:
        raise DllmError("this tokenizer has no separator token: set separator: false")
    return int(sep)


def run(config: AlignConfig, resume: bool = False) -> NativeModel:
    """The whole recipe: teacher answers, a smaller copy if asked for, both stages; the model in `output/model`.

    Beside the model, `drafter.json` says how to draft with it. `resume` goes on from the checkpoint and the teacher's
    answers in `output`; without it the folder must hold none.
    """
    folder = Path(config.output)
    path, answers = folder / checkpoint.CHECKPOINT, folder / "teacher.jsonl"
    saved = checkpoint.begin(config, resume)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model, verifier = pair(config)

    def save(stage: int, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        state = optimizer.state_dict() if optimizer is not None else {}
        weights = {n: p.detach() for n, p in model.transformer.named_parameters()}
        values = {"recipe": checkpoint.recipe(config), "stage": stage, "step": step, "optimizer": state}
        checkpoint.save_atomically({**values, "weights": weights}, path)
        log.info("stage %d, step %d saved in %s", stage, step, path)

    if saved is None:
        answers.unlink(missing_ok=True)
        save(0, 0, None)
    else:
        model.transformer.load_state_dict(saved["weights"], strict=False)
    data = continuations(verifier, task_prompts(model, config), config.max_new_tokens, config.batch_size, answers)
    log.info("%d teacher answers, %d tokens", len(data), sum(len(c.answer) for c in data))
    align(model, data, config, saved, save)
    save(3, 0, None)  # nothing left to do
    model.transformer.to(torch.bfloat16 if config.dtype == "bfloat16" else torch.float32)
    how = {"suffix_token_id": separator(model)} if config.separator else {}
    model.save(folder / "model", extra={"drafter.json": how})
    return model


def pair(config: AlignConfig) -> tuple[NativeModel, PreTrainedModel]:
    """The drafter before alignment (bidirectional, cut to size) and its teacher. DllmError where they number their
    tokens differently."""
    device = pick_device(config.device)
    model = load(config.drafter, dtype=torch.float32, device=device)
    model.sampler_settings = {}  # they are of the weights that are about to change
    model = as_diffusion(model) if model.config.causal else model
    model = (shrink(model, config.layers) if config.layers else model).to(device)
    arguments = {"dtype": config.dtype, "device": str(model.device), **config.verifier.given()}
    verifier = load_verifier(config.verifier.name, **arguments)
    size = len(verifier.get_input_embeddings().weight)  # type: ignore[arg-type]
    tokenizer = getattr(verifier, "tokenizer", None)  # foreign
    if Vocabulary.between(model.tokenizer, tokenizer, model.vocab_size, size).kind != "ids":
        raise DllmError(
            f"drafter {config.drafter.name} and verifier {config.verifier.name} number their tokens differently: an "
            "aligned drafter learns the verifier's ids, so take one that has the verifier's tokenizer"
        )
    return model, verifier


def task_prompts(model: Model, config: AlignConfig, split: str = "train") -> list[list[int]]:
    """Prompt ids of the recipe: problems of the built-in tasks, or the lines of a file."""
    return [model.chat([{"role": "user", "content": line}]) for line in task_lines(config, split)]


def task_lines(config: Taught, split: str = "train") -> list[str]:
    """The same as text."""
    if config.prompts:
        return read_prompts(config.prompts)
    return [e.prompt for name, n in config.tasks.items() for e in generate(name, split, n, config.seed)]
