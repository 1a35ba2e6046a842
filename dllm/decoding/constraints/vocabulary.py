"""The bytes of a model's tokens, by `llguidance`, which knows the byte alphabets of tokenizers."""

from __future__ import annotations

import weakref
from importlib import import_module
from importlib.util import find_spec

from dllm.decoding.constraints.automaton import Vocabulary
from dllm.decoding.stopping import special_tokens
from dllm.errors import DllmError, first_line
from dllm.models.model import Model

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
    try:
        reader = import_module("llguidance.hf").from_tokenizer(tokenizer, slices=[])
    except Exception as error:  # foreign
        raise DllmError(f"the tokens of this tokenizer cannot be read as bytes: {first_line(error)}") from error
    special, vocab = special_tokens(tokenizer), tokenizer.get_vocab()
    silent = {i for name, i in vocab.items() if name in special}
    known = {i for i in vocab.values() if i < model.vocab_size} - silent
    return Vocabulary.of([reader.decode_bytes([i]) if i in known else b"" for i in range(model.vocab_size)])
