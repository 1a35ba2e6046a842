"""What a run writes down: samples, cells of results, and where they were made. All of it is JSON, so a record may lack
what an earlier version or another kind of task did not know.
"""

from __future__ import annotations

from typing import Any, TypedDict

Prompt = str | list[dict[str, str]]  # a text, or chat messages
Decoding = dict[str, Any]  # arguments of `dllm.generate` by their names, not yet checked by `Arguments`


class Clock(TypedDict, total=False):
    """Of a sample. Seconds are wall time; peak memory is that of the process so far."""

    seconds: float  # from the start of its call to its last forward, of all its turns
    processor: float  # seconds of this process on all cores, divided by the rows: what else runs here is not in it
    share: float  # of its batch, divided by the rows
    rows: int  # of its batch
    admitted: int  # of these decoded at a time at most, where memory says how many
    prefill_seconds: float
    decode_seconds: float
    peak_mb: float


class Turn(TypedDict, total=False):
    """One answer of a drafting run or of a conversation."""

    text: str
    ids: list[int]  # with the stop
    nfe: int
    seconds: float
    emitted: list[int]  # tokens a forward of the verifier, the bonus token with them


class Differs(TypedDict):
    """Where a drafted answer leaves the plain one of its verifier."""

    turn: int
    at: int  # the first other token of the turn
    gap: float  # of the verifier's two best logits there
    tie: bool  # the gap is within rounding, so that the order of the additions decided


class Sample(TypedDict, total=False):
    """One document decoded under one setting, and its verdict: a line of `samples.jsonl`."""

    key: str  # its identity (`store.sample_key`)
    task: str
    setting: str
    index: int  # of the document in its task
    doc: str
    cell: str | None  # a mark of what task and setting were
    asked_by: str  # lm-eval's task, of a group
    prompt: Prompt
    cut: int  # tokens of the prompt that did not fit the model
    target: str
    text: str
    answer: str | None  # what was read out of the text; None also where it is the whole text
    correct: float | None  # 0 … 1; None before lm-eval has said it
    note: str
    tokens: int  # to the first stop
    tokens_raw: int  # every decoded position
    nfe: int
    nfe_equiv: float | None
    finish: str
    sampler: str
    arness: float | None  # of the answer's tokens, where the commit order was kept (`Trace.arness`)
    logprobs: list[float | None]  # of the tokens, where the setting says logprobs (docs/logprobs.md)
    p: float  # of the label that was read, among the labels
    labels: dict[str, float]  # p of each label
    truth: str | None  # the label that is right; None: none is
    category: str
    asked: list[str]  # the turns behind the prompt
    turns: list[Turn]  # the answers
    accepted: list[int]  # draft tokens that the verifier took, cycle by cycle
    slots: list[list[int]]  # of each slot of a draft: how often it was judged, and accepted
    draft_forwards: int
    own: float  # seconds of our loop: neither the drafter's nor the verifier's
    differs: Differs | None  # from the first plain setting of its verifier; None: nowhere
    error: str | None
    clock: Clock


class Speed(Clock, total=False):
    """Seconds and speeds of a cell (`metrics.clock`)."""

    tokens_per_second: float
    tokens_per_second_sample: float


Interval = tuple[float, float, float]  # a figure, and the ends of its interval


class Drafting(TypedDict, total=False):
    """How drafting did on some documents; intervals by bootstrap over documents, paired against plain."""

    n: int
    tokens_per_second: float
    tau: Interval  # tokens a forward of the verifier
    speedup: dict[str, Interval]  # plain setting -> ratio of tokens a second
    processor: dict[str, Interval]  # plain setting -> ratio of tokens a second of the processor's
    compared: int  # documents that the first plain setting decoded as well
    ties: int  # of them, those that leave its text at a tie of floats
    differ: int  # and those that leave it elsewhere: not lossless
    gap: float  # the widest of a tie


class Cell(TypedDict, total=False):
    """The figures of one task under one setting."""

    task: str
    setting: str
    version: str
    n: int
    errors: int
    accuracy: float
    low: float  # of its interval
    high: float
    tokens: int
    tokens_raw: int
    empty: int
    nfe: float  # mean over the samples
    nfe_equiv: float
    tpf: float  # Σ tokens ÷ Σ NFE
    tpf_mean: float
    arness: float  # mean over the samples whose commit order was kept; NaN: none was
    finish: dict[str, int]
    brier: float  # of labels that were read: mean square of p - correct
    brier_low: float
    brier_high: float
    ece: float  # and their expected calibration error
    ece_low: float
    ece_high: float
    temperature: float  # the one that fits these labels best
    brier_fitted: float  # of either half of the samples at the temperature that fits the other half
    brier_fitted_low: float
    brier_fitted_high: float
    ece_fitted: float
    ece_fitted_low: float
    ece_fitted_high: float
    accepted_per_cycle: float
    draft_forwards: float
    slots: list[float]  # P(slot is accepted | it was judged)
    own_ms: float  # of our loop, a forward of the verifier
    own_share: float  # of a sample's seconds
    drafting: dict[str, Drafting]  # by category; "" is all of them
    cut: int  # prompts that did not fit
    clock: Speed
    metric: str  # of lm-eval, as it names it
    lm_eval: dict[str, float]
    decoding: list[Decoding]  # what it was decoded with


class Environment(TypedDict, total=False):
    """Versions, hardware and occasion of a run; no names of machines or users."""

    python: str
    system: str
    packages: dict[str, str]
    hardware: str
    weights: dict[str, str]  # a mark of each network's
    engine: str
    date: str
    commit: str | None
    command: str


class Stored(TypedDict):
    """`results.json`."""

    name: str
    seed: int
    errors: int
    notices: list[str]
    cells: list[Cell]
    aup: dict[str, dict[str, float]]
    env: Environment
    samples: list[str]  # keys
