"""Safetensors in and out, with a strict account: every expected tensor once, nothing left over, right shapes, finite.

Tensors are streamed one at a time into parameters allocated in their final dtype and place, so the host never holds
more than the model and one tensor. Rotary tables are no part of a checkpoint: the backbone computes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from dllm.errors import DllmError, first_line
from dllm.models.config import ModelConfig
from dllm.models.family import Family
from dllm.models.files import INDEX, write_json
from dllm.models.layout import Layout, Piece
from dllm.models.transformer import Transformer

DERIVED = re.compile(r"(rotary_emb|rotary_pos_emb)\.(inv_freq|original_inv_freq)$")  # tables that old writers stored
Place = Callable[[str], torch.device]  # parameter name -> where it goes


def build(config: ModelConfig) -> Transformer:
    """A transformer on the meta device: shapes, no memory."""
    with torch.device("meta"):
        return Transformer(config)


def load_weights(
    folder: Path, family: Family, config: ModelConfig, dtype: torch.dtype | None, place: Place
) -> Transformer:
    """A transformer with the weights of `folder`, cast to `dtype` (None: as stored) one tensor at a time.

    Errors: missing, unexpected or duplicated tensors, wrong shapes, truncated files, NaN or infinite values.
    """
    where = stored(folder)
    experts = 0 if config.moe is None else config.moe.n_experts
    for asked, what in ((config.n_layers, "layers"), (experts, "experts")):
        if asked > len(where):  # building them to see that they are absent might never end
            raise DllmError(f"config.json asks for {asked} {what}, but {folder} holds {len(where)} tensors")
    try:
        model, table = build(config), family.layout(config)
    except (RuntimeError, OverflowError) as error:
        raise DllmError(f"config.json asks for an impossible model: {first_line(error)}") from error
    head = _tied_head(family, config)
    account(folder, where, table, head)
    fill(model, table, _stream(where), dtype, place, folder)
    if head is not None and head in where:
        _check_tied_head(head, where[head], model)
    return model


def fill(
    model: Transformer,
    table: Layout,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    place: Place,
    source: object,
    shared: bool = False,
) -> None:
    """Put official tensors in their places of a model on the meta device; those that `table` lacks are passed over.

    shared   a tensor that is a whole parameter, in its dtype and place, becomes it, and is not copied.
    Errors: a wrong shape, NaN or infinite values, by the name of their `source`.
    """
    parameters = dict(model.named_parameters())
    filled: dict[str, Tensor] = {}
    broken: list[str] = []
    for name, tensor in tensors:
        piece = table.get(name)
        if piece is None:  # a tied head that was stored as well
            continue
        _check_shape(name, tensor, part(parameters, piece))
        if not _finite(tensor):
            broken.append(name)
        kind, device = _dtype(piece.parameter, dtype or tensor.dtype), place(piece.parameter)
        if shared and not piece.part and not piece.turned and (tensor.dtype, tensor.device) == (kind, device):
            filled[piece.parameter] = tensor.detach()
            continue
        if piece.parameter not in filled:
            filled[piece.parameter] = torch.empty(parameters[piece.parameter].shape, dtype=kind, device=device)
        part(filled, piece).copy_(tensor)
    if broken:
        raise DllmError(f"NaN or infinite values in {_some(broken)} of {source}")
    for name, value in filled.items():
        assign(model, name, value, parameters[name].requires_grad)


def assign(model: nn.Module, name: str, value: Tensor, requires_grad: bool = True) -> None:
    """Put `value` in the place of a parameter, whatever device that one was on."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=requires_grad))


def save_weights(model: Transformer, family: Family, folder: Path, shard_bytes: int = 5 * 10**9) -> None:
    """Write the official tensors; above `shard_bytes` as numbered shards with an index."""
    from huggingface_hub import split_state_dict_into_shards_factory

    parameters, table = dict(model.named_parameters()), family.layout(model.config)
    shards = split_state_dict_into_shards_factory(
        table,
        get_storage_size=lambda piece: part(parameters, piece).nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in shards.filename_to_tensors.items():
        tensors = {name: _copied(part(parameters, table[name])) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        write_json(folder / INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})


def part(parameters: Mapping[str, Tensor], piece: Piece) -> Tensor:
    """The view of a parameter that an official tensor holds."""
    value = parameters[piece.parameter].detach()
    value = value[piece.part] if piece.part else value
    return value.T if piece.turned else value


def _copied(value: Tensor) -> Tensor:
    return value.cpu().clone(memory_format=torch.contiguous_format)


def stored(folder: Path) -> dict[str, Path]:
    """The file of every tensor. Errors: a tensor in two files, or not where the index says."""
    where: dict[str, Path] = {}
    for file, indexed in _files(folder):
        with opened(file) as shard:
            names = [n for n in shard.keys() if not DERIVED.search(n)]  # noqa: SIM118
        if twice := [n for n in names if n in where]:
            raise DllmError(f"{_some(twice)} stored twice: in {where[twice[0]].name} and in {file.name}")
        if indexed is not None and (absent := indexed - set(names)):
            raise DllmError(f"{INDEX} places {_some(absent)} in {file.name}, which does not hold it")
        where.update(dict.fromkeys(names, file))
    return where


def accounted(folder: Path, where: dict[str, Path], expected: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of files (see `stored`), one at a time. Errors: they are not exactly those of the names and shapes
    that are expected, or hold NaN or infinite values."""
    account(folder, where, expected)
    for name, tensor in _stream(where):
        _check_shape(name, tensor, expected[name])
        if not _finite(tensor):
            raise DllmError(f"NaN or infinite values in {name} of {folder}")
        yield name, tensor


def account(folder: object, where: Iterable[str], table: Iterable[str], optional: str | None = None) -> None:
    """Errors: `where` does not hold exactly the tensors of `table`."""
    missing = {*table} - {*where}
    extra = {*where} - {*table} - {optional}
    if missing or extra:
        parts = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("also holds", extra)) if names]
        raise DllmError(f"the checkpoint {folder} {' and '.join(parts)}")


def _files(folder: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """Weight files with the tensors that the index places in each (None without an index)."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        try:
            weight_map = dict[str, str](json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise DllmError(f"{index} is not a shard index: {error}") from error
        if single.is_file() and single.name not in weight_map.values():
            raise DllmError(f"{folder} holds {single.name} and {INDEX}, two sets of weights: remove one of them")
        for name in sorted(set(weight_map.values())):
            file = folder / name
            if file.parent != folder or not file.is_file():
                raise DllmError(f"the shard {name} named in {index} is absent")
            yield file, {t for t, f in weight_map.items() if f == name and not DERIVED.search(t)}
    elif single.is_file():
        yield single, None
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise DllmError(f"{folder} holds pickled weights, which can run code when read; convert them to safetensors")
    else:
        raise DllmError(f"{folder} holds no model.safetensors and no {INDEX}")


def opened(file: Path) -> safe_open:
    """A file of weights to read from. Errors: it is none."""
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise DllmError(f"{file} is truncated or no safetensors file: {first_line(error)}") from error


def _stream(where: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    large = sum(file.stat().st_size for file in set(where.values())) > 10**9
    with tqdm(total=len(where), desc="loading", unit="tensor", disable=not large) as bar:
        for file in dict.fromkeys(where.values()):
            with opened(file) as shard:
                for name in (n for n, f in where.items() if f == file):
                    yield name, shard.get_tensor(name)
                    bar.update()


def _check_shape(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        shape, asked = tuple(tensor.shape), tuple(expected.shape)
        raise DllmError(f"{name} has shape {shape}, the configuration asks for {asked}")


def _finite(tensor: Tensor) -> bool:
    """A sum is finite iff its terms are, unless it overflows; only then look at every element."""
    total = tensor.sum(dtype=torch.float32 if tensor.dtype != torch.float64 else None)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _dtype(parameter: str, dtype: torch.dtype) -> torch.dtype:
    """The choice of experts is sensitive: its bias stays in float32."""
    return torch.float32 if parameter.endswith("expert_bias") and dtype.itemsize < 4 else dtype


def _tied_head(family: Family, config: ModelConfig) -> str | None:
    """The name under which some writers store the head of a tied model a second time."""
    if not config.tied:
        return None
    return next(n for n, p in family.layout(replace(config, tied=False)).items() if p.parameter == "lm_head.weight")


def _check_tied_head(name: str, file: Path, model: Transformer) -> None:
    with opened(file) as shard:
        head = shard.get_tensor(name)
    embedding = model.embed_tokens.weight.detach()
    if head.shape != embedding.shape or not torch.equal(head.to(embedding), embedding):
        raise DllmError(f"the configuration ties head and embedding, but {name} differs from the embedding")


def _some(names: Iterable[str], limit: int = 4) -> str:
    """The first few names and how many more."""
    every = sorted(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more
