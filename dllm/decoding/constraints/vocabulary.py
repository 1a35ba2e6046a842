"""The bytes of a model's tokens. Those of a byte-level vocabulary are spelt in its names; of any other one they are
read by `llguidance`, which knows all alphabets and takes a second for it."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from tokenizers.decoders import ByteLevel

from dllm.decoding.constraints.automaton import Vocabulary
from dllm.decoding.stopping import special_tokens
from dllm.errors import DllmError, first_line
from dllm.models.model import Model
from dllm.models.tokenizer import Tokenizer

_KNOWN: weakref.WeakKeyDictionary[Model, Vocabulary] = weakref.WeakKeyDictionary()
EXTRA = ("interegular", "lark", "llguidance")


def vocabulary(model: Model) -> Vocabulary:
    """The bytes of each token that may be predicted, none for special ones. Errors: a model without a tokenizer, one
    whose tokens are no byte strings, packages that are missing."""
    if model not in _KNOWN:
        _KNOWN[model] = _read(model)
    return _KNOWN[model]


def _read(model: Model) -> Vocabulary:
    if lacking := [name for name in EXTRA if find_spec(name) is None]:
        raise DllmError(f"constraints need {' and '.join(lacking)}: pip install 'dllm-toolkit[constrain]'")
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise DllmError("a constraint speaks of text, and this model came without a tokenizer")
    special, vocab = special_tokens(tokenizer), tokenizer.get_vocab()
    known = {i: name for name, i in vocab.items() if i < model.vocab_size and name not in special}
    read = _reader(tokenizer)
    return Vocabulary.of([read(i, known[i]) if i in known else b"" for i in range(model.vocab_size)])


def _reader(tokenizer: Tokenizer) -> Callable[[int, str], bytes]:
    """The bytes of a token, by its id and name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and isinstance(backend.decoder, ByteLevel):
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        return lambda _, name: name.encode() if name in added else spelt(name)
    try:
        reader = import_module("llguidance.hf").from_tokenizer(tokenizer, slices=[])
    except Exception as error:  # foreign
        raise DllmError(f"the tokens of this tokenizer cannot be read as bytes: {first_line(error)}") from error
    return lambda i, _: bytes(reader.decode_bytes([i]))


def alphabet() -> dict[int, str]:
    """The sign of each byte in byte-level vocabularies: itself where it is printed, else one from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


_NO_BYTE = 256
_BYTES = defaultdict[int, int](lambda: _NO_BYTE, {ord(sign): byte for byte, sign in alphabet().items()})


def spelt(name: str) -> bytes:
    """The bytes that a name spells; its own where it has a sign of no byte, as their decoders read it."""
    try:
        return name.translate(_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        return name.encode()
