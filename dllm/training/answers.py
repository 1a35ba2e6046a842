"""The verifier's own answers, which drafters and heads learn from: made in lanes, kept in a file.

Prompts are the built-in tasks', those of a file, or what the verifier itself says as a user.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from tqdm import tqdm

from dllm.decoding.prediction import Law
from dllm.drafting.front import encode
from dllm.drafting.registry import VerifierLike, as_verifier
from dllm.drafting.verifier import CausalLM, Verifier
from dllm.errors import DllmError, first_line
from dllm.models.hub import load_verifier, pick_device
from dllm.models.tokenizer import Message
from dllm.tasks.registry import generate
from dllm.training.answer_file import AnswerFile, read_answers
from dllm.training.config import Answers
from dllm.training.data import Pair, read_prompts
from dllm.training.holdout import Holdout, user_reader
from dllm.training.sampling import GREEDY, Ask, answerer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FREE = "free"  # the name of no file: the verifier makes up its prompts
USER = 64  # tokens that are made up of a prompt, at most; longer ones are rare, and often lose the thread
LEAST = 4  # tokens of a prompt, its end included
MADE_UP = Law(1.0, 0.95)  # of a prompt: at temperature 1 the tail of the law is noise
OPENED = 0.6  # share of the made-up prompts that begin with an opening: the rest is what the verifier itself would ask
PATIENCE = 1000  # made-up prompts in a row of which none is new
log = logging.getLogger(__name__)


def answers_of(config: Answers, verifier: PreTrainedModel) -> list[Pair]:
    """The answers that a recipe learns from: those in its file, made first where they are missing.

    Errors: neither a file nor prompts to make it from; a prompt that is held out; a file that was made otherwise.
    """
    path, (holdout, lines) = config.answers, checked(config)
    known = as_verifier(cast("CausalLM", verifier))
    making = bool(config.tasks or config.prompts)
    if not making and not path.exists():
        return read_answers(path)
    file = AnswerFile(path, settings_of(config), compared(config))
    if holdout:
        holdout.check(path, map(user_reader(known), file.pairs))
    if not making:
        return file.of()
    law = Law(config.temperature, config.top_p if config.top_p < 1 else None)
    style, width = Style(config.max_new_tokens, law, config.seed), config.sampling_batch
    if config.prompts == FREE:
        if len(file.pairs) < config.count:
            Users(known, config.openings, holdout, file, style).make(config.count, width)
        return file.of()
    ids, _ = encode(known, list(lines))
    return continuations(known, ids, style, width, file)


def checked(config: Answers) -> tuple[Holdout, Sequence[str] | Sequence[list[Message]]]:
    """What a recipe must not learn from, and the prompts that it names. Errors: one of them, or an opening, is held
    out; a file that cannot be read."""
    holdout, lines = Holdout.of(config.holdout), prompts_of(config)
    holdout.check("openings", config.openings)
    holdout.check(config.prompts or "tasks", (line if isinstance(line, str) else _said(line) for line in lines))
    return holdout, lines


def settings_of(config: Answers) -> dict[str, object]:
    """What answers are made with, as their file says it."""
    given = {"dtype": config.dtype, **config.verifier.given()}
    source = {"verifier": config.verifier.name} | {k: given[k] for k in ("revision", "subfolder") if k in given}
    names = "max_new_tokens", "temperature", "top_p", "seed"
    return {**source, "dtype": str(given["dtype"]), **{name: vars(config)[name] for name in names}}


def compared(config: Answers) -> list[str]:
    """Of that, what answers in a file must agree with: a recipe without prompts takes what the verifier said, and
    greedy answers are the same for all seeds."""
    if not (config.tasks or config.prompts):
        return ["verifier"]
    drawn = ("top_p", "seed") if config.temperature else ()
    return ["verifier", "revision", "subfolder", "dtype", "max_new_tokens", "temperature", *drawn]


def make(config: Answers) -> list[Pair]:
    """The same with the recipe's own verifier."""
    if config.threads:
        torch.set_num_threads(config.threads)
    arguments = {"dtype": config.dtype, "device": pick_device(config.device), **config.verifier.given()}
    return answers_of(config, load_verifier(config.verifier.name, **arguments))


def prompts_of(config: Answers) -> Sequence[str] | Sequence[list[Message]]:
    """Problems of the built-in tasks, the lines of a file, or its conversations; none of those that are made up.
    Errors: a line that is none."""
    if config.prompts in ("", FREE):
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


@dataclass(frozen=True)
class Style:
    """How prompts are answered: at most `limit` tokens, by a law, with draws that depend on prompt and seed."""

    limit: int
    law: Law = GREEDY
    seed: int = 0

    def ask(self, prompt: Sequence[int]) -> Ask:
        """A prompt to be answered."""
        return Ask(tuple(prompt), self.limit, self.law, zlib.crc32(f"{self.seed} {list(prompt)}".encode()))


def continuations(
    verifier: VerifierLike,
    prompts: Sequence[Sequence[int]],
    style: Style,
    width: int = 32,
    file: AnswerFile | None = None,
) -> list[Pair]:
    """The verifier's own answers to prompts given as ids, `width` at once; those that the file has are not made again,
    and prompts that leave no room for an answer are left out."""
    known, file = as_verifier(verifier), AnswerFile() if file is None else file
    room = (known.max_positions or sys.maxsize) - style.limit
    fit = [tuple(p) for p in prompts if len(p) <= room]
    if len(fit) < len(prompts):
        log.warning(
            "%d prompts are longer than the %d tokens that the verifier's positions leave beside an answer: left out",
            len(prompts) - len(fit),
            room,
        )
    left = [style.ask(p) for p in sorted({*fit} - file.pairs.keys(), key=lambda p: (-len(p), p))]

    def more(n: int) -> list[Ask]:
        taken = left[-n:][::-1]
        del left[-n:]
        return taken

    if left:
        with Kept(file, width, len(left)) as kept:
            for ask, answer in answerer(known, width).answers(more):
                kept.add(ask.prompt, answer)
    return file.of(fit)


class Kept:
    """Answers on their way into a file, some at once, and all at the end whatever ends it; with a bar."""

    def __init__(self, file: AnswerFile, some: int, total: int) -> None:
        self.file, self.some, self.new, self.tokens = file, some, list[tuple[tuple[int, ...], list[int]]](), 0
        self.bar = tqdm(total=total, desc="answers", unit="answer", leave=False, disable=not total)

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.file.add(self.new)

    def __len__(self) -> int:
        return len(self.file.pairs) + len(self.new)

    def add(self, prompt: tuple[int, ...], answer: list[int]) -> None:
        """One more."""
        self.new.append((prompt, answer))
        self.tokens += len(answer)
        self.bar.update()
        self.bar.set_postfix(tokens=self.tokens, refresh=False)
        if len(self.new) >= self.some:
            self.file.add(self.new)
            self.new = []


@dataclass(frozen=True)
class Turn(Ask):
    """The beginning of a user's turn; its last `said` ids are the user's own."""

    said: int = 0


class Users:
    """Prompts that the verifier makes up, as the user of its chat template, and its answers to them."""

    def __init__(
        self, verifier: Verifier, openings: Sequence[str], holdout: Holdout, file: AnswerFile, style: Style
    ) -> None:
        self.verifier, self.holdout, self.file, self.style = verifier, holdout, file, style
        (opened,), _ = encode(verifier, ["X"])
        tokenizer = verifier.tokenizer
        assert tokenizer is not None  # it has encoded
        self.tokenizer = tokenizer
        head, x, _ = tokenizer.decode(opened).rpartition("X")
        if not x or not tokenizer.chat_template:
            raise DllmError("prompts: free needs a verifier with a chat template, whose user it can play")
        self.head, *self.openings = [
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (head, *openings)
        ]
        self.opened = OPENED if self.head else 1.0
        if not (self.head or self.openings):
            raise DllmError(
                "this verifier's chat template begins with what the user says: prompts: free needs openings"
            )
        self.seen = set(map(user_reader(verifier), file.pairs))
        self.begun = len(file.pairs)  # a run that goes on hears other users than the one before it
        self.turns, self.playing, self.asked, self.idle, self.left_out = 0, 0, 0, 0, 0
        self.waiting = list[Ask]()

    def make(self, count: int, width: int) -> None:
        """Answers until the file has `count` of them. Errors: nothing new is made up."""
        with Kept(self.file, width, count - self.begun) as kept:

            def more(n: int) -> list[Ask]:
                taken = self.waiting[:n]
                del self.waiting[:n]
                self.asked += len(taken)
                missing = count - len(kept) - self.asked - len(self.waiting)
                turns = [self._turn() for _ in range(min(n - len(taken), 2 * missing - self.playing))]
                self.playing += len(turns)
                return taken + turns

            for ask, answer in answerer(self.verifier, width).answers(more):
                if isinstance(ask, Turn):
                    self.playing -= 1
                    self._heard(ask, answer, count - len(kept) - self.asked - len(self.waiting))
                else:
                    self.asked -= 1
                    kept.add(ask.prompt, answer)
                if self.idle == PATIENCE:
                    raise DllmError(f"the verifier makes up nothing new after {len(kept)} prompts: set count to that")
        if self.left_out:
            log.warning("%d made-up prompts are held out: left out", self.left_out)

    def _turn(self) -> Turn:
        self.turns += 1
        rng = random.Random(f"{self.style.seed} {self.begun} {self.turns}")
        opening = rng.choice(self.openings) if self.openings and rng.random() < self.opened else ()
        return Turn((*self.head, *opening), USER, MADE_UP, rng.getrandbits(32), len(opening))

    def _heard(self, turn: Turn, made: list[int], missing: int) -> None:
        """Ask what a user has said to the end, if it is new and one more is missing."""
        said = [*turn.prompt[len(turn.prompt) - turn.said :], *made[:-1]]
        text = self.tokenizer.decode(said)
        whole = made[-1] in self.verifier.eos and len(said) + 1 >= LEAST
        plain = text == self.tokenizer.decode(said, skip_special_tokens=True)  # no turn within the turn
        text, self.idle = text.strip(), self.idle + 1
        if not (whole and plain and text) or text in self.seen:
            return
        self.seen.add(text)
        if text in self.holdout:
            self.left_out += 1
        elif missing > 0:
            (ids,), _ = encode(self.verifier, [text])
            self.waiting.append(self.style.ask(ids))
            self.idle = 0
