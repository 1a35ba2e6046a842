"""`Model`: what decoding, drafting and evaluation may ask of a diffusion language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypedDict, Unpack, runtime_checkable

import torch
from torch import Tensor

from dllm.errors import DllmError
from dllm.models.moe import wide
from dllm.models.settings import SamplerSetting
from dllm.models.tokenizer import NO_TOKENIZER, Message, Tokenizer, by_template
from dllm.models.transformer import Known, KVStore, Outputs, Rows, Said

NO_CACHE = 'this model has no cache: use cache="none"'
NO_ATTENTION = "this model gives no attention weights"


class ForwardOptions(TypedDict, total=False):
    """The keywords of `Model.forward`, where they are described."""

    fresh: Tensor | None
    keep: Tensor | None
    visible: Tensor | None
    lane: Tensor | None
    store: KVStore | None
    known: Known | None


class Decoded(NamedTuple):
    """One answer of an `OwnDecoder`."""

    tokens: list[int]  # without what follows the first end-of-text
    nfe: int  # denoising forwards
    stopped: bool  # at an end-of-text


class OwnDecoder(Protocol):
    """The decoding loop of a model that is no masked-diffusion model: none of the samplers applies to it."""

    def options(self, spec: object) -> Mapping[str, object]:
        """Parameters out of the call's sampler= (None, a name, a mapping). Errors: other samplers and parameters."""

    def decode(self, prompt: list[int], max_new_tokens: int, seed: int, options: Mapping[str, object]) -> Decoded:
        """The answer to one prompt, at most `max_new_tokens` ids. Errors: an empty prompt."""


@runtime_checkable
class Model(Protocol):
    """A masked-diffusion language model, as engine, samplers, lookahead, drafters and evaluation see it.

    `dllm.load` returns one. A class of your own derives from `Model`, sets the members that have no value here, and
    writes `forward`. Shapes: N rows of Q queries, D columns of a hidden state, V = vocab_size, S slots of the store.

    vocab_size        ids below it may be predicted.
    embedding_rows    ids below it may be fed; a checkpoint may pad its vocabulary.
    max_positions     positions there are, prompt and answer together.
    mask_id           the token of an open column; None: this is no masked-diffusion model.
    eos_ids           tokens that end an answer.
    pad_id, bos_id    padding and beginning of a text; None: there is none.
    shift             1: the hidden state of position i predicts position i + 1; 0: it predicts i.
    block_size        positions of a block of block-causal attention; None: every token sees every token.
    family            picks the defaults of a call.
    tokenizer         None: prompts are ids.
    supports_cache    whether `forward` takes a store.
    attention_layers  how many layers can be asked for attention weights, see `forward_with`; 0: none.
    relative          whether positions enter as differences only: then a canvas of masks alone predicts the same in
                      every column, and columns tie.
    batch_invariant   whether the logits of a row are the same bits whatever shares its forward.
    sampler_settings  by sampler: what a name without parameters takes.
    generation_config  what the checkpoint's generation_config.json says (`dllm.text_pipeline` goes by it).
    own_decoder       decodes in place of the samplers; None: the samplers do.
    """

    vocab_size: int
    embedding_rows: int
    max_positions: int
    mask_id: int | None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    bos_id: int | None = None
    shift: int = 0
    block_size: int | None = None
    family: str = ""
    tokenizer: Tokenizer | None = None
    supports_cache: bool = False
    attention_layers: int = 0
    relative: bool = False
    batch_invariant: bool = False
    sampler_settings: Mapping[str, SamplerSetting] = MappingProxyType({})
    generation_config: Mapping[str, object] = MappingProxyType({})
    own_decoder: OwnDecoder | None = None

    @property
    def device(self) -> torch.device:
        """Where ids and positions are expected and logits come out."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states; float64 makes rows independent of what shares their forward."""
        return torch.float32

    def forward(self, ids: Tensor, pos: Tensor | None = None, **options: Unpack[ForwardOptions]) -> Tensor:
        """Hidden states (N, Q, D) of tokens `ids` (N, Q) at positions `pos` (N, Q); no gradients are recorded.

        pos      position and store slot; -1 marks padding, whose output is meaningless but finite; None: 0..Q-1.
        visible  bool, True = may be attended to. Without a store (N, 1|Q, Q) over the queries themselves, None = all.
                 With a store (N, 1|Q, S) over its first S slots, and (N, 1|Q, S+Q), one more column a query, when a
                 token is neither fresh nor kept. The model adds its causal or block-causal rule and padding.
        fresh    (N, Q): the token's key and value replace the stored ones at its slot; None = every real token.
        keep     (N, Q): and stay there; None = the fresh ones. A token that is not fresh is private to this forward.
        lane     (N,) the store's row for each row; None = 0..N-1. Rows may read one lane together: then one of them may
                 keep, at slots that the others replace for themselves.
        store    from `new_store`; None = a full forward. Errors: a model without a cache is given one.
        known    what the host knows of these tensors: then nothing here waits for the device, `visible=None` with a
                 store means all of its first `known.slots` slots, and `visible`, `fresh` and `keep` are left out where
                 they say nothing. None: the device is asked.
        """

    def forward_with(
        self,
        ids: Tensor,
        pos: Tensor | None = None,
        *,
        rows: Rows | None = None,
        kv: bool = False,
        **options: Unpack[ForwardOptions],
    ) -> Outputs:
        """As `forward`, with more of what it computes. Errors: a model that cannot give that.

        rows  the queries whose attention weights are wanted, and the layers that they are the mean of. They are those
              of this very forward: its own queries against all keys that they see, stored ones among them.
        kv    with a store: the keys and values that each layer computed for the tokens.
        """
        if kv:
            raise DllmError(NO_CACHE)
        if rows is not None:
            raise DllmError(NO_ATTENTION)
        return Outputs(Said(self.forward(ids, pos, **options)), [])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D) in at least float32, -inf at the mask; callers write into them.

        By default the hidden states are the logits.
        """
        return shut(hidden[..., : self.vocab_size].clone(), self.mask_id)

    def head_rows(self, ids: Tensor) -> Tensor | None:
        """A copy (n, D) of the head's weights for some ids (n,), for who reads the logits of these alone; None: there
        is no such matrix, and only `logits` gives them."""
        return None

    def source(self, pos: Tensor) -> Tensor:
        """Position whose hidden state predicts `pos`; position 0 of a shifted model reads itself."""
        return (pos - self.shift).clamp(min=0)

    def new_store(self, lanes: int, slots: int) -> KVStore:
        """An empty key/value store for `lanes` rows of up to `slots` positions. Errors: there is no cache."""
        raise DllmError(NO_CACHE)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation and the opening of the answer. Errors: no tokenizer, no template, what that refuses."""
        if self.tokenizer is None:
            raise DllmError(f"this model has no tokenizer ({NO_TOKENIZER}): pass ids, or load it with tokenizer=")
        if not self.tokenizer.chat_template:
            raise DllmError("this checkpoint has no chat template and its tokenizer no chat tokens: pass plain text")
        return list(by_template(self.tokenizer, messages, add_generation_prompt=True))

    def compile(self) -> None:
        """Compile what `forward` runs, once. Errors: a model that cannot."""
        raise DllmError("this model cannot be compiled: leave compile= out")


@torch.no_grad()
def rows_of(weight: Tensor, ids: Tensor) -> Tensor | None:
    """A copy (n, D) of some rows of a matrix; None where it is quantized or split over processes."""
    plain = type(weight.data) is Tensor and weight.dtype.is_floating_point
    return weight[ids.to(weight.device)] if plain else None


def shut(logits: Tensor, mask_id: int | None) -> Tensor:
    """`logits` (..., V) in at least float32, then changed in place: the mask token can never be predicted."""
    logits = logits.to(wide(logits.dtype))
    if mask_id is not None and mask_id < logits.shape[-1]:
        logits[..., mask_id] = -torch.inf
    return logits
