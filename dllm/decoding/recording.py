"""What the engine notes for a trace: the commits of each step, and how sure the model was of them."""

from __future__ import annotations

import math

from dllm.decoding.logprobs import Logprobs
from dllm.decoding.runner import Tick
from dllm.decoding.trace import Trace


def record(trace: Trace, tick: Tick, row: int, before: list[int]) -> None:
    """Add one forward to a row's trace; `before` are the ids of its canvas until then."""
    at, f, noted = tick.rows[row], tick.facts[row], tick.state.columns[Logprobs]
    start, length, new = f.start, f.length, tick.state.canvas.ids[at].tolist()
    known, value, bound = (leaf[at].tolist() for leaf in (noted.known, noted.value, noted.bound))
    changed = [col for col in range(start, length) if before[col] != new[col]]
    trace.commits.append([[col, new[col]] for col in changed])
    trace.confidence.append([round(math.exp(value[col]), 6) if known[col] else None for col in changed])
    given = [math.exp(bound[col]) if known[col] and bound[col] < math.inf else None for col in changed]
    trace.posterior.append([p and round(p, 6) for p in given] if any(p is not None for p in given) else [])
    trace.windows.append([tick.before[row].lo, tick.before[row].hi])
    trace.lengths.append(length)
    ticket = tick.request[row]
    trace.seconds.append(round(ticket.call.elapsed - ticket.entered, 6))
    before[:] = new
