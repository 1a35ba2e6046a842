"""The training library: masking, losses, data, recipes, resuming, and what happens when something goes wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dllm.errors import DllmError
from dllm.models.config import ModelConfig
from dllm.models.hub import load
from dllm.models.native import NativeModel
from dllm.models.transformer import Transformer
from dllm.spec import build
from dllm.tasks.base import Example
from dllm.training import checkpoint, trainer
from dllm.training.config import DataSpec, MaskSpec, ScheduleSpec, TrainConfig, load_config
from dllm.training.data import Batch, Batches, JsonLines, Pair, TaskMix, read_jsonl, read_prompts
from dllm.training.diffusion import mask_hard, mask_window, noise_levels, reading_rows, weighted
from dllm.training.evaluate import wilson
from dllm.training.log import read_curve
from dllm.training.objectives import Autoregressive, Diffusion, _hidden
from dllm.training.optim import Muon, orthogonal
from dllm.training.trainer import Trainer, train

RECIPE = {
    "model": {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 48, "max_positions": 256},
    "data": {"tasks": {"word_problems": 1, "sudoku": 1, "functions": 1}, "long": 0.1},
    "schedule": {"steps": 8, "warmup": 2, "decay": 3},
    "batch_size": 4,
    "log_every": 2,
    "save_every": 3,
    "device": "cpu",
}


def recipe(folder: Path, **changes: object) -> TrainConfig:
    return build(TrainConfig, {**RECIPE, "output": str(folder), **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(model: NativeModel) -> dict[str, torch.Tensor]:
    return dict(model.transformer.state_dict())


# ---------------------------------------------------------------------------------------------------- masking, losses


def test_noise_levels_cover_the_interval_evenly() -> None:
    t = noise_levels(10, generator())
    assert sorted(((t * 10).ceil() - 1).long().tolist()) == list(range(10))
    assert t.min() > 0 and t.max() <= 1


def test_noise_levels_do_not_depend_on_the_place_in_the_batch() -> None:
    """Else the first rows of every batch would be the barely masked ones."""
    g = generator()
    levels = torch.stack([noise_levels(4, g) for _ in range(2000)])
    assert (levels.mean(0) - 0.5).abs().max() < 0.03


def test_masking_touches_the_window_only_and_at_the_asked_rate() -> None:
    ids = torch.arange(5, 105).repeat(4000, 1)
    first = torch.full((4000,), 20)
    t = torch.full((4000,), 0.3)
    noisy, masked = mask_window(ids, first, 1, t, generator())
    assert not masked[:, :20].any()
    assert torch.equal(noisy == 1, masked)
    assert torch.equal(noisy[~masked], ids[~masked])
    assert masked[:, 20:].float().mean().item() == pytest.approx(0.3, abs=0.003)


def test_every_row_has_a_masked_token_even_at_tiny_rates() -> None:
    _, masked = mask_window(torch.zeros(50, 9).long(), torch.full((50,), 6), 1, torch.full((50,), 1e-9), generator())
    assert (masked.sum(1) == 1).all()


def test_skip_first_keeps_position_zero() -> None:
    _, masked = mask_window(torch.zeros(50, 4).long(), torch.zeros(50).long(), 1, torch.ones(50), generator(), True)
    assert not masked[:, 0].any() and masked[:, 1:].all()


def test_reading_rows_open_somewhere_in_the_answer() -> None:
    first, answer = torch.full((2000,), 3), torch.full((2000,), 5)
    chosen = torch.arange(2000) % 2 == 0
    cut = reading_rows(first, answer, chosen, generator())
    assert (cut[~chosen] == 3).all()
    assert set((cut[chosen] - 3).tolist()) == {0, 1, 2, 3, 4}


def test_hard_tokens_are_masked_in_proportion_to_their_difficulty() -> None:
    """One of two tokens is masked first with the probability of its share of the weights (Plackett-Luce)."""
    ids = torch.tensor([9, 5, 6]).repeat(20000, 1)
    difficulty = torch.zeros(10)
    difficulty[5], difficulty[6] = 3.0, 1.0
    masked = mask_hard(ids, torch.ones(20000).long(), torch.full((20000,), 0.5), difficulty, generator())
    assert not masked[:, 0].any() and (masked.sum(1) == 1).all()
    assert masked[:, 1].float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert mask_hard(ids, torch.ones(20000).long(), torch.ones(20000), difficulty, generator())[:, 1:].all()


def test_hard_masks_take_all_copies_of_a_value_behind_the_first_column() -> None:
    ids = torch.tensor([4, 9, 5, 9, 6, 5, 9]).repeat(500, 1)
    masked = mask_hard(ids, torch.full((500,), 2), torch.full((500,), 1e-9), torch.ones(10), generator())
    patterns = {tuple(row.nonzero().flatten().tolist()) for row in masked}
    assert patterns == {(2, 5), (3, 6), (4,)}  # the 9 in column 1 is before the first


def test_shares_of_kinds_of_rows_and_learned_difficulty() -> None:
    objective = Diffusion(1, 40, "uniform", MaskSpec(reading=0.3, hard=0.4))
    batch = Batch(torch.full((3000, 20), 7), torch.full((3000,), 4), torch.full((3000,), 16))
    noisy, masked, t = objective.noise(batch, generator(), False)
    assert (t == 1).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(noisy == 1, masked) and not masked[:, :4].any() and masked.any(1).all()
    objective._learn(torch.tensor([3.0] * 5 + [0.0] * 5), torch.tensor([7] * 5 + [8] * 5))
    assert objective.difficulty[7] > 1 > objective.difficulty[8] and objective.difficulty[9] == 1


def test_elbo_loss_is_unbiased_and_uniform_the_plain_mean() -> None:
    """With weights 1/t the expectation over masks is the mean loss of all tokens, whatever t."""
    nats = torch.rand(40, generator=generator()) * 3
    t = noise_levels(3000, generator(1))
    masked = torch.rand(3000, 40, generator=generator(2)) < t[:, None]
    chosen = nats.expand(3000, -1)[masked]
    level = t[:, None].expand(-1, 40)[masked]
    elbo = weighted(chosen, level, torch.tensor(3000 * 40), "elbo")
    assert elbo.item() == pytest.approx(nats.mean().item(), rel=0.05)
    assert weighted(chosen, level, torch.tensor(1), "uniform").item() == pytest.approx(chosen.mean().item())


# --------------------------------------------------------------------------------------------------------- objectives


def tiny_config(**changes: object) -> ModelConfig:
    base = ModelConfig(
        family="llada", architecture="LLaDAModelLM", vocab_size=40, embedding_rows=40, hidden_size=16, n_layers=2,
        n_heads=2, n_kv_heads=2, head_dim=8, intermediate_size=24, mask_id=1, eos_ids=(2,), max_positions=64,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def test_block_causal_training_equals_decoding_block_by_block() -> None:
    """Each block's hidden states are those of a forward over the clean blocks before it and its own noisy tokens."""
    torch.manual_seed(0)
    model = Transformer(tiny_config(family="sdar", block_size=4)).eval()
    clean = torch.randint(3, 40, (2, 12))
    noisy = clean.clone()
    noisy[:, [1, 5, 6, 9, 11]] = 1
    rows, columns = (noisy == 1).nonzero(as_tuple=True)
    got = _hidden(model, noisy, clean, rows, columns)
    for row, column, hidden in zip(rows.tolist(), columns.tolist(), got, strict=True):
        start = column // 4 * 4
        seen = torch.cat([clean[row, :start], noisy[row, start : start + 4]])
        torch.testing.assert_close(model(seen[None])[0, column], hidden, rtol=1e-4, atol=1e-5)


def test_shifted_models_read_the_row_before() -> None:
    torch.manual_seed(0)
    plain = Transformer(tiny_config(family="dream", shift=1)).eval()
    ids = torch.randint(3, 40, (1, 8))
    rows, columns = torch.zeros(2).long(), torch.tensor([3, 5])
    torch.testing.assert_close(_hidden(plain, ids, ids, rows, columns), plain(ids)[0, [2, 4]])
    both = Transformer(tiny_config(family="fast_dllm_v2", shift=1, block_size=4)).eval()
    noisy = ids.clone()
    noisy[0, [3, 4, 6]] = 1
    got = _hidden(both, noisy, ids, torch.zeros(2).long(), torch.tensor([4, 6]))
    # The first token of a block is read from the finished block before it, the others from their own noisy block.
    torch.testing.assert_close(got[0], both(ids[:, :4])[0, 3], rtol=1e-4, atol=1e-5)
    own = torch.cat([ids[:, :4], noisy[:, 4:]], 1)
    torch.testing.assert_close(got[1], both(own)[0, 5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block,shift", [(None, 0), (None, 1), (4, 0), (4, 1)])
def test_every_kind_of_family_learns_one_batch(block: int | None, shift: int) -> None:
    torch.manual_seed(0)
    model = Transformer(tiny_config(block_size=block, shift=shift))
    batch = Batch(torch.randint(3, 40, (1, 16)).repeat(4, 1), torch.full((4,), 6), torch.full((4,), 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for step in range(60):
        loss = Diffusion(1, 40, "uniform", MaskSpec(0.2, 0.3))(model, batch, generator(step))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        losses.append(loss.value.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_autoregressive_loss_covers_the_answer_and_one_end_token() -> None:
    model = Transformer(tiny_config(family="causal", architecture="LlamaForCausalLM", causal=True, shift=1)).eval()
    ids = torch.tensor([[5, 6, 7, 8, 2, 2, 2, 2]])
    loss = Autoregressive()(model, Batch(ids, torch.tensor([2]), torch.tensor([3])), generator())
    assert loss.tokens == 3
    logits = model.head(model(ids))[0]
    assert loss.value.item() == pytest.approx(F.cross_entropy(logits[1:4], ids[0, 2:5]).item(), rel=1e-5)


# --------------------------------------------------------------------------------------------------------------- data


def pairs(example: Example) -> Pair:
    return Pair([7] * len(example.prompt), [8] * len(example.answer))


def test_rows_have_one_length_and_end_in_eos() -> None:
    batches = Batches(TaskMix({"functions": 1.0}), pairs, 2, 8, DataSpec(long=0.5, rare=0.1), seed=1)
    for _, batch in zip(range(20), batches.from_step(0), strict=False):
        assert batch.ids.shape[1] % 8 == 0
        for ids, prompt, answer in zip(*(x.tolist() for x in batch), strict=True):
            assert ids[:prompt] == [7] * prompt
            assert ids[prompt : prompt + answer] == [8] * (answer - 1) + [2]
            assert set(ids[prompt + answer :]) <= {2}


def test_batches_depend_on_the_step_alone() -> None:
    batches = Batches(TaskMix({"functions": 1.0, "word_problems": 2.0}), pairs, 2, 4, DataSpec(), seed=1)
    run = batches.from_step(0)
    first = [next(run) for _ in range(20)]
    again = next(batches.from_step(18))
    assert torch.equal(first[18].ids, again.ids)
    assert not any(torch.equal(first[0].ids, b.ids) for b in first[1:])


def test_task_mix_never_leaves_the_training_split() -> None:
    from dllm.tasks.base import hash_split

    for example in TaskMix({"word_problems": 1.0, "functions": 1.0}).take(0, 200, 0):
        assert hash_split(example.meta["key"]) == "train"


def test_jsonl_visits_every_example_once_an_epoch(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{i}", "answer": f"ä{i}"}) for i in range(7)), encoding="utf-8")
    source = JsonLines(path)
    assert sorted(e.prompt for e in source.take(7, 7, 0)) == [f"p{i}" for i in range(7)]
    assert [e.prompt for e in source.take(0, 7, 0)] != [e.prompt for e in source.take(7, 7, 0)]
    assert source.take(3, 9, 0) == source.take(0, 12, 0)[3:]


def test_broken_lines_are_named_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    good = b'{"prompt": "a", "answer": "b"}'
    path.write_bytes(b"\n".join([good, b"{", b'{"prompt": 1, "answer": "b"}', b"", b"[]", b'{"answer": "\xff"}', good]))
    with pytest.raises(DllmError, match=r"4 broken lines .*: 2, 3, 5, 6$"):
        read_jsonl(path)
    path.write_text("\n\n")
    with pytest.raises(DllmError, match="no examples"):
        read_jsonl(path)
    with pytest.raises(DllmError, match="no data file"):
        read_jsonl(tmp_path / "absent")


def test_an_example_beyond_max_length_is_named() -> None:
    batches = Batches(TaskMix({"functions": 1.0}), pairs, 2, 4, DataSpec(max_length=20), seed=1)
    with pytest.raises(DllmError, match="exceeds max_length 20"):
        next(batches.from_step(0))


# ------------------------------------------------------------------------------------------------------------ recipes


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\u2028still one\r\n\n two\x85\n".encode())
    assert read_prompts(path) == ["one\u2028still one", " two\x85"]
    path.write_bytes(b"\xff")
    with pytest.raises(DllmError, match="cannot read"):
        read_prompts(path)
    with pytest.raises(DllmError, match="no file of prompts"):
        read_prompts(tmp_path / "absent")


@pytest.mark.parametrize(
    "change,message",
    [
        ("batchsize: 3", "did you mean 'batch_size'"),
        ("optimizer: {learning_rate: 1}", "optimizer.learning_rate"),
        ("batch_size: many", "line 3: batch_size: must be an integer, found 'many'"),
        ("batch_size: 0", "line 3: batch_size: must be at least 1, found 0"),
        ("objective: diffusio", "did you mean 'diffusion'"),
        ("data: {}", "data once"),
        ("data: {tasks: {sudoku: -1}}", "weights"),
        ("schedule: {steps: 5, decay: 9}", "between 0 and steps"),
        ("loss: elbo\nmasks: {hard: 0.5}", "leave out masks"),
        ("lora: {rank: 4}", "model.start"),
        ("- a", "not valid YAML"),
        ("lora: &l {targets: *l}", "the anchor 'l' refers to itself"),
        ("seed: 2024-13-45", "month must be in"),
    ],
)
def test_bad_recipes_say_what_is_wrong(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        f"output: {tmp_path}\n" + ("" if change.startswith("data") else "data: {tasks: {sudoku: 1}}\n") + change
    )
    with pytest.raises(DllmError, match=message):
        load_config(path)


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("output: o\ndata: {tasks: {sudoku: 1}}\n")
    config = load_config(path, ["optimizer.lr=1e-3", "batch_size=7", "lora.targets=[q_proj]"])
    assert (config.optimizer.lr, config.batch_size, config.lora.targets) == (1e-3, 7, ("q_proj",))
    with pytest.raises(DllmError, match="key=value"):
        load_config(path, ["batch_size"])
    with pytest.raises(DllmError, match="no recipe"):
        load_config(tmp_path / "absent.yaml")


def test_schedule_rises_stays_and_falls() -> None:
    rates = [ScheduleSpec(steps=100, warmup=10, decay=40).rate(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:61] == [1.0] * 52
    assert rates[80] == pytest.approx(0.5) and 0 < rates[99] < 0.03


def test_wilson_interval() -> None:
    assert wilson(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(5, 5)[1] == pytest.approx(1.0) and wilson(5, 5)[0] < 0.6


# ----------------------------------------------------------------------------------------------------- runs, resuming


def interrupted(monkeypatch: pytest.MonkeyPatch, config: TrainConfig, after: int) -> None:
    """A run that dies after some steps, as by Ctrl-C."""
    backward = Trainer._backward

    def stop(self: Trainer, batch: Batch, step: int, part: int) -> object:
        if step == after:
            raise KeyboardInterrupt
        return backward(self, batch, step, part)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_backward", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_muon_follows_torch_but_for_its_bfloat16(shape: tuple[int, int]) -> None:
    start = [torch.randn(shape, generator=generator(i)) for i in range(2)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    both = Muon(ours, **settings), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(4):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = torch.randn(shape, generator=generator(10 * step + i))
            b.grad = a.grad.clone()
        for optimizer in both:
            optimizer.step()
    for a, b, p in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - p).norm()


def test_orthogonal_makes_every_singular_value_nearly_one() -> None:
    x = torch.randn(3, 20, 50, generator=generator(), dtype=torch.float64)
    for update in (orthogonal(x), orthogonal(x.mT).mT):
        values = torch.linalg.svdvals(update)
        assert values.min() > 0.6 and values.max() < 1.3
        torch.testing.assert_close(update, orthogonal(x))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    changes = {"accumulate": 2, "masks": {"reading": 0.3, "hard": 0.4, "power": 2}, "optimizer": {"name": optimizer}}
    whole = train(recipe(tmp_path / "a", **changes))
    config = recipe(tmp_path / "b", **changes)
    interrupted(monkeypatch, config, after=5)
    resumed = train(config, resume=True)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    a, b = read_curve(tmp_path / "a" / "curve.csv"), read_curve(tmp_path / "b" / "curve.csv")
    assert [r["step"] for r in a] == [r["step"] for r in b] == [2, 4, 6, 8]
    assert a[-1]["loss"] == b[-1]["loss"]


def test_resume_after_kill_9(tmp_path: Path) -> None:
    whole = train(recipe(tmp_path / "a", save_every=1, schedule={"steps": 6, "warmup": 2, "decay": 3}))
    path = tmp_path / "r.yaml"
    values = {
        **RECIPE,
        "output": str(tmp_path / "b"),
        "save_every": 1,
        "schedule": {"steps": 6, "warmup": 2, "decay": 3},
    }
    path.write_text(json.dumps(values))
    command = [sys.executable, "-c", "from dllm.cli import main; main()", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})  # fmt: skip
    saved = tmp_path / "b" / "checkpoint.pt"
    deadline = time.monotonic() + 600
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < checkpoint.read(saved)["step"] <= 6
    resumed = train(load_config(path), resume=True)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_ctrl_c_ends_the_step_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(recipe(tmp_path / "a"))
    backward = Trainer._backward

    def strike(self: Trainer, batch: Batch, step: int, part: int) -> object:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return backward(self, batch, step, part)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trainer, "_backward", strike)
            train(recipe(tmp_path / "b"))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    resumed = Trainer(recipe(tmp_path / "b"), resume=True)
    assert resumed.step == 5  # the step that it fell into counts
    for name, value in weights(resumed.run()).items():
        assert torch.equal(value, weights(whole)[name]), name


def test_another_recipe_is_refused_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(tmp_path)
    interrupted(monkeypatch, config, after=4)
    with pytest.raises(DllmError, match=r"another recipe: seed \(0 there\)"):
        train(replace(config, seed=1), resume=True)
    with pytest.raises(DllmError, match="another recipe: schedule"):
        train(replace(config, schedule=ScheduleSpec(steps=8, warmup=4, decay=3)), resume=True)
    with pytest.raises(DllmError, match="go on with --resume"):
        train(config)
    longer = replace(config, schedule=ScheduleSpec(steps=9, warmup=2, decay=3))  # decay had not begun: allowed
    assert Trainer(longer, resume=True).step == 3


def test_nothing_to_resume_and_damaged_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DllmError, match="nothing to resume"):
        train(recipe(tmp_path / "new"), resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DllmError, match="cannot be read as a checkpoint"):
        train(recipe(tmp_path), resume=True)


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save_atomically({"step": 1}, path)

    def full(value: object, file: object) -> None:
        file.write(b"half of it")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DllmError, match="No space left on device; the checkpoint before it is kept"):
        checkpoint.save_atomically({"step": 2}, path)
    monkeypatch.undo()
    assert checkpoint.read(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_really_full_device_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    (tmp_path / "c.pt.new").symlink_to("/dev/full")
    with pytest.raises(DllmError, match="could not save"):
        checkpoint.save_atomically({"x": torch.zeros(10**6)}, path)
    assert not path.exists()


def test_nan_stops_at_its_step_and_keeps_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Diffusion.__call__
    calls = []

    def poisoned(self: Diffusion, model: Transformer, batch: Batch, g: torch.Generator) -> object:
        calls.append(1)
        loss = objective(self, model, batch, g)
        return loss._replace(value=loss.value * math.nan) if len(calls) == 5 else loss

    monkeypatch.setattr(Diffusion, "__call__", poisoned)
    with pytest.raises(DllmError, match="step 5: the loss is not finite; the last good state is in"):
        train(recipe(tmp_path))
    saved = checkpoint.read(tmp_path / "checkpoint.pt")
    assert saved["step"] == 3
    assert all(v.isfinite().all() for v in saved["weights"].values())


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Gradients of two parts are the mean of the parts' gradients."""
    run = Trainer(recipe(tmp_path, accumulate=2))
    run.backbone.eval()
    feed = run.batches.from_step(0)
    first, second = next(feed), next(feed)
    run._backward(first, 0, 0)
    run._backward(second, 0, 1)
    total = run.backbone.norm.weight.grad
    assert total is not None
    alone = []
    for part, batch in enumerate((first, second)):
        run.backbone.zero_grad()
        run.objective(run.backbone, batch, generator(part)).value.backward()
        assert run.backbone.norm.weight.grad is not None
        alone.append(run.backbone.norm.weight.grad.clone())
    torch.testing.assert_close(total, (alone[0] + alone[1]) / 2)


def test_own_jsonl_and_export_in_the_official_layout(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"Say {i}.", "answer": f" {i}"}) for i in range(9)))
    model = train(recipe(tmp_path / "run", data={"jsonl": str(path)}))
    again = load(tmp_path / "run" / "model", device="cpu")
    for name, value in weights(model).items():
        assert torch.equal(value, weights(again)[name])
    stored = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert "model.transformer.blocks.0.attn_out.weight" in stored
    assert again.tokenizer.chat_template == model.tokenizer.chat_template


def test_twin_loads_into_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = train(recipe(tmp_path, objective="autoregressive"))
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.tensor([[9, 8, 7, 20]])
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model.forward(ids)), twin(ids).logits, rtol=1e-4, atol=1e-4)


def test_objective_must_fit_the_model(tmp_path: Path) -> None:
    first = train(recipe(tmp_path / "a", schedule={"steps": 1, "warmup": 0, "decay": 0}))
    with pytest.raises(DllmError, match="does not fit a masked-diffusion model"):
        Trainer(recipe(tmp_path / "b", objective="autoregressive"), model=first)


def test_dllm_starts_from_its_twin(tmp_path: Path) -> None:
    short = {"steps": 1, "warmup": 0, "decay": 0}
    twin = train(recipe(tmp_path / "a", objective="autoregressive", schedule=short))
    config = recipe(tmp_path / "b", model={"start": str(tmp_path / "a" / "model")}, schedule=short)
    start = Trainer(config).model
    assert (start.family, start.mask_id, start.config.causal) == ("llada", 1, False)
    for name, value in weights(twin).items():
        assert torch.equal(value, weights(start)[name])


def test_lora_trains_adapters_only_resumes_and_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    train(recipe(tmp_path / "base", schedule={"steps": 1, "warmup": 0, "decay": 0}))
    changes = {
        "model": {"start": str(tmp_path / "base" / "model")},
        "lora": {"rank": 2, "dropout": 0.1},
        "optimizer": {"name": "adamw"},
    }
    whole = train(recipe(tmp_path / "a", **changes))
    config = recipe(tmp_path / "b", **changes)
    interrupted(monkeypatch, config, after=5)
    assert all("lora_" in name for name in checkpoint.read(tmp_path / "b" / "checkpoint.pt")["weights"])
    resumed = train(config, resume=True)
    base = weights(load(tmp_path / "base" / "model", device="cpu"))
    assert weights(whole).keys() == base.keys()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert torch.equal(weights(whole)["embed_tokens.weight"], base["embed_tokens.weight"])
    assert not torch.equal(weights(whole)["layers.0.mlp.gate_up_proj.weight"], base["layers.0.mlp.gate_up_proj.weight"])
    with pytest.raises(DllmError, match=r"lora\.targets"):
        Trainer(recipe(tmp_path / "c", **{**changes, "lora": {"rank": 2, "targets": ["nothing_so_named"]}}))


def test_lora_without_peft_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(recipe(tmp_path / "base", schedule={"steps": 1, "warmup": 0, "decay": 0}))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DllmError, match=r"dllm-toolkit\[lora\]"):
        Trainer(recipe(tmp_path / "x", model={"start": str(tmp_path / "base" / "model")}, lora={"rank": 2}))


def test_mixed_precision_keeps_float32_weights(tmp_path: Path) -> None:
    model = train(recipe(tmp_path, precision="bfloat16"))
    assert {v.dtype for v in weights(model).values()} == {torch.float32}


def test_shipped_recipes_are_valid() -> None:
    folder = Path(trainer.__file__).parents[2] / "configs" / "train"
    recipes = [load_config(p) for p in sorted(folder.glob("*.yaml"))]
    assert {r.objective for r in recipes} == {"diffusion", "autoregressive"}


def test_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from dllm.cli import app

    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**RECIPE, "output": str(tmp_path / "run")}))
    result = CliRunner().invoke(app, ["train", str(path), "--set", "schedule.steps=2", "--set", "schedule.decay=0"])
    assert result.exit_code == 0, result.output
    assert "run/model" in result.output.replace("\n", "")
    result = CliRunner().invoke(app, ["train", str(path), "--set", "schedule.steps=2", "--set", "schedule.decay=0",
                                      "--eval", "--problems", "3"])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["word_problems", "sudoku", "functions"]
