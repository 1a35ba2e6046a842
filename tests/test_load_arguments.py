"""The arguments of `dllm.load` from every front: Python, command line, YAML, lm-eval, benches."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import Dllm, dllm  # noqa: F401

import dllm as toolkit
from dllm.drafting.hidden.config import read_head
from dllm.errors import DllmError
from dllm.eval import config as configuration
from dllm.models.arguments import Checkpoint, LoadArguments
from dllm.models.hub import load, load_verifier, locate

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
TRAINED, RANDOM = (str(CHECKPOINTS / f"tiny-llada-{kind}") for kind in ("trained", "random"))
NAMES = {f.name for f in fields(LoadArguments)}


@pytest.fixture
def bare(tmp_path) -> Path:
    """A checkpoint with a tokenizer whose files name no mask token."""
    folder = Path(shutil.copytree(TRAINED, tmp_path / "bare"))
    for name, gone in (("config.json", "mask_token_id"), ("tokenizer_config.json", "mask_token")):
        values = json.loads((folder / name).read_text())
        values.pop(gone)
        (folder / name).write_text(json.dumps(values))
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer.replace("<mask>", "<hole>"))
    with pytest.raises(DllmError, match="pass its id as mask_id="):
        load(folder, device="cpu")
    return folder


# --- Python -----------------------------------------------------------------------------------------------------------


def test_the_signature_and_the_text_of_load_are_those_of_the_table():
    own = inspect.signature(load).parameters
    assert set(own) - {"name_or_path"} == NAMES
    assert all(own[f.name].default == f.default for f in fields(LoadArguments))
    assert all(name in (load.__doc__ or "") for name in NAMES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"maskid": 5}, "unknown argument 'maskid' of dllm.load; did you mean 'mask_id'"),
        ({"torch_dtype": "auto"}, "it is dtype="),
        ({"trust_remote_code": True}, "never run"),
        ({"mask_id": "1"}, "mask_id is an id (a whole number), not '1'"),
        ({"mask_id": 1.0}, "mask_id is an id"),
        ({"mask_id": True}, "mask_id is an id"),
        ({"eos_ids": "2"}, "eos_ids is an id or a list of ids"),
        ({"eos_ids": [2, "3"]}, "eos_ids is an id or a list of ids"),
        ({"eos_ids": {2: 3}}, "eos_ids is an id or a list of ids"),
        ({"block_size": "8"}, "block_size is a whole number"),
        ({"shift": 2}, "shift is 0 or 1"),
        ({"shift": "1"}, "shift is 0 or 1"),
        ({"backend": 3}, "unknown backend '3'"),
        ({"device_map": 5}, "device_map is a name, or module names"),
        ({"quantization": 8}, "quantization is a name"),
        ({"revision": 5}, "revision is a branch"),
        ({"token": 5}, "token is text"),
        ({"cache_dir": 5}, "cache_dir is a folder"),
        ({"local_files_only": "yes"}, "local_files_only is true or false"),
        ({"subfolder": 5}, "subfolder is a folder"),
        ({"attn_implementation": 5}, "attn_implementation is a name"),
        ({"attn_implementation": "eager"}, 'backend="transformers"'),
        ({"dtype": 5}, "unknown dtype '5'"),
        ({"dtype": [1]}, "unknown dtype"),
        ({"dtype": torch.int64}, "unknown dtype 'torch.int64'"),
        ({"device": 1.5}, "unknown device '1.5'"),
        ({"tokenizer": RANDOM}, "no tokenizer.json"),
    ],
)
def test_wrong_arguments_are_one_line(given, message):
    with pytest.raises(DllmError) as error:
        load(RANDOM, **{"device": "cpu", **given})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["2024-13-45", "&a [*a]", "[" * 3000, ""])
def test_wrong_text_for_an_argument_is_one_line(text):
    with pytest.raises(DllmError, match="mask_id is an id"):
        LoadArguments.read({"mask_id": text})


def test_arguments_that_a_model_cannot_take_are_refused():
    with pytest.raises(DllmError, match="mask_id is for masked-diffusion models; LlamaForCausalLM is autoregressive"):
        load(CHECKPOINTS / "tiny-llama-ar-random", device="cpu", mask_id=9)
    network = load_verifier(CHECKPOINTS / "tiny-llama-ar-random", device="cpu")
    with pytest.raises(DllmError, match="block_size, revision are for names and folders"):
        load(network, mask_id=9, block_size=4, revision="v2")
    assert load(network, mask_id=9, dtype="float64").dtype == torch.float64
    with pytest.raises(DllmError, match="mask_id is for masked-diffusion models, not for a verifier"):
        load_verifier("tiny-ar", mask_id=9)
    assert load(CHECKPOINTS / "tiny-llama-ar-random", device="cpu", backend="transformers", mask_id=9).mask_id == 9


def test_a_tokenizer_is_named_or_passed():
    named = load(RANDOM, device="cpu", tokenizer="tiny", mask_id=158, eos_ids=157)
    passed = load(RANDOM, device="cpu", tokenizer=named.tokenizer, mask_id=158, eos_ids=157)
    assert passed.tokenizer is named.tokenizer and len(named.tokenizer) > 100
    with pytest.raises(DllmError, match="tokenizer= is a tokenizer, a folder or a Hugging Face id, not int"):
        load(RANDOM, device="cpu", tokenizer=5)


def test_the_home_of_no_user_is_no_folder():
    with pytest.raises(DllmError, match="no such folder: ~nobody-here/model"):
        load("~nobody-here/model")


def test_what_decides_the_download_reaches_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    shutil.copytree(RANDOM, tmp_path / "snapshot" / "step-9")
    asked: dict[str, Any] = {}

    def download(name, **given):
        asked.update(given)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    where = {"revision": "v2", "token": "secret", "cache_dir": "c", "local_files_only": True}
    assert load("someone/model", device="cpu", subfolder="step-9", **where).family == "llada"
    assert {name: asked[name] for name in where} == where
    assert "step-9/*.safetensors" in asked["allow_patterns"] and not any("py" in p for p in asked["allow_patterns"])
    assert "secret" not in repr(Checkpoint("someone/model", **where))
    with pytest.raises(DllmError, match="holds no folder 'step-8'"):
        load("someone/model", subfolder="step-8")
    with pytest.raises(DllmError, match="holds no folder"):
        locate(tmp_path / "snapshot", subfolder="../..")
    with pytest.raises(DllmError, match='did you mean subfolder="step-9"'):
        load(tmp_path / "snapshot")
    assert load(tmp_path / "snapshot", device="cpu", subfolder="step-9").family == "llada"


# --- command line -----------------------------------------------------------------------------------------------------


def test_commands_take_every_argument(dllm: Dllm, bare, tmp_path):  # noqa: F811
    common = ("-m", str(bare), "--device", "cpu", "--model-arg", "mask_id=1", "--model-arg", "eos_ids=[0, 2]")
    shown = dllm("generate", "12+30=", *common, "-n", "4", "--json", "--dtype", "float64")
    assert shown.returncode == 0, shown.stderr
    model = load(bare, device="cpu", mask_id=1, eos_ids=[0, 2], dtype="float64")
    assert json.loads(shown.stdout)["text"] == toolkit.generate(model, "12+30=", max_new_tokens=4).text
    shown = dllm("chat", *common, "-n", "4", stdin="12+30=\n/quit\n")
    assert "no chat template" in shown.stderr  # the model is loaded, and no chat model
    traces = tmp_path / "t.safetensors"
    prompts = tmp_path / "p.txt"
    prompts.write_text("12+30=\n1+2=\n7+8=\n")
    shown = dllm("filter", "collect", str(traces), *common, "--prompts", str(prompts), "--max-new-tokens", "4")
    assert shown.returncode == 0 and traces.exists(), shown.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model-arg", "maskid=5"], "did you mean 'mask_id'"),
        (["--model-arg", "mask_id=five"], "mask_id is an id (a whole number), not 'five'"),
        (["--model-arg", "mask_id"], "write key=value"),
        (["--model-arg", "mask_id=1", "--model-arg", "mask_id=2"], "gives mask_id twice"),
        (["--model-arg", "dtype=float32", "--dtype", "float64"], "dtype is given twice"),
        (["--model-arg", "device_map={embed_tokens: cpu}"], "no place for"),
        (["--model-arg", "block_size=8"], "block-causal"),
        (["--model-arg", "eos_ids=[1"], "eos_ids is an id or a list of ids"),
    ],
)
def test_wrong_arguments_of_commands_are_one_line(dllm: Dllm, args, message):  # noqa: F811
    for command in (["generate", "x"], ["chat"], ["bench", "lookahead"], ["filter", "compare"], ["samplers"]):
        if "samplers" in command and message in ("no place for", "block-causal"):
            continue  # it loads no model
        shown = dllm(*command, "-m", TRAINED, "--model-arg", "local_files_only=true", *args)
        assert shown.returncode == 1 and message in shown.stderr, command
        assert len(shown.stderr.strip().splitlines()) == 1


def test_speculate_takes_arguments_of_both_models(dllm: Dllm):  # noqa: F811
    verifier, drafter = ("--verifier-arg", "dtype=float64"), ("--drafter-arg", "dtype=float64")
    shown = dllm("speculate", "Tom has 3 apples.", *verifier, *drafter, "-n", "4")
    assert shown.returncode == 0, shown.stderr
    for args, message in (
        (["--verifier-arg", "mask_id=5"], "not for a verifier"),
        (["--verifier-arg", "dype=float64"], "did you mean 'dtype'"),
        (["--drafter-arg", "maskid=5"], "did you mean 'mask_id'"),
        (["--drafter", "suffix", "--drafter-arg", "mask_id=5"], "not for 'suffix'"),
    ):
        shown = dllm("speculate", "x", *args)
        assert shown.returncode == 1 and message in shown.stderr


def test_benches_take_a_model_or_say_that_they_have_their_own(dllm: Dllm, monkeypatch):  # noqa: F811
    from dllm.bench import lookahead as bench_lookahead
    from dllm.bench import samplers as bench_samplers

    seen: list[Any] = []
    monkeypatch.setattr(bench_lookahead, "run", lambda only, repeats, model: seen.append(model) or [])
    monkeypatch.setattr(bench_samplers, "run", lambda model, **_: seen.append(model) or "")
    args = ("-m", TRAINED, "--model-arg", "mask_id=1", "--dtype", "float64")
    for name in ("lookahead", "samplers"):
        assert dllm("bench", name, *args).returncode == 0
    assert seen == 2 * [Checkpoint(TRAINED, mask_id=1, dtype="float64")]
    for name, hint in (("step", "generate, lookahead, "), ("drafting", "--drafter")):
        shown = dllm("bench", name, "-m", TRAINED)
        assert shown.returncode == 1 and hint in shown.stderr


def test_answers_are_decoded_by_a_checkpoint_with_arguments(bare, tmp_path):
    from dllm.bench.answers import Answers

    answers = Answers(tmp_path / "a.jsonl", Checkpoint(str(bare), mask_id=1, device="cpu"))
    assert answers.model.mask_id == 1


# --- YAML -------------------------------------------------------------------------------------------------------------


def test_a_configuration_takes_every_argument(bare, tmp_path):
    from dllm.eval.worker import Worker

    model = {"name": str(bare), "mask_id": 1, "eos_ids": [0, 2], "device": "cpu", "token": "secret", "revision": None}
    config = configuration.load({"tasks": ["word_problems"], "limit": 1, "model": model})
    loaded = Worker(config).model(config.settings[0].model)
    assert (loaded.mask_id, loaded.eos_ids) == (1, (0, 2))
    plain = config.plain()
    assert "secret" not in json.dumps(plain)
    again = configuration.load(plain)
    spec = configuration.ModelSpec(str(bare), mask_id=1, eos_ids=[0, 2], device="cpu")
    assert again.settings[0].model == spec
    elsewhere = configuration.load(
        {**plain, "matrix": [{"model": [{**model, "token": "other", "cache_dir": "there"}]}]}
    )
    assert list(elsewhere.cells().values()) == list(config.cells().values())  # the same model, wherever it came from
    swept = configuration.load(
        {"tasks": ["word_problems"], "model": "tiny", "matrix": {"model.dtype": ["float32", "float64"]}},
        ["model.device_map={layers: cpu}"],
    )
    assert [s.model.dtype for s in swept.settings] == ["float32", "float64"]
    assert {s.model.device_map["layers"] for s in swept.settings} == {"cpu"} and swept.methods()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{name: tiny, maskid: 5}", "did you mean 'mask_id'"),
        ("{name: tiny, mask_id: five}", "mask_id: must be an integer, found 'five'"),
        ("{name: tiny, eos_ids: [1, x]}", "eos_ids"),
        ("{name: tiny, shift: 7}", "shift is 0 or 1"),
        ("{name: tiny, backend: nativ}", "did you mean 'native'"),
        ("{name: tiny, local_files_only: 3}", "local_files_only"),
    ],
)
def test_wrong_arguments_of_a_configuration_name_the_line(tmp_path, model, message):
    path = tmp_path / "run.yaml"
    path.write_text(f"tasks: [word_problems]\nmodel: {model}\n")
    with pytest.raises(DllmError) as error:
        configuration.load(path)
    assert message in str(error.value) and "run.yaml, line 2" in str(error.value)


# --- lm-eval ----------------------------------------------------------------------------------------------------------


def test_model_args_of_lm_eval(bare):
    pytest.importorskip("lm_eval")
    from lm_eval.utils import simple_parse_args_string

    from dllm.eval.harness import DiffusionLM

    def made(text: str) -> DiffusionLM:
        return DiffusionLM(**simple_parse_args_string(text), device="cpu")

    lm = made(f"pretrained={bare},mask_id=1,eos_ids=[0,2],dtype=float64,local_files_only=true,sampler=threshold")
    assert (lm.model.mask_id, lm.model.eos_ids, lm.model.dtype) == (1, (0, 2), torch.float64)
    assert lm.decoding == {"sampler": "threshold"}
    for text, message in (
        ("maskid=1", "did you mean 'mask_id'"),
        ("mask_id=one", "mask_id is an id"),
        ("trust_remote_code=true", "never run"),
        ("samplr=x", "sampler"),
        ("gen_length=x", "max_new_tokens"),
    ):
        with pytest.raises(DllmError, match=message):
            made(f"pretrained={bare},{text}")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("smollm2-drafter", "`dllm align configs/align/smollm2-head.yaml` makes one"),
        ("smollm2-diffusion", "`dllm align configs/align/smollm2-diffusion.yaml` makes one"),
    ],
)
def test_a_model_whose_weights_do_not_ship_names_its_recipe(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllm.models.hub.ASSETS", tmp_path)
    with pytest.raises(DllmError) as error:
        locate(name)
    assert how in str(error.value) and "\n" not in str(error.value)


def test_the_head_that_ships_is_small_and_fits_the_verifier_it_is_for() -> None:
    folder = locate("smollm2-drafter")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
    config = read_head(json.loads((folder / "config.json").read_text()))
    assert (config.hidden_size, config.block, config.reach) == (576, 4, 16)


def test_the_diffusion_model_that_ships_is_an_adapter_of_its_base_alone() -> None:
    folder = locate("smollm2-diffusion")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
    recast = json.loads((folder / "recast.json").read_text())
    assert (recast["base"], recast["block_size"], recast["shift"]) == ("smollm2", 32, 1)
