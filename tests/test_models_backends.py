"""transformers models as they are, several devices, several processes, quantized weights, mixture layers."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch._subclasses.fake_tensor import FakeTensorMode

from dllm.errors import DllmError
from dllm.models.checkpoint import build
from dllm.models.config import ModelConfig, MoEConfig
from dllm.models.foreign import ForeignModel
from dllm.models.hub import load
from dllm.models.moe import OPAQUE, MoE, blocked, grouped, route
from dllm.models.native import NativeModel
from dllm.models.parallel import device_plan
from dllm.models.transformer import Transformer

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
WORDS = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


# --- backend="transformers" -------------------------------------------------------------------------------------------


def random_network(kind: str):
    import transformers

    torch.manual_seed(0)
    extra = {"num_key_value_heads": 2} if kind == "Llama" else {"max_position_embeddings": 64, "type_vocab_size": 1}
    config = getattr(transformers, f"{kind}Config")(
        **WORDS, **extra, eos_token_id=60, pad_token_id=60, bos_token_id=None, attn_implementation="sdpa"
    )
    network = getattr(transformers, f"{kind}For{'CausalLM' if kind == 'Llama' else 'MaskedLM'}")(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_foreign_model(kind, tmp_path):
    network = random_network(kind)
    network.save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu", backend="transformers", mask_id=59)
    assert isinstance(model, ForeignModel) and not model.supports_cache and model.shift == 0
    assert model.mask_id == 59 and model.eos_ids == (60,) and model.vocab_size == 61
    ids = torch.randint(0, 59, (2, 12))
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 59
    first, second = (model.logits(model.forward(x))[:, 0] for x in (ids, changed))
    assert (first[:, :59] - second[:, :59]).abs().max() > 1e-4  # the first token sees the last
    assert (first[:, 59] == -torch.inf).all()


@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_foreign_padding_and_visibility(kind):
    model = load(random_network(kind), device="cpu", mask_id=59)
    ids = torch.randint(0, 59, (2, 12))
    pos = torch.arange(12).expand(2, -1).clone()
    pos[1, 7:] = -1
    out = model.forward(ids, pos)
    assert out.isfinite().all()
    assert (out[1:, :7] - model.forward(ids[1:, :7])).abs().max() < 1e-5
    visible = (torch.arange(12) < 9)[None, None].expand(2, 1, 12)
    assert (model.forward(ids, visible=visible)[:, :9] - model.forward(ids[:, :9])).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_every_attention_of_a_foreign_model_masks_the_same(kind, tmp_path):
    """Eager attention adds its mask, where the others choose by it."""
    model = load(random_network(kind), device="cpu", mask_id=59)
    model.save(tmp_path)
    eager = load(tmp_path, device="cpu", backend="transformers", mask_id=59, attn_implementation="eager")
    passed = random_network(kind)
    passed.set_attn_implementation("eager")
    pos = torch.arange(12).expand(2, -1).clone()
    pos[1, 7:] = -1
    ids, visible = torch.randint(0, 59, (2, 12)), (torch.arange(12) < 9)[None, None].expand(2, 1, 12)
    for other in (eager, load(passed, device="cpu", mask_id=59)):
        assert other.adds_mask and not model.adds_mask
        assert (other.forward(ids, pos) - model.forward(ids, pos))[:, :7].abs().max() < 1e-5
        assert (other.forward(ids, visible=visible) - model.forward(ids, visible=visible))[:, :9].abs().max() < 1e-5
    with pytest.raises(DllmError, match="unknown attn_implementation 'flash_attention_2'"):
        load(tmp_path, device="cpu", backend="transformers", mask_id=59, attn_implementation="flash_attention_2")
    passed.config._attn_implementation = "flex_attention"
    with pytest.raises(DllmError, match="takes no mask of this shape"):
        load(passed, device="cpu", mask_id=59)


def test_foreign_models_have_no_cache():
    model = load(random_network("Llama"), device="cpu", mask_id=59, shift=1)
    assert model.shift == 1
    with pytest.raises(DllmError, match='cache="none"'):
        model.new_store(1, 8)
    with pytest.raises(DllmError, match='cache="none"'):
        model.forward(torch.zeros(1, 4, dtype=torch.long), store=object())


def test_a_foreign_model_replaces_the_checkpoint_whole(tmp_path):
    """transformers' own writer leaves the files of another shape, and reads the old single one first."""
    model = load(random_network("Llama"), device="cpu", mask_id=59)
    for shard_bytes in (10**9, 20_000, 10**9):
        with torch.no_grad():
            model.transformer.model.norm.weight.mul_(2)
        model.save(tmp_path, shard_bytes=shard_bytes)
        again = load(tmp_path, device="cpu", backend="transformers")
        assert again.mask_id == 59
        assert torch.equal(again.transformer.model.norm.weight, model.transformer.model.norm.weight)
        assert (tmp_path / "model.safetensors").exists() == (shard_bytes == 10**9)


def test_foreign_errors(tmp_path):
    with pytest.raises(DllmError, match="mask_id="):
        load(random_network("Llama"), device="cpu")
    with pytest.raises(DllmError, match="no class of its own"):
        load(CHECKPOINTS / "tiny-llada-random", device="cpu", backend="transformers")
    with pytest.raises(DllmError, match="did you mean 'transformers'"):
        load(CHECKPOINTS / "tiny-llada-random", device="cpu", backend="transfomers")
    with pytest.raises(DllmError, match="not int"):
        load(3, device="cpu")


# --- several devices --------------------------------------------------------------------------------------------------


def test_device_map():
    name = CHECKPOINTS / "tiny-llada-random"
    plain = load(name, device="cpu")
    ids = torch.randint(0, 150, (1, 9))
    for plan in ("auto", {"": "cpu"}, {"embed_tokens": "cpu", "layers": "cpu", "norm": "cpu", "lm_head": "cpu"}):
        assert torch.equal(load(name, device="cpu", device_map=plan).forward(ids), plain.forward(ids))
    with pytest.raises(DllmError, match=r"no place for norm\.weight"):
        load(name, device="cpu", device_map={"embed_tokens": "cpu", "layers": "cpu"})
    with pytest.raises(DllmError, match="unknown device_map 'autoo'"):
        load(name, device="cpu", device_map="autoo")
    with pytest.raises(DllmError, match="disk"):
        load(name, device="cpu", device_map={"": "disk"})
    for absent in (17, "cuda:17", "gpu"):
        with pytest.raises(DllmError, match="device"):
            load(name, device="cpu", device_map={"": absent})
    assert torch.equal(load(name, device="cpu", device_map={"": torch.device("cpu")}).forward(ids), plain.forward(ids))


def test_the_longest_name_decides():
    config = load(CHECKPOINTS / "tiny-llada-random", device="cpu").config
    place = device_plan(config, {"": 0, "layers.1": 1, "layers.1.mlp": "cpu"}, None)
    assert place("layers.0.mlp.up_proj.weight") == torch.device("cuda", 0)
    assert place("layers.1.self_attn.q_proj.weight") == torch.device("cuda", 1)
    assert place("layers.1.mlp.up_proj.weight") == torch.device("cpu")


def test_a_spread_model_stores_keys_where_it_computes(monkeypatch):
    """On the CPU alone only the bookkeeping can be seen: tensors are moved, the store never is."""
    model = load(CHECKPOINTS / "tiny-dream-random", device="cpu")
    ids = torch.randint(0, 150, (2, 9))
    pos, visible = torch.arange(9).expand(2, -1), torch.ones(2, 1, 9, dtype=torch.bool)
    stores = [model.new_store(2, 9) for _ in range(2)]
    whole = model.forward(ids, pos, visible=visible, store=stores[0])
    model.transformer.spread = True
    assert torch.equal(model.forward(ids, pos, visible=visible, store=stores[1]), whole)
    for a, b in zip(stores[0].keys, stores[1].keys, strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0
    assert [k.device.type for k in stores[0].keys] == ["cpu"] * model.config.n_layers


# --- several processes ------------------------------------------------------------------------------------------------

SPLIT = ("tiny-llada-random", "tiny-llada-trained", "tiny-llada2-random", "tiny-llada-moe-random", "tiny-sdar-random")


def _one_process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    ids = torch.arange(2 * 12).view(2, 12) * 5 % 150
    pos, visible = torch.arange(12).expand(2, -1), torch.ones(2, 1, 12, dtype=torch.bool)
    results = {}
    for name in SPLIT:
        model = load(CHECKPOINTS / name, device="cpu", device_map="tensor")
        kv = model.new_store(2, 12)
        assert kv.keys[0].shape[1] == model.config.n_kv_heads // 2
        full = model.forward(ids, pos, visible=visible, store=kv)
        step = model.forward(ids[:, 4:8], pos[:, 4:8], visible=visible, store=kv)
        results[name] = (model.logits(full), model.logits(step))
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_tensor_parallel_over_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_one_process, (port, str(tmp_path)), nprocs=2)
    ids = torch.arange(2 * 12).view(2, 12) * 5 % 150
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name in SPLIT:
            model = load(CHECKPOINTS / name, device="cpu")
            full, keep = model.logits(model.forward(ids)), torch.arange(model.vocab_size) != model.mask_id
            assert (results[name][0] - full)[..., keep].abs().max() < 2e-4, name  # logits up to 30 in float32
            assert (results[name][1] - full[:, 4:8])[..., keep].abs().max() < 2e-4, name


def test_tensor_parallel_needs_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(DllmError, match="torchrun"):
        load(CHECKPOINTS / "tiny-llada-random", device="cpu", device_map="tensor")


# --- quantized weights ------------------------------------------------------------------------------------------------


def test_quantized_weights(tmp_path):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    config = ModelConfig("llada", "LLaDAModelLM", 90, 90, 64, 2, 4, 4, 16, 128, mask_id=89, eos_ids=(88,), pad_id=88)
    folder = NativeModel(config).save(tmp_path)
    plain, ids = load(folder, device="cpu"), torch.randint(0, 88, (1, 20))
    expected = plain.forward(ids)
    errors = {}
    for kind in ("int8", "int4"):
        model = load(folder, device="cpu", quantization=kind)
        out = model.forward(ids)
        errors[kind] = float((out - expected).norm() / expected.norm())
        store = model.new_store(1, 20)
        pos, visible = torch.arange(20)[None], torch.ones(1, 1, 20, dtype=torch.bool)
        assert (model.forward(ids, pos, visible=visible, store=store) - out).abs().max() < 1e-5
        assert model.fingerprint() not in (plain.fingerprint(), "") and len(model.fingerprint()) == 16
        with pytest.raises(DllmError, match="cannot be saved"):
            model.save(tmp_path / "again")
    assert 0 < errors["int8"] < 0.02 < errors["int4"] < 0.3
    with pytest.raises(DllmError, match="unknown quantization 'int9'"):
        load(folder, device="cpu", quantization="int9")


# --- mixture of experts -----------------------------------------------------------------------------------------------


def naive(mlp: MoE, x: torch.Tensor) -> torch.Tensor:
    """One token and one expert at a time."""
    flat, bias = x.flatten(0, -2), mlp.gate.expert_bias
    experts, weights = route(flat @ mlp.gate.weight.T, bias, mlp.moe)
    out = torch.zeros_like(flat)
    for t in range(len(flat)):
        for e, w in zip(experts[t].tolist(), weights[t], strict=True):
            gate, up = (flat[t] @ mlp.gate_up_proj[e]).chunk(2)
            out[t] += w * ((torch.nn.functional.silu(gate) * up) @ mlp.down_proj[e])
    return out.view_as(x) + (0 if mlp.shared_experts is None else mlp.shared_experts(x))


ROUTERS = {
    "softmax": MoEConfig(8, 3, 16),
    "renormalised": MoEConfig(8, 3, 16, renormalize=True),
    "grouped": MoEConfig(8, 2, 16, "sigmoid", True, 2.5, 4, 2, expert_bias=True, shared_size=16),
    "idle experts": MoEConfig(40, 2, 16),
    "narrow experts": MoEConfig(4, 2, 5),  # rows that the grouped product does not take
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ROUTERS)
def test_mixture_equals_the_naive_loop(kind, dtype):
    torch.manual_seed(0)
    config = replace(ModelConfig("x", "x", 9, 9, 24, 1, 2, 2, 12, 16), moe=ROUTERS[kind])
    mlp = Transformer(config).layers[0].mlp
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    mlp.to(dtype)
    for shape in ((2, 7, 24), (1, 1, 24)):
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            assert (mlp(x) - naive(mlp, x)).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)
        trained = mlp(x)  # with gradients another product is used
        with torch.no_grad():
            assert (trained - naive(mlp, x)).abs().max() < 1e-5


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_blocks_that_no_routing_changes_equal_sorted_segments(tokens):
    """What an accelerator without a kernel for segments computes, whatever the routing: even, random, one for all."""
    torch.manual_seed(0)
    gate_up, down, x = torch.randn(6, 8, 10).double(), torch.randn(6, 5, 8).double(), torch.randn(tokens, 8).double()
    random = torch.rand(tokens, 6).topk(2, -1).indices
    for experts in (random, torch.arange(2 * tokens).view(tokens, 2) % 6, torch.tensor([[5, 2]]).expand(tokens, -1)):
        assert (blocked(x, experts, gate_up, down) - grouped(x, experts, gate_up, down)).abs().max() < 1e-12
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # asks nothing
            fakes = [mode.from_tensor(t) for t in (x, experts, gate_up, down)]
            assert blocked(*fakes).shape == OPAQUE(*fakes).shape == (tokens, 2, 8)


def test_gradients_of_a_mixture_reach_the_experts_that_were_used():
    torch.manual_seed(0)
    mlp = MoE(8, MoEConfig(6, 2, 5)).double()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    experts = route(x @ mlp.gate.weight.T, None, mlp.moe)[0]
    wanted = [x, mlp.gate.weight, mlp.gate_up_proj, mlp.down_proj]
    ours, theirs = (torch.autograd.grad(out.square().sum(), wanted) for out in (mlp(x), naive(mlp, x)))
    for own, other in zip(ours, theirs, strict=True):
        assert (own - other).abs().max() < 1e-10
    idle = sorted({*range(6)} - {*experts.flatten().tolist()})
    assert idle and not ours[-1][idle].any()


def test_groups_limit_the_choice_and_the_bias_does_not_weigh():
    moe = MoEConfig(4, 1, 8, "sigmoid", False, 1.0, 2, 1, expert_bias=True)
    scores = torch.tensor([[5.0, -5.0, 2.0, 2.0]])  # sigmoid: the first group has the best expert, the second the sum
    assert route(scores, None, moe)[0].item() in (2, 3)
    experts, weights = route(scores, torch.tensor([3.0, 0.0, 0.0, 0.0]), moe)
    assert experts.item() == 0 and torch.allclose(weights, torch.tensor(5.0).sigmoid())


def test_a_large_mixture_takes_no_memory_on_the_meta_device():
    flash = MoEConfig(256, 8, 1024)
    config = ModelConfig("llada2", "LLaDA2MoeModelLM", 157184, 157184, 4096, 32, 32, 4, 128, 9216, moe=flash)
    assert sum(p.numel() for p in build(config).parameters()) > 90e9
