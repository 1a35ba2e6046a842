"""The process that compiles: a pattern may take longer, and more memory, than anybody wants to wait for.

    python -m dllm.decoding.constraints.worker < request.npz > automaton.npz

It imports no torch, so that it starts at once, and is killed when its time is up (`limited`, `compiling`).
"""

from __future__ import annotations

import io
import json
import sys

import numpy as np

from dllm.decoding.constraints import schema
from dllm.decoding.constraints.automaton import ByteAutomaton, Vocabulary
from dllm.decoding.constraints.grammar import of_grammar
from dllm.decoding.constraints.lift import lifted
from dllm.decoding.constraints.pattern import of_choices, of_pattern
from dllm.errors import DllmError, TooLarge

LONGEST = {"regex": 1 << 12, "grammar": 1 << 16}  # bytes of what a user writes
MEMORY = 8 << 30  # bytes of address space


def automaton(kind: str, what: object, max_depth: int | None) -> ByteAutomaton:
    """The byte automaton of a constraint: `regex`, `choices`, `json_schema` or `grammar`."""
    if kind == "choices":
        assert isinstance(what, list)
        return of_choices([text.encode() for text in what])
    if kind == "json_schema":
        return of_pattern(schema.pattern(what, max_depth))
    text = str(what)
    if (size := len(text.encode())) > LONGEST[kind]:
        raise TooLarge(f"{kind}: a text of {size} bytes; at most {LONGEST[kind]} are read")
    return of_grammar(text, max_depth) if kind == "grammar" else of_pattern(text)


def main() -> None:
    """Read a request, write the automaton over tokens, or what is wrong."""
    with np.load(io.BytesIO(sys.stdin.buffer.read())) as sent:
        asked = json.loads(sent["asked"].tobytes())
        vocabulary = Vocabulary(sent["flat"], sent["ends"])
    limited(asked["seconds"])
    try:
        found = lifted(
            automaton(asked["kind"], asked["what"], asked["max_depth"]), vocabulary, asked["ends"], asked["pads"],
            asked["banned"],
        )  # fmt: skip
        made = {name: getattr(found, name) for name in ("classes", "accepting", "src", "by", "dst")}
    except DllmError as error:
        made = {"error": np.frombuffer(str(error).encode(), np.uint8)}
        if isinstance(error, TooLarge):
            made["large"] = np.ones(1)
    except UnicodeEncodeError:
        made = {"error": b"the constraint has half a character in it (a surrogate), which no text holds"}
    except (MemoryError, RecursionError) as error:
        said = f"the constraint is too large ({type(error).__name__})"
        made = {"error": np.frombuffer(said.encode(), np.uint8), "large": np.ones(1)}
    np.savez(sys.stdout.buffer, **made)


def limited(seconds: int) -> None:
    """Have a pattern that explodes end here, not the machine: by its memory, and by the processor's seconds."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    for what, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, seconds)):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most if hard < 0 else min(most, hard), hard))


if __name__ == "__main__":
    main()
