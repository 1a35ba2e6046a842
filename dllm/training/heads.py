"""Training a head over a verifier's hidden states (`dllm.drafting.hidden`) on the verifier's own answers.

The head is DSpark's (arXiv 2607.05147): few layers, a block of an anchor and masks whose every slot predicts the token
behind it, and a Markov head for the order within the block. Its tables over the vocabulary are products of the
verifier's embedding with small matrices, so that what is learned of one token holds for its like; they are multiplied
out when the head is saved. Only the most frequent ids are drafted, by the rows of the verifier's own head, or by two
factors of them that learn with the rest (SlimSpec, arXiv 2605.10453).

A step takes texts, anchors in them, and the `window` states before each anchor. A slot learns the verifier's law of its
token given the true text before it: the few best ids, weighted by `decay` to the power of the slot.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dllm.drafting.hidden.backbone import Backbone, Layer, Rotary, Text
from dllm.drafting.hidden.config import HeadConfig, read_head
from dllm.drafting.registry import as_verifier
from dllm.drafting.verifier import CausalLM, Verifier, embedding, text_config
from dllm.errors import DllmError, out_of_memory
from dllm.models.checkpoint import opened
from dllm.models.files import replaced, replaced_checkpoint, write_json
from dllm.models.hub import load_verifier, pick_device
from dllm.training import checkpoint
from dllm.training.answers import answers_of
from dllm.training.config import HeadRecipe
from dllm.training.data import Pair
from dllm.training.optim import Optimizers, build_optimizers
from dllm.training.steps import fitting, run_steps
from dllm.training.trainer import mixed

log = logging.getLogger(__name__)
BEST = 16  # ids that the verifier's law of a position is kept for
FORWARD = 4096  # tokens of a forward of the verifier, padding included
SHARD = 128  # texts of a file of states
TEXTS = 64  # of which the states of the verifier's head are looked at
RARE = 1e-4  # of the largest variance: the least that a direction of them counts


class Told(NamedTuple):
    """What the verifier says of a text of n tokens, on the host."""

    ids: Tensor  # (n,)
    answer: int  # its first token
    states: Tensor  # (n, T, H) bfloat16, behind the tapped layers
    best: Tensor  # (n, BEST) ids of the token behind each one, most probable first
    law: Tensor  # (n, BEST) their probabilities


class Blocks(NamedTuple):
    """M anchors with their blocks of B slots, and C columns of context in a row. Ids are the verifier's."""

    block: Tensor  # (M, B) anchor and masks
    pos: Tensor  # (M, B)
    before: Tensor  # (M, B) the token before each slot's
    best: Tensor  # (M, B, BEST)
    law: Tensor  # (M, B, BEST)
    real: Tensor  # (M, B) bool: not behind the end of the text
    states: Tensor  # (C, T, H)
    at: Tensor  # (C,) positions
    seen: Tensor  # (M, W) columns of the context that an anchor sees, -1: none

    def to(self, device: torch.device) -> Blocks:
        """On a device."""
        return Blocks(*(x.to(device) for x in self))


class Trained(nn.Module):
    """The parameters of a head that learn. embed (V, H) is the verifier's, rows (R, H) are its head's for the ids
    `known` (R,): they stand still. An output head of two factors begins with those of the rows for states of a second
    `moment` (H, H)."""

    def __init__(
        self, config: HeadConfig, embed: Tensor, rows: Tensor, known: Tensor, moment: Tensor | None = None
    ) -> None:
        super().__init__()
        assert config.order is not None
        rank, hidden = config.order.rank, config.hidden_size
        self.config, self.embed, self.rows, self.known = config, embed, rows, known
        self.own = torch.full((len(embed),), -1, device=known.device).index_copy(
            0, known, torch.arange(len(known)).to(known)
        )
        self.backbone = Backbone(config, Rotary(config.rope, config.head_dim))
        scale = float(embed.float().std())
        self.left, self.right = nn.Linear(hidden, rank, False), nn.Linear(hidden, rank, False)
        nn.init.normal_(self.left.weight, std=hidden**-0.5 / scale)
        nn.init.zeros_(self.right.weight)
        self.gate_proj = nn.Linear(hidden + rank, rank)
        self.lm_head_down: nn.Linear | None = None
        if config.slim is not None:
            self.lm_head_down, self.lm_head = nn.Linear(hidden, config.slim, False), nn.Linear(config.slim, 1, False)
            moment = torch.eye(hidden, device=rows.device) if moment is None else moment
            self.lm_head.weight, self.lm_head_down.weight = map(nn.Parameter, factors(rows, config.slim, moment))
        self._look()

    @torch.no_grad()
    def _look(self) -> None:
        """Heads begin with a distance each, from 1 to the block's width, so that slots find the anchor and the newest
        states at once: a key's bias is one direction, a query's the same turned by the distance."""
        c, half = self.config, self.config.head_dim // 2
        fast = torch.arange(half // 3)  # turning far enough from one position to the next
        angle = self.backbone.rotary.frequencies[fast]
        strength = (c.head_dim / len(fast)) ** 0.5
        for attention in (layer.self_attn for layer in self.backbone.layers if isinstance(layer, Layer)):
            q, k = (proj.bias.view(-1, c.head_dim) for proj in (attention.q_proj, attention.k_proj))
            for h in range(c.heads):
                distance = 1 + h * c.block // c.heads
                k[h, fast] += strength
                q[h, fast] += strength * torch.cos(distance * angle)
                q[h, half + fast] -= strength * torch.sin(distance * angle)

    def forward(self, blocks: Blocks) -> Tensor:
        """Logits (M, B, R) of each slot given the true token before it."""
        hidden = self.states(blocks)
        left = self._gated(self.left(self.embed[blocks.before]), hidden)
        out: Tensor = self.logits(hidden) + left @ self.right(self.rows).T
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Of states (..., H), (..., R), without the order within the block."""
        if self.lm_head_down is None:
            return hidden @ self.rows.to(hidden.dtype).T
        out: Tensor = self.lm_head(self.lm_head_down(hidden))
        return out

    def states(self, blocks: Blocks) -> Tensor:
        """(M, B, H) of the slots."""
        keys, values = self.backbone.keys(blocks.states.to(self.embed), blocks.at)  # (L, G, C, D)
        place = blocks.seen.clamp(min=0)
        k, v = (x[:, :, place].transpose(1, 2) for x in (keys, values))  # (L, M, G, W, D)
        text = Text(k, v, blocks.at[place].where(blocks.seen >= 0, -1), True)
        out: Tensor = self.backbone(self.embed[blocks.block], blocks.pos, text)
        return out

    def walk(self, blocks: Blocks) -> Tensor:
        """(M, B) ids: the best of each slot given those before."""
        hidden, found, right = self.states(blocks), [blocks.block[:, 0]], self.right(self.rows)
        for h in hidden.unbind(1):
            left = self._gated(self.left(self.embed[found[-1]]), h)
            found.append(self.known[(self.logits(h) + left @ right.T).argmax(-1)])
        return torch.stack(found[1:], 1)

    def _gated(self, left: Tensor, hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.gate_proj(torch.cat([hidden, left.to(hidden.dtype)], -1))) * left

    def tensors(self) -> dict[str, Tensor]:
        """By official name, with the tables multiplied out."""
        named = {name: p.detach() for name, p in self.backbone.named_parameters()}
        gate = {f"markov_head.gate_proj.{name}": p.detach() for name, p in self.gate_proj.named_parameters()}
        w1, w2 = self.left(self.embed).detach(), self.right(self.rows).detach()
        marks = torch.zeros(len(self.embed), dtype=torch.bool).index_fill(0, self.known.cpu(), True)
        some = not marks.all()
        ids = {"d2t": self.known.cpu() - torch.arange(len(self.known)), "t2d": marks} if some else {}
        head = {name: p.detach() for name, p in self.named_parameters() if name.startswith("lm_head")}
        return {**named, **gate, **head, "markov_head.markov_w1.weight": w1, "markov_head.markov_w2.weight": w2, **ids}


def factors(rows: Tensor, rank: int, moment: Tensor) -> tuple[Tensor, Tensor]:
    """(R, rank) and (rank, H) whose product gives the logits nearest to those of a head's rows (R, H), for states of a
    second moment (H, H); without what all logits share, which no law sees.

    A truncated singular value decomposition of the rows times the root of the moment: of SmolLM2's 49 152 rows it keeps
    the best id of 0.33 of its tokens at rank 128, where that of the rows alone keeps 0.04.
    """
    table, (size, axes) = (rows - rows.mean(0)).double(), torch.linalg.eigh(moment.double())
    root = size.clamp(min=float(size.max()) * RARE).sqrt()
    weighted = table @ (axes * root)  # (R, H)
    inner = torch.linalg.eigh(weighted.T @ weighted).eigenvectors[:, -rank:]  # (H, rank)
    return (weighted @ inner).to(rows), ((axes / root) @ inner).T.contiguous().to(rows)


@torch.no_grad()
def moment(verifier: Verifier, data: Sequence[Pair]) -> Tensor:
    """(H, H) second moment of the states from which the verifier's head makes the logits, over some texts."""
    total, n = torch.zeros(()), 0
    for pair in data[:: max(1, len(data) // TEXTS)][:TEXTS]:
        ids = torch.tensor([pair.prompt + pair.answer], device=verifier.device)
        states = verifier.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0].float()
        total, n = states.T @ states + total.to(states), n + len(states)
    return total / n


def frequent(data: Sequence[Pair], n: int, vocab: int, always: Collection[int] = ()) -> Tensor:
    """(n,) those of `always`, then the most frequent ids of answers, then of prompts, then the lowest: those that a
    tokenizer merged first."""
    answers = Counter(t for pair in data for t in pair.answer)
    prompts = Counter(t for pair in data for t in pair.prompt)
    ranked = sorted(range(vocab), key=lambda t: (t not in always, -answers[t], -prompts[t], t))
    return torch.tensor(sorted(ranked[:n]))


@dataclass(frozen=True)
class Stored:
    """Where what the verifier says of a text is written: rows `first` to `last` of a file that is mapped, not read."""

    ids: Tensor  # (n,)
    answer: int
    file: safe_open
    first: int
    last: int

    def read(self) -> Told:
        """The text with its states."""
        parts = (self.file.get_slice(name) for name in ("states", "best", "law"))  # type: ignore[no-untyped-call]
        states, best, law = (part[self.first : self.last] for part in parts)
        return Told(self.ids.long(), self.answer, states, best.long(), law.float())


def told(verifier: Verifier, data: Sequence[Pair], taps: Sequence[int], folder: Path) -> list[Stored]:
    """What the verifier says of every text, in the files of `folder`; what they lack is added. The states, kilobytes a
    token, stay on the disk: a step reads those of its texts."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.glob("*.safetensors"))
    first = max((int(file.stem) for file in files), default=-1) + 1  # files may have been removed
    found = [text for file in files for text in _stored(file)]
    kept = {_key(text.ids) for text in found}
    rest = [pair for pair in data if _key(torch.tensor(pair.prompt + pair.answer)) not in kept]
    rest.sort(key=lambda pair: len(pair.prompt) + len(pair.answer))
    for at in tqdm(range(0, len(rest), SHARD), "states", unit="file", disable=not rest):
        file = folder / f"{first + at // SHARD:05d}.safetensors"
        _write(list(_said(verifier, rest[at : at + SHARD], taps)), file)
        found += _stored(file)
    return found


def _key(ids: Tensor) -> bytes:
    return ids.int().numpy().tobytes()


def _said(verifier: Verifier, data: Sequence[Pair], taps: Sequence[int]) -> Iterator[Told]:
    """Of texts in the order of their lengths, the longest first. Errors: not even one fits into memory."""
    data, room = list(data), FORWARD
    while data:
        width = len(data[-1].prompt) + len(data[-1].answer)
        some = data[-max(1, room // width) :]
        try:
            told = _forward(verifier, some, taps)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(some) == 1:
                raise DllmError(
                    f"a text of {width} tokens does not fit on {verifier.device}: cut the answers"
                ) from error
            room = len(some) * width // 2
            continue
        yield from told
        del data[-len(some) :]


@torch.no_grad()
def _forward(verifier: Verifier, some: Sequence[Pair], taps: Sequence[int]) -> list[Told]:
    ids, device = [torch.tensor(pair.prompt + pair.answer) for pair in some], verifier.device
    padded, real = (pad_sequence(x, batch_first=True).to(device) for x in (ids, [torch.ones_like(x) for x in ids]))
    out = verifier.model(input_ids=padded, attention_mask=real, output_hidden_states=True, use_cache=False)
    states = torch.stack([out.hidden_states[tap + 1] for tap in taps], 2).to(torch.bfloat16).cpu()
    best = out.logits.topk(BEST)
    law = (best.values.float() - out.logits.float().logsumexp(-1, keepdim=True)).exp().cpu()
    return [
        Told(x, len(pair.prompt), states[i, :n].clone(), best.indices[i, :n].cpu(), law[i, :n].clone())
        for i, (pair, x) in enumerate(zip(some, ids, strict=True))
        for n in [len(x)]
    ]


def _write(texts: Sequence[Told], file: Path) -> None:
    tensors = {
        "ids": torch.cat([text.ids for text in texts]).int(),
        "lengths": torch.tensor([len(text.ids) for text in texts]),
        "answers": torch.tensor([text.answer for text in texts]),
        "states": torch.cat([text.states for text in texts]),
        "best": torch.cat([text.best for text in texts]).int(),
        "law": torch.cat([text.law for text in texts]).half(),
    }
    with replaced(file) as draft:
        save_file(tensors, draft)


def _stored(file: Path) -> Iterator[Stored]:
    stored = opened(file)
    names = "ids", "lengths", "answers"
    ids, lengths, answers = (stored.get_tensor(name) for name in names)  # type: ignore[no-untyped-call]
    last = lengths.cumsum(0)
    places = answers.tolist(), (last - lengths).tolist(), last.tolist()
    for some, answer, first, end in zip(ids.clone().split(lengths.tolist()), *places, strict=True):
        yield Stored(some, answer, stored, first, end)


def blocks_of(texts: Sequence[Told], anchors: Sequence[Sequence[int]], config: HeadConfig) -> Blocks:
    """The blocks behind the anchors of each text (their places), and the states that they see."""
    b, w = config.block, (config.reach or 1) - 1
    slots, window = torch.arange(b), torch.arange(-w, 0)
    parts, columns = list[tuple[Tensor, ...]](), 0
    for text, places in zip(texts, anchors, strict=True):
        at, n = torch.tensor(places), len(text.ids)
        first, end = max(0, int(at.min()) - w), int(at.max())
        pos = at[:, None] + slots  # (m, B)
        inside = pos.clamp(max=n - 1)
        block = torch.full_like(pos, int(config.mask))
        block[:, 0] = text.ids[at]
        seen = at[:, None] + window  # (m, W)
        seen = (seen - first + columns).where(seen >= first, -1)
        columns += end - first
        context = text.states[first:end], torch.arange(first, end)
        parts.append((block, pos, text.ids[inside], text.best[inside], text.law[inside], pos + 1 < n, *context, seen))
    return Blocks(*(torch.cat(some) for some in zip(*parts, strict=True)))


class Score(NamedTuple):
    """Of some blocks: the loss (), and the share of each slot's best ids that are the verifier's (B,)."""

    loss: Tensor
    right: Tensor


def score(head: Trained, blocks: Blocks, decay: float) -> Score:
    """Cross-entropy against the verifier's law among the ids that are drafted; slot j weighs decay^j."""
    logits, own = head(blocks), head.own[blocks.best]  # (M, B, R), (M, B, BEST)
    law = blocks.law.where(own >= 0, 0)
    mass = law.sum(-1)
    real = blocks.real & (mass > 0)
    nats = logits.float().logsumexp(-1) - (logits.gather(-1, own.clamp(min=0)).float() * law).sum(-1) / mass.clamp(
        min=1e-6
    )
    weight = real * decay ** torch.arange(real.shape[1], device=real.device)
    right = ((logits.detach().argmax(-1) == own[..., 0]) & blocks.real).sum(0) / blocks.real.sum(0).clamp(min=1)
    return Score((nats * weight).sum() / weight.sum(), right)


@torch.no_grad()
def accepted(head: Trained, blocks: Blocks) -> float:
    """Mean length of the greedy walk's part that the verifier takes, with its own token: tau of full blocks."""
    hits = (head.walk(blocks) == blocks.best[..., 0]) & blocks.real
    return 1 + float(hits.long().cumprod(1).sum(1).float().mean())


def config_of(recipe: HeadRecipe, verifier: Verifier) -> dict[str, object]:
    """config.json of the head. Errors: a mask that the tokenizer lacks, taps that the verifier lacks."""
    given, vocab = text_config(verifier.model), verifier.vocab
    depth, heads = given.num_hidden_layers, given.num_attention_heads
    mask = verifier.tokenizer.get_vocab().get(recipe.mask) if verifier.tokenizer is not None else None
    if mask is None:
        raise DllmError(f"mask: {recipe.mask!r} is no token of {recipe.verifier.name}; name an unused special token")
    if bad := [tap for tap in recipe.taps if not -1 <= tap < depth - 1]:
        raise DllmError(f"taps: layer {bad[0]} of {recipe.verifier.name} cannot be read; -1 to {depth - 2} can")
    head_dim = getattr(given, "head_dim", None) or given.hidden_size // heads  # foreign
    return {
        "architectures": ["DSparkDraftModel"],
        "hidden_size": given.hidden_size,
        "intermediate_size": recipe.intermediate_size or given.intermediate_size,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "attention_bias": True,
        "rms_norm_eps": given.rms_norm_eps,
        "rope_theta": recipe.rope_theta,
        "vocab_size": vocab,
        "max_position_embeddings": given.max_position_embeddings,
        "num_target_layers": depth,
        "layer_types": ["sliding_attention"] * recipe.layers,
        "sliding_window": recipe.window,
        "block_size": recipe.block,
        "dflash_config": {
            "projector_type": "dspark",
            "markov_head_type": "gated",
            "markov_rank": recipe.rank,
            "mask_token_id": mask,
            "target_layer_ids": list(recipe.taps),
            "draft_vocab_size": min(recipe.vocabulary, vocab),
            **({"head_rank": recipe.head_rank} if recipe.head_rank else {}),
        },
    }


def held_out(text: Stored, share: float) -> bool:
    """Whether an answer is left for measurement: by its prompt, so that more data move none of the others."""
    digest = hashlib.sha256(json.dumps(text.ids[: text.answer].tolist()).encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def draw(texts: Sequence[Stored], n: int, anchors: int, rng: random.Random) -> tuple[list[Told], list[list[int]]]:
    """`n` texts, and up to `anchors` places of each answer that have a token behind them."""
    some = rng.choices(texts, k=n)
    spans = [range(text.answer, len(text.ids) - 1) for text in some]
    return [text.read() for text in some], [sorted(rng.sample(span, min(anchors, len(span)))) for span in spans]


def train(
    head: Trained,
    texts: Sequence[Stored],
    held: Sequence[Stored],
    recipe: HeadRecipe,
    saved: Mapping[str, Any] | None = None,
    save: Callable[[int, Optimizers], None] | None = None,
) -> list[float]:
    """Every step's loss. A step depends on its number and the state alone, so a run that goes on equals an
    uninterrupted one."""
    optimizers, first, losses = build_optimizers(head, recipe.optimizer, recipe.schedule), 0, list[float]()
    if saved is not None:
        first = saved["step"]
        optimizers.load_state_dict(saved["optimizer"])
    device = head.embed.device
    probe = blocks_of(*draw(held, 24, 16, random.Random(f"{recipe.seed} held out")), head.config).to(device)
    tau = accepted(head, probe)

    def backward(step: int, size: int) -> Score:
        some = draw(texts, size, recipe.anchors, random.Random(f"{recipe.seed} head {step}"))
        blocks = blocks_of(*some, head.config).to(device)
        with mixed(recipe.dtype, device):
            found = score(head, blocks, recipe.decay)
            found.loss.backward()  # type: ignore[no-untyped-call]
        return found

    def take(step: int) -> dict[str, str]:
        loss, share = fitting(recipe.batch_size, partial(backward, step), device)
        if not optimizers.step(step):
            raise DllmError(f"the gradient is not finite at step {step}: lower optimizer.lr")
        losses.append(float(loss.detach()))
        slots = "/".join(f"{s:.2f}" for s in share.tolist())
        return {"loss": f"{losses[-1]:.3f}", "slots": slots, "held_out": f"tau {tau:.2f}"}

    def measured(done: int) -> None:
        nonlocal tau
        with mixed(recipe.dtype, device), torch.no_grad():
            (nats, share), tau = score(head, probe, recipe.decay), accepted(head, probe)
        said = "/".join(f"{s:.3f}" for s in share.tolist())
        log.info("step %d: held-out loss %.3f, slots %s, tau %.3f", done, float(nats), said, tau)
        if save is not None:
            save(done, optimizers)

    run_steps("head", first, recipe.schedule.steps, take, measured, recipe.save_every)
    return losses


def run(recipe: HeadRecipe, resume: bool = False) -> Path:
    """The whole recipe; returns the folder of the head, `output/head`. `resume` goes on from the checkpoint there."""
    folder = Path(recipe.output)
    path, made = folder / checkpoint.CHECKPOINT, folder / "head"
    saved = checkpoint.begin(recipe, resume)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    device = pick_device(recipe.device)
    arguments = {"dtype": recipe.dtype, "device": device, **recipe.verifier.given()}
    teacher = load_verifier(recipe.verifier.name, **arguments)
    verifier = as_verifier(cast(CausalLM, teacher))
    raw = config_of(recipe, verifier)
    config = read_head(raw)
    data = [pair for pair in answers_of(recipe, teacher) if len(pair.answer) > 1]
    if not data:
        raise DllmError(f"{recipe.answers} holds no answer of two tokens or more")
    n, vocab = config.rows or verifier.vocab, verifier.vocab
    known = frequent(data, n, vocab, verifier.eos) if saved is None else saved["known"]
    embed = embedding(verifier.model).detach().float()
    known = known.to(device)
    rows = verifier.model.get_output_embeddings().weight[known].detach().float()
    seen = moment(verifier, data) if config.slim is not None and saved is None else None
    head = Trained(config, embed, rows, known, seen).to(device)

    def save(step: int, optimizers: Optimizers) -> None:
        weights = {name: p.detach() for name, p in head.named_parameters()}
        values = {"recipe": checkpoint.recipe(recipe), "step": step, "optimizer": optimizers.state_dict()}
        checkpoint.save_atomically({**values, "weights": weights, "known": known}, path)
        write(head, raw, made)
        log.info("step %d saved in %s", step, path)

    if saved is not None:
        head.load_state_dict(saved["weights"])
    texts = told(verifier, data, config.taps, folder / "states")
    left = [held_out(text, recipe.held_out) for text in texts]
    held = [text for text, out in zip(texts, left, strict=True) if out]
    texts = [text for text, out in zip(texts, left, strict=True) if not out]
    if not texts:
        raise DllmError(f"held_out={recipe.held_out} leaves none of {len(held)} answers to train on: make more of them")
    log.info("%d answers, %d tokens; %d held out", len(texts), sum(len(t.ids) - t.answer for t in texts), len(held))
    train(head, texts, held or texts, recipe, saved, save)
    return made


def write(head: Trained, raw: Mapping[str, object], folder: Path) -> None:
    """The head as a checkpoint in bfloat16, which `dllm.speculate` reads."""
    tensors = head.tensors()
    small = {n: (t.to(torch.bfloat16) if t.is_floating_point() else t).contiguous() for n, t in tensors.items()}
    with replaced_checkpoint(folder) as draft:
        save_file(small, draft / "model.safetensors", metadata={"format": "pt"})
        write_json(draft / "config.json", raw)
