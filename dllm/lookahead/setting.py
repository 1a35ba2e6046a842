"""How far to look ahead, and what is promised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from dllm.decoding.cache.policy import Policy
from dllm.decoding.slots import Sampler
from dllm.errors import DllmError
from dllm.models.model import Model
from dllm.spec import KINDS, check, named, param, settings, value

MODES = ("exact", "guarded", "fast")
FORMS = ("memo", "chain")


def _costs(table: object) -> bool:
    """Whether this says what forwards of some numbers of rows cost."""
    rows, cost = KINDS["int"].fits, KINDS["float"].fits
    return isinstance(table, Mapping) and bool(table) and all(rows(k) and cost(v) and v > 0 for k, v in table.items())


@dataclass(frozen=True)
class Lookahead:
    """How far to look ahead, and what is promised.

    rows          query rows of a sequence in one forward, the true one included; "auto" takes what the measured cost of
                  a forward and the hits so far make fastest (1: no lookahead).
    mode          exact    identical to the plain call, never more forwards. For float64 weights, and for models that
                           declare `batch_invariant = True`: logits do not depend on what runs in the same forward.
                  guarded  identical to the plain call of each prompt by itself as long as logits differ between
                           forward shapes by less than `delta`, for rules that are monotone in each confidence. A
                           decision that a change of `delta` could turn over is taken again on the forward of that plain
                           call. Forwards: those of the plain call at most, plus these re-runs (in `stats`).
                  fast     no promise. Every `audit`-th hit is checked on a forward of its own and the rate of
                           divergent decisions reported. Never more forwards than the plain call.
                  None     exact where it can be had, else guarded.
    drafter       roll     repeat the sampler's own step on the last prediction.
                  ladder   the current state with the 1, 2, ... surest tokens written.
    retain        keep evaluated guesses until the cache is refreshed, not only until the next forward.
    multi_source  draft from all states passed since the last forward, not only from the last one.
    cross_blocks  guess beyond the end of the block, where the forward covers that (no cache, block-causal models).
    ahead         block-causal models: blocks of masks that each row reads behind its own, so that guesses reach beyond
                  the edge. Each costs its columns; without any, thresholds in small blocks save next to nothing.
    restart       a row that has moved on to another block begins there with a forward of its own and without guesses,
                  as FreeDave's released eager mode does.
    max_rows      query rows of a whole forward; None: `rows` for each sequence. The likeliest guesses get them.
    form          memo     the host keeps answers by the names of their queries: the fewest forwards.
                  chain    a round is one piece of work on the device: drafts from the last state, nothing is retained.
                           drafter="ladder", restart and relax are the memo's, and samplers that edit the length.
                  auto     chain on CUDA devices; elsewhere memo, and with rows="auto" what takes less time.
    relax         a rule that changes the output; `out.lossless` is False then, and the plain call's forwards no bound.
                  subset   a step whose outcome was not guessed is cut down to the largest guess inside it, whose answer
                           is there already: the threshold variant of FreeDave's released code.
    """

    rows: int | str = 4
    mode: str | None = param(None, "exact where it can be had, else guarded", choices=(None, *MODES))
    drafter: str = param("roll", "the sampler's own step guesses best", choices=("roll", "ladder"))
    retain: bool = True
    multi_source: bool = True
    cross_blocks: bool = True
    ahead: int = param(1, "without any, thresholds in small blocks save next to nothing", low=0)
    restart: bool = False
    max_rows: int | None = param(None, "`rows` for each sequence", low=1)
    delta: float | None = param(None, "bound on logit differences; None: measured", low=0)
    audit: int = param(16, "every so many hits of mode fast are checked", low=1)
    costs: Mapping[int, float] | None = None  # recorded cost of a forward for 1, 2, ... rows; None: measured
    form: str = param("auto", "what is faster on the device", choices=("auto", *FORMS))
    relax: str | None = param(None, "the output is that of the plain call", choices=(None, "subset"))

    def __post_init__(self) -> None:
        if self.rows != "auto" and (not isinstance(self.rows, int) or isinstance(self.rows, bool) or self.rows < 1):
            raise DllmError(f"lookahead: rows={self.rows!r} must be 'auto' or an integer of at least 1")
        check(self, "lookahead")
        if self.costs is not None and not _costs(self.costs):
            raise DllmError(f"lookahead costs={self.costs!r} must be a table such as {{1: 1.0, 8: 1.3}}")

    @classmethod
    def parse(cls, spec: object) -> Lookahead:
        """From 4, "auto", "8:mode=fast", {"rows": 8, "mode": "fast"}, a Lookahead. Errors: unknown keys, bad values."""
        if isinstance(spec, Lookahead):
            return spec
        if isinstance(spec, str):
            rows, _, given = named(spec, "lookahead")
            return cls.parse({"rows": value(rows), **given})
        return cls(**settings("lookahead", cls, spec if isinstance(spec, Mapping) else {"rows": spec}))

    def far(self, policy: Policy) -> Policy:
        """The cache policy of forwards with guesses."""
        ahead = self.ahead and self.cross_blocks and policy.exact and policy.block_size
        return replace(policy, ahead=self.ahead) if ahead else policy

    @property
    def lossless(self) -> bool:
        """Whether the output is that of the plain call, under the conditions of the mode."""
        return self.mode != "fast" and self.relax is None

    def settle(self, model: Model, sampler: Sampler) -> Lookahead:
        """The setting with its mode decided. Errors: a promise that this model or sampler cannot keep, and why."""
        if sampler.needs.impure:
            raise DllmError(
                f"sampler {sampler.name!r} depends on more than its state (global randomness, a clock or the number of "
                "forwards), so its steps cannot be verified ahead of time: use it without lookahead"
            )
        why = self.needs_memo(sampler)
        if self.form == "chain" and why:
            raise DllmError(f"lookahead form 'chain' does not serve {why}: use form 'memo'")
        invariant = model.dtype == torch.float64 or model.batch_invariant
        if self.mode == "exact" and not invariant:
            raise DllmError(
                f"lookahead mode 'exact' cannot be promised in {str(model.dtype).removeprefix('torch.')}: the last "
                "bits of logits depend on the shape of a forward. Load the model with dtype='float64', or use "
                "mode 'guarded'"
            )
        return replace(self, mode=self.mode or ("exact" if invariant else "guarded"))

    def needs_memo(self, sampler: Sampler) -> str:
        """What only the memo can serve of this; "" where there is nothing."""
        cases = {
            "drafter='ladder'": self.drafter == "ladder",
            "restart=True": self.restart,
            f"relax={self.relax!r}": self.relax is not None,
            f"sampler {sampler.name!r}, which edits the length": sampler.needs.edits_length,
        }
        return next((what for what, holds in cases.items() if holds), "")


@dataclass
class Stats:
    """What the lookahead of one request did."""

    steps: int = 0  # of the sampler
    forwards: int = 0  # that this request waited for
    rows: int = 0  # query rows evaluated for it
    hits: int = 0  # steps that found their answer in the memo
    retained: int = 0  # of these, answers older than the last forward
    reruns: int = 0  # forwards that confirmed a close decision, or restored a cache
    audits: int = 0  # hits that were checked (mode fast)
    divergences: int = 0  # confirmed or checked decisions that came out different
    cuts: int = 0  # steps that a relaxation cut down
    depth: dict[int, int] = field(default_factory=dict)  # hits by how many steps ahead they were guessed
    delta: float = 0.0  # the bound that mode guarded relied on
    form: str = "memo"

    def report(self, setting: Lookahead) -> dict[str, object]:
        """As an output shows it."""
        return {**vars(self), "mode": setting.mode, "drafter": setting.drafter, "relax": setting.relax}
