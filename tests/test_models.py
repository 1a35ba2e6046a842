"""The backbone against official logits, against native transformers classes, and against itself through the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripted import tiny as random_model
from torch import Tensor

from dllm.models.config import ModelConfig
from dllm.models.hub import load
from dllm.models.native import NativeModel
from dllm.models.transformer import KVStore, Transformer

GOLDEN = Path(__file__).parent / "golden"
MASKS = {"tiny-fast-dllm-v2-random": 158}  # not in its config: a call parameter of the reference
CHECKPOINTS = sorted(p.parent.name for p in GOLDEN.glob("given/*/logits.json"))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def golden(name: str) -> list[tuple[dict, Tensor]]:
    described = json.loads((GOLDEN / "given" / name / "logits.json").read_text())
    tensors = load_file(GOLDEN / "given" / name / "logits.safetensors")
    return [(e, tensors[e["raw_key"]]) for e in described["entries"]]


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_official_logits(name, dtype):
    for entry, expected in golden(name):
        rule = entry["attention"]
        block = rule["block_causal"] if isinstance(rule, dict) else None
        options = {"dtype": dtype, "device": "cpu", "mask_id": MASKS.get(name), "block_size": block}
        model = load(GOLDEN / "checkpoints" / name, **options)
        ids = torch.tensor(entry["input_ids"])
        real = torch.ones_like(ids) if entry["attention_mask"] is None else torch.tensor(entry["attention_mask"])
        pos = torch.where(real > 0, real.cumsum(1) - 1, -1)
        logits = model.transformer.head(model.forward(ids, pos))
        stored = torch.tensor(entry["positions"])
        seen = real[:, stored].bool()
        error = (logits[:, stored] - expected[..., : model.vocab_size]).abs()[seen].max()
        # float32 alone is off by 1.15e-4 in one logit of the random LLaDA (|logit| up to 30, products in float32)
        assert error < (1e-4 if dtype == "float64" else 2e-4), (name, entry["name"], error)


# --- native twins -----------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 60, "pad_token_id": 60,
    "bos_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
TWINS = {  # our architecture: (transformers class, its config class, its arguments, what our config.json adds)
    "DreamModel": ("Qwen2", {}, {"model_type": "Dream"}),
    "Fast_dLLM_QwenForCausalLM": ("Qwen2", {}, {"model_type": "Fast_dLLM_Qwen", "bd_size": 8}),
    "SDARForCausalLM": ("Qwen3", {"head_dim": 16}, {"model_type": "sdar", "block_size": 4}),
    "SDARMoeForCausalLM": ("Qwen3Moe", {**MOE, "norm_topk_prob": True}, {"model_type": "sdar_moe", "block_size": 4}),
    "LLaDAMoEModelLM": (
        "Qwen3Moe",
        {**MOE, "norm_topk_prob": False, "head_dim": 8},
        {"model_type": "llada", "expert_intermediate_size": 16, "dense_intermediate_size": 48, "qk_layernorm": True},
    ),
    "ILLaDAForCausalLM": ("Llama", {"tie_word_embeddings": True}, {"model_type": "illada"}),
    "LlamaForCausalLM": ("Llama", {}, {}),
    "Qwen3ForCausalLM": ("Qwen3", {"head_dim": 16}, {}),
}


def twin(architecture: str, folder: Path):
    """A random transformers model and our model loaded from its weights under our family's config."""
    import transformers

    name, arguments, ours = TWINS[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **arguments, attn_implementation="sdpa")
    native = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in native.parameters():  # larger than the usual 0.02, so that every term shows
        torch.nn.init.normal_(parameter, std=0.2)
    native.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"architectures": [architecture], "mask_token_id": 59, **ours}
    values |= MOE if "num_experts" in arguments else {}
    (folder / "config.json").write_text(json.dumps(values))
    return native, load(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("architecture", TWINS)
def test_native_twin(architecture, tmp_path):
    native, model = twin(architecture, tmp_path)
    ids = torch.randint(0, 59, (2, 21), generator=torch.Generator().manual_seed(1))
    rule = {}
    if model.block_size is not None:
        block = torch.arange(21) // model.block_size
        rule["attention_mask"] = (block[None] <= block[:, None]).expand(2, 1, 21, 21)
    elif not model.config.causal:
        native.config.is_causal = False
    with torch.no_grad():
        expected = native(ids, use_cache=False, **rule).logits
        logits = model.transformer.head(model.forward(ids))
    assert (logits - expected).abs().max() < 1e-5


def test_llada_equals_llama_with_renamed_weights(tmp_path):
    native, _ = twin("LlamaForCausalLM", tmp_path)
    native.config.is_causal = False
    names = {
        "model.embed_tokens": "embed_tokens", "model.norm": "norm", "model.layers": "layers", "lm_head": "lm_head",
    }  # fmt: skip
    config = replace(load(tmp_path, device="cpu").config, family="llada", architecture="LLaDAModelLM", causal=False)
    model = NativeModel(replace(config, mask_id=59, shift=0, rope_full_precision=True, raw={}))
    state = {}
    for name, value in native.state_dict().items():
        old = next(o for o in names if name.startswith(o))
        state[names[old] + name[len(old) :]] = value
    for layer in (f"layers.{i}" for i in range(config.n_layers)):
        for fused, parts in (("self_attn.{}qkv_proj", "qkv"), ("mlp.{}gate_up_proj", ("gate", "up"))):
            rows = [state.pop(f"{layer}.{fused.partition('{')[0]}{part}_proj.weight") for part in parts]
            state[f"{layer}.{fused.format('')}.weight"] = torch.cat(rows)
    model.transformer.load_state_dict(state)
    again = load(model.save(tmp_path / "llada"), device="cpu")
    assert again.config.architecture == "LLaDAModelLM" and again.eos_ids == (60,) and again.mask_id == 59
    ids = torch.randint(0, 59, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = native(ids, use_cache=False).logits
    assert (again.transformer.head(again.forward(ids)) - expected).abs().max() < 1e-5


def test_causal_twin_is_saved_as_a_plain_llama(tmp_path):
    from transformers import AutoModelForCausalLM

    config = ModelConfig(
        "causal", "LlamaForCausalLM", 61, 61, 32, 2, 4, 2, 8, 48, causal=True, shift=1, eos_ids=(60,), pad_id=60
    )
    model = NativeModel(config)
    native = AutoModelForCausalLM.from_pretrained(model.save(tmp_path))
    assert type(native).__name__ == "LlamaForCausalLM"
    ids = torch.randint(0, 59, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (native(ids).logits - model.transformer.head(model.forward(ids))).abs().max() < 1e-5


# --- the cached forward -----------------------------------------------------------------------------------------------

N, L = 3, 24


tiny = partial(random_model, layers=3, std=0.25)


def sample_ids(n: int = N, length: int = L, seed: int = 4) -> Tensor:
    return torch.randint(0, 39, (n, length), generator=torch.Generator().manual_seed(seed))


def positions(n: int = N, length: int = L) -> Tensor:
    return torch.arange(length).expand(n, -1)


def everything(n: int = N, slots: int = L) -> Tensor:
    return torch.ones(n, 1, slots, dtype=torch.bool)


def filled(model: NativeModel, ids: Tensor) -> tuple[KVStore, Tensor]:
    n, length = ids.shape
    store = model.new_store(n, length)
    return store, model.forward(ids, positions(n, length), visible=everything(n, length), store=store)


def stored(store: KVStore) -> list[Tensor]:
    """What can be read: without the spare slot."""
    return [t[:, :, : store.slots] for t in (*store.keys, *store.values)]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance


@pytest.mark.parametrize("switches", [{}, {"block_size": 8}, {"causal": True}], ids=["full", "block", "causal"])
def test_unchanged_input_through_the_cache(switches):
    """Prefix and dual steps on the tokens of the refresh reproduce the full forward."""
    model, ids = tiny(**switches), sample_ids()
    full = model.forward(ids)
    store, refreshed = filled(model, ids)
    close(refreshed, full)
    for lo, hi in ((8, L), (8, 16), (5, 9)):
        step = model.forward(ids[:, lo:hi], positions()[:, lo:hi], visible=everything(), store=store)
        close(step, full[:, lo:hi])


def test_one_layer_stays_exact_whatever_changes():
    """Keys and values of the first layer depend on a token's own id alone."""
    model, ids = tiny(layers=1), sample_ids()
    store, _ = filled(model, ids)
    changed = ids.clone()
    changed[:, 8:16] = sample_ids(seed=5)[:, 8:16]
    step = model.forward(changed[:, 8:16], positions()[:, 8:16], visible=everything(), store=store)
    close(step, model.forward(changed)[:, 8:16])


def test_deeper_models_are_stale():
    model, ids = tiny(), sample_ids()
    store, _ = filled(model, ids)
    changed = ids.clone()
    changed[:, 8:16] = sample_ids(seed=5)[:, 8:16]
    step = model.forward(changed[:, 8:16], positions()[:, 8:16], visible=everything(), store=store)
    assert (step - model.forward(changed)[:, 8:16]).abs().max() > 1e-3


@pytest.mark.parametrize("ragged", [False, True])
def test_block_causal_incremental_equals_full(ragged):
    """Clean blocks committed one by one, with noisy forwards in between that keep nothing."""
    model, ids = tiny(block_size=4), sample_ids()
    full, store = model.forward(ids), model.new_store(N, L)
    start = torch.tensor([0, 8, 4]) if ragged else torch.zeros(N, dtype=torch.long)  # rows are at different blocks
    for row, blocks in enumerate(start.tolist()):
        lane = torch.tensor([row])
        for lo in range(0, blocks, 4):
            pos = torch.arange(lo, lo + 4)[None]
            model.forward(ids[lane, lo : lo + 4], pos, lane=lane, visible=everything(1, lo + 4), store=store)
    for step in range(3):
        pos = start[:, None] + 4 * step + torch.arange(4)
        seen = (torch.arange(L)[None, None] < pos[:, -1, None, None] + 1).expand(N, 1, L)
        noisy = torch.full((N, 4), 39)
        none = torch.zeros(N, 4, dtype=torch.bool)
        model.forward(noisy, pos, keep=none, visible=seen, store=store)
        clean = ids.gather(1, pos)
        close(model.forward(clean, pos, visible=seen, store=store), full.gather(1, pos[..., None].expand(-1, -1, 32)))


def test_rows_at_different_positions_with_padding_queries():
    """Rows drift apart: each refreshes another window, the shorter one padded with -1; rows as if alone."""
    model, ids = tiny(), sample_ids()
    store, _ = filled(model, ids)
    alone = [KVStore(tuple(k[i : i + 1].clone() for k in store.keys), tuple(v[i : i + 1].clone() for v in store.values))
             for i in range(N)]  # fmt: skip
    windows = [(2, 8), (10, 12), (0, 5)]
    fed = sample_ids(seed=6)
    pos, tokens = torch.full((N, 6), -1), torch.zeros(N, 6, dtype=torch.long)
    for i, (lo, hi) in enumerate(windows):
        pos[i, : hi - lo], tokens[i, : hi - lo] = torch.arange(lo, hi), fed[i, lo:hi]
    visible = everything()
    visible[1, :, 20:] = False
    out = model.forward(tokens, pos, visible=visible, store=store)
    assert out.isfinite().all()
    for i, (lo, hi) in enumerate(windows):
        row = model.forward(fed[i : i + 1, lo:hi], positions(1)[:, lo:hi], visible=visible[i : i + 1], store=alone[i])
        close(out[i : i + 1, : hi - lo], row)
        for together, single in zip(stored(store), stored(alone[i]), strict=True):
            close(together[i : i + 1], single)


def test_padded_rows_equal_the_same_rows_alone():
    for switches in ({}, {"block_size": 4}, {"causal": True}):
        model, ids = tiny(**switches), sample_ids()
        lengths = (24, 15, 7)
        pos = torch.stack([positions(1)[0].where(torch.arange(L) < n, -1) for n in lengths])
        out = model.forward(ids, pos)
        assert out.isfinite().all()
        for i, n in enumerate(lengths):
            close(out[i : i + 1, :n], model.forward(ids[i : i + 1, :n]))


def test_borrowed_and_kept_tokens_are_told_apart():
    """fresh without keep acts for one forward and leaves the store as it was."""
    model, ids = tiny(), sample_ids()
    store, _ = filled(model, ids)
    untouched = KVStore(tuple(k.clone() for k in store.keys), tuple(v.clone() for v in store.values))
    pos, tokens = positions()[:, 8:16], sample_ids(seed=7)[:, 8:16]
    keep = torch.zeros(N, 8, dtype=torch.bool)
    borrowed = model.forward(tokens, pos, keep=keep, visible=everything(), store=store)
    for old, new in zip(stored(untouched), stored(store), strict=True):
        assert torch.equal(old, new)
    keep[:, 2:5] = True
    mixed = model.forward(tokens, pos, keep=keep, visible=everything(), store=store)
    close(mixed, borrowed)
    for old, new in zip(stored(untouched), stored(store), strict=True):
        changed = (old != new).any(-1).any(1)
        assert torch.equal(changed.nonzero()[:, 1].unique(), torch.tensor([10, 11, 12]))
    whole = model.forward(tokens, pos, visible=everything(), store=untouched)
    close(whole, borrowed)


@pytest.mark.parametrize("switches", [{}, {"block_size": 8}], ids=["full", "block"])
def test_private_tokens_have_their_own_columns(switches):
    """A token that is neither fresh nor kept is seen only where its own column is visible."""
    model, ids = tiny(**switches), sample_ids()
    store, _ = filled(model, ids)
    other = sample_ids(seed=8)[:, 8:16]
    # the shadow alone, hiding the stored slots that it stands for, is the borrowed forward
    visible = torch.ones(N, 1, L + 8, dtype=torch.bool)
    visible[:, :, 8:16] = False
    none = torch.zeros(N, 8, dtype=torch.bool)
    shadow = model.forward(other, positions()[:, 8:16], fresh=none, visible=visible, store=store)
    expected = model.forward(other, positions()[:, 8:16], keep=none, visible=everything(), store=store)
    close(shadow, expected)
    # and unseen by the others it changes nothing for them
    both = torch.cat([ids[:, 8:16], other], 1)
    pos = positions()[:, 8:16].repeat(1, 2)
    fresh = torch.arange(16).expand(N, -1) < 8
    visible = torch.ones(N, 16, L + 16, dtype=torch.bool)
    visible[:, :, L:] = False
    visible[:, 8:, 8:16] = False
    visible[:, 8:, L + 8 :] = True
    packed = model.forward(both, pos, fresh=fresh, visible=visible, store=store)
    close(packed[:, :8], model.forward(ids)[:, 8:16])
    close(packed[:, 8:], expected)


def test_branches_packed_along_the_sequence_equal_separate_rows():
    """R guesses about one row: as R rows that read one lane, or packed in one row with private columns."""
    model, ids = tiny(), sample_ids(1)
    store, _ = filled(model, ids)
    branches = sample_ids(4, 6, seed=9)
    pos = torch.arange(6, 12).expand(4, -1)
    lane, none = torch.zeros(4, dtype=torch.long), torch.zeros(4, 6, dtype=torch.bool)
    rows = model.forward(branches, pos, keep=none, lane=lane, visible=everything(4), store=store)
    visible = torch.zeros(1, 24, L + 24, dtype=torch.bool)
    visible[:, :, :6] = visible[:, :, 12:L] = True
    for b in range(4):
        visible[:, 6 * b : 6 * b + 6, L + 6 * b : L + 6 * b + 6] = True
    packed = model.forward(
        branches.reshape(1, -1), pos.reshape(1, -1), fresh=none.reshape(1, -1), visible=visible, store=store
    )
    close(packed.view(4, 6, -1), rows)
    for b in range(4):
        full = tiny(layers=1).config  # same sizes; the branch alone, on a copy of the lane
        assert full.head_dim == model.config.head_dim
        copy = KVStore(tuple(k.clone() for k in store.keys), tuple(v.clone() for v in store.values))
        close(rows[b : b + 1], model.forward(branches[b : b + 1], pos[:1], visible=everything(1), store=copy))


def test_lanes_in_any_order():
    model, ids = tiny(), sample_ids()
    store, full = filled(model, ids)
    lane = torch.tensor([2, 0])
    step = model.forward(ids[lane, 4:9], positions(2)[:, 4:9], lane=lane, visible=everything(2), store=store)
    close(step, full[lane, 4:9])
    tokens = sample_ids(seed=11)[lane, 4:9]
    model.forward(tokens, positions(2)[:, 4:9], lane=lane, visible=everything(2), store=store)
    expected = filled(model, ids)[0]
    for i in range(2):
        one = torch.tensor([int(lane[i])])
        model.forward(tokens[i : i + 1], positions(1)[:, 4:9], lane=one, visible=everything(1), store=expected)
    for a, b in zip(stored(store), stored(expected), strict=True):
        close(a, b)


def slowly(model: NativeModel, ids, pos, fresh, keep, visible, lane, store: KVStore) -> Tensor:
    """The cached forward by its definition, one row, one layer and one query at a time."""
    net, config = model.transformer, model.config
    block = 1 if config.causal else config.block_size
    x, rotate = net.embed_tokens(ids), net._rotation(pos, torch.float64)
    slots = visible.shape[-1] - ids.shape[1] * bool((~fresh & (pos >= 0)).any())
    for i, layer in enumerate(net.layers):
        attention, h = layer.self_attn, layer.input_layernorm(x)
        projected = attention.qkv_proj(h).unflatten(-1, (-1, config.head_dim))
        q, k, v = projected.split([config.n_heads, config.n_kv_heads, config.n_kv_heads], 2)
        q, k = rotate(q), rotate(k)
        out = torch.zeros(*ids.shape, config.n_heads, config.head_dim, dtype=torch.float64)
        for n in range(len(ids)):
            real = [j for j in range(ids.shape[1]) if pos[n, j] >= 0]
            keys, values = store.keys[i][lane[n]].clone(), store.values[i][lane[n]].clone()  # (kv_heads, slots, d)
            for j in real:
                if fresh[n, j]:
                    keys[:, pos[n, j]], values[:, pos[n, j]] = k[n, j], v[n, j]
                if keep[n, j]:
                    store.keys[i][lane[n], :, pos[n, j]], store.values[i][lane[n], :, pos[n, j]] = k[n, j], v[n, j]
            at = torch.cat([torch.arange(slots), pos[n]])[: visible.shape[-1]]
            keys = torch.cat([keys[:, :slots], k[n].transpose(0, 1)], 1)[:, : visible.shape[-1]]
            values = torch.cat([values[:, :slots], v[n].transpose(0, 1)], 1)[:, : visible.shape[-1]]
            for j in real:
                seen = visible[n, j if visible.shape[1] > 1 else 0] & (at >= 0)
                seen = seen if block is None else seen & (at // block <= pos[n, j] // block)
                for head in range(config.n_heads):
                    of = head * config.n_kv_heads // config.n_heads
                    scores = keys[of, seen] @ q[n, j, head] / config.head_dim**0.5
                    out[n, j, head] = scores.softmax(0) @ values[of, seen]
        x = x + attention.o_proj(out.flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return net.norm(x)


@pytest.mark.parametrize("seed", range(24))
def test_any_mixture_of_fresh_kept_private_and_padding_tokens(seed):
    """Random flags, positions, lanes and masks against the slow definition; outputs and what stays in the store."""
    g = torch.Generator().manual_seed(seed)

    def coin(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g) < 0.6

    model = tiny(layers=2, **[{}, {"block_size": 4}, {"causal": True}][seed % 3])
    lanes, rows, slots, q = 3, 1 + seed % 3, 12, 5
    store = model.new_store(lanes, slots)
    for side in store[:2]:
        for t in side:
            t.normal_(generator=g)
    pos = torch.stack([torch.randperm(slots, generator=g)[:q] for _ in range(rows)])
    pos = torch.where(coin(rows, q) | (torch.arange(q) == 0), pos, -1) if seed % 2 else pos
    shared = seed % 4 == 3
    lane = torch.full((rows,), 1) if shared else torch.randperm(lanes, generator=g)[:rows]
    fresh = coin(rows, q) if seed % 5 else torch.ones(rows, q, dtype=torch.bool)
    keep = fresh & coin(rows, q) if not shared else torch.zeros(rows, q, dtype=torch.bool)
    private = bool((~fresh & (pos >= 0)).any())
    visible = coin(rows, q if seed % 7 else 1, slots + q * private)
    for n in range(rows):  # every query sees itself at least
        for j in range(q):
            column = int(pos[n, j]) if fresh[n, j] else slots + j
            visible[n, j if visible.shape[1] > 1 else 0, column] = True
    ids = torch.randint(0, 39, (rows, q), generator=g)
    copy = KVStore(tuple(t.clone() for t in store.keys), tuple(t.clone() for t in store.values))
    with torch.no_grad():
        expected = slowly(model, ids, pos, fresh, keep, visible, lane, copy)
    out = model.forward(ids, pos, fresh=fresh, keep=keep, visible=visible, lane=lane, store=store)
    assert out.isfinite().all()
    close(out[pos >= 0], expected[pos >= 0])
    for a, b in zip(stored(store), stored(copy), strict=True):
        close(a, b)


def test_only_the_first_slots_are_read():
    model, ids = tiny(), sample_ids()
    store, _ = filled(model, ids)
    seen = torch.arange(L)[None, None].expand(N, 1, L) < 12
    narrow = model.forward(ids[:, 4:9], positions()[:, 4:9], visible=everything(N, 12), store=store)
    close(narrow, model.forward(ids[:, 4:9], positions()[:, 4:9], visible=seen, store=store))


def test_store_size_is_exact():
    model = tiny()
    # layers, sides, kv heads, head dim, slots and the spare one, lanes, bytes of a float64
    assert model.new_store(2, 10).nbytes == 3 * 2 * 2 * 8 * 11 * 2 * 8
    assert model.new_store(2, 10).slots == 10


def test_shift_picks_the_left_neighbour():
    model = tiny(shift=1)
    assert model.source(torch.tensor([0, 1, 7])).tolist() == [0, 0, 6]
    assert tiny().source(torch.tensor([0, 1, 7])).tolist() == [0, 1, 7]


def test_the_mask_and_padding_rows_cannot_be_predicted():
    model = tiny()
    logits = model.logits(model.forward(sample_ids()))
    assert logits.shape[-1] == 40 and (logits[..., 39] == -torch.inf).all() and logits[..., :39].isfinite().all()
    padded = NativeModel(replace(model.config, vocab_size=30, mask_id=29))
    assert padded.logits(padded.forward(sample_ids())).shape[-1] == 30
    half = NativeModel(model.config).to(dtype=torch.bfloat16)
    assert half.logits(half.forward(sample_ids())).dtype == torch.float32


def test_long_positions_equal_the_native_class(tmp_path):
    """Rotary angles come from float32 tables at any position."""
    native, model = twin("LlamaForCausalLM", tmp_path)
    ids = torch.randint(0, 59, (1, 8), generator=torch.Generator().manual_seed(1))
    pos = torch.arange(8)[None] + 100_000
    with torch.no_grad():
        expected = native(ids, position_ids=pos, use_cache=False).logits
        logits = model.transformer.head(model.forward(ids, pos))
    assert (logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_at_long_positions(dtype):
    """The rotation is relative: far from the origin the error of half precision is what it is near it."""
    exact = load(GOLDEN / "checkpoints" / "tiny-llada-trained", device="cpu")
    half = load(GOLDEN / "checkpoints" / "tiny-llada-trained", device="cpu", dtype=dtype)
    ids = torch.randint(3, 250, (1, 32), generator=torch.Generator().manual_seed(1))
    far = torch.arange(32)[None] + 4096
    errors = []
    for pos in (torch.arange(32)[None], far):
        near, seen = (m.logits(m.forward(ids, pos)).softmax(-1) for m in (exact, half))
        errors.append(float((near - seen).abs().max()))
    assert errors[0] < (0.2 if dtype == "bfloat16" else 0.03) and errors[1] < 2 * errors[0] + 0.01


def test_gradients_reach_every_parameter():
    model = Transformer(tiny().config)
    model.head(model(sample_ids())).float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
