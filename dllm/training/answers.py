"""The verifier's own answers, which drafters and pair heads learn from: made in batches, kept in a file.

The file has a line `[prompt ids, answer ids]` each, and grows batch by batch, so that a kill at any moment costs the
batch that was being made; with the ending .gz every batch is a gzip member.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from tqdm import tqdm

from dllm import spec
from dllm.drafting.front import encode
from dllm.drafting.registry import as_verifier
from dllm.drafting.verifier import CausalLM, Verifier
from dllm.errors import DllmError, first_line
from dllm.models.hub import load_verifier, pick_device
from dllm.models.tokenizer import Message
from dllm.tasks.registry import generate
from dllm.training.config import Answers
from dllm.training.data import Pair, read_prompts
from dllm.training.holdout import Holdout, user_reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FREE = "free"  # the name of no file: the verifier makes up its prompts
USER = 56  # tokens of a made-up prompt at most; longer ones are rare, and often lose the thread
NUCLEUS = 0.95  # of a made-up prompt: at temperature 1 the tail of the law is noise
PATIENCE = 20  # rounds of nothing new
log = logging.getLogger(__name__)


def answers_of(config: Answers, verifier: PreTrainedModel) -> list[Pair]:
    """The answers that a recipe learns from: those in its file, made first where they are missing.

    Errors: neither a file nor prompts to make it from; a prompt that is held out.
    """
    path, holdout = config.answers, Holdout.of(config.holdout)
    known = as_verifier(cast("CausalLM", verifier))
    if config.tasks or config.prompts:
        path.parent.mkdir(parents=True, exist_ok=True)
    if holdout:
        holdout.check(path, map(user_reader(known), _kept(path)))
    if config.prompts == FREE:
        return _free(config, known, holdout, path)
    if not (config.tasks or config.prompts):
        return read_answers(path)
    lines = prompts_of(config)
    holdout.check(config.prompts or "tasks", (line if isinstance(line, str) else _said(line) for line in lines))
    return _answered(config, known, lines, path)


def make(config: Answers) -> list[Pair]:
    """The same with the recipe's own verifier and nothing else in memory."""
    if config.threads:
        torch.set_num_threads(config.threads)
    arguments = {"dtype": config.dtype, "device": pick_device(config.device), **config.verifier.given()}
    return answers_of(config, load_verifier(config.verifier.name, **arguments))


def prompts_of(config: Answers) -> Sequence[str] | Sequence[list[Message]]:
    """Problems of the built-in tasks, the lines of a file, or its conversations. Errors: a line that is none."""
    if not config.prompts:
        return [e.prompt for name, n in config.tasks.items() for e in generate(name, "train", n, config.seed)]
    lines = read_prompts(config.prompts)
    if not config.prompts.endswith(".jsonl"):
        return lines
    return [_conversation(line, f"{config.prompts}, line {i}") for i, line in enumerate(lines, 1)]


def _conversation(line: str, where: str) -> list[Message]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DllmError(f"{where}: not JSON: {first_line(error)}") from None
    found = found.get("messages", found.get("prompt")) if isinstance(found, dict) else found
    chat = isinstance(found, list) and found and all(isinstance(m, dict) and {"role", "content"} <= {*m} for m in found)
    if not (isinstance(found, str) or chat):
        raise DllmError(
            f'{where}: expected a list of {{"role", "content"}}, {{"messages": list}} or {{"prompt": text}}'
        )
    return [{"role": "user", "content": found}] if isinstance(found, str) else cast("list[Message]", found)


def _said(messages: Sequence[Message]) -> str:
    """What the user says last."""
    return next((str(m["content"]) for m in reversed(messages) if m["role"] == "user"), "")


def _answered(
    config: Answers, verifier: Verifier, lines: Sequence[str] | Sequence[list[Message]], path: Path
) -> list[Pair]:
    ids, _ = encode(verifier, list(lines))
    model = cast("PreTrainedModel", verifier.model)
    return continuations(
        model, ids, config.max_new_tokens, config.sampling_batch, path, config.temperature, config.seed
    )


def _free(config: Answers, verifier: Verifier, holdout: Holdout, path: Path) -> list[Pair]:
    """Answers to what the verifier itself says as a user, up to the number that the recipe asks for."""
    kept, left_out = _kept(path), 0
    seen = set(map(user_reader(verifier), kept))
    idle = 0  # rounds in a row that gave nothing new
    with tqdm(total=config.count, initial=len(kept), desc="free prompts", unit="prompt", leave=False) as bar:
        while len(kept) < config.count:
            said = [
                s for s in _users(verifier, config.sampling_batch, f"{config.seed} {len(kept)} {idle}") if s not in seen
            ]
            new = [line for line in dict.fromkeys(said) if line not in holdout][: config.count - len(kept)]
            left_out += sum(line in holdout for line in said)
            seen.update(said)
            if new:
                _answered(config, verifier, new, path)
            before, kept = len(kept), _kept(path)
            bar.update(len(kept) - before)
            idle = 0 if len(kept) > before else idle + 1
            if idle == PATIENCE:
                raise DllmError(f"the verifier makes up nothing new after {len(kept)} prompts: set count to that")
    if left_out:
        log.warning("%d made-up prompts are held out: left out", left_out)
    return read_answers(path)


def _users(verifier: Verifier, n: int, seed: str) -> list[str]:
    """What a user says, `n` times: the chat template's opening of the user's turn, continued at temperature 1."""
    (opened,), _ = encode(verifier, ["X"])
    tokenizer = verifier.tokenizer
    assert tokenizer is not None  # it has encoded
    text = tokenizer.decode(opened)
    head, x, _ = text.rpartition("X")
    if not x or not tokenizer.chat_template:
        raise DllmError("prompts: free needs a verifier with a chat template, whose user it can play")
    ids = list(tokenizer(head, add_special_tokens=False)["input_ids"])
    model = cast("PreTrainedModel", verifier.model)
    drawn = _drawn(model, [ids] * n, USER, 1.0, seed, NUCLEUS)
    ended = [turn[:-1] for turn in drawn if turn and turn[-1] in verifier.eos]
    return [said for turn in ended if len(turn) >= 4 and (said := tokenizer.decode(turn).strip())]


def continuations(
    verifier: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 32,
    path: Path | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Pair]:
    """The verifier's own answers to prompts given as ids, made in the order of their lengths.

    With `path` each answer is kept in that file as soon as it is there, and those of an earlier run are not made again.
    """
    kept = _kept(path)
    missing = sorted({tuple(p) for p in prompts} - kept.keys(), key=lambda p: (len(p), p))
    for at in tqdm(range(0, len(missing), batch_size), desc="teacher", unit="batch", leave=False):
        some = missing[at : at + batch_size]
        answers = _drawn(verifier, some, max_new_tokens, temperature, f"{seed} {some[0]}")
        kept |= zip(some, answers, strict=True)
        if path is not None:
            _append(path, zip(some, answers, strict=True))
    return [Pair(list(p), kept[tuple(p)]) for p in prompts if kept[tuple(p)]]


def _drawn(
    verifier: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: str,
    top_p: float = 1.0,
) -> list[list[int]]:
    """A batch of answers, each up to its end token and with it."""
    pad = verifier.generation_config.pad_token_id or 0
    end = verifier.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=verifier.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=verifier.device)
    law = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    torch.manual_seed(zlib.crc32(seed.encode()))
    texts = verifier.generate(  # type: ignore[operator]
        ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **{"do_sample": False, **law}
    )[:, width:].tolist()
    return [text[: next((n + 1 for n, t in enumerate(text) if t in ends), len(text))] for text in texts]


def _append(path: Path, pairs: Iterator[tuple[Sequence[int], list[int]]]) -> None:
    lines = "".join(f"{json.dumps([list(p), a], separators=(',', ':'))}\n" for p, a in pairs).encode()
    with path.open("ab") as file:
        file.write(gzip.compress(lines) if path.suffix == ".gz" else lines)


def _kept(path: Path | None) -> dict[tuple[int, ...], list[int]]:
    """prompt -> answer of an earlier run; a last line that was cut off is dropped, from the file too.

    Errors: a line that is no prompt and answer.
    """
    if path is None or not path.exists():
        return {}
    try:
        content = path.read_bytes()
        text, whole = _members(content) if path.suffix == ".gz" else (content, content.rfind(b"\n") + 1)
        rest = content[whole:]
        if rest and path.suffix != ".gz" and _ends(rest):
            text, rest = content + b"\n", b""
            with path.open("ab") as file:
                file.write(b"\n")
        if rest:
            with path.open("r+b") as file:
                file.truncate(whole)
        lines = spec.lines(text[: text.rfind(b"\n") + 1].decode())
        return dict(_pair(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip())
    except (OSError, UnicodeDecodeError, zlib.error) as error:
        raise DllmError(f"{path} is damaged ({first_line(error)}); delete it and run again") from None


def _ends(rest: bytes) -> bool:
    """Whether what follows the last line break is a whole line all the same."""
    try:
        json.loads(rest)
    except ValueError:
        return False
    return True


def _pair(line: str, where: str) -> tuple[tuple[int, ...], list[int]]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DllmError(f"{where}: not JSON: {first_line(error)}") from None
    match found:
        case [[_, *_] as prompt, list(answer)] if all(type(t) is int and t >= 0 for t in (*prompt, *answer)):
            return tuple(prompt), answer
    raise DllmError(f"{where}: expected [prompt ids, answer ids], ids from 0 on and at least one in the prompt")


def _members(content: bytes) -> tuple[bytes, int]:
    """The text of all whole gzip members, and where the last of them ends."""
    text, whole = b"", 0
    while whole < len(content):
        member = zlib.decompressobj(wbits=31)
        more = member.decompress(content[whole:])
        if not member.eof:
            break
        text, whole = text + more, len(content) - len(member.unused_data)
    return text, whole


def read_answers(path: Path) -> list[Pair]:
    """All answers of a file that must be there."""
    if not path.exists():
        raise DllmError(f"there are no answers in {path}: name tasks or prompts to make them from, or another file")
    return [Pair(list(prompt), answer) for prompt, answer in _kept(path).items() if answer]
