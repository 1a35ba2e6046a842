"""Constraints of a call: compiled, checked against its canvases, and given to its rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from dllm.call.arguments import Arguments
from dllm.decoding.canvas import Canvas, State
from dllm.decoding.constraints.automaton import TokenAutomaton
from dllm.decoding.constraints.bound import Bound, Rule
from dllm.decoding.constraints.compiling import compiled
from dllm.decoding.constraints.constraint import Constraint
from dllm.decoding.constraints.vocabulary import vocabulary
from dllm.decoding.runner import Options
from dllm.decoding.slots import Sampler
from dllm.errors import DllmError, Unsatisfiable
from dllm.models.model import Model
from dllm.models.tokenizer import Tokenizer


def rule_of(
    model: Model, args: Arguments, options: Options, canvas: Canvas, windows: Sequence[int], tails: Sequence[int]
) -> tuple[Rule, Bound] | None:
    """The automata of a call, and which of them each row has; None: nothing is constrained.

    Errors: arguments that do not go with a constraint, a number of constraints that is not that of the prompts, what
    cannot be compiled.
    """
    asked = args.constraints()
    if not asked:
        return None
    if args.stop:
        raise DllmError("stop= may cut a constrained answer short of what was asked; leave it out")
    if not args.early_stop:
        raise DllmError("early_stop=False decodes what lies behind a constrained answer, and nothing is said of that")
    rows = len(windows)
    if len(asked) > 1 and len(asked) * args.n != rows:
        raise DllmError(f"constraint= has {len(asked)} constraints for {rows // args.n} prompts; give one for each")
    ends = () if args.infill else tuple(i for i in options.eos_ids if i not in options.suppress)
    pads = () if model.pad_id is None or model.pad_id == model.mask_id else (model.pad_id,)
    tokens, banned = vocabulary(model), (*options.suppress, *(() if model.mask_id is None else (model.mask_id,)))
    places, automata = list[int](), list[Constraint | None]()
    for constraint in asked:
        if constraint not in automata:
            automata.append(constraint)
        places.append(automata.index(constraint))
    which = places * rows if len(places) == 1 else [p for p in places for _ in range(args.n)]
    if not args.infill and any(c is not None and c.where for c in automata):
        raise DllmError("where='holes' speaks of the holes of a prompt: pass infill=True, or leave it out")
    made = tuple(
        TokenAutomaton.anything(model.vocab_size, ends) if c is None else compiled(c.asked, tokens, ends, pads, banned)
        for c in automata
    )
    for constraint, automaton in zip(automata, made, strict=True):
        if constraint is not None and not automaton.states:
            deep = "" if constraint.max_depth is None else f" within max_depth={constraint.max_depth}"
            raise Unsatisfiable(f"{_named(constraint)} has no member{deep} that the tokens of this model can write")
    made = tuple(a if c is None or c.where is None else a.for_holes() for c, a in zip(automata, made, strict=True))
    columns = max(1, *windows)  # that of an answer without any lies behind its end
    rule = Rule(made, columns, ends, 0 if args.infill else args.min_new_tokens)
    at, tail = torch.tensor(which, device=model.device), torch.tensor(list(tails), device=model.device)
    if any(a.hole for a in made):  # what is given behind the last hole is no part of an answer
        holes = torch.tensor([a.hole is not None for a in made], device=model.device)[at]
        tail = torch.where(holes, canvas.length - _last(canvas), tail)
    return rule, Bound(at, tail)


def _last(canvas: Canvas) -> Tensor:
    """(B,) the end of the last hole."""
    cols = torch.arange(1, canvas.ids.shape[1] + 1, device=canvas.ids.device)
    return torch.where(canvas.frozen, 0, cols).amax(1)


def check(rule: Rule, bound: Bound, queue: State, sampler: Sampler, infill: bool) -> None:
    """Errors: a sampler that writes over what stands, a window that no member fits, with the shortest that exists."""
    if sampler.needs.edits:
        raise DllmError(f"sampler {sampler.name!r} writes over committed tokens, which a constraint cannot follow")
    opened = sampler.window.open(queue)[0].canvas if sampler.needs.edits_length else queue.canvas
    canvas, again = queue.canvas.cpu(), opened.cpu()
    dead = (~rule.alive(opened, bound)).nonzero()[:, 0].tolist()
    if not dead:
        return
    row = dead[0]
    automaton = rule.automata[int(bound.which[row])]
    if automaton.hole is not None:
        _check_holes(automaton.hole, canvas.frozen[row].tolist(), f"prompt {row}: " if len(canvas.ids) > 1 else "")
    size = _columns(again, bound, row)
    whole = f"no member of the constraint fits {size} tokens"
    where = f"prompt {row}: " if len(canvas.ids) > 1 else ""
    if automaton.least is not None and automaton.least > size:
        begins = f", with which sampler {sampler.name!r} begins" if size < _columns(canvas, bound, row) else ""
        more = "give the holes more masks" if infill else "allow more (max_new_tokens=)"
        raise Unsatisfiable(f"{where}{whole}{begins}; the shortest needs {automaton.least}: {more}")
    if infill:
        raise Unsatisfiable(
            f"{where}{whole} with the text that is given around the holes, which is part of it: give the holes other "
            "lengths, or bind each by itself (where='holes')"
        )
    if rule.early:
        raise Unsatisfiable(f"{where}{whole} without an end token in the first {rule.early} (min_new_tokens)")
    raise Unsatisfiable(f"{where}{whole} exactly, and without end tokens it must fill them all")


def _check_holes(hole: TokenAutomaton, given: list[bool], where: str) -> None:
    """Errors: a hole that no member fits, with the lengths that exist."""
    sizes = [len(list(run)) for frozen, run in groupby(given) if not frozen]
    for number, size in enumerate(sizes, 1):
        most = 2 * size + (hole.least or 0) + 2
        lengths = hole.lengths(most)
        if size not in lengths:
            every = lengths == list(range(lengths[0], most + 1))
            near = sorted(sorted(lengths, key=lambda n: abs(n - size))[:6])
            said = f"{lengths[0]} or more" if every else " or ".join(map(str, near))
            masks = "1 mask" if size == 1 else f"{size} masks"
            raise Unsatisfiable(f"{where}hole {number} has {masks}, which cannot hold a member; {said} can")


def verdict(
    automaton: TokenAutomaton, tokens: list[int], given: list[bool], tokenizer: Tokenizer | None
) -> dict[str, bool]:
    """What came of an answer, of which some tokens were given: `member`, whether it, or each of its holes, is one;
    `canonical`, whether the tokenizer would write its text with these tokens. A model that seldom does was pushed off
    its habits."""
    parts, one = [tokens], automaton
    if automaton.hole is not None:
        runs = groupby(zip(tokens, given, strict=False), key=lambda pair: pair[1])
        parts, one = [[token for token, _ in run] for frozen, run in runs if not frozen], automaton.hole
    return {
        "member": all(map(one.accepts, parts)),
        "canonical": tokenizer is not None and all(_written(part, tokenizer) == part for part in parts),
    }


def _written(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    """The tokens that a tokenizer writes their text with."""
    return list(tokenizer(tokenizer.decode(tokens), add_special_tokens=False)["input_ids"])


def _columns(canvas: Canvas, bound: Bound, row: int) -> int:
    return int(canvas.length[row] - canvas.start[row]) - int(bound.tail[row])


def _named(constraint: Constraint) -> str:
    kind = str(constraint.asked["kind"])
    said = repr(constraint.asked["what"])
    return f"{kind}={said if len(said) <= 60 else said[:57] + '...'}"
