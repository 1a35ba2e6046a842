"""The loop: draft, search, verify, commit, adapt. One loop for every drafter, search, controller and verifier.

    while rows:
        proposals = proposed(rows)                       # drafter -> lattice -> path search -> controller's trim
        logits = session.verify(proposals)               # one forward of the verifier
        kept = judged(rows, logits)                      # exact acceptance; the one wait for the device
        row.settle(kept)                                 # cut at end tokens and stop strings
        row.take(session.commit(accepted paths))         # the cache forgets the rest; drafters may read its states

The output is the verifier's own, whatever is drafted: token for token when greedy, in law when sampling.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dllm.decoding.graphs import granted
from dllm.drafting.config import SpecConfig
from dllm.drafting.control import Controller, Cut, Length
from dllm.drafting.drafters import Ask, Drafter, asked, companies
from dllm.drafting.lattice import DraftFailure
from dllm.drafting.loans import Loans
from dllm.drafting.proposal import EMPTY, Proposal
from dllm.drafting.request import Request, SpecResult
from dllm.drafting.row import Answer, Question, Settled, Speculation
from dllm.drafting.store import as_store, corpus_ids, corpus_index, keep
from dllm.drafting.suffixes import SuffixArray
from dllm.drafting.verifier import Pending, Session, Verifier
from dllm.errors import DllmError

log = logging.getLogger(__name__)


class Streamer(Protocol):
    """What follows a text as it becomes final; transformers' streamers do."""

    def put(self, value: Tensor) -> None:
        """The next id: (1,)."""

    def end(self) -> None:
        """There are no more."""


def proposed(rows: Sequence[Speculation]) -> list[Proposal]:
    """What to verify next, of every row. All rows that ask for the same are answered together: they agree upon lengths,
    and drafts of one company are made in one go."""
    talks, proposals = [row.propose() for row in rows], [EMPTY] * len(rows)
    answers: dict[int, Answer] = dict.fromkeys(range(len(rows)))
    questions: dict[int, Question] = {}
    while answers:
        for i, answer in answers.items():
            start = time.perf_counter()
            try:
                questions[i] = talks[i].send(answer)
            except StopIteration as end:
                proposals[i] = end.value
            rows[i].stats.t_search += time.perf_counter() - start
        answers = _answered(rows, questions)
        questions = {i: q for i, q in questions.items() if i not in answers}
    return proposals


def _answered(rows: Sequence[Speculation], questions: Mapping[int, Question]) -> dict[int, Answer]:
    """Answers to all questions of one kind, by the row: lengths before drafts, so that cuts are agreed upon once every
    draft is there."""
    start = time.perf_counter()
    lengths = {i: q for i, q in questions.items() if isinstance(q, Length)}
    asks = {i: q for i, q in questions.items() if isinstance(q, Ask)}
    cuts = {i: q for i, q in questions.items() if isinstance(q, Cut)}
    if asks and not lengths:
        return _drafts(rows, asks)
    together: Sequence[int] = ()
    if lengths:
        together = rows[0].controller.lengths(list(lengths.values()), len(rows))
    elif cuts:
        together = rows[0].controller.cuts(list(cuts.values()), len(rows))
    for i in questions:
        rows[i].stats.t_search += (time.perf_counter() - start) / len(questions)
    return dict(zip(lengths or cuts, together, strict=True))


def _drafts(rows: Sequence[Speculation], asks: Mapping[int, Ask]) -> dict[int, Answer]:
    """Drafts, by the row; None where the logits are unusable."""
    answers: dict[int, Answer] = {}
    places = list(asks)
    for company in companies(asks.values()):
        start, together = time.perf_counter(), [places[i] for i in company]
        drafts = asked([asks[i] for i in together])
        seconds = (time.perf_counter() - start) / len(together)
        for i, draft in zip(together, drafts, strict=True):
            r, failed = rows[i].stats, isinstance(draft, DraftFailure)
            r.t_draft, r.failed = r.t_draft + seconds, r.failed or failed
            if asks[i].drafter is rows[i].drafter:
                r.fellows, r.slots = len(together), r.slots + max(asks[j].k for j in together)
            answers[i] = None if isinstance(draft, DraftFailure) else draft
            if failed:
                log.debug("%s: %s", asks[i].drafter.name, draft)
    return answers


def rounds(
    verifier: Verifier,
    drafter: Drafter | None,
    requests: Sequence[Request],
    cfg: SpecConfig,
    controller: Controller | None = None,
    session: Session | None = None,
) -> Iterator[tuple[list[list[int]], list[Speculation]]]:
    """Run the loop; after each round yield the new tokens of every row, and the rows.

    session   of the verifier, fresh or over the text of an earlier turn; None: a new one.
    Errors: DllmError for prompts, trees and controllers that the verifier or the loop does not take.
    """
    controller = cfg.build_controller() if controller is None else controller
    if not isinstance(controller, Controller):
        raise DllmError(f"controller is a Controller (a name goes to length=), not {controller!r}")
    store, texts = as_store(cfg.store), list[SuffixArray]()
    if store is not None:
        store.check(verifier.vocab, verifier.tokenizer, type(verifier.model).__name__)
        texts += store.texts.levels
        cfg = replace(cfg, store=store)
    if cfg.graft is not None:  # a name is loaded once
        cfg = replace(cfg, graft=cfg.grafts)
    if isinstance(cfg.corpus, str | Path):
        cfg = replace(cfg, corpus=corpus_ids(cfg.corpus, verifier.vocab, verifier.tokenizer))
    if cfg.corpus and isinstance(cfg.corpus, tuple):
        texts.append(corpus_index(cfg.corpus, verifier.vocab))
    rows, loans = list[Speculation](), Loans(cfg.graphs)
    for q in requests:
        verifier.check_ids(q.ids)
        if not q.ids:
            raise DllmError("the prompt is empty: give at least one token (the verifier's bos)")
        if verifier.max_positions is not None and q.before + len(q.ids) > verifier.max_positions:
            raise DllmError(f"the prompt has {len(q.ids)} tokens, the verifier takes {verifier.max_positions}")
        rows.append(
            Speculation(
                q, verifier, drafter, cfg.build_search(q.do_sample), controller.fork(), cfg, loans, tuple(texts)
            )
        )
        if len(requests) > 1 and verifier.stretches and q.max_length > rows[-1].end:
            raise DllmError(
                f"{type(verifier.model).__name__} stretches its positions by the longest text so far (dynamic RoPE): "
                f"a batch may not pass {verifier.max_positions} tokens; decode row by row"
            )
    if any(cfg.tree or row.search.tree for row in rows) and not verifier.can("trees"):
        raise DllmError(
            f"{type(verifier.model).__name__} does not place keys by position_ids alone, so it cannot verify a tree: "
            "use a chain (tree=0, no tree search)"
        )
    if session is not None:
        granted(cfg.graphs, "the cache of transformers' own generate cannot be captured: call dllm.speculate")
    with loans:
        session = session or verifier.open(len(rows), graphs=verifier.graphs(loans))
        for row in rows:
            if row.taps and row.request.before:
                raise DllmError(
                    "the drafter reads the verifier's hidden states, which past_key_values does not hold: pass the ids "
                    "of the whole text, so that they can be computed again"
                )
            row.cached = session.past
            row.controller.rows = len(rows)
        while not all(row.done for row in rows):
            yield _round(session, rows), rows
    for row in rows:
        row.finish()
    if store is not None:
        found = [(row.ids, len(row.request.ids)) for row in rows]
        store.learn(found, [lesson for row in rows for lesson in row.lessons()])
        keep(store)


def _round(session: Session, rows: list[Speculation]) -> list[list[int]]:
    start, replays = time.perf_counter(), 0
    for b, row in enumerate(rows):
        if row.verifier.restarts and row.cached <= (row.verifier.turn or 0) < len(row.ids) and not row.done:
            session.restart(b)
            row.cached = 0
        if row.taps and row.told < row.cached:
            row.take(session.replay(row.ids[: row.cached], row.taps), 0)
            replays = 1
    replayed = time.perf_counter()
    live, starts = [row for row in rows if not row.done], [row.cached for row in rows]
    drafts = iter(proposed(live))
    pending = [None if row.done else Pending(row.ids[row.cached :], next(drafts)) for row in rows]
    ready = time.perf_counter()
    found = session.verify(pending, rows[0].taps)
    verdicts = iter(judged(live, [logits for logits in found if logits is not None]))
    verified = time.perf_counter()
    settled = [([], None) if row.done else row.settle(next(verdicts)) for row in rows]
    told = time.perf_counter()
    for row, states, at in zip(rows, session.commit([path for _, path in settled]), starts, strict=True):
        row.take(states, at)
    end = time.perf_counter()
    verify, commit = verified - ready, end - told
    other = end - replayed - verify - commit - sum(row.stats.t_draft + row.stats.t_search for row in live)
    width = max(len(p.ids) + len(p.proposal) for p in pending if p is not None)
    for row in live:
        r = row.stats
        r.t_verify, r.t_commit, r.t_other = verify, commit, max(0.0, other)
        r.rows, r.width, r.leads = len(rows), width, row is live[0]
        r.replays, r.t_replay = replays, replayed - start if replays else 0.0
        row.finish_round()
    return [emitted for emitted, _ in settled]


def judged(rows: Sequence[Speculation], logits: Sequence[Tensor]) -> list[Settled]:
    """What stays of each row's proposal. The host waits once for the device, and more where a law walks by itself."""
    asked = [row.ask(scores) for row, scores in zip(rows, logits, strict=True)]
    answers = iter(torch.cat(asked).tolist())
    return [
        row.judge(scores, list(islice(answers, len(question))))
        for row, scores, question in zip(rows, logits, asked, strict=True)
    ]


def decode(
    verifier: Verifier,
    drafter: Drafter | None,
    requests: Sequence[Request],
    cfg: SpecConfig,
    controller: Controller | None = None,
    streamer: Streamer | None = None,
    session: Session | None = None,
    begun: float | None = None,
) -> list[SpecResult]:
    """All rounds: a result for each request. The streamer gets tokens as they become final. `begun`: when work on the
    requests began, by `time.perf_counter`; None: now."""
    start = time.perf_counter() if begun is None else begun
    rows: list[Speculation] = []
    for emitted, rows in rounds(verifier, drafter, requests, cfg, controller, session):
        if streamer is not None:
            for token in emitted[0]:
                streamer.put(torch.tensor([token]))
        for row in rows:
            if row.done and not row.result.seconds:
                row.result.seconds = time.perf_counter() - start
    if streamer is not None:
        streamer.end()
    return [row.result for row in rows] or [SpecResult(list(q.ids), len(q.ids)) for q in requests]
