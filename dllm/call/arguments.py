"""Every decoding argument: its default, what it may be, and what other codes call it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias, TypedDict, TypeVar

from dllm.call.steering import Criterion, OnStep, Processor, listed
from dllm.decoding.cache.policy import Policy
from dllm.decoding.constraints.constraint import KINDS, Constraint, Schema
from dllm.decoding.runner import Step
from dllm.decoding.stopping import stop_strings
from dllm.errors import DllmError, nearest, unknown
from dllm.lookahead.setting import Lookahead
from dllm.samplers.registry import Spec

T = TypeVar("T")
CacheSpec: TypeAlias = str | Mapping[str, object] | Policy
ConstraintSpec: TypeAlias = Mapping[str, object] | Constraint
LookaheadSpec: TypeAlias = int | str | Mapping[str, object] | Lookahead


@dataclass(frozen=True)
class FamilyDefaults:
    """What a call uses where it says nothing."""

    sampler: str = "confidence"
    block_length: int | None = 32  # None: the model's own block, else the whole window


# LLaDA's instruct scores use blocks; Dream decodes the whole window on its own schedule; block-causal models decode
# their own blocks by threshold, at the values of their model cards (Dream's reasoner has none and takes no risk).
DEFAULTS: dict[str, FamilyDefaults] = {
    "dream": FamilyDefaults("dream", None),
    "sdar": FamilyDefaults("threshold:tau=0.85", None),
    "llada2": FamilyDefaults("threshold:tau=0.95", None),
    "fast_dllm": FamilyDefaults("fast_dllm_v2:tau=0.9", None),
}


# names of other codes -> ours
RENAMED = {
    **dict.fromkeys(("gen_length", "max_length", "max_tokens", "max_gen_toks"), "max_new_tokens"),
    **dict.fromkeys(("remasking", "alg", "algorithm"), "sampler"),
    **dict.fromkeys(("diffusion_steps", "num_steps", "gen_steps"), "steps"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "until"), "stop"),
    **dict.fromkeys(("num_return_sequences", "best_of"), "n"),
    **dict.fromkeys(("eos_token_id", "stop_token_ids"), "eos"),
    **dict.fromkeys(("inputs", "prompts", "messages", "text"), "prompt"),
    "threshold": "sampler='threshold:tau=...'",
    "factor": "sampler='factor:f=...'",
    "alg_temp": "sampler='dream:alg_temp=...'",
    "use_cache": "cache='prefix'",
    "dual_cache": "cache='dual'",
    "cfg": "cfg_scale",
    "do_sample": "temperature",
    "generator": "seed",
    "min_length": "min_new_tokens",
    "output_history": "trace=True",
    "top_logprobs": "logprobs",
    **{
        name: f"dllm.load(..., {name}=...)"
        for name in ("mask_id", "tokenizer", "device", "dtype", "revision", "backend")
    },
}


_IDS = "logits_processor= takes transformers' processors (docs/steering.md), suppress_tokens= bans single ids"
_GRAMMAR = "regex=, choices=, json_schema= and grammar= constrain the answer (docs/constraints.md)"
_PROBABILITIES = "logprobs=0 returns those of the tokens, logprobs=k with k alternatives (docs/logprobs.md)"


# what people ask for by names that have no counterpart -> what there is
EXISTS = {
    "stream": "dllm.stream(model, prompt) yields text as it becomes final, and generate(streamer=) takes a streamer",
    **dict.fromkeys(("callback", "callback_on_step_end"), "on_step= sees every step and may end an answer"),
    **dict.fromkeys(("bad_words_ids", "repetition_penalty", "no_repeat_ngram_size"), _IDS),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "logit_bias"), _IDS),
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_grammar", "response_format", "prefix_allowed_tokens_fn"), _GRAMMAR
    ),
    **dict.fromkeys(("output_scores", "output_logits", "return_dict_in_generate"), _PROBABILITIES),
    "generation_config": "dllm.generation_arguments(config) has its fields as arguments of dllm.generate",
    **dict.fromkeys(("num_beams", "num_beam_groups"), "a canvas has no beams; n= gives several answers"),
    "assistant_model": "dllm.speculate drafts for an autoregressive model",
    "past_key_values": "cache= names a policy of the block cache, which lives for one call",
    "pad_token_id": "attention_mask= says what is padding",
    "token_type_ids": "a text needs none; the tokenizer's output is taken whole: dllm.generate(model, encoding)",
}


class Rule(NamedTuple):
    """What an argument may be."""

    kind: type
    holds: Callable[[Any], bool]
    says: str

    def check(self, name: str, value: object) -> None:
        """Errors: a value of another kind, or out of range."""
        wrong = not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool)
        if wrong or not self.holds(value):
            raise DllmError(f"{name}={value!r} must be {self.says}")


def at_least(lowest: int) -> Rule:
    """An integer, and how small it may be."""
    return Rule(Integral, lambda n: n >= lowest, f"an integer of at least {lowest}")


COUNT, WHOLE = at_least(1), at_least(0)
FLAG = Rule(bool, lambda _: True, "True or False")
PARTS = Rule(object, lambda parts: all(map(callable, listed(parts))), "a function of ids and scores, or several")
WATCHER = Rule(object, callable, "a function of a StepView")
STEP = Rule(object, callable, "what takes a step, such as Checked() of dllm.decoding.invariants")


def ruled(default: T, rule: Rule) -> T:
    """A field that is checked; None is allowed as well where it is the default."""
    return field(default=default, metadata={"rule": rule})


class DecodingArguments(TypedDict, total=False):
    """The arguments of `Arguments`, for signatures: `def mine(**arguments: Unpack[DecodingArguments])`. `n`, which
    decides whether a call returns one output or a list, stands in the signatures itself."""

    sampler: Spec | None
    cache: CacheSpec | None
    max_new_tokens: int | None
    block_length: int | None
    steps: int | None
    temperature: float
    top_p: float | None
    top_k: int | None
    gumbel: bool
    cfg_scale: float
    seed: int
    stop: str | Sequence[str] | None
    eos: int | Sequence[int] | None
    min_new_tokens: int
    suppress_tokens: Sequence[int]
    logits_eos_inf: bool
    confidence_eos_eot_inf: bool
    early_stop: bool
    lookahead: LookaheadSpec | None
    batch_size: int
    chat: bool | None
    infill: bool
    logprobs: int | None
    logits_processor: Processor | Sequence[Processor] | None
    stopping_criteria: Criterion | Sequence[Criterion] | None
    on_step: OnStep | None
    trace: bool
    compile: bool
    graphs: bool | None
    max_nfe: int | None
    check: Step | None
    regex: str | None
    choices: Sequence[str] | None
    json_schema: Schema | str | None
    grammar: str | None
    constraint: ConstraintSpec | Sequence[ConstraintSpec | None] | None


@dataclass(frozen=True)
class Arguments:
    """Every decoding argument with its default (docs/arguments.md). Errors name the argument and what it may be."""

    sampler: Spec | None = None  # a name, "name:key=value", "a+b", a mapping or a list of these; None: the family's
    cache: CacheSpec | None = None  # a policy, in the same forms; None: the model's (docs/caches.md)
    max_new_tokens: int | None = ruled(None, WHOLE)  # columns behind the prompt; None: 128 or what fits, 0 with infill
    # columns decoded before the next ones; None: the model's, else the family's
    block_length: int | None = ruled(None, COUNT)
    steps: int | None = ruled(None, COUNT)  # forwards over the whole window (quota samplers); None: one token a step
    temperature: float = ruled(0.0, Rule(Real, lambda x: 0 <= x < math.inf, "0 (greedy) or positive"))  # 0 is greedy
    top_p: float | None = ruled(None, Rule(Real, lambda x: 0 < x <= 1, "in (0, 1]"))  # nucleus
    top_k: int | None = ruled(None, COUNT)
    gumbel: bool = ruled(False, FLAG)  # draw by Gumbel noise instead of the inverse CDF: the same law, other draws
    # classifier-free guidance; 0 is off
    cfg_scale: float = ruled(0.0, Rule(Real, lambda x: 0 <= x < math.inf, "0 (off) or positive"))
    # request i uses seed + i
    seed: int = ruled(0, Rule(Integral, lambda n: abs(n) < 1 << 62, "an integer, below 2**62"))
    n: int = ruled(1, COUNT)  # answers per prompt
    stop: str | Sequence[str] | None = None  # strings that end the answer
    eos: int | Sequence[int] | None = None  # ids that end it; None: the model's
    min_new_tokens: int = ruled(0, WHOLE)  # no end token in the first columns
    suppress_tokens: Sequence[int] = ()  # ids that are never predicted
    logits_eos_inf: bool = ruled(False, FLAG)  # end tokens are never predicted (LLaDA)
    confidence_eos_eot_inf: bool = ruled(False, FLAG)  # columns that predict an end token are committed last (LLaDA)
    early_stop: bool = ruled(True, FLAG)  # False: every column is decoded, as in the public codes
    lookahead: LookaheadSpec | None = None  # rows of exact verification (docs/lookahead.md)
    batch_size: int = ruled(8, COUNT)  # rows decoded at a time
    chat: bool | None = ruled(None, FLAG)  # whether text goes through the chat template; None: where there is one
    infill: bool = ruled(False, FLAG)  # fill the mask tokens inside the prompt
    # log-probabilities of the tokens, with so many alternatives (docs/logprobs.md)
    logprobs: int | None = ruled(
        None, Rule(Integral, lambda n: 0 <= n <= 20, "an integer from 0 to 20: so many alternatives of each token")
    )
    # transformers' processors and criteria, and what sees every step (docs/steering.md)
    logits_processor: Processor | Sequence[Processor] | None = field(default=None, metadata={"rule": PARTS})
    stopping_criteria: Criterion | Sequence[Criterion] | None = field(default=None, metadata={"rule": PARTS})
    on_step: OnStep | None = field(default=None, metadata={"rule": WATCHER})
    trace: bool = ruled(False, FLAG)  # record what each forward committed
    graphs: bool | None = ruled(None, FLAG)  # whether ticks become CUDA graphs; None: where they can
    compile: bool = ruled(False, FLAG)  # torch.compile of a layer
    max_nfe: int | None = ruled(None, COUNT)  # forwards a row may take; None: 4 a column, and 64
    check: Step | None = field(default=None, metadata={"rule": STEP})  # checks every step (docs/testing.md)
    regex: str | None = None  # the answer matches it fully (docs/constraints.md)
    choices: Sequence[str] | None = None  # the answer is one of these
    json_schema: Schema | str | None = None  # the answer is a document of this schema
    grammar: str | None = None  # the answer is a text that this grammar parses, in the notation of lark
    # a `dllm.Constraint`, or one for each prompt, None for a prompt without
    constraint: ConstraintSpec | Sequence[ConstraintSpec | None] | None = None

    def __post_init__(self) -> None:
        self.constraints()
        for name, rule in RULES.items():
            value = vars(self)[name]
            if value is None and self.__dataclass_fields__[name].default is None:
                continue
            rule.check(name, value)
        stop_strings(self.stop)

    def constraints(self) -> tuple[Constraint | None, ...]:
        """What answers are bound to: nothing, one thing for all, or one for each prompt, None for one that is free.
        Errors: more than one of the arguments that say so."""
        said = {name: vars(self)[name] for name in (*KINDS, "constraint") if vars(self)[name] is not None}
        if len(said) > 1:
            raise DllmError(f"{' and '.join(said)} constrain the same answers; give one of them")
        if self.constraint is None:
            return tuple(Constraint(**said) for _ in said)
        if isinstance(self.constraint, Sequence) and not isinstance(self.constraint, str):
            each = tuple(None if given is None else Constraint.parse(given) for given in self.constraint)
            if not each:
                raise DllmError("constraint= is an empty list: give one constraint for each prompt, or leave it out")
            return () if each == (None,) * len(each) else each
        return (Constraint.parse(self.constraint),)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Arguments:
        """The arguments of a call. Errors: an unknown name, with the nearest one or what there is in its place."""
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise unknown("argument", name, cls.__dataclass_fields__, hint=counterpart(name))
        return cls(**given)

    def given(self) -> dict[str, Any]:
        """The arguments that are no defaults."""
        return {f.name: vars(self)[f.name] for f in fields(self) if vars(self)[f.name] != f.default}


RULES: dict[str, Rule] = {f.name: f.metadata["rule"] for f in fields(Arguments) if f.metadata}


def counterpart(name: str) -> str:
    """What a hint says of an argument that other codes have: its name here, or what there is instead."""
    if name in RENAMED:
        return f": here it is {RENAMED[name]}"
    if name in EXISTS:
        return f": {EXISTS[name]}"
    near = nearest(name, [*Arguments.__dataclass_fields__, *RENAMED])
    return f"; did you mean {near!r}? Here that is {RENAMED[near]}" if near in RENAMED else ""
