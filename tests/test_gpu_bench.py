"""The bench of a GPU on a CPU: every row at tiny shapes, another code's loop from a folder, what is counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from replay import standing_in

import dllm
from dllm.bench import gpu, rival
from dllm.bench.runtime import Figure
from dllm.bench.shapes import SMALL, experts_read, weights
from dllm.bench.traced import Record, counted, traced
from dllm.cli import main
from dllm.errors import DllmError
from dllm.models.native import NativeModel

CPU = torch.device("cpu")
NETWORK = """
from types import SimpleNamespace
import torch
from torch import nn

class Config:
    def __init__(self, **values):
        vars(self).update(values)

class Block(nn.Module):
    def __init__(self, width, mlp):
        super().__init__()
        for name in ("attn_norm", "ff_norm"):
            setattr(self, name, nn.RMSNorm(width))
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        for name in ("ff_proj", "up_proj"):
            setattr(self, name, nn.Linear(width, mlp, bias=False))
        self.ff_out = nn.Linear(mlp, width, bias=False)

class LLaDAModelLM(nn.Module):
    config_class = Config

    def __init__(self, config):
        super().__init__()
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        rows, width = config.embedding_size, config.d_model
        blocks = nn.ModuleList(Block(width, config.mlp_hidden_size) for _ in range(config.n_layers))
        parts = dict(wte=nn.Embedding(rows, width), blocks=blocks, ln_f=nn.RMSNorm(width))
        parts["ff_out"] = nn.Linear(width, rows, bias=False)
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict(parts)

    def forward(self, ids):
        parts = self.model.transformer
        return SimpleNamespace(logits=parts.ff_out(parts.ln_f(parts.wte(ids))))
"""
LOOP = """
import torch
from {dot}model.modeling_llada import LLaDAModelLM

def generate(model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold):
    assert (temperature, remasking, threshold) == (0.0, "low_confidence", None)
    assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    masks = torch.full((1, gen_length), mask_id)
    ids = torch.cat([prompt, masks], 1)
    for _ in range(steps):
        best = model(ids).logits[..., :mask_id].argmax(-1)
    return torch.cat([prompt, best[:, -gen_length:]], 1), steps

generate_with_prefix_cache = generate_with_dual_cache = generate
"""


def folder(path: Path, loop: str = LOOP, dot: str = "") -> Path:
    """A folder with a loop and a network that have the names of Fast-dLLM's."""
    (path / "llada" / "model").mkdir(parents=True)
    (path / "llada" / "model" / "modeling_llada.py").write_text(NETWORK)
    (path / "llada" / "generate.py").write_text(loop.format(dot=dot))
    return path / "llada"


@pytest.fixture
def bench() -> gpu.Bench:
    made = gpu.Bench(SMALL, CPU, 1)
    made.timer = count(step=0.5).__next__
    return made


def test_every_row_runs_on_a_cpu(tmp_path: Path) -> None:
    rows = list(gpu.run(None, 1, small=True, against=folder(tmp_path), device=CPU))
    assert [row.note for row in rows if row.failed] == []
    skipped = {row.note for row in rows if row.value is None}
    assert skipped <= {"skipped: needs a GPU", "skipped: needs torchao: pip install 'dllm-toolkit[quantization]'"}
    parts = gpu.Bench(SMALL, CPU, 1).parts()
    assert [row.name for row in rows] == [row.name for part in parts for row in part.rows]
    found = {row.name: row for row in rows}
    assert found["rows equal to themselves alone, float32"].value == 1.0
    assert found["Fast-dLLM's loop / ours, dual"].note.split("; ")[1].startswith("4 and 4 forwards")
    assert {row.bound for row in rows} == {None}  # tiny shapes are not judged


def test_what_is_asked_of_the_full_shapes() -> None:
    bounds = {row.name: row.bound for part in gpu.Bench(SMALL, CPU, 1).parts() for row in part.rows}
    assert [bound for name, bound in bounds.items() if bound and "own work" not in name] == [
        3.0, 1.6, 0.9, 12, 1, 6, 1, 4, 1.5, 1.05, 1.5, 1.05, 2, 2, 0.75, 60, 10, 1.6, 0.75,
    ]  # fmt: skip
    own = {name.removeprefix("own work of a step, ms: "): b for name, b in bounds.items() if "own work" in name}
    assert (own["threshold"], own["threshold, top-p"], own["daedal"]) == (0.6, 1.2, 2.0)
    assert len(own) >= 2 * 32


def test_what_does_not_fit_into_the_minutes_is_left_out() -> None:
    rows = list(gpu.run(["decode", "batch"], 1, small=True, minutes=0, device=CPU))
    assert {row.note for row in rows} == {"skipped: takes about 0 s, and 0 s of 0 minutes are left"}
    assert [row.value for row in rows] == [None] * 3


def test_an_error_is_a_row_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half() -> Iterator[gpu.Found]:
        yield 2.0, "two"
        raise RuntimeError("first line\nsecond line")

    rows = (gpu.asked("a", 3), gpu.asked("b", 4))
    found = list(gpu.measured(gpu.Part("x", rows, half, 1)))
    assert found == [
        Figure("a", 2.0, 3, note="two"), Figure("b", None, 4, note="RuntimeError: first line", failed=True),
    ]  # fmt: skip
    assert (found[0].met, found[1].met) == (True, None)
    monkeypatch.setattr(gpu, "run", lambda *_, **__: iter(found))
    monkeypatch.setattr(sys, "argv", ["dllm", "bench", "gpu", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert '"failed": true' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"small": False}, "no CUDA device; --small"),
        ({"only": ["decod"]}, "did you mean 'decode'"),
        ({"against": Path("no/such")}, "there is no generate.py; name the folder `llada` of a Fast-dLLM checkout"),
    ],
)
def test_mistakes(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DllmError, match=message):
        next(gpu.run(**{"small": True, "device": CPU, **arguments}))


def test_time_of_a_forward_and_its_floor(bench: gpu.Bench) -> None:
    vars(bench)["bandwidth"] = weights(bench.dense) / 0.025  # bytes a second: the floor is 25 ms
    [(ratio, note)] = bench.decode()
    assert ratio == pytest.approx(5.0)  # half a second for four forwards
    assert note == "125.00 ms a forward, 4 forwards, 32 tokens/s"
    [(first, said)] = bench.first()
    assert (first, said) == (0.0, "0.50 s, later 0.50 s; no graphs")


def test_what_is_measured_is_captured(bench: gpu.Bench) -> None:
    with standing_in():
        _, said = next(iter(bench.own_work("threshold")))
        assert said.startswith("2 steps a decode") and not said.endswith(" 0 replays")
        [(_, first)] = bench.first()
        assert "'captures': 2, 'replays': 2, 'eager': 2" in first  # a refresh and a step of two blocks
        assert not [out for out in dllm.generate(bench.dense, [[1]], max_new_tokens=4, **gpu.EAGER) if out.stats]


def test_bandwidth_counts_reads_and_writes(bench: gpu.Bench) -> None:
    assert bench.bandwidth == 2 * SMALL.copied / 0.5


def test_bytes_of_a_forward(bench: gpu.Bench) -> None:
    layer = 4 * 64 * 64 + 3 * 64 * 192 + 2 * 64
    assert weights(bench.dense) == 4 * (2 * layer + 64 + 512 * 64)  # the embedding is looked up
    model = bench.model(SMALL.mixture)
    assert weights(model) - weights(model, 0.25) == 0.75 * 4 * 8 * 3 * 64 * 16  # one layer is a mixture


def test_experts_that_a_forward_chooses(bench: gpu.Bench) -> None:
    model = bench.model(SMALL.mixture)
    once = partial(model.forward, torch.zeros(1, 1, dtype=torch.long))
    assert experts_read(model, once) == 2 / 8  # of one token
    assert experts_read(model, lambda: (once(), once())) == 2 / 8


def test_prompts_are_ragged(bench: gpu.Bench) -> None:
    lengths = [len(prompt) for prompt in bench.prompts(4)]
    assert lengths == [16, 14, 12, 10]
    assert bench.prompts(1)[0] == bench.prompts(4)[0]


def test_counts_of_a_step() -> None:
    host = (
        "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync",
        "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaDeviceSynchronize", "aten::add",
    )  # fmt: skip
    records = [Record(name, False, i, i + 1) for i, name in enumerate(host)]
    records += [Record("kernel", True, a, b) for a, b in ((0, 10), (5, 12), (6, 7), (20, 24))]
    found = counted(records, 2)
    assert (found.launches, found.replays, found.copies, found.waits) == (1.5, 0.5, 0.5, 1.5)
    assert found.busy == pytest.approx(8e-6)  # 0 to 12 and 20 to 24, of two steps


def test_steps_are_traced(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "traced", lambda work, steps: (work(), traced(lambda: None, steps))[1])
    assert list(bench.steady()) == [
        (0.0, "0.00 of 125.00 ms a step"), (0.0, "0.0 launches, 0.0 replays; 0.0 copies beside"), (0.0, "4 steps"),
    ]  # fmt: skip


@pytest.mark.parametrize("dot", ["", "."])
def test_the_network_of_a_folder_has_our_weights(tmp_path: Path, bench: gpu.Bench, dot: str) -> None:
    modules, path = set(sys.modules), list(sys.path)
    prompt, model = torch.tensor([[3, 4]]), bench.dense
    allowed = rival.Kernels.allowed()
    with rival.rival(folder(tmp_path, dot=dot), model) as other:
        assert rival.Kernels.allowed() == allowed != other.kernels
        head = other.network.get_submodule("model.transformer.ff_out").weight
        assert head.data_ptr() == model.transformer.lm_head.weight.data_ptr()
        tokens, nfe = other.decode("dual", prompt, steps=2, new=4, block=4, mask=511)
        ids = torch.tensor([[511] * 4])
        best = other.network(ids).logits[..., :511].argmax(-1)
        assert (tokens, nfe) == (best[0].tolist(), 2)
    assert rival.Kernels.allowed() == allowed
    assert sys.path == path
    assert not {name for name in sys.modules.keys() - modules if "llada" in name or name.startswith("model")}


def without(word: str) -> Callable[[Path], Path]:
    return lambda path: folder(path, LOOP.replace(word, "other"))


def narrower(path: Path) -> Path:
    made = folder(path)
    made.joinpath("model/modeling_llada.py").write_text(NETWORK.replace('"ff_proj", "up_proj"', '"ff_proj",'))
    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (without("generate_with_dual_cache"), "generate.py has no generate_with_dual_cache$"),
        (narrower, "its network has other weights than this model: model.transformer.blocks.0.up_proj.weight, "),
    ],
)
def test_a_folder_that_lacks_something(
    tmp_path: Path, bench: gpu.Bench, made: Callable[[Path], Path], message: str
) -> None:
    model: NativeModel = bench.dense
    with pytest.raises(DllmError, match=message), rival.rival(made(tmp_path), model):
        pass
