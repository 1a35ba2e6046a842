"""Loading, saving and every way a checkpoint can be wrong: one clear line each, and no code is run."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm.errors import DllmError
from dllm.models.checkpoint import INDEX
from dllm.models.config import ModelConfig
from dllm.models.hub import load, load_verifier
from dllm.models.native import NativeModel
from dllm.models.settings import SamplerSetting, write_settings
from dllm.models.transformer import Transformer

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
MASKS = {"tiny-fast-dllm-v2-random": 158}
HEADS = ("dflash", "dspark", "domino", "dflare", "jetspec")  # they draft with their verifier, see test_drafting_hidden
NAMES = sorted(p.name for p in CHECKPOINTS.iterdir() if not any(kind in p.name for kind in HEADS))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A writable copy of the random LLaDA."""
    return Path(shutil.copytree(CHECKPOINTS / "tiny-llada-random", tmp_path / "llada"))


@pytest.fixture
def moe(tmp_path) -> Path:
    return Path(shutil.copytree(CHECKPOINTS / "tiny-llada-moe-random", tmp_path / "moe"))


def cpu(path, **options) -> NativeModel:
    return load(path, device="cpu", **options)


def edit(folder: Path, **values) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "delete"}))


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> dict[str, str]:
    """Split the weights in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({n: tensors[n] for n in own}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {n: file for file, own in parts.items() for n in own}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_save_writes_the_official_tensors_back(name, tmp_path):
    model = cpu(CHECKPOINTS / name, mask_id=MASKS.get(name))
    model.save(tmp_path)
    before, after = (load_file(p / "model.safetensors") for p in (CHECKPOINTS / name, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    again = cpu(tmp_path)
    assert again.config == model.config and again.fingerprint() == model.fingerprint()
    original = json.loads((CHECKPOINTS / name / "config.json").read_text())
    written = json.loads((tmp_path / "config.json").read_text())
    for key in ("architectures", "model_type", "eos_token_id", "vocab_size", "rope_theta"):
        assert written.get(key) == original.get(key) or key not in original


@pytest.mark.parametrize("name", NAMES)
def test_a_config_written_from_scratch_is_read_back(name, tmp_path):
    """Without the original config.json: a model built by the training code."""
    from dataclasses import replace

    model = cpu(CHECKPOINTS / name, mask_id=MASKS.get(name))
    bare = NativeModel(replace(model.config, raw={}), model.transformer, model.tokenizer)
    assert cpu(bare.save(tmp_path)).config == model.config


def test_shards_equal_one_file(folder, tmp_path):
    whole = cpu(folder)
    ids = torch.randint(0, 150, (1, 12))
    split = whole.save(tmp_path / "split", shard_bytes=40_000)
    assert len(list(split.glob("model-*-of-*.safetensors"))) > 1 and (split / INDEX).is_file()
    assert not (split / "model.safetensors").exists()
    assert torch.equal(cpu(split).forward(ids), whole.forward(ids))
    shard(folder)
    assert torch.equal(cpu(folder).forward(ids), whole.forward(ids))


def test_dtypes(folder):
    assert cpu(folder).dtype == torch.float32  # the default on a CPU
    assert cpu(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert cpu(folder, dtype=torch.float64).dtype == torch.float64
    cpu(folder, dtype="bf16").save(folder)
    assert cpu(folder, dtype="auto").dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_fingerprint_tells_weights_and_configs_apart(folder):
    one = cpu(folder).fingerprint()
    assert one == cpu(folder).fingerprint() and len(one) == 16
    rewrite(folder, lambda t: t["model.transformer.blocks.1.ff_out.weight"].mul_(1.001))
    two = cpu(folder).fingerprint()
    assert len({one, two, cpu(folder, eos_ids=5).fingerprint(), cpu(folder, dtype="float64").fingerprint()}) == 4


def test_old_rotary_tables_in_a_file_are_ignored(folder):
    rewrite(folder, lambda t: t.update({"model.transformer.blocks.0.rotary_emb.inv_freq": torch.full((6,), torch.nan)}))
    cpu(folder)


def test_a_head_stored_beside_a_tied_embedding(tmp_path):
    folder = Path(shutil.copytree(CHECKPOINTS / "tiny-llada-trained", tmp_path / "tied"))
    name, embedding = "model.transformer.ff_out.weight", "model.transformer.wte.weight"
    rewrite(folder, lambda t: t.update({name: t[embedding].clone()}))
    assert cpu(folder).config.tied
    rewrite(folder, lambda t: t[name].mul_(2))
    with pytest.raises(DllmError, match=r"ties head and embedding.*ff_out"):
        cpu(folder)


# --- saving over what is there ----------------------------------------------------------------------------------------


def doubled(folder: Path) -> NativeModel:
    """The model of a folder, changed."""
    model = cpu(folder)
    with torch.no_grad():
        model.transformer.norm.weight.mul_(2)
    return model


def weights(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") or "index" in p.name}


@pytest.mark.parametrize("shape", ["shards", "single", "odd shards", "pickle", "adapter"])
@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_saving_replaces_the_checkpoint_whatever_its_shape(folder, shape, shard_bytes, tmp_path):
    if shape == "shards":
        cpu(folder).save(folder, shard_bytes=40_000)
    elif shape == "odd shards":
        shard(folder)
    elif shape == "pickle":
        torch.save({}, folder / "pytorch_model-00001-of-00002.bin")
        (folder / "pytorch_model.bin.index.json").write_text("{}")
    elif shape == "adapter":
        shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    (folder / "modeling.py").write_text("")
    changed = doubled(folder)
    changed.save(folder, shard_bytes=shard_bytes)
    assert cpu(folder).fingerprint() == changed.fingerprint()
    fresh = changed.save(tmp_path / "fresh", shard_bytes=shard_bytes)
    assert {p.name for p in folder.iterdir()} == {p.name for p in fresh.iterdir()} | {"notes.txt", "modeling.py"}


def test_saving_replaces_the_tokenizer_and_the_notes_of_a_drafter(folder, tmp_path):
    target = tmp_path / "t"
    cpu(CHECKPOINTS / "tiny-llada-trained").save(target, extra={"drafter.json": {"suffix_token_id": 3}})
    assert json.loads((target / "drafter.json").read_text()) == {"suffix_token_id": 3}
    cpu(folder).save(target)
    again = cpu(target)
    assert again.tokenizer is None and again.fingerprint() == cpu(folder).fingerprint()
    assert {p.name for p in target.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_a_save_cut_short_anywhere_leaves_the_old_model_or_the_new(folder, monkeypatch):
    """The process is killed before each call that touches the disk, until a save gets through."""
    import os

    import dllm.models.checkpoint
    import dllm.models.files

    class Killed(BaseException):
        pass

    before = cpu(folder).save(folder, shard_bytes=40_000)
    old, seen, calls = cpu(before).fingerprint(), [], 0

    def dying(function, left):
        def call(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **options)

        return call

    for calls in range(200):
        target = Path(shutil.copytree(folder, folder.with_name(f"try{calls}")))
        changed, left = doubled(target), [calls]
        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (os, "link"), (os, "fsync"), (Path, "unlink"), (shutil, "rmtree")):
                patch.setattr(module, name, dying(getattr(module, name), left))
            patch.setattr(dllm.models.checkpoint, "save_file", dying(save_file, left))
            try:
                changed.save(target)
                finished = True
            except Killed:
                finished = False
        found = cpu(target).fingerprint()
        seen.append(found)
        assert found in (old, changed.fingerprint())
        if calls % 5 == 0:  # the next save clears up
            again = doubled(target)
            assert cpu(again.save(target, shard_bytes=60_000)).fingerprint() == again.fingerprint()
            assert not (target / "model.safetensors").exists() and not list(target.glob(".*")), calls
        shutil.rmtree(target)
        if finished:
            break
    assert seen[0] == old and seen[-1] == changed.fingerprint() and calls > 20


def test_a_full_disk_is_one_line(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    old = cpu(folder).fingerprint()
    monkeypatch.setattr("dllm.models.checkpoint.save_file", full)
    with pytest.raises(DllmError, match=r"could not save the model in .*No space left"):
        doubled(folder).save(folder)
    assert cpu(folder).fingerprint() == old and not list(folder.glob(".*"))
    with pytest.raises(DllmError, match="could not save"):
        cpu(folder).save(folder / "config.json")
    with pytest.raises(DllmError, match=r"shard_bytes is a positive number of bytes, not '5GB'"):
        cpu(folder).save(folder, shard_bytes="5GB")


def test_classes_without_their_code_are_not_named(folder, tmp_path, monkeypatch):
    """transformers would look for the files of `auto_map` beside the weights."""
    import huggingface_hub

    def classes(saved: Path):
        return json.loads((saved / "config.json").read_text()).get("auto_map")

    assert classes(folder)["AutoConfig"] == "configuration_llada.LLaDAConfig"
    assert classes(cpu(folder).save(tmp_path / "copy")) is None
    for name in ("configuration_llada.py", "modeling_llada.py"):
        (folder / name).write_text("")
    original = classes(folder)
    assert classes(cpu(folder).save(folder)) == original  # its code is there
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    copy = classes(cpu("someone/model").save(tmp_path / "copy"))
    assert copy["AutoModel"] == "someone/model--modeling_llada.LLaDAModelLM"
    assert classes(cpu(tmp_path / "copy").save(tmp_path / "copy")) == copy
    own = Path(shutil.copytree(CHECKPOINTS / "tiny-llada-trained", tmp_path / "t"))
    config = json.loads((own / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_x.X", None]}
    (own / "tokenizer_config.json").write_text(json.dumps(config))
    assert "auto_map" not in (cpu(own).save(own) / "tokenizer_config.json").read_text()


def test_a_saved_twin_is_read_by_transformers(tmp_path):
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    for name in ("tiny-llama-ar-random", "tiny-qwen3-ar-random"):
        model = cpu(CHECKPOINTS / name, dtype="float64")
        native = AutoModelForCausalLM.from_pretrained(model.save(tmp_path / name)).eval()
        ids = torch.randint(0, model.vocab_size, (1, 9))
        with torch.no_grad():
            assert (native(ids).logits - model.transformer.head(model.forward(ids))).abs().max() < 1e-4
        AutoModel.from_pretrained(tmp_path / name)
    cpu(CHECKPOINTS / "tiny-llada-trained").save(tmp_path / "t")
    assert AutoTokenizer.from_pretrained(tmp_path / "t").mask_token_id == 1


@pytest.mark.parametrize("name", ["tiny-dream-random", "tiny-llada-random", "tiny-sdar-random"])
def test_what_a_caller_settled_is_saved(name, tmp_path):
    settled = {"eos_ids": [3, 5], "mask_id": 9} | ({"block_size": 2} if "sdar" in name else {})
    for shift in (0, 1):
        model = cpu(CHECKPOINTS / name, shift=shift, **settled)
        again = cpu(model.save(tmp_path / "copy"))
        assert again.config == model.config and again.shift == shift
    assert cpu(again.save(tmp_path / "copy")).shift == 1
    back = cpu(tmp_path / "copy", shift=0).save(tmp_path / "copy")
    assert cpu(back).shift == 0


def test_two_sets_of_weights_are_refused(folder):
    single = (folder / "model.safetensors").read_bytes()
    cpu(folder).save(folder, shard_bytes=40_000)
    (folder / "model.safetensors").write_bytes(single)
    with pytest.raises(DllmError, match="two sets of weights"):
        cpu(folder)


# --- wrong checkpoints ------------------------------------------------------------------------------------------------


def test_missing_and_unexpected_tensors_are_named(folder):
    rewrite(folder, lambda t: t.pop("model.transformer.ln_f.weight"))
    with pytest.raises(DllmError, match=r"lacks model\.transformer\.ln_f\.weight"):
        cpu(folder)
    rewrite(folder, lambda t: t.update({"stray.weight": torch.ones(2)}))
    with pytest.raises(DllmError, match=r"lacks .*ln_f\.weight and also holds stray\.weight"):
        cpu(folder)


def test_long_lists_are_cut(folder):
    rewrite(folder, lambda t: [t.pop(n) for n in list(t)[:9]])
    with pytest.raises(DllmError, match="and 5 more"):
        cpu(folder)


def test_wrong_shape(folder):
    rewrite(folder, lambda t: t.update({"model.transformer.blocks.0.q_proj.weight": torch.ones(47, 48)}))
    with pytest.raises(DllmError, match=r"blocks\.0\.q_proj\.weight has shape \(47, 48\).*\(48, 48\)"):
        cpu(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite(folder, value):
    rewrite(folder, lambda t: t["model.transformer.blocks.1.up_proj.weight"][3, 4].fill_(value))
    with pytest.raises(DllmError, match=r"NaN or infinite values in model\.transformer\.blocks\.1\.up_proj\.weight"):
        cpu(folder)


@pytest.mark.parametrize("size", [0, 5, 1000, -10])
def test_truncated(folder, size):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(DllmError, match="truncated"):
        cpu(folder)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(DllmError, match=r"pickled weights.*safetensors"):
        cpu(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(DllmError, match=r"holds no model\.safetensors"):
        cpu(folder)


def test_absent_shard(folder):
    shard(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(DllmError, match=r"shard b\.safetensors named in .* is absent"):
        cpu(folder)


def test_shard_outside_the_folder(folder):
    weight_map = shard(folder)
    weight_map["model.transformer.ln_f.weight"] = "../other.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DllmError, match=r"shard \.\./other\.safetensors"):
        cpu(folder)


def test_tensor_in_two_shards(folder):
    shard(folder)
    a, b = load_file(folder / "a.safetensors"), load_file(folder / "b.safetensors")
    name = next(iter(a))
    save_file({**b, name: a[name]}, folder / "b.safetensors")
    with pytest.raises(DllmError, match="stored twice"):
        cpu(folder)


def test_index_that_promises_too_much(folder):
    weight_map = shard(folder)
    a = load_file(folder / "a.safetensors")
    name = next(iter(a))
    del a[name]
    save_file(a, folder / "a.safetensors")
    assert weight_map[name] == "a.safetensors"
    with pytest.raises(DllmError, match="does not hold it"):
        cpu(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', "{}"])
def test_broken_index(folder, content):
    shard(folder)
    (folder / INDEX).write_text(content)
    with pytest.raises(DllmError, match="not a shard index"):
        cpu(folder)


def test_missing_and_duplicated_experts(moe):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rewrite(moe, lambda t: t.update({"model.layers.1.mlp.experts.6.up_proj.weight": t.pop(name)}))
    with pytest.raises(DllmError, match=r"lacks .*experts\.3\.up_proj.* also holds .*experts\.6\.up_proj"):
        cpu(moe)
    rewrite(moe, lambda t: t.update({name: t["model.layers.1.mlp.experts.2.up_proj.weight"].clone()}))
    with pytest.raises(DllmError, match=r"also holds .*experts\.6\.up_proj"):
        cpu(moe)


# --- wrong configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_config_that_is_no_json_object(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(DllmError, match=r"config\.json"):
        cpu(folder)


def test_unknown_family_names_the_other_backend(folder):
    edit(folder, architectures=["NewDiffusionLM"])
    with pytest.raises(DllmError, match=r"'NewDiffusionLM'.*backend=\"transformers\""):
        cpu(folder)
    edit(folder, architectures="delete")
    with pytest.raises(DllmError, match="no architecture"):
        cpu(folder)


def test_model_type_is_not_trusted():
    assert cpu(CHECKPOINTS / "tiny-llada-moe-random").family == "llada_moe"  # its model_type is "llada"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tiny-llada-random", {"alibi": True}, "alibi=True"),
        ("tiny-llada-random", {"block_group_size": 2}, "block_group_size=2"),
        ("tiny-llada-random", {"scale_logits": True}, "scale_logits=True"),
        ("tiny-llada-random", {"d_model": "delete"}, "lacks 'd_model'"),
        ("tiny-llada-random", {"d_model": "wide"}, "d_model is a positive whole number"),
        ("tiny-dream-random", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ("tiny-dream-random", {"rope_parameters": {"rope_type": "llama3"}}, "rope scaling 'llama3'"),
        ("tiny-dream-random", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("tiny-dream-random", {"rope_theta": "delete"}, "lacks 'rope_theta'"),
        ("tiny-llada-moe-random", {"rope_theta": -1}, "rope_theta is a positive number"),
        ("tiny-llada-moe-random", {"num_experts": "delete"}, "lacks 'num_experts'"),
        ("tiny-llada2-random", {"use_bias": True}, "use_bias=True"),
        ("tiny-llada2-random", {"use_bias": "delete"}, "lacks 'use_bias'"),
        ("tiny-llada2-random", {"score_function": "softmax"}, "score_function='softmax'"),
    ],
)
def test_what_the_backbone_cannot_do_is_refused(tmp_path, name, change, message):
    folder = Path(shutil.copytree(CHECKPOINTS / name, tmp_path / name))
    edit(folder, **change)
    with pytest.raises(DllmError, match=message):
        cpu(folder)


def test_block_size_from_config_name_or_default(tmp_path, caplog):
    named = Path(shutil.copytree(CHECKPOINTS / "tiny-sdar-random", tmp_path / "SDAR-8B-Chat-b16"))
    assert cpu(named).block_size == 4  # the config decides
    edit(named, block_size="delete")
    assert cpu(named).block_size == 16
    plain = Path(shutil.copytree(named, tmp_path / "SDAR"))
    with caplog.at_level("WARNING"):
        assert cpu(plain).block_size == 4
    assert "no block_size" in caplog.text
    assert cpu(plain, block_size=8).block_size == 8
    with pytest.raises(DllmError, match="must be positive"):
        cpu(plain, block_size=0)
    with pytest.raises(DllmError, match="attends to everything"):
        cpu(CHECKPOINTS / "tiny-llada-random", block_size=8)


# --- special ids ------------------------------------------------------------------------------------------------------


def test_mask_id_from_nowhere(folder):
    edit(folder, mask_token_id="delete")
    with pytest.raises(DllmError, match="mask_id="):
        cpu(folder)
    assert cpu(folder, mask_id=158).mask_id == 158


def test_mask_id_from_the_tokenizer(tmp_path):
    folder = Path(shutil.copytree(CHECKPOINTS / "tiny-llada-trained", tmp_path / "t"))
    edit(folder, mask_token_id="delete")
    assert cpu(folder).mask_id == 1


def test_contradictory_mask_ids(tmp_path):
    folder = Path(shutil.copytree(CHECKPOINTS / "tiny-llada-trained", tmp_path / "t"))
    edit(folder, mask_token_id=7)
    with pytest.raises(DllmError, match=r"config\.json says 7, the tokenizer says 1; pass mask_id="):
        cpu(folder)
    assert cpu(folder, mask_id=1).mask_id == 1


@pytest.mark.parametrize(("mask", "message"), [(500, "outside"), (-1, "outside"), (157, "end-of-text")])
def test_impossible_mask_ids(folder, mask, message):
    with pytest.raises(DllmError, match=f"mask id {mask} .*{message}"):
        cpu(folder, mask_id=mask)


def test_mask_that_is_the_padding(folder):
    edit(folder, pad_token_id=158)
    with pytest.raises(DllmError, match="padding"):
        cpu(folder)


def test_ends_are_a_set_from_all_sources(folder):
    assert cpu(folder).eos_ids == (157,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [157, 3], "bos_token_id": 9}')
    model = cpu(folder)
    assert model.eos_ids == (157, 3) and model.bos_id == 9 and model.pad_id == 157
    assert cpu(folder, eos_ids=[5, 6]).eos_ids == (5, 6)
    with pytest.raises(DllmError, match="end-of-text id 999 is outside"):
        cpu(folder, eos_ids=999)


def test_published_vocabularies_bring_their_turn_end():
    from dllm.models import dream, llada
    from dllm.models.special import resolve

    sizes = {"hidden_size": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 8, "intermediate_size": 8}
    config = ModelConfig("llada", "LLaDAModelLM", 126464, 126464, **sizes, mask_id=126336, eos_ids=(126081,))
    assert resolve(config, llada.FAMILY).eos_ids == (126081, 126348)
    config = ModelConfig("dream", "DreamModel", 152064, 152064, **sizes, eos_ids=(151643,), shift=1)
    found = resolve(config, dream.FAMILY)  # no mask id in the files: the constant of the family
    assert found.mask_id == 151666
    assert resolve(found, dream.FAMILY).eos_ids == (151643, 151645)


def test_rows_beyond_the_tokenizer_cannot_be_predicted(tmp_path):
    """LLaDA stores 126464 rows for 126349 tokens."""
    folder = Path(shutil.copytree(CHECKPOINTS / "tiny-llada-trained", tmp_path / "t"))
    name = "model.transformer.wte.weight"
    rewrite(folder, lambda t: t.update({name: torch.cat([t[name], torch.ones(9, 128)])}))
    edit(folder, vocab_size=264, embedding_size=264)
    model = cpu(folder)
    assert model.vocab_size == 255 and model.config.embedding_rows == 264
    assert model.logits(model.forward(torch.tensor([[5, 1, 1]]))).shape[-1] == 255


def test_chat(tmp_path):
    model = cpu(CHECKPOINTS / "tiny-llada-trained")
    with pytest.raises(DllmError, match="no chat tokens"):
        model.chat([{"role": "user", "content": "12"}])
    marks = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    model.tokenizer.add_tokens(marks, special_tokens=True)
    begin, start, end, turn = model.tokenizer.convert_tokens_to_ids(marks)
    ids = model.chat([{"role": "user", "content": " 12 "}])
    assert [i for i in ids if i in (begin, start, end, turn)] == [begin, start, end, turn, start, end]
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert model.chat([{"role": "user", "content": "12"}]) == model.tokenizer("12")["input_ids"]
    with pytest.raises(DllmError, match="no tokenizer"):
        cpu(CHECKPOINTS / "tiny-llada-random").chat([{"role": "user", "content": "12"}])


# --- names, devices, dtypes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Why is the sky blue?", "prompt="),
        ("tinny", "did you mean 'tiny'"),
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("x" * 5000, r"^'x{60}' is neither a folder"),
        ("a\0b", "prompt="),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(DllmError, match=message):
        cpu(name)


def test_folder_without_config(tmp_path):
    with pytest.raises(DllmError, match=r"no checkpoint: it has no config\.json"):
        cpu(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DllmError, match="is a file"):
        cpu(tmp_path / "file")


def test_hub_failures_are_one_line(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        assert not any("py" in p for p in kwargs["allow_patterns"])  # never code
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DllmError, match=r"someone/model .* no route to host$"):
        cpu("someone/model")


def test_hub_ids_are_downloaded(monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(CHECKPOINTS / "tiny-llada-random")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert cpu("someone/model", revision="abc").family == "llada" and asked == [("someone/model", "abc")]


def test_bad_options(folder):
    with pytest.raises(DllmError, match=r"unknown dtype 'bfloat61'; did you mean 'bfloat16'"):
        cpu(folder, dtype="bfloat61")
    with pytest.raises(DllmError, match="unknown device"):
        load(folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(DllmError, match="no CUDA device"):
            load(folder, device="cuda")


def test_out_of_memory_is_one_line(folder, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 3 TiB")

    monkeypatch.setattr("dllm.models.hub.load_weights", full)
    with pytest.raises(DllmError, match=r"does not fit on cpu.*3 TiB"):
        cpu(folder)


def test_verifiers():
    model = load_verifier(CHECKPOINTS / "tiny-qwen3-ar-random", device="cpu")
    assert type(model).__name__ == "Qwen3ForCausalLM" and not model.training
    assert load_verifier(model) is model
    with pytest.raises(DllmError):
        load_verifier(CHECKPOINTS / "tiny-llada-random", device="cpu")


def test_no_memory_is_taken_before_the_weights_come(monkeypatch, folder):
    """The module is built on the meta device and every parameter is replaced."""
    seen = []
    original = Transformer.__init__

    def spy(self, config):
        original(self, config)
        seen.append(next(self.parameters()).device.type)

    monkeypatch.setattr(Transformer, "__init__", spy)
    model = cpu(folder)
    assert seen == ["meta"] and all(p.device.type == "cpu" for p in model.transformer.parameters())


def test_nothing_is_drawn_for_weights_that_come(monkeypatch, folder):
    """For a draw on the meta device torch imports its compiler: more than a second of each load."""
    monkeypatch.setattr(torch.nn.init, "normal_", lambda *_, **__: pytest.fail("drawn"))
    cpu(folder)


# --- values of the wrong kind -----------------------------------------------------------------------------------------

WRONG = ["x", "2", 664.5, -1, 0, True, [], ["a"], {"a": 1}, 10**9, float("nan")]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_value_in_a_config_is_one_line_or_means_nothing(name, tmp_path):
    """Every key of every family with values of other kinds: a model that computes, or one clear line."""
    folder = Path(shutil.copytree(CHECKPOINTS / name, tmp_path / name))
    raw = json.loads((folder / "config.json").read_text())
    keys = {*raw, "eos_token_id", "pad_token_id", "rope_scaling", "rope_parameters", "head_dim", "num_key_value_heads"}
    rng, refused = random.Random(name), 0
    for key in sorted(keys):
        for wrong in rng.sample(WRONG, 3):
            edit(folder, **{**raw, key: wrong})
            try:
                model = cpu(folder, mask_id=MASKS.get(name))
            except DllmError as error:
                refused += 1
                assert "\n" not in str(error)
            else:
                model.forward(torch.tensor([[5, 6, 7]]))
    assert refused > len(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token_id": "2"}, "eos_token_id is an id or a list of ids, not '2'"),
        ({"vocab_size": 664.0}, "vocab_size is a positive whole number, not 664.0"),
        ({"weight_tying": "false"}, "weight_tying is true or false, not 'false'"),
        ({"n_kv_heads": 3}, "4 heads share 3 of keys"),
        ({"n_layers": 9000}, "asks for 9000 layers"),
        ({"architectures": {"a": 1}}, "names no architecture"),
        ({"rope_theta": "1e4"}, "rope_theta is a positive number"),
    ],
)
def test_what_a_wrong_value_is_called(folder, change, message):
    edit(folder, **change)
    with pytest.raises(DllmError, match=message):
        cpu(folder)


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": "2"}', '{"bos_token_id": [1]}', '{"eos_token_id": [1, null]}', "[]"]
)
def test_a_wrong_generation_config_is_one_line(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(DllmError, match=r"generation_config\.json"):
        cpu(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"mask_token": 5}', '{"mask_token": {"a": 1}}', '{"tokenizer_class": 5}']
)
def test_a_wrong_tokenizer_config_is_one_line_or_means_nothing(tmp_path, content):
    folder = Path(shutil.copytree(CHECKPOINTS / "tiny-llada-trained", tmp_path / "t"))
    (folder / "tokenizer_config.json").write_text(content)
    try:
        cpu(folder)
    except DllmError as error:
        assert "\n" not in str(error)


def test_a_chat_template_that_raises_is_one_line(tmp_path):
    model = cpu(CHECKPOINTS / "tiny-llada-trained")
    for template in (
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9]['content'] }}",
        "{% if %}",
        "{{ 1/0 }}",
    ):
        model.tokenizer.chat_template = template
        with pytest.raises(DllmError, match="chat template") as error:
            model.chat([{"role": "user", "content": "12"}])
        assert "\n" not in str(error.value)


def test_the_block_causal_dream_decodes_its_blocks(tmp_path):
    import dllm
    from dllm.call.arguments import DEFAULTS
    from dllm.models.families import FAMILIES

    assert set(DEFAULTS) <= set(FAMILIES)  # each can be reached
    folder = Path(shutil.copytree(CHECKPOINTS / "tiny-dream-random", tmp_path / "reasoner"))
    assert dllm.generate(cpu(folder), [5, 6], max_new_tokens=4).sampler == "dream"
    edit(folder, architectures=["DreamForCausalLM"], block_size=4)
    model = cpu(folder)
    assert (model.block_size, model.shift) == (4, 0)
    out = dllm.generate(model, [5, 6], max_new_tokens=6, early_stop=False, trace=True)
    assert out.sampler == "confidence" and out.nfe == 6
    assert cpu(model.save(tmp_path / "copy")).config == model.config


# --- tokenizers and adapters ------------------------------------------------------------------------------------------


def test_tokenizer_files(folder, caplog):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words))
    model = cpu(folder, mask_id=4, eos_ids=3)
    assert model.tokenizer("hello worlds", add_special_tokens=False)["input_ids"] == [5, 6, 7]
    (folder / "vocab.txt").unlink()
    (folder / "vocab.json").write_text("{}")
    with caplog.at_level("WARNING"):
        assert cpu(folder).tokenizer is None
    assert "lacks merges.txt" in caplog.text
    with pytest.raises(DllmError, match=r"no tokenizer \(there is no tokenizer\.json, tokenizer\.model, vocab\.txt"):
        cpu(folder).chat([{"role": "user", "content": "12"}])
    (folder / "tokenizer.model").write_bytes(b"\x0a\x01nope")
    with pytest.raises(DllmError, match=r"tokenizer\.model|cannot be read") as error:
        cpu(folder)
    assert "\n" not in str(error.value)


def test_tokenizer_files_are_fetched(monkeypatch):
    from fnmatch import fnmatch

    import huggingface_hub

    def offline(name, allow_patterns, **_):
        asked = ("tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt", "vocab.json", "adapter_config.json")
        assert all(any(fnmatch(file, pattern) for pattern in allow_patterns) for file in asked)
        assert not any(fnmatch(f, p) for f in ("model.py", "pytorch_model.bin") for p in allow_patterns)
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DllmError, match="offline"):
        cpu("someone/model")


def adapter(path: Path, base: Path | str, updates: dict[str, tuple[torch.Tensor, torch.Tensor]], **settings) -> Path:
    """An adapter folder as peft writes it: module -> (A, B)."""
    path.mkdir()
    tensors = {
        f"base_model.model.{m}.lora_{k}.weight": t for m, ab in updates.items() for k, t in zip("AB", ab, strict=True)
    }
    save_file(tensors, path / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 6, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps({**values, **settings}))
    return path


@pytest.mark.parametrize(
    ("name", "module", "shape"),
    [
        ("tiny-llada-random", "model.transformer.blocks.1.q_proj", (48, 48)),
        ("tiny-dream-random", "model.layers.0.self_attn.k_proj", None),
        ("tiny-llada2-random", "model.layers.1.attention.query_key_value", None),  # three parts of the backbone
        ("tiny-llada-moe-random", "model.layers.1.mlp.experts.2.down_proj", None),
    ],
)
def test_an_adapter_is_merged_into_its_base(name, module, shape, tmp_path):
    torch.manual_seed(0)
    before = load_file(CHECKPOINTS / name / "model.safetensors")[f"{module}.weight"].double()
    assert shape in (None, tuple(before.shape))
    a, b = torch.randn(2, before.shape[1]), torch.randn(before.shape[0], 2)
    for settings, scale in (
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {module.rpartition(".")[2]: 1}}, 0.5),
    ):
        folder = adapter(tmp_path / f"a{scale:.2f}", CHECKPOINTS / name, {module: (a, b)}, **settings)
        model = cpu(folder, dtype="float64")
        after = load_file(model.save(tmp_path / f"m{scale:.2f}") / "model.safetensors")
        original = load_file(CHECKPOINTS / name / "model.safetensors")
        assert torch.allclose(after[f"{module}.weight"], before + scale * b.double() @ a.double(), atol=1e-12)
        assert all(
            torch.equal(after[n], original[n].double()) for n in after if n != f"{module}.weight" and "bias" not in n
        )
        model.save(folder)  # over the adapter: a whole checkpoint takes its place
        assert cpu(folder, dtype="float64").fingerprint() == model.fingerprint()
        assert not (folder / "adapter_config.json").exists()


def test_an_adapter_of_peft_equals_peft(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = CHECKPOINTS / "tiny-llama-ar-random"
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 9},
        modules_to_save=["lm_head"], init_lora_weights=False,
    )  # fmt: skip
    tuned = peft.get_peft_model(network, settings).eval()
    tuned.save_pretrained(tmp_path / "a")
    model = cpu(tmp_path / "a")
    ids = torch.randint(0, model.vocab_size, (1, 9))
    with torch.no_grad():
        theirs = tuned(ids).logits
    assert (model.transformer.head(model.forward(ids)) - theirs).abs().max() < 1e-4
    own, others = (SamplerSetting(n, {n: {}}, "t", 1, 1, (0, 1), 1, "confidence", 0, (0, 0)) for n in ("eb", "factor"))
    write_settings(tmp_path / "a", [own])  # an adapter changes the model, so that what was chosen for the base is void
    write_settings(Path(shutil.copytree(base, tmp_path / "base")), [others])
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    masked = cpu(tmp_path / "a", backend="transformers", mask_id=9)
    assert [*masked.sampler_settings] == [*cpu(tmp_path / "a").sampler_settings] == ["eb"]
    ours, theirs = model.transformer.layers[0].self_attn.qkv_proj, masked.transformer.model.layers[0].self_attn.q_proj
    assert torch.allclose(theirs.weight, ours.apart(ours.weight)["q_proj"], atol=1e-6)


def refused(folder: Path, message: str) -> None:
    """In one line that says which adapter, once."""
    with pytest.raises(DllmError, match=message) as found:
        cpu(folder)
    assert str(found.value).count(str(folder)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"use_dora": True}, "use_dora=True"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "./nowhere"}, "is of the base './nowhere': no such folder: ./nowhere"),
        ({"lora_alpha": "x"}, "lora_alpha is a number"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
    ],
)
def test_adapters_that_cannot_be_merged(tmp_path, change, message):
    module = "model.transformer.blocks.1.q_proj"
    update = {module: (torch.ones(2, 48), torch.ones(48, 2))}
    refused(adapter(tmp_path / "a", CHECKPOINTS / "tiny-llada-random", update, **change), message)


def test_adapters_that_do_not_fit(tmp_path):
    base, a, b = CHECKPOINTS / "tiny-llada-random", torch.ones(2, 48), torch.ones(48, 2)
    folder = adapter(tmp_path / "1", base, {"model.layers.0.q": (a, b)})
    refused(folder, r"changes model\.layers\.0\.q\.weight, which this model does not have")
    folder = adapter(tmp_path / "2", base, {"model.transformer.blocks.1.q_proj": (a[:, :40].contiguous(), b)})
    refused(folder, r"of another base: its .*q_proj\.weight has shape \(48, 40\), not \(48, 48\)")
    folder = adapter(tmp_path / "3", base, {"model.transformer.blocks.1.q_proj": (a, b)})
    rank = "base_model.model.model.transformer.blocks.1.q_proj.lora_A.weight"
    save_file({rank: a}, folder / "adapter_model.safetensors")
    refused(folder, r"lacks .*lora_B")
    save_file({rank: a, rank.replace("_A", "_B"): torch.ones(48, 3)}, folder / "adapter_model.safetensors")
    refused(folder, "do not fit")
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    refused(folder, "truncated")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, r"no adapter_model\.safetensors")
