"""Learned filters (Learn2PD) and end-of-text prediction."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import model
from scripted import Scripted, peaks

import dllm
from dllm.decoding.prediction import Prediction
from dllm.errors import DllmError
from dllm.samplers.learn2pd import EMBEDDED, Filter, feature_of, tokenizer_hash
from dllm.training import filters

PROMPTS = [[3, 4, 5, 6, 7, 8], [9, 10, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
CALL: dict[str, Any] = {"max_new_tokens": 24, "block_length": 8, "early_stop": False}
RANDOM = "tiny-llada-random"


def diagonal(size: int, k: float = 10.0, c: float = 0.9, tau: float = 0.5) -> Filter:
    """Accepts conf > c + logit(tau) / k."""
    weights = {
        "linear1.weight": torch.eye(size), "linear1.bias": torch.zeros(size),
        "linear2.weight": k * torch.eye(size), "linear2.bias": torch.full((size,), -k * c),
    }  # fmt: skip
    return Filter(weights, size, tau=tau)


def decode(sampler: Any, **more: Any) -> list[Any]:
    return dllm.generate(model(RANDOM), PROMPTS, sampler=sampler, **{**CALL, **more}, trace=True)


def test_size_and_round_trip(tmp_path: Path) -> None:
    made = Filter(filters.fresh(filters.Recipe(kind="block"), 32), 32, meta={"model": "m"})
    assert sum(w.numel() for w in made.weights.values()) == 2112
    made.save(tmp_path / "f.safetensors")
    back = Filter.load(tmp_path / "f.safetensors")
    assert all(torch.equal(back.weights[k], w) for k, w in made.weights.items())
    assert (back.tau, back.kind, back.feature, back.meta and back.meta["model"]) == (0.96, "block", "prob", "m")
    torch.save({k: w.double() for k, w in made.weights.items()}, tmp_path / "f.pth")
    converted = Filter.load(tmp_path / "f.pth")
    assert converted.revealed == "model"
    assert all(torch.equal(converted.weights[k], w) for k, w in made.weights.items())


def test_features_stay_finite_where_a_probability_rounds_to_one() -> None:
    logits = torch.tensor([[[100.0, 0.0], [1.0, 0.0]]])
    pred = Prediction(logits, torch.tensor([[0, 1]]))
    assert feature_of(pred, "log1m")[0].tolist() == pytest.approx([20.0, 1.3133], abs=1e-3)
    assert feature_of(pred, "prob")[0].tolist() == pytest.approx([1.0, 0.7311], abs=1e-3)
    assert feature_of(pred, "negent")[0, 0] == pytest.approx(0.0, abs=1e-6)


def test_hand_example() -> None:
    z = diagonal(2)(torch.tensor([[0.95, 0.85]]), torch.ones(1, 2, dtype=torch.bool))
    assert z[0].tolist() == pytest.approx([0.5, -0.5], abs=1e-5)
    unsure = Scripted(peaks([(1, 0.5), (2, 0.6)], 4))
    sampler = {"name": "learn2pd", "filter": diagonal(2)}
    out = dllm.generate(unsure, [0], sampler=sampler, max_new_tokens=2, block_length=2, trace=True)
    assert out.trace.commits == [[[2, 2]], [[1, 1]]]  # none passes: the surest column goes first


@pytest.mark.parametrize("cache_", ["none", "dual"])
def test_diagonal_filter_is_the_threshold(cache_: str) -> None:
    for c in (0.3, 0.5):
        ours = decode({"name": "learn2pd", "filter": diagonal(8, c=c)}, cache=cache_)
        plain = decode({"name": "threshold", "tau": c}, cache=cache_)
        assert [o.trace.commits for o in ours] == [o.trace.commits for o in plain]
        assert max(len(step) for o in ours for step in o.trace.commits) > 1


def test_accepting_nothing_is_static_and_everything_one_forward_a_block() -> None:
    static = decode("confidence")
    assert [o.trace.commits for o in decode({"name": "learn2pd", "filter": diagonal(8), "tau": 1})] == [
        o.trace.commits for o in static
    ]
    assert [o.nfe for o in decode({"name": "learn2pd", "filter": diagonal(8), "tau": -1})] == [3, 3, 3]


def test_short_blocks_are_padded() -> None:
    ours = decode({"name": "learn2pd", "filter": diagonal(32, c=0.4)}, max_new_tokens=13)
    plain = decode("threshold:tau=0.4", max_new_tokens=13)
    assert [o.trace.commits for o in ours] == [o.trace.commits for o in plain]


def test_accepted_set_shrinks_as_tau_grows() -> None:
    draws = torch.Generator().manual_seed(0)
    made = Filter(filters.fresh(filters.Recipe(), 8), 8, "shared")
    p = made(torch.rand(5, 8, generator=draws), torch.rand(5, 8, generator=draws) > 0.3).sigmoid()
    low, high = float(p.quantile(0.3)), float(p.quantile(0.7))
    assert bool(((p > high) <= (p > low)).all())
    assert int((p > high).sum()) < int((p > low).sum())


@pytest.fixture(scope="module")
def traces() -> filters.Traces:
    prompts = [
        torch.randint(3, 150, (4 + i % 3,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(20)
    ]
    return filters.collect(model(RANDOM), prompts, max_new_tokens=16, block_length=8, batch_size=20)


def test_traces_follow_the_teacher(traces: filters.Traces) -> None:
    """`collect` itself checks that the path ends in the teacher's answer."""
    assert int(traces.prompt.max()) == 19
    assert bool((traces.label <= traces.real).all())
    first = traces.take((traces.step == 0).nonzero()[:, 0])
    assert bool((first.label & first.masked).any(1).all())  # the teacher's own first token is among the right ones
    for prompt in range(20):
        rows = traces.take((traces.prompt == prompt).nonzero()[:, 0])
        for masked, label, left in zip(rows.masked, rows.label, rows.masked[1:], strict=False):
            right = masked & label
            if bool(left.all()):  # the next block
                continue
            if bool(right.any()):
                assert torch.equal(left, masked & ~label)  # what is right is committed, and nothing else
            else:
                assert int((masked & ~left).sum()) == 1  # stuck: one column of the teacher's
    per_prompt = torch.bincount(traces.prompt)
    assert int(per_prompt.max()) < 16  # fewer steps than the teacher took


def test_training_learns_and_the_filter_decodes(traces: filters.Traces, tmp_path: Path) -> None:
    fit, validation, test = traces.split()
    assert not set(fit.prompt.tolist()) & set(validation.prompt.tolist()) and len(test.prompt)
    recipe = filters.Recipe(precision=0.8)
    made = filters.train(traces, recipe)
    untrained = Filter(filters.fresh(recipe, 8), 8, "shared")
    assert float(filters.loss_of(made, validation, True)) < float(filters.loss_of(untrained, validation, True))
    assert filters.evaluate(made, validation)["precision"] >= 0.8
    made.save(tmp_path / "f.safetensors")
    sampler = {"name": "learn2pd", "filter": str(tmp_path / "f.safetensors"), "tau": 0.3}
    base = decode(sampler)
    assert sum(o.nfe for o in base) < 3 * 24
    ahead = decode(sampler, lookahead=4)
    assert [o.trace.commits for o in ahead] == [o.trace.commits for o in base]
    assert all(a.nfe <= b.nfe for a, b in zip(ahead, base, strict=True))
    followed = filters.collect(model(RANDOM), PROMPTS, max_new_tokens=16, block_length=8, filter=replace(made, tau=0.3))
    assert len(filters.join([traces, followed]).prompt) == len(traces.prompt) + len(followed.prompt)


def test_tau_reaches_the_precision() -> None:
    p, label = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([True, True, False, True, False])
    assert filters.cut_for(p, label, 0.9) == pytest.approx(0.7)
    assert filters.cut_for(p, label, 0.75) == pytest.approx(0.5)
    assert filters.cut_for(p, ~label, 0.9) == 1.0


def test_areas() -> None:
    p, label = torch.tensor([0.9, 0.8, 0.8, 0.1]), torch.tensor([True, True, False, False])
    assert filters.auroc(p, label) == pytest.approx(3.5 / 4)


def test_mismatches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DllmError, match="blocks of 4 columns, not 8"):
        decode({"name": "learn2pd", "filter": diagonal(4)})
    other = replace(diagonal(8), meta={"vocab_size": "7"})
    with pytest.raises(DllmError, match="7 tokens"):
        decode({"name": "learn2pd", "filter": other})
    with pytest.raises(DllmError, match="feature='logit'"):
        replace(diagonal(8), feature="logit")
    with pytest.raises(DllmError, match="do not fit"):
        replace(diagonal(8), block_length=9)
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(DllmError, match="cannot read the filter"):
        Filter.load(tmp_path / "x")
    with pytest.raises(DllmError, match="no state dict"):
        Filter.convert(tmp_path / "x")


# -- end of text ------------------------------------------------------------------------------------------------------

END = 124  # a token that the random model predicts often


def test_the_canvas_ends_behind_the_accepted_end_of_text() -> None:
    outs = decode("eotp+threshold:tau=0.4", eos=END)
    assert any(out.canvas_length < len(p) + 24 for out, p in zip(outs, PROMPTS, strict=True))
    for out, prompt in zip(outs, PROMPTS, strict=True):
        assert out.trace.lengths == sorted(out.trace.lengths, reverse=True)
        new = out.sequences[len(prompt) :]
        assert END not in new[:-1]
        assert out.nfe <= 24


def test_the_eager_mode_cuts_at_a_prediction() -> None:
    base, eager = decode("confidence", eos=END), decode("eotp:mode=eager", eos=END)
    assert sum(o.nfe for o in eager) < sum(o.nfe for o in base)
    accepted, cut = decode("eotp", eos=END), [o.canvas_length for o in eager]
    assert all(a.canvas_length >= c for a, c in zip(accepted, cut, strict=True))


def test_end_of_text_composes_with_a_filter_and_lookahead() -> None:
    sampler = [{"name": "learn2pd", "filter": diagonal(8, c=0.4)}, {"name": "eotp"}]
    base, ahead = decode(sampler, eos=END), decode(sampler, eos=END, lookahead=4)
    assert [o.sequences for o in base] == [o.sequences for o in ahead]


def test_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from dllm.cli import app

    folder = Path(__file__).parent / "golden" / "checkpoints" / "tiny-llada-trained"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{i} plus {i} is" for i in range(12)))
    traces, made = str(tmp_path / "t.safetensors"), str(tmp_path / "f.safetensors")
    steps = [
        [
            "collect",
            traces,
            "--model",
            str(folder),
            "--prompts",
            str(prompts),
            "--max-new-tokens",
            "8",
            "--block-length",
            "8",
        ],
        ["train", traces, "--out", made, "--epochs", "2"],
        ["eval", made, traces],
    ]
    for step in steps:
        result = CliRunner().invoke(app, ["filter", *step])
        assert result.exit_code == 0, result.output
    assert "precision" in result.output


def test_a_filter_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    made, path = Filter(filters.fresh(filters.Recipe(kind="block"), 32), 32), tmp_path / "f.safetensors"
    made.save(path)

    def full(tensors, file, *_):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dllm.samplers.learn2pd.save_file", full)
    with pytest.raises(OSError, match="No space"):
        replace(made, tau=0.1).save(path)
    assert Filter.load(path).fingerprint() == made.fingerprint() and list(tmp_path.iterdir()) == [path]


def test_the_shipped_filter_is_the_embedded_models() -> None:
    """A filter knows its tokenizer by sixteen hex digits; a model without one is not asked."""
    shipped = Filter.load(str(files("dllm.assets").joinpath(EMBEDDED)))
    assert shipped.meta is not None and shipped.meta["tokenizer"] == tokenizer_hash(dllm.load("tiny").tokenizer)
    assert tokenizer_hash(None) == ""
