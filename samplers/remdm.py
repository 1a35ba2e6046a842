"""ReMDM: decoding that masks tokens again, as a schedule says or where the model doubts them (arXiv 2503.00307)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dllm.decoding import noise
from dllm.samplers import Blocks, Canvas, Context, Decision, Needs, Prediction, State, View, quota, rank
from dllm.samplers.base import Assumed, Bundle, Method, param
from dllm.samplers.revoke import committed_here, decoded, remask, stored_probability

REFINE = "refine"
ETA = {"cap": 0.008, "rescale": 0.008, "loop": 0.02}  # the paper's values
LOOP_FROM, LOOP_TO, LOOP_ALPHA = 0.55, 0.05, 0.9  # the paper's loop: time runs from 1 to 0, alpha is held at 0.9


@dataclass(frozen=True)
class ReMDM(Method):
    """`refine`, the variant used with language models: fill a share of the window by score, k columns a step; then
    `loops` times mask the k decoded tokens that are least probable now and commit the k best columns; then fill the
    rest.

    The other schedules follow the paper's posterior over `steps` steps with alpha = 1 - t: in each a decoded token is
    masked with probability sigma, a mask gets a token with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t).
    With sigma_max = min(1, (1 - alpha_s) / alpha_t): `cap` takes min(eta, sigma_max), `rescale` eta sigma_max, `conf`
    sigma_max times a softmax over minus the confidences at commit, `loop` caps eta and holds alpha at 0.9 for
    0.05 < t < 0.55, with no masking outside of it. A window that is complete ends the row, as everywhere.
    """

    schedule: str = param(
        REFINE,
        "deterministic, and the form that others compare with on language models",
        choices=(REFINE, "cap", "rescale", "conf", "loop"),
    )
    eta: float | None = param(None, "None: the paper's, 0.008 for cap and rescale, 0.02 for loop", low=0, high=1)
    fill: float = param(0.875, "share of the window filled before the loops, of the published variant", low=0, high=1)
    loops: int = param(32, "loops of the published variant, two forwards each", low=0)
    k: int = param(1, "columns a step, of the published variant", low=1)

    name: ClassVar[str] = "remdm"
    source: ClassVar[str] = "ReMDM, arXiv 2503.00307"
    cost: ClassVar[str] = "one row, every column of the window, committed ones too; two forwards a loop"

    def bundle(self, context: Context) -> Bundle:
        """Owns the selection and amends, and the score where it draws; the whole window where nobody brings one."""
        needs = Needs(committed=True, revises=True, may_idle=True, stochastic=self.schedule != REFINE)
        assumes: Assumed = {"window": Blocks(context.max_new_tokens, whole=True)}
        if self.schedule == REFINE:
            law = Refine(self.fill, self.loops, self.k)
            return Bundle(select=law.select, amend=(law.revoke,), assumes=assumes, needs=needs, memory=law.memory)
        eta = ETA.get(self.schedule, 1.0) if self.eta is None else self.eta
        chance = Posterior(self.schedule, eta, context.steps)
        return Bundle(
            score=quota.confidence,  # draws rank nothing: a score that is named would have no say, and is refused
            select=chance.select,
            amend=(chance.revoke,),
            assumes=assumes,
            needs=needs,
            columns=chance.columns,
        )


class Progress(NamedTuple):
    """Per-row leaves of `refine`, (B,)."""

    half: Tensor  # half-loops done
    masks: Tensor  # masks of the first canvas


class Committed(NamedTuple):
    """Per-column leaves of the posterior, (B, L) float64: the confidence at the commit."""

    confidence: Tensor


@dataclass(frozen=True)
class Refine:
    """Fill, loop, fill. A row's phase follows from how many masks it has left and how many half-loops it has done."""

    fill: float
    loops: int
    k: int

    def memory(self, canvas: Canvas) -> Progress:
        """Nothing is filled yet."""
        return Progress(torch.zeros_like(canvas.start), canvas.masked.sum(1))

    def phase(self, view: View) -> tuple[Tensor, Tensor]:
        """(B,) bool: the row is looping; (B,) bool: and this is the half that masks."""
        half, total = view.memory[Progress]
        filled = total - view.canvas.masked.sum(1)
        full = (filled >= (total * self.fill).long()) & (filled > 0)
        looping = (half < 2 * self.loops) & ((half > 0) | full)  # a loop that began runs through
        return looping, looping & (half % 2 == 0)

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: the k best, but in the half of a loop that masks."""
        _, masking = self.phase(view)
        return (rank(score, view.live) < self.k) & ~masking[:, None]

    def revoke(self, view: View, pred: Prediction, d: Decision) -> Decision:
        """The decision with the k least probable tokens masked again, in that half."""
        looping, masking = self.phase(view)
        before = view.memory[Progress]
        view.memory[Progress] = before._replace(half=before.half + looping)
        return remask(view, d, stored_probability(view, pred), decoded(view), masking * self.k)


@dataclass(frozen=True)
class Posterior:
    """One step of the remasking posterior, from time t to s = t - 1 / steps."""

    schedule: str
    eta: float
    steps: int | Tensor | None  # None: one for each column of the row's window

    def columns(self, canvas: Canvas) -> Committed:
        """Nothing is committed yet."""
        return Committed(torch.zeros_like(canvas.ids, dtype=torch.float64))

    def alpha(self, t: Tensor) -> Tensor:
        """The share of tokens that are decoded at time t."""
        if self.schedule != "loop":
            return 1 - t
        early = LOOP_ALPHA * (1 - t) / (1 - LOOP_FROM)
        late = LOOP_ALPHA + (1 - LOOP_ALPHA) * (LOOP_TO - t) / LOOP_TO
        return torch.where(t > LOOP_FROM, early, torch.where(t < LOOP_TO, late, LOOP_ALPHA))

    def sigma(self, t: Tensor, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        """The probability that a decoded token is masked again; `conf` spreads it over the columns."""
        most = torch.where(alpha_t > 0, (1 - alpha_s) / alpha_t, 1.0).clamp(max=1)
        if self.schedule == "rescale":
            return self.eta * most
        if self.schedule == "conf":
            return most
        capped = most.clamp(max=self.eta)
        if self.schedule == "cap":
            return capped
        return torch.where((t > LOOP_TO) & (t <= LOOP_FROM), capped, 0.0)

    def now(self, state: State) -> tuple[Tensor, Tensor]:
        """(B,) the rates of each row at its step."""
        return (self if self.steps is not None else replace(self, steps=state.asked)).rates(state.step)

    def rates(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """sigma, and the probability that a mask gets its token, at these steps."""
        assert self.steps is not None
        t, s = (1 - (step.double() + i) / self.steps for i in (0, 1))
        alpha_t, alpha_s = self.alpha(t), self.alpha(s)
        sigma = self.sigma(t, alpha_t, alpha_s)
        staying = 0.0 if self.schedule == "conf" else sigma  # there a mask has no weight of its own
        return sigma, (alpha_s - (1 - staying) * alpha_t) / (1 - alpha_t)

    def select(self, view: View, soft: Prediction, score: Tensor) -> Tensor:
        """(B, W) bool: a keyed draw for each mask."""
        return view.uniform(noise.TRANSFER) < self.now(view.state)[1][:, None]

    def revoke(self, view: View, pred: Prediction, d: Decision) -> Decision:
        """The decision with a keyed draw of tokens masked again."""
        sigma = self.now(view.state)[0][:, None].expand(view.cols.shape)
        among, table = decoded(view), view.columns[Committed].confidence
        if self.schedule == "conf":
            sigma = sigma * weights(view.gather(table), among)
        view.columns[Committed] = Committed(view.scatter(table, pred.confidence, committed_here(view, d)))
        again = among & (view.uniform(noise.REMASK) < sigma)
        return remask(view, d, sigma, again, again.sum(1))


def weights(confidence: Tensor, among: Tensor) -> Tensor:
    """(B, W) softmax of minus the confidence over the columns of `among`; zero elsewhere."""
    return (-confidence).masked_fill(~among, -torch.inf).softmax(1).nan_to_num(0.0)
