"""`Model` is what the rest may ask of a model: every class that stands for one has its members."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_cases import model as golden
from scripted import Scripted
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import dllm
from dllm.bench.runtime import Recorder
from dllm.bench.step import Tables
from dllm.errors import DllmError
from dllm.models.model import Model
from dllm.models.transformer import Rows

MEMBERS = {*Model.__annotations__, *(name for name in vars(Model) if not name.startswith("_"))}


def foreign() -> Model:
    sizes = dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return dllm.load(LlamaForCausalLM(LlamaConfig(**sizes)), mask_id=19)


MODELS = {
    "native": lambda: golden("tiny-llada-random"),
    "foreign": foreign,
    "scripted": lambda: Scripted(torch.zeros(3, 5)),
    "tables": lambda: Tables([torch.zeros(2, 5)]),
    "recorder": lambda: Recorder(golden("tiny-llada-random")),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_the_members(name):
    model = MODELS[name]()
    assert isinstance(model, Model) and not [member for member in MEMBERS if not hasattr(model, member)]
    assert (model.new_store(1, 4).nbytes > 0) if model.supports_cache else model.shift in (0, 1)
    if not model.supports_cache:
        with pytest.raises(DllmError, match='use cache="none"'):
            model.new_store(1, 4)
        with pytest.raises(DllmError, match='use cache="none"'):
            model.forward_with(torch.zeros(1, 2, dtype=torch.long), torch.arange(2)[None], kv=True)
    if not model.attention_layers:
        rows = Rows(frozenset({0}), torch.zeros(1, 1, dtype=torch.long), 2)
        with pytest.raises(DllmError, match="this model gives no attention weights"):
            model.forward_with(torch.zeros(1, 2, dtype=torch.long), rows=rows)


class Parrot(Model):
    """The least that a model of one's own needs: sizes, the mask, and a forward."""

    vocab_size = embedding_rows = 6
    max_positions, mask_id = 32, 5

    def forward(self, ids: Tensor, pos: Tensor | None = None, **_: object) -> Tensor:
        return F.one_hot(torch.arange(ids.shape[1]).expand_as(ids) % 5, 6).float()


def test_a_model_of_ones_own_is_decoded():
    model = Parrot()
    assert dllm.generate(model, [1, 2], max_new_tokens=3).tokens == [2, 3, 4]
    assert (model.device.type, model.dtype, model.chat.__doc__ is not None) == ("cpu", torch.float32, True)
    with pytest.raises(DllmError, match="cache"):
        dllm.generate(model, [1, 2], max_new_tokens=3, cache="dual")
    with pytest.raises(DllmError, match="no tokenizer"):
        dllm.generate(model, "text", max_new_tokens=3)
    with pytest.raises(DllmError, match="cannot be compiled"):
        dllm.generate(model, [1, 2], max_new_tokens=3, compile=True)


def test_what_is_no_model_is_refused():
    class Half:
        mask_id = 1

    with pytest.raises(DllmError, match="a model is a name, a folder or a loaded transformers model, not Half"):
        dllm.generate(Half(), [1, 2])
