"""Linear layers in the order of factors that is fast for few rows give what the usual order gives."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dllm.models import linear as few

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def turned(monkeypatch):
    """As on a machine where it pays, whatever this one is."""
    monkeypatch.setattr(few, "turned", lambda: True)


@pytest.mark.parametrize("shape", [(512, 256), (256, 512), (70000, 1)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_every_number_of_rows_gives_what_the_usual_order_gives(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias)
    fast = nn.Sequential(deepcopy(layer))
    few.fast_for_few(fast)
    assert type(fast[0]) is few.FewRows and fast[0].weight.data_ptr() != layer.weight.data_ptr()
    for size in ((1,), (2,), (3,), (1, 4), (2, 2), (7,), (9,), (0,), ()):
        x = torch.randn(*size, shape[1])
        out, expected = fast(x), layer(x)
        assert out.shape == expected.shape and torch.allclose(out, expected, atol=1e-5)
        assert out.is_contiguous()
    x = torch.randn(2, 6, shape[1])[:, ::3]
    assert torch.allclose(fast(x), layer(x), atol=1e-5)
    again = deepcopy(fast)
    again.load_state_dict(nn.Sequential(layer).state_dict())
    assert type(again[0]) is few.FewRows and torch.allclose(again(x), layer(x), atol=1e-5)


def test_gradients_are_those_of_the_usual_order():
    weight, x = torch.randn(512, 256, requires_grad=True), torch.randn(3, 256, requires_grad=True)
    found, expected = (torch.autograd.grad(f(x, weight).square().sum(), (x, weight)) for f in (few.linear, F.linear))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-2) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "layer", [nn.Linear(16, 16), nn.Linear(512, 256, dtype=torch.float64), nn.Linear(512, 256, dtype=torch.bfloat16)]
)
def test_small_matrices_and_other_dtypes_stay_as_they_are(layer):
    few.fast_for_few(layer)
    assert type(layer) is nn.Linear
    x = torch.randn(2, layer.in_features).to(layer.weight)
    assert torch.equal(few.linear(x, layer.weight, layer.bias), layer(x))


def test_nothing_is_changed_where_the_usual_order_is_as_fast(monkeypatch):
    monkeypatch.setattr(few, "turned", lambda: False)
    layer = nn.Linear(512, 256)
    few.fast_for_few(layer)
    assert type(layer) is nn.Linear
    x = torch.randn(2, 512)
    assert torch.equal(few.linear(x, layer.weight, layer.bias), layer(x))
