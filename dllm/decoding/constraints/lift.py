"""From bytes to tokens: a byte automaton lifted over a vocabulary, tokens that behave alike as one class.

Two tokens are of one class if they lead from every state to the same state. A frontier of live triples (node, from, to)
goes down the tree of the vocabulary's bytes level by level; bytes that no state tells apart count as one, so that most
tokens share their nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dllm.decoding.constraints.automaton import DEAD, ByteAutomaton, Ints, TokenAutomaton, Vocabulary
from dllm.errors import TooLarge

EDGES = 1 << 18  # a step holds a number for each edge and column


def lifted(
    automaton: ByteAutomaton, vocabulary: Vocabulary, ends: Sequence[int] = (), pads: Sequence[int] = (),
    banned: Sequence[int] = (),
) -> TokenAutomaton:  # fmt: skip
    """The automaton over tokens. `ends` may follow a member, and they and `pads` each other; `banned` are never said.

    Without `ends` the tokens of a member are the member's bytes and nothing else. Errors: too many edges.
    """
    classes, relations = _classes(automaton, vocabulary)
    states = len(automaton.accepting)
    accepting = np.flatnonzero(automaton.accepting)
    src, by, dst = (np.concatenate([r[k] for r in relations]) for k in range(3)) if relations else (_none(),) * 3
    classes[[*ends, *pads]] = DEAD
    number = len(relations) + 1
    final = automaton.accepting
    if ends:
        final = np.append(final, True)
        src = np.concatenate([src, accepting, [states]])
        by = np.concatenate([by, np.full(len(accepting) + 1, number)])
        dst = np.concatenate([dst, np.full(len(accepting) + 1, states)])
        classes[list(ends)] = number
        if pads := [p for p in pads if p not in ends]:
            src, by, dst = np.append(src, states), np.append(by, number + 1), np.append(dst, states)
            classes[pads] = number + 1
    classes[list(banned)] = DEAD
    kept = np.isin(by, classes)  # of classes that still have a token
    return _trimmed(classes, final, src[kept], by[kept], dst[kept])


def _none() -> Ints:
    return np.zeros(0, np.int64)


def _classes(automaton: ByteAutomaton, vocabulary: Vocabulary) -> tuple[Ints, list[tuple[Ints, Ints, Ints]]]:
    """The class of each token, and the edges of each class from 1 on."""
    kinds, kind = np.unique(automaton.delta.T, axis=0, return_inverse=True)
    delta = np.ascontiguousarray(kinds.T).astype(np.int64)  # (S, kinds)
    text = kind.reshape(-1)[vocabulary.flat]
    starts = np.concatenate([[0], vocabulary.ends[:-1]])
    lengths = vocabulary.ends - starts
    classes, known = np.zeros(len(lengths), np.int64), dict[bytes, int]()
    relations = list[tuple[Ints, Ints, Ints]]()
    tokens, node = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)  # of each token that is still live
    begin = now = np.arange(len(delta))  # the triples, by node
    offset = np.array([0, len(delta)])  # where those of each node are
    for depth in range(int(lengths.max(initial=0))):
        longer = lengths[tokens] > depth
        tokens, node = tokens[longer], node[longer]
        step, node = np.unique(node * len(kinds) + text[starts[tokens] + depth], return_inverse=True)
        parent, byte = step // len(kinds), step % len(kinds)
        counts = offset[parent + 1] - offset[parent]
        owner = np.repeat(np.arange(len(step)), counts)
        at = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + offset[parent][owner]
        begin, now = begin[at], delta[now[at], byte[owner]]
        live = now >= 0
        begin, now, owner = begin[live], now[live], owner[live]
        offset = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(step)))])
        whole = lengths[tokens] == depth + 1
        place = np.full(len(step), DEAD)
        for some in np.unique(node[whole]).tolist():
            pairs = slice(offset[some], offset[some + 1])
            if pairs.start == pairs.stop:
                continue
            key = begin[pairs].tobytes() + now[pairs].tobytes()
            if key not in known:
                known[key] = len(known) + 1
                relations.append((begin[pairs], np.full(len(begin[pairs]), len(known)), now[pairs]))
            place[some] = known[key]
        classes[tokens[whole]] = place[node[whole]]
        alive = (offset[1:] > offset[:-1])[node]
        tokens, node = tokens[alive], node[alive]
        if not len(tokens):
            break
    return classes, relations


def _trimmed(classes: Ints, accepting: NDArray[np.bool_], src: Ints, by: Ints, dst: Ints) -> TokenAutomaton:
    """Only states between the first and an accepting one; classes that have become alike are one, by first token."""
    first = np.zeros(len(accepting), np.bool_)
    first[0] = True
    useful = _reached(first, src, dst) & _reached(accepting, dst, src)
    kept = useful[src] & useful[dst]
    src, by, dst = src[kept], by[kept], dst[kept]
    order = np.lexsort((src, by))
    src, by, dst = src[order], by[order], dst[order]
    used, begins = np.unique(by, return_index=True)
    tokens = np.full(int(classes.max(initial=0)) + 1, len(classes))
    np.minimum.at(tokens, classes, np.arange(len(classes)))  # first token of each class
    groups = dict[bytes, list[int]]()
    for one, some in zip(used.tolist(), np.split(np.stack([src, dst]), begins[1:], axis=1), strict=False):
        groups.setdefault(some.tobytes(), []).append(one)
    ranked = sorted(groups.values(), key=lambda alike: min(int(tokens[one]) for one in alike))
    name, chief = np.full(len(tokens), DEAD), list[int]()
    for number, alike in enumerate(ranked, DEAD + 1):
        name[alike] = number
        chief.append(alike[0])
    lead = np.isin(by, chief)
    src, by, dst = src[lead], name[by[lead]], dst[lead]
    state = np.cumsum(useful) - 1
    order = np.lexsort((by, src))
    if len(order) > EDGES:
        raise TooLarge(f"the constraint has {len(order)} edges over this vocabulary; at most {EDGES} are kept")
    return TokenAutomaton(name[classes], accepting[useful], state[src][order], by[order], state[dst][order])


def _reached(found: NDArray[np.bool_], src: Ints, dst: Ints) -> NDArray[np.bool_]:
    """The states that edges lead to from these."""
    while True:
        more = found.copy()
        more[dst[found[src]]] = True
        if (more == found).all():
            return found
        found = more
