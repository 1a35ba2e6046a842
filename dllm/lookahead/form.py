"""Which form of the lookahead a call takes: the memo of the host (`walk`), or rounds on the device (`chain`)."""

from __future__ import annotations

from dllm.decoding.cache.policy import Policy
from dllm.decoding.slots import Sampler
from dllm.lookahead.chain import ChainRunner
from dllm.lookahead.pace import ROWS, Pace
from dllm.lookahead.setting import Lookahead
from dllm.lookahead.walk import LookaheadRunner
from dllm.models.model import Model


def runner(
    setting: Lookahead, model: Model, sampler: Sampler, policy: Policy, checked: bool
) -> type[LookaheadRunner] | type[ChainRunner]:
    """The runner of a settled setting; where steps are `checked` one by one, that of the memo."""
    form = setting.form
    if checked or setting.needs_memo(sampler):
        form = "memo"
    elif form == "auto" and model.device.type == "cuda":
        form = "chain"
    elif form == "auto":
        form = faster(setting, model, sampler, policy) if setting.rows == "auto" else "memo"
    return ChainRunner if form == "chain" else LookaheadRunner


def faster(setting: Lookahead, model: Model, sampler: Sampler, policy: Policy) -> str:
    """The form that takes the most steps in a unit of time, as far as it is known.

    Chains come first: one that does not pay is a plain call. The memo has its turn where they do.
    """
    chain, memo = (Pace.of(model, sampler, policy, setting, form) for form in ("chain", "memo"))
    if not chain.seen or chain.best(1, setting.max_rows) == 1:
        return "chain"
    fast, slow = (max(pace.speeds(1, ROWS).values()) for pace in (chain, memo))
    return "memo" if not memo.seen or slow > fast else "chain"
