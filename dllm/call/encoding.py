"""From prompts to the ids of a dLLM: templates, padding, unconditional starts."""

from __future__ import annotations

from functools import partial

from dllm.call.prompts import Padding, Text, read
from dllm.errors import DllmError
from dllm.models.model import Model
from dllm.models.tokenizer import NO_TOKENIZER


def prompt_ids(model: Model, prompt: object, chat: bool | None = None) -> tuple[list[list[int]], bool]:
    """Token ids of the prompts of a call, and whether it was a single one; None starts from nothing."""
    if prompt is None:
        return [unprompted(model)], True
    return read(prompt, partial(encode, model, chat=chat), padding(model))


def encode(model: Model, prompt: Text, chat: bool | None) -> list[int]:
    """Token ids of text or chat messages. Text goes through the chat template where there is one (chat=None)."""
    if model.tokenizer is None:
        raise DllmError(f"this model has no tokenizer ({NO_TOKENIZER}): pass ids, or load it with tokenizer=")
    if not isinstance(prompt, str):
        return model.chat(prompt)
    if chat or (chat is None and getattr(model.tokenizer, "chat_template", None)):  # foreign
        return model.chat([{"role": "user", "content": prompt}])
    return list(model.tokenizer(prompt, add_special_tokens=False)["input_ids"])


def padding(model: Model) -> Padding:
    """What ids of this model may be padding."""
    return Padding.of(model.tokenizer, model.pad_id, (*model.eos_ids, model.bos_id, model.mask_id))


def unprompted(model: Model) -> list[int]:
    """Unconditional generation starts from bos where the model is shifted, else from nothing."""
    if not model.shift:
        return []
    if model.bos_id is None:
        raise DllmError("this model predicts the next token and has no bos id: pass a prompt")
    return [model.bos_id]
