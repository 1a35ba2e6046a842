"""Special ids from all their sources, resolved once: mask, end-of-text set, padding, beginning, usable vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dllm.errors import DllmError
from dllm.models.config import Json, ModelConfig, is_id, is_ids
from dllm.models.family import Family
from dllm.models.tokenizer import Tokenizer

MASK_STRINGS = ("<|mdm_mask|>", "<|mask|>", "<|MASK|>", "<MASK>", "<[MASK]>", "|<MASK>|")


def resolve(
    config: ModelConfig,
    family: Family | None,
    tokenizer: Tokenizer | None = None,
    generation: Json | None = None,
    mask_id: int | None = None,
    eos_ids: int | Sequence[int] | None = None,
) -> ModelConfig:
    """`config` with its special ids settled; an argument settles what the files leave open or contradict.

    Errors: no mask id anywhere, sources that disagree, a mask id that is out of range, an end or the padding.
    """
    generation = generation or {}
    vocab = tokenizer.get_vocab() if tokenizer is not None else {}
    named, end = (getattr(tokenizer, f"{name}_token_id", None) for name in ("mask", "eos"))  # foreign
    if not config.causal:
        config = replace(config, mask_id=_mask(config, family, named, vocab, mask_id))
    for name in ("eos_token_id", "bos_token_id"):
        value = generation.get(name)
        if value is not None and not (is_ids(value) and (name == "eos_token_id" or isinstance(value, int))):
            raise DllmError(f"generation_config.json: {name} is an id, not {value!r}")
    ends = _ids(eos_ids) if eos_ids is not None else _ends(config, family, end, vocab, generation)
    pad = config.pad_id if config.pad_id is not None else getattr(tokenizer, "pad_token_id", None)  # foreign
    begins = (getattr(tokenizer, "bos_token_id", None), config.bos_id, generation.get("bos_token_id"))  # foreign
    highest = max(vocab.values()) if vocab else config.vocab_size - 1
    config = replace(
        config,
        eos_ids=ends,
        pad_id=pad if pad is not None else (ends[0] if ends else None),
        bos_id=next((b for b in begins if is_id(b)), None),
        vocab_size=min(config.vocab_size, max([highest, *ends]) + 1),  # padding rows of the embedding mean nothing
    )
    _check(config)
    return config


def _mask(
    config: ModelConfig, family: Family | None, named: int | None, vocab: Mapping[str, int], explicit: int | None
) -> int:
    if explicit is not None:
        return explicit
    sources = {"config.json": config.mask_id, "the tokenizer": named}
    found = {name: i for name, i in sources.items() if i is not None}
    if not found:
        found = {f"the token {s}": vocab[s] for s in MASK_STRINGS if s in vocab}
    if not found and family is not None and family.mask_id is not None and family.mask_id < config.embedding_rows:
        found = {f"the family {family.name}": family.mask_id}
    if not found:
        raise DllmError("this checkpoint names no mask token: pass its id as mask_id=")
    if len(set(found.values())) > 1:
        seen = {*found.values(), *(vocab.get(s) for s in MASK_STRINGS)}
        if family is not None and family.mask_by_constant and family.mask_id in seen:
            return family.mask_id  # type: ignore[return-value]
        said = ", ".join(f"{name} says {i}" for name, i in found.items())
        raise DllmError(f"the mask id is contradictory: {said}; pass mask_id= to settle it")
    return next(iter(found.values()))


def _ends(
    config: ModelConfig, family: Family | None, end: int | None, vocab: Mapping[str, int], generation: Json
) -> tuple[int, ...]:
    ends = [*config.eos_ids, *_ids(generation.get("eos_token_id"))] or [*_ids(end)]
    if family is not None and family.turn_end is not None and family.turn_end in vocab:
        ends.append(vocab[family.turn_end])
    elif family is not None and config.mask_id == family.mask_id:  # the published vocabulary, where nobody names it
        ends += _ids(family.turn_end_id)
    return tuple(dict.fromkeys(ends))


def _ids(value: object) -> tuple[int, ...]:
    return (value,) if is_id(value) else tuple(value) if isinstance(value, list | tuple) else ()


def _check(config: ModelConfig) -> None:
    rows, mask = config.embedding_rows, config.mask_id
    if bad := [e for e in config.eos_ids if not 0 <= e < rows]:
        raise DllmError(f"end-of-text id {bad[0]} is outside the {rows} rows of the embedding; pass eos_ids=")
    if mask is None:
        return
    if not 0 <= mask < rows:
        raise DllmError(f"mask id {mask} is outside the {rows} rows of the embedding; pass mask_id=")
    if mask in config.eos_ids:
        raise DllmError(f"mask id {mask} is also an end-of-text id; pass mask_id= or eos_ids=")
    if mask == config.pad_id:
        raise DllmError(f"mask id {mask} is also the padding id; pass mask_id=")
