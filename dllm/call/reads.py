"""Reads: probabilities of allowed labels at the open slots of an answer, without writing one.

The fixed text of the answer stands on the canvas, only slots are masked, and one forward says what belongs there. A
mask is the neutral seed, so nothing is drawn and nothing averaged. docs/reads.md says what is exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, TypeAlias, cast, overload

import torch
from torch import Tensor

from dllm.call.arguments import Arguments
from dllm.call.job import ModelLike, mask_of, resolve_model
from dllm.call.prompts import One, Prompt, Several, check_ids, prompt_ids
from dllm.errors import DllmError, nearest, unknown
from dllm.models.model import Model
from dllm.models.tokenizer import NO_TOKENIZER, Tokenizer

Canvas: TypeAlias = tuple[int, ...]  # ids of one row
Question: TypeAlias = tuple[Canvas, int, int]  # a canvas, a column of it that is masked, a token
LABELS = ("auto", "chain", "product")
LENGTHS = ("refuse", "condition")


@dataclass(frozen=True)
class SlotReading:
    """What a model says of the labels of one slot. `exact` names the law: `slot`, `chain` or `product`."""

    logp: dict[str, float]  # log p(label) over the whole vocabulary, in nats
    p: dict[str, float]  # over the labels alone: sums to 1; calibrated where the call has a null prompt
    mass: float  # of the vocabulary's probability that the labels hold
    tokens: dict[str, tuple[int, ...]]  # ids of each label inside the template
    columns: tuple[int, ...]  # of the canvas
    exact: str

    @property
    def best(self) -> str:
        """The most probable label, the first of equals."""
        return max(self.p, key=lambda label: self.p[label])

    @property
    def margin(self) -> float:
        """Its p minus that of the next one."""
        first, second = sorted(self.p.values(), reverse=True)[:2] if len(self.p) > 1 else (1.0, 0.0)
        return first - second


@dataclass(frozen=True)
class Reading:
    """What a model says of the slots of one prompt: `reading["mood"].p`."""

    slots: dict[str, SlotReading]
    nfe: int  # forwards, one after the other
    canvas: list[int]  # that was read, with the labels that stages wrote
    sees_suffix: bool  # whether a slot sees the fixed text behind it; block-causal models do not beyond their block

    def __getitem__(self, slot: str) -> SlotReading:
        if slot not in self.slots:
            apart = [name for name in self.slots if name.startswith(f"{slot}:")]
            raise DllmError(
                f"the labels of slot {slot!r} have different numbers of columns and are read apart: {', '.join(apart)}"
                if apart
                else unknown("slot", slot, self.slots)
            )
        return self.slots[slot]


@dataclass(frozen=True)
class Slot:
    """An open slot of a form: its first column in the template, and the ids of each label."""

    at: int
    labels: dict[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        """Columns; every label has as many."""
        return len(next(iter(self.labels.values())))


@dataclass(frozen=True)
class Form:
    """A template as ids, masks at its slots."""

    ids: Canvas
    slots: dict[str, Slot]

    @classmethod
    def of(cls, tokenizer: Tokenizer, mask: int, parts: Parts, slots: Mapping[str, Sequence[str]]) -> Form:
        """Errors: labels of different lengths, masks in them, and slots that share a token."""
        found = {name: _slot(tokenizer, parts, name, slots) for name in slots}
        for name, slot in found.items():
            if any(mask in label for label in slot.labels.values()):
                raise DllmError(f"slot {name!r}: a label holds the mask token, which is never an answer")
        first = {name: labels[0] for name, labels in slots.items()}
        ids, spans = _tokens(tokenizer, _filled(parts, first))
        order = sorted(spans, key=lambda name: spans[name])
        for one, other in itertools.pairwise(order):
            if spans[one][1] > spans[other][0]:
                raise DllmError(f"slots {one!r} and {other!r} share a token: put text between them")
        for slot in found.values():
            ids[slot.at : slot.at + slot.size] = [mask] * slot.size
        return cls(tuple(ids), found)


Parts: TypeAlias = list[tuple[str, str | None]]  # the text before each slot with its name, and that behind the last


def _parts(template: str, slots: Mapping[str, Sequence[str]]) -> Parts:
    """A template apart. Errors: what is no text, names that are not those of the slots, no labels or bad ones."""
    if not isinstance(template, str):
        raise DllmError(f"template={template!r} must be a text with slots, such as 'Answer: {{answer}}'")
    if not isinstance(slots, Mapping):
        raise DllmError(f"slots={slots!r} must be a mapping from the names of slots to their labels")
    try:
        pieces = [*Formatter().parse(template)]
    except ValueError as error:
        raise DllmError(f"template {template!r}: {error}; a brace of the text is written twice") from None
    if shaped := next((name for _, name, spec, sign in pieces if spec or sign), None):
        raise DllmError(
            f"template {template!r}: slot {shaped!r} has a format, and a label stands as it is: {{{shaped}}}"
        )
    parts: Parts = [(text, name) for text, name, *_ in pieces]
    names = [name for _, name in parts if name is not None]
    for name in names:
        if name not in slots:
            near = nearest(name, slots)
            hint = f"; did you mean {near!r}?" if near else ""
            raise DllmError(f"the template has a slot {name!r} without labels{hint}")
    if absent := [name for name in slots if name not in names]:
        raise DllmError(f"the template {template!r} has no slot {{{absent[0]}}}")
    if len(set(names)) < len(names):
        raise DllmError(f"the template has a slot twice: {', '.join(names)}")
    if not names:
        raise DllmError("a template to read has at least one slot, such as {answer}")
    for name, labels in slots.items():
        _check_labels(name, labels)
    return parts


def _check_labels(name: str, labels: Sequence[str]) -> None:
    listed = isinstance(labels, Sequence) and not isinstance(labels, str) and len(labels) > 0
    if not listed or not all(isinstance(label, str) and label for label in labels):
        raise DllmError(f"slot {name!r} needs a list of labels, none of them empty; got {labels!r}")
    if len(set(labels)) < len(labels):
        raise DllmError(f"slot {name!r} has a label twice: {', '.join(map(repr, labels))}")


def _filled(parts: Parts, labels: Mapping[str, str]) -> Parts:
    """The pieces of the text with these labels, and which slot each label piece is."""
    return [piece for text, name in parts for piece in ((text, None), *([(labels[name], name)] if name else []))]


def _tokens(tokenizer: Tokenizer, pieces: Parts) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """The ids of a text, and the half-open range of them that writes each slot's label. Errors: no offsets."""
    text, spans, end = "".join(piece for piece, _ in pieces), dict[str, tuple[int, int]](), 0
    try:
        made = cast("Any", tokenizer)(text, add_special_tokens=False, return_offsets_mapping=True)
    except (NotImplementedError, TypeError) as error:
        raise DllmError("reads need a tokenizer that says which characters a token writes (a fast one)") from error
    ids, offsets = [*made["input_ids"]], made["offset_mapping"]
    for piece, name in pieces:
        begin, end = end, end + len(piece)
        if name is not None:
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > begin]
            spans[name] = inside[0], inside[-1] + 1
    return ids, spans


def _tokenised(
    tokenizer: Tokenizer, parts: Parts, name: str, slots: Mapping[str, Sequence[str]]
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """The first column of a slot, and the ids of its labels where they stand; the other slots have their first labels.
    Errors: labels that change how the text around them is written."""
    others = {other: labels[0] for other, labels in slots.items()}
    found, around = dict[str, tuple[int, ...]](), dict[str, tuple[list[int], list[int]]]()
    for label in slots[name]:
        ids, spans = _tokens(tokenizer, _filled(parts, {**others, name: label}))
        at, end = spans[name]
        found[label], around[label] = tuple(ids[at:end]), (ids[:at], ids[end:])
    first, *rest = slots[name]
    for label in rest:
        if around[label] != around[first]:
            texts = ([*around[one][0], *found[one], *around[one][1]] for one in (first, label))
            a, b = map(tokenizer.convert_ids_to_tokens, texts)
            told = f"{a} with {first!r}, {b} with {label!r}"
            raise DllmError(f"slot {name!r}: its labels change how the text around them is written: {told}")
    return len(around[first][0]), found


def _slot(tokenizer: Tokenizer, parts: Parts, name: str, slots: Mapping[str, Sequence[str]]) -> Slot:
    """A slot of the template. Errors: labels that begin one another, and of different lengths."""
    at, found = _tokenised(tokenizer, parts, name, slots)
    for label, own in found.items():
        longer = next((o for o, other in found.items() if o != label and other[: len(own)] == own), None)
        if longer is not None:
            raise DllmError(f"slot {name!r}: label {label!r} begins label {longer!r}; no read can tell them apart")
    sizes = {label: len(own) for label, own in found.items()}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{label!r} {n}" for label, n in sizes.items())
        raise DllmError(
            f"slot {name!r}: labels of different numbers of tokens have no common canvas ({counts}); use aliases of "
            "one length, such as A, B, C with the options in the prompt, or lengths='condition'"
        )
    return Slot(at, found)


def _forms(
    tokenizer: Tokenizer, mask: int, parts: Parts, slots: Mapping[str, Sequence[str]], apart: bool
) -> list[tuple[Form, dict[str, str]]]:
    """The forms to read, and of each the slots whose labels it answers for, with the names of their readings.

    `apart`: a slot whose labels have different numbers of tokens has a form for each of these numbers; the first form
    answers for all other slots, and there such a slot is as long as its first label.
    """
    groups = dict[str, dict[int, list[str]]]()
    for name in slots if apart else ():
        by_size = dict[int, list[str]]()
        for label, ids in _tokenised(tokenizer, parts, name, slots)[1].items():
            by_size.setdefault(len(ids), []).append(label)
        if len(by_size) > 1:
            groups[name] = by_size
    some = {name: next(iter(groups[name].values())) if name in groups else labels for name, labels in slots.items()}
    forms = [(Form.of(tokenizer, mask, parts, some), {name: name for name in slots if name not in groups})]
    for name, by_size in groups.items():
        for size, labels in sorted(by_size.items()):
            forms.append((Form.of(tokenizer, mask, parts, {**some, name: labels}), {name: f"{name}:{size}"}))
    return forms


@overload
def read(
    model: ModelLike, prompt: One, template: str, *, slots: Mapping[str, Sequence[str]], labels: str = "auto",
    lengths: str = "refuse", stages: Sequence[Sequence[str]] | None = None, null: One | None = None,
    cfg_scale: float = 0.0, temperature: float = 1.0, chat: bool | None = None, batch_size: int = 8,
) -> Reading: ...  # fmt: skip
@overload
def read(
    model: ModelLike, prompt: Several, template: str, *, slots: Mapping[str, Sequence[str]], labels: str = "auto",
    lengths: str = "refuse", stages: Sequence[Sequence[str]] | None = None, null: One | None = None,
    cfg_scale: float = 0.0, temperature: float = 1.0, chat: bool | None = None, batch_size: int = 8,
) -> list[Reading]: ...  # fmt: skip
def read(
    model: ModelLike,
    prompt: Prompt,
    template: str,
    *,
    slots: Mapping[str, Sequence[str]],
    labels: str = "auto",
    lengths: str = "refuse",
    stages: Sequence[Sequence[str]] | None = None,
    null: One | None = None,
    cfg_scale: float = 0.0,
    temperature: float = 1.0,
    chat: bool | None = None,
    batch_size: int = 8,
) -> Reading | list[Reading]:
    """Log-probabilities of the labels at the slots of `template`, an answer with `{slot}` where a label belongs.

    prompt, chat  as `generate` takes them.
    slots         the labels of each slot.
    labels        of several tokens: `chain` sums log p(token | tokens before it, the later ones masked), a forward a
                  token; `product` reads all tokens in one forward, as if they were independent. auto: chain.
    lengths       labels of a slot with different numbers of tokens: `refuse`, or `condition`, which reads those of each
                  number on a canvas of theirs, given that number: `reading["mood:2"]` has the labels of two columns.
    stages        names of slots; the best label of a stage is written before the next is read. None: one stage.
    null          a prompt without content: `p` is then that of log p(label | prompt) - log p(label | null).
    cfg_scale     guidance away from the canvas whose prompt is masked; 0 is off.
    temperature   `p` is that of log p(label) / temperature, which an evaluation fits (docs/reads.md).
    batch_size    canvases of a forward.

    Returns one `Reading` for one prompt, a list for a list. Errors: `DllmError`, one line.
    """
    Arguments(cfg_scale=cfg_scale, chat=chat, batch_size=batch_size)  # checks them
    model = resolve_model(model)
    mask = mask_of(model)
    if model.tokenizer is None:
        raise DllmError(f"a template is text, and this model has no tokenizer ({NO_TOKENIZER})")
    for name, value, known in (("labels", labels, LABELS), ("lengths", lengths, LENGTHS)):
        if value not in known:
            raise DllmError(f"{name}={value!r} must be one of {', '.join(known)}")
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise DllmError(f"temperature={temperature!r} must be a number above 0")
    forms = _forms(model.tokenizer, mask, _parts(template, slots), slots, lengths == "condition")
    order = _stages(stages, slots, forms)
    heads, single = prompt_ids(model, prompt, chat, 1)
    empty, one = ([], True) if null is None else prompt_ids(model, null, chat, 1)
    if not one:
        raise DllmError("null= is one prompt without content, which serves all prompts; give no list of them")
    given = [*heads, *empty]
    rows = [Row.of(model, head, form) for head in given for form, _ in forms]
    look = Look(model, cfg_scale, batch_size)
    _read(look, rows, order, "chain" if labels == "auto" else labels)
    by_prompt = [rows[i : i + len(forms)] for i in range(0, len(rows), len(forms))]
    blank = by_prompt.pop() if null is not None else None
    made = [_reading(model, own, blank, [named for _, named in forms], temperature, look.nfe) for own in by_prompt]
    return made[0] if single else made


def _stages(
    stages: Sequence[Sequence[str]] | None, slots: Mapping[str, object], forms: Sequence[tuple[Form, dict[str, str]]]
) -> list[list[str]]:
    """The slots of each stage. Errors: a slot in none or in two, names of no slot, a slot that has no best label before
    the last stage."""
    if stages is not None and not (
        isinstance(stages, Sequence) and all(s and isinstance(s, list | tuple) for s in stages)
    ):
        raise DllmError(f"stages={stages!r} must be lists of slots, such as [['first'], ['second', 'third']]")
    order = [[*slots]] if stages is None else [[*stage] for stage in stages]
    named = [name for stage in order for name in stage]
    if sorted(map(str, named)) != sorted(slots):
        raise DllmError(f"stages={stages!r} must name each of the slots once: {', '.join(slots)}")
    for _, apart in forms[1:]:
        for name in apart:
            if name not in order[-1]:
                raise DllmError(
                    f"slot {name!r} has labels of different numbers of tokens, so there is no best one to write before "
                    "the next stage: read it in the last one"
                )
    return order


@dataclass
class Row:
    """A prompt under way: its form, its canvas, and what its slots said."""

    head: int
    form: Form
    canvas: Canvas
    said: dict[str, tuple[dict[str, float], str]]

    @classmethod
    def of(cls, model: Model, head: list[int], form: Form) -> Row:
        """Errors: a prompt with masks or unknown ids, more tokens than positions, nothing to predict a slot from."""
        check_ids(head, model.embedding_rows, "the prompt")
        if model.mask_id in head:
            raise DllmError("a prompt to read holds no mask tokens: slots stand in the template")
        if (size := len(head) + len(form.ids)) > model.max_positions:
            raise DllmError(f"prompt and template have {size} tokens; the model has {model.max_positions} positions")
        if model.shift and not head and form.ids[0] == model.mask_id:
            raise DllmError("with shifted logits position 0 cannot be predicted: begin the template with a word")
        return cls(len(head), form, (*head, *form.ids), {})


def _read(look: Look, rows: Sequence[Row], order: list[list[str]], law: str) -> None:
    """All rows, stage by stage, token by token."""
    for stage in order:
        sums = [{name: dict.fromkeys(row.form.slots[name].labels, 0.0) for name in stage} for row in rows]
        chain = law == "chain"
        for level in range(max(row.form.slots[name].size for row in rows for name in stage) if chain else 1):
            asked: dict[tuple[int, str, str, int], Question] = {}
            for i, row in enumerate(rows):
                for name in stage:
                    slot = row.form.slots[name]
                    at = row.head + slot.at
                    for label, ids in slot.labels.items():
                        for j in range(level, min(level + 1, slot.size)) if chain else range(slot.size):
                            canvas = written(row.canvas, at, ids[:j] if chain else ())
                            asked[i, name, label, j] = canvas, at + j, ids[j]
            answers = look({*asked.values()}, {q[0]: rows[i].head for (i, *_), q in asked.items()})
            for (i, name, label, _), question in asked.items():
                sums[i][name][label] += answers[question]
        for row, totals in zip(rows, sums, strict=True):
            for name, logp in totals.items():
                slot = row.form.slots[name]
                row.said[name] = logp, "slot" if slot.size == 1 else law
                if stage is not order[-1]:
                    best = max(logp, key=lambda label: logp[label])
                    row.canvas = written(row.canvas, row.head + slot.at, slot.labels[best])


def written(canvas: Canvas, at: int, ids: Sequence[int]) -> Canvas:
    """The canvas with these ids from a column on."""
    return (*canvas[:at], *ids, *canvas[at + len(ids) :])


def _reading(
    model: Model,
    rows: Sequence[Row],
    blank: Sequence[Row] | None,
    answering: Sequence[Mapping[str, str]],
    temperature: float,
    nfe: int,
) -> Reading:
    """What the forms of one prompt say, each of the slots that it answers for."""
    slots = dict[str, SlotReading]()
    for i, (row, names) in enumerate(zip(rows, answering, strict=True)):
        for name, shown in names.items():
            slots[shown] = _slot_reading(row, None if blank is None else blank[i], name, temperature)
    row = rows[0]
    block, first = model.block_size, row.head + min(slot.at for slot in row.form.slots.values())
    sees = block is None or first // block == (len(row.canvas) - 1) // block
    return Reading(slots, nfe, [*row.canvas], sees)


def _slot_reading(row: Row, blank: Row | None, name: str, temperature: float) -> SlotReading:
    slot, (logp, exact) = row.form.slots[name], row.said[name]
    level = {label: (v - (blank.said[name][0][label] if blank else 0.0)) / temperature for label, v in logp.items()}
    top = max(level.values())
    total = sum(math.exp(v - top) for v in level.values())
    return SlotReading(
        logp=logp,
        p={label: math.exp(v - top) / total for label, v in level.items()},
        mass=sum(map(math.exp, logp.values())),
        tokens=slot.labels,
        columns=tuple(range(row.head + slot.at, row.head + slot.at + slot.size)),
        exact=exact,
    )


@dataclass
class Look:
    """Answers questions about masked columns, every canvas in one forward."""

    model: Model
    cfg_scale: float
    batch_size: int
    nfe: int = 0  # forwards, one after the other, guidance included

    def __call__(self, questions: set[Question], heads: Mapping[Canvas, int]) -> dict[Question, float]:
        """log p(token) of each; heads: the given columns of each canvas, which guidance masks."""
        by_canvas: dict[Canvas, list[Question]] = {}
        for question in sorted(questions):
            by_canvas.setdefault(question[0], []).append(question)
        canvases, out = sorted(by_canvas, key=len), dict[Question, float]()
        for i in range(0, len(canvases), self.batch_size):
            some = canvases[i : i + self.batch_size]
            out |= self.batch(some, [by_canvas[c] for c in some], [heads[c] for c in some])
        self.nfe += 2 if self.cfg_scale else 1
        return out

    @torch.inference_mode()
    def batch(self, canvases: list[Canvas], asked: list[list[Question]], heads: list[int]) -> dict[Question, float]:
        """The answers of one forward, or of two under guidance."""
        width, device = max(map(len, canvases)), self.model.device
        ids = torch.tensor([[*c, *[0] * (width - len(c))] for c in canvases], device=device)
        pos = torch.tensor([[*range(len(c)), *[-1] * (width - len(c))] for c in canvases], device=device)
        flat = [(row, question) for row, questions in enumerate(asked) for question in questions]
        places = sorted({(row, column) for row, (_, column, _) in flat})
        rows, cols = (torch.tensor(x, device=device) for x in zip(*places, strict=True))
        logits = self.logits(ids, pos, rows, cols)
        if self.cfg_scale:
            given = torch.arange(width, device=device) < torch.tensor(heads, device=device)[:, None]
            free = self.logits(torch.where(given, mask_of(self.model), ids), pos, rows, cols)
            logits = free + (self.cfg_scale + 1) * (logits - free)
            logits[:, self.model.mask_id] = -torch.inf
        at = torch.tensor([places.index((row, column)) for row, (_, column, _) in flat], device=device)
        token = torch.tensor([token for _, (_, _, token) in flat], device=device)
        values = logits.log_softmax(-1)[at, token].tolist()
        return {question: value for (_, question), value in zip(flat, values, strict=True)}

    def logits(self, ids: Tensor, pos: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """(n, V) of places (rows, cols), each (n,)."""
        padded = bool((pos < 0).any())
        hidden = self.model.forward(ids, pos if padded else None)
        return self.model.logits(hidden[rows, self.model.source(cols)])


def chained(model: Model, head: list[int], tail: list[int], cfg_scale: float = 0.0, batch_size: int = 8) -> float:
    """log p(tail | head) by the chain from left to right, in nats: a forward a token."""
    look = Look(model, cfg_scale, batch_size)
    canvas = (*head, *[mask_of(model)] * len(tail))
    questions = [(written(canvas, len(head), tail[:j]), len(head) + j, token) for j, token in enumerate(tail)]
    return sum(look({*questions}, {q[0]: len(head) for q in questions}).values())
