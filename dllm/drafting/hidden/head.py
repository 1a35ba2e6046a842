"""A head and its weights: from a folder or a module of transformers, with a strict account of the tensors. No code that
comes with a checkpoint is run."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dllm.drafting.hidden.backbone import Backbone, Rotary
from dllm.drafting.hidden.config import HeadConfig, Raw, read_head
from dllm.drafting.hidden.order import order_head
from dllm.errors import DllmError, first_line
from dllm.models.checkpoint import account, accounted, stored
from dllm.models.linear import fast_for_few

# how formats call what z-lab calls otherwise
RENAMED = (
    (r"^encoder\.fc\.", "fc."),
    (r"^encoder\.output_norm_enc\.", "hidden_norm."),
    (r"^context_norm\.", "hidden_norm."),
    (r"^final_norm\.", "norm."),
    (r"^logit_head\.", ""),
)
RIGHT = "markov_head.markov_w2.weight"  # of a head that drafts some of the verifier's ids: their rows alone
UNUSED = re.compile(r"^(fc|context_proj)\.")  # of a head whose layers mix the taps themselves


class Head(nn.Module):
    """The network, and what of a head is not the verifier's."""

    def __init__(self, config: HeadConfig, rotary: Rotary) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, rotary)
        vocab, hidden = config.vocab or 0, config.hidden_size
        if not vocab and any(x is not None for x in (config.order, config.own, config.rows, config.slim)):
            raise DllmError("config.json of a drafter with tables over the vocabulary needs vocab_size")
        self.order = order_head(config, vocab)
        self.confidence: nn.Linear | None = None
        if config.order is not None and config.order.confidence:
            token = config.order.rank if config.order.confidence == "hidden+token" else 0
            self.confidence = nn.Linear(hidden + token, 1)
        self.embed_tokens = nn.Embedding(vocab, hidden) if config.own is not None else None
        self.lm_head_down = nn.Linear(hidden, config.slim, False) if config.slim is not None else None
        width, columns = config.slim or hidden, config.columns
        self.lm_head = nn.Linear(width, columns, False) if columns is not None else None
        self.to_verifier: Tensor | None = None  # (n,) the verifier's ids of a reduced vocabulary, on the host
        self.elsewhere: dict[tuple[torch.device, torch.dtype], Head] = {}

    def at(self, device: torch.device, dtype: torch.dtype) -> Head:
        """The head on a device and in a dtype. This one stays as it was loaded, for verifiers of other dtypes."""
        own, key = self.backbone.norm.weight, (device, dtype)
        if (own.device, own.dtype) == key:
            return self
        if key not in self.elsewhere:
            self.elsewhere[key] = copy.deepcopy(self, {id(self.elsewhere): {}}).to(device, dtype)
        return self.elsewhere[key]

    def names(self) -> dict[str, str]:
        """Official name -> parameter."""
        prefix = "" if self.order is None else self.order.prefix
        begins = {"backbone.": "", "order.": prefix, "confidence.": "confidence_head.proj."}
        out = {}
        for parameter, _ in self.named_parameters():
            part = next((part for part in begins if parameter.startswith(part)), "")
            out[begins.get(part, "") + parameter.removeprefix(part)] = parameter
        return out

    def expected(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by official name; the values show the shapes."""
        parameters, c = dict(self.named_parameters()), self.config
        out: dict[str, Tensor] = {name: parameters[parameter] for name, parameter in self.names().items()}
        own = c.rows if c.own is None else c.own
        if own is not None and c.vocab is not None and own < c.vocab:
            out |= {"d2t": torch.empty(own, device="meta"), "t2d": torch.empty(c.vocab, device="meta")}
        if c.rows is not None and RIGHT in out:
            out[RIGHT] = out[RIGHT][: c.rows]
        return out


def head_of_folder(folder: Path, raw: Raw, dtype: torch.dtype | None, device: torch.device) -> Head:
    """The head of a checkpoint. Errors: DllmError for missing, unexpected, misshapen or NaN tensors, pickles, and
    configurations that are not hosted."""
    head, found = _empty(raw, str(folder)), stored(folder)
    official = _official(found, head)
    if len(head.config.layers) > len(found):
        raise DllmError(
            f"config.json asks for {len(head.config.layers)} layers, but {folder} holds {len(found)} tensors"
        )
    expected = head.expected()
    # names as they are stored, so that errors say them
    shapes = {official.get(name, name): value for name, value in expected.items()}
    kept = {name: file for name, file in found.items() if name in official.values()}
    tensors = {name: tensor for name, tensor in accounted(folder, kept, shapes)}
    return _filled(head, {name: tensors[official.get(name, name)] for name in expected}, dtype, device)


def head_of_module(module: nn.Module, raw: Raw) -> Head:
    """The head that a loaded module of transformers, or of a head's own code, is; tensors are shared. Errors: as of a
    folder."""
    name = type(module).__name__
    head, state = _empty(raw, name), module.state_dict()
    official = _official(state, head)
    expected = head.expected()
    account(name, official, expected)
    for key, value in expected.items():
        if state[official[key]].shape != value.shape:
            shape, asked = tuple(state[official[key]].shape), tuple(value.shape)
            raise DllmError(f"{official[key]} of {name} has shape {shape}, its configuration asks for {asked}")
    first = next(module.parameters())
    return _filled(head, {key: state[official[key]] for key in expected}, first.dtype, first.device)


def _empty(raw: Raw, name: str) -> Head:
    """A head on the meta device."""
    config = read_head(raw)
    try:
        rotary = Rotary(config.rope, config.head_dim)
        with torch.device("meta"):
            return Head(config, rotary)
    except DllmError:
        raise
    except Exception as error:  # whatever torch and transformers raise for sizes that do not go together
        raise DllmError(f"the configuration of {name} asks for an impossible drafter: {first_line(error)}") from error


def _official(names: Iterable[str], head: Head) -> dict[str, str]:
    """Official name -> name as stored, without what a head does not use."""
    out: dict[str, str] = {}
    for name in names:
        official = name
        for pattern, to in RENAMED:
            official = re.sub(pattern, to, official)
        if not (head.config.fused and UNUSED.match(official)):
            out[name if official in out else official] = name
    return out


def _filled(head: Head, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device) -> Head:
    names, tensors = head.names(), dict(tensors)
    if "d2t" in tensors:
        offsets, marks = tensors["d2t"].cpu().long(), tensors["t2d"].cpu().bool()
        ids = torch.arange(len(offsets)) + offsets
        if not torch.equal(ids, marks.nonzero()[:, 0]):
            raise DllmError("d2t and t2d of a drafter name different ids of the verifier: the checkpoint is damaged")
        head.to_verifier = ids
        if head.config.rows is not None and RIGHT in tensors:
            right = tensors[RIGHT]
            tensors[RIGHT] = right.new_zeros(len(marks), right.shape[1]).index_copy(0, ids.to(right.device), right)
    head.load_state_dict(
        {names[name]: tensor.to(device, dtype or tensor.dtype) for name, tensor in tensors.items() if name in names},
        assign=True,
    )
    fast_for_few(head)
    return head.eval().requires_grad_(False)
