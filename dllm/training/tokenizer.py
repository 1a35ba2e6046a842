"""The tokenizer of the embedded pair: whole words and numbers of the tasks, bytes for everything else.

A sum is then a look-up over single tokens and a problem takes about fifty tokens, while any UTF-8 text still goes in
and comes out unchanged: a word outside the vocabulary is spelled in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from dllm.tasks.base import Example
from dllm.tasks.registry import generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, MASK, EOS, SEP = "<|pad|>", "<|mask|>", "<|eos|>", "<|sep|>"
SPECIAL = (PAD, MASK, EOS, SEP)  # ids 0 to 3
# A new line with its indentation, a word, a number, a run of #, a two-character operator, any other character, spaces;
# one leading space belongs to what follows it.
PIECE = r"\n *| ?[A-Za-z]+| ?[0-9]+| ?#+| ?(?:\*\*|//|==)| ?[^\sA-Za-z0-9]| +|\s"
# The template ends every turn, so that a lone user message is already the prompt the models were trained on.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}<|eos|>{% else %}<|sep|>{% endif %}{% endfor %}"
)


def build_tokenizer(examples: Iterable[Example], max_length: int = 512) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are those of `examples` and the numbers 0 to 99 after a space."""
    from transformers import PreTrainedTokenizerFast

    cut = _pre_tokenizer()
    texts = chain.from_iterable((e.prompt, e.answer) for e in examples)
    seen = {piece for text in texts for piece, _ in cut.pre_tokenize_str(text)}
    digits = set("0123456789")
    words = sorted(p for p in seen if len(p) > 1 and not digits & set(p))  # a bare number is spelled: sudoku rows
    numbers = [f"Ġ{n}" for n in range(100)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *numbers, *words])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    core.pre_tokenizer = cut
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token=PAD,
        mask_token=MASK,
        eos_token=EOS,
        sep_token=SEP,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@cache
def embedded_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """The tokenizer of the embedded pair, rebuilt from the training problems of the generators."""
    sample = {"word_problems": 4000, "sudoku": 1, "functions": 4000}  # every word of the templates occurs many times
    return build_tokenizer(chain.from_iterable(generate(name, "train", n) for name, n in sample.items()), max_length)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
