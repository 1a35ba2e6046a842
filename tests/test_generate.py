"""The front door: prompts of every kind, stops, infilling, streams, scores, and one clear line for every mistake."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN, model, read
from scripted import Scripted, peaks

import dllm
from dllm.call.arguments import Arguments
from dllm.call.prompts import as_list
from dllm.decoding.trace import Trace
from dllm.errors import DllmError

TRAINED = GOLDEN / "checkpoints" / "tiny-llada-trained"


@pytest.fixture(scope="module")
def trained() -> Any:
    return dllm.load(TRAINED, device="cpu")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return model("tiny-llada-random")


def test_prompts_of_every_kind(tiny: Any, trained: Any) -> None:
    one = dllm.generate(tiny, [3, 4, 5], max_new_tokens=4)
    assert dllm.generate(tiny, torch.tensor([3, 4, 5]), max_new_tokens=4).sequences == one.sequences
    listed = dllm.generate(tiny, [[3, 4, 5]], max_new_tokens=4)
    assert isinstance(listed, list)
    assert listed[0].sequences == one.sequences
    assert [o.sequences for o in dllm.generate(tiny, torch.tensor([[3, 4, 5]]), max_new_tokens=4)] == [one.sequences]
    text = dllm.generate(trained, "12+30=", max_new_tokens=8)
    ids = trained.tokenizer("12+30=", add_special_tokens=False)["input_ids"]
    assert text.sequences == dllm.generate(trained, list(ids), max_new_tokens=8).sequences
    assert text.text == trained.tokenizer.decode(text.tokens, skip_special_tokens=True)


def test_no_prompt_is_unconditional(tiny: Any) -> None:
    out = dllm.generate(tiny, max_new_tokens=5, early_stop=False)
    assert len(out.sequences) == 5
    shifted = dllm.generate(model("tiny-dream-random"), max_new_tokens=5, early_stop=False)
    assert shifted.sequences[0] == model("tiny-dream-random").bos_id
    assert len(shifted.sequences) == 6


def test_several_answers_use_consecutive_seeds(tiny: Any) -> None:
    many = dllm.generate(tiny, [3, 4], max_new_tokens=6, temperature=1.0, n=3, seed=5)
    assert [o.seed for o in many] == [5, 6, 7]
    assert many[2].sequences == dllm.generate(tiny, [3, 4], max_new_tokens=6, temperature=1.0, seed=7).sequences


def test_nothing_to_generate(tiny: Any) -> None:
    out = dllm.generate(tiny, [3, 4, 5], max_new_tokens=0)
    assert (out.sequences, out.tokens, out.nfe, out.tokens_per_forward) == ([3, 4, 5], [], 0, 0.0)


def test_infilling_keeps_what_is_given(tiny: Any) -> None:
    m = tiny.mask_id
    prompt = [4, m, m, 9, 10, m, 12]
    out = dllm.generate(tiny, prompt, infill=True, block_length=2)
    assert m not in out.sequences
    assert [t for t, p in zip(out.sequences, prompt, strict=True) if p != m] == [4, 9, 10, 12]
    longer = dllm.generate(tiny, prompt, infill=True, max_new_tokens=3)
    assert len(longer.sequences) == 10
    both = dllm.generate(tiny, [prompt, [5, m, 6]], infill=True, block_length=2)
    assert both[0].sequences == out.sequences


def test_min_new_tokens_and_suppressed_tokens() -> None:
    table = torch.full((6, 5), -4.0, dtype=torch.float64)
    table[:, 3], table[:, 2], table[:, 1] = 4.0, 3.0, 2.0
    scripted = Scripted(table, eos=3)
    assert dllm.generate(scripted, [0], max_new_tokens=6).tokens == []
    assert dllm.generate(scripted, [0], max_new_tokens=6, min_new_tokens=2).tokens == [2, 2]
    assert dllm.generate(scripted, [0], max_new_tokens=6, min_new_tokens=2, suppress_tokens=[2]).tokens == [1, 1]
    assert dllm.generate(scripted, [0], max_new_tokens=6, logits_eos_inf=True).tokens == [2] * 6


def test_eos_can_be_committed_last() -> None:
    scripted = Scripted(peaks([(1, 0.6), (3, 0.99), (1, 0.5), (3, 0.98)], 5), eos=3)
    out = dllm.generate(
        scripted, [0], max_new_tokens=4, block_length=4, confidence_eos_eot_inf=True, early_stop=False, trace=True
    )
    assert [c for pairs in out.trace.commits for c, _ in pairs] == [1, 3, 2, 4]


def test_stop_strings_stop_the_decode(trained: Any) -> None:
    prompt = read("tiny-llada-trained", "llada_generate")[0]["prompt_ids"]
    plain = dllm.generate(trained, prompt, max_new_tokens=32, block_length=8)
    text = plain.text
    assert len(text) > 8
    stop = text[3:5]
    out = dllm.generate(trained, prompt, max_new_tokens=32, block_length=8, stop=["no such text", stop])
    assert out.text == text[: text.find(stop)]
    assert out.finish_reason == "stop"
    assert out.nfe < plain.nfe


def test_a_stream_adds_up_to_the_output(trained: Any) -> None:
    prompts = [case["prompt_ids"] for case in read("tiny-llada-trained", "llada_generate")[:2]]
    events = list(dllm.stream(trained, prompts, max_new_tokens=24, block_length=8, drafts=True))
    plain = dllm.generate(trained, prompts, max_new_tokens=24, block_length=8)
    for i, expected in enumerate(plain):
        mine = [e for e in events if e.request == i]
        assert "".join(e.text for e in mine) == expected.text
        assert mine[-1].output.tokens == expected.tokens
        assert [e.output is None for e in mine[:-1]] == [True] * (len(mine) - 1)
    assert any(e.draft and "▁" in e.draft for e in events)


def test_a_stream_leaves_autograd_alone(tiny: Any) -> None:
    for _ in dllm.stream(tiny, [3, 4], max_new_tokens=2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_a_trace_survives_json(trained: Any, tmp_path: Any) -> None:
    out = dllm.generate(trained, "12+30=", max_new_tokens=8, trace=True)
    out.trace.save(tmp_path / "run.json")
    again = Trace.load(tmp_path / "run.json")
    assert again == out.trace
    assert again.text == out.text
    assert len(again.seconds) == out.nfe
    assert again.seconds == sorted(again.seconds)
    (tmp_path / "bad.json").write_text(json.dumps([1]))
    with pytest.raises(DllmError, match="not a trace"):
        Trace.load(tmp_path / "bad.json")


def test_a_trace_says_what_was_asked_and_how_sure_the_model_was() -> None:
    scripted = Scripted(peaks([(1, 0.6), (3, 0.9), (1, 0.5), (1, 0.8)], 5), eos=3)
    trace = dllm.generate(
        scripted, [0], max_new_tokens=4, block_length=2, sampler="threshold:tau=0.7", trace=True
    ).trace
    assert trace.commits == [[[2, 3]], [[1, 1]]]
    assert trace.confidence == [[pytest.approx(0.9)], [pytest.approx(0.6)]]
    assert (trace.cache, trace.arguments["max_new_tokens"], trace.arguments["sampler"]) == (
        "none",
        4,
        "threshold:tau=0.7",
    )
    assert trace.cells() == [("1 ", 1), ("3 ", 0)]  # what was never decoded is neither painted nor left out silently
    assert trace.undecoded == 2
    assert "2 columns were never decoded" in trace.summary
    filled = dllm.generate(scripted, [0], max_new_tokens=4, block_length=4, max_nfe=2, trace=True).trace
    assert filled.confidence == [[pytest.approx(0.9)], [pytest.approx(p) for p in (0.6, 0.5, 0.8)]]


def test_a_trace_of_an_infilled_text_shows_the_holes_and_what_was_given(trained: Any) -> None:
    ids = trained.tokenizer("12+30=")["input_ids"]
    holes = [*ids[:2], trained.mask_id, ids[3], trained.mask_id, *ids[5:]]
    out = dllm.generate(trained, holes, infill=True, trace=True)
    cells = out.trace.cells()
    assert [k is None for _, k in cells] == [False, True, False, *[True] * (len(ids) - 5)]
    assert sum(k is not None for _, k in cells) == len(out.tokens) == 2


def test_the_score_is_the_exact_likelihood_where_that_is_known() -> None:
    """Two independent columns: the bound is tight and equals the sum of the log-probabilities."""
    scripted = Scripted(peaks([(1, 0.5), (2, 0.5)], 4))
    assert math.isclose(dllm.score(scripted, [0], [1, 2], samples=64), 2 * math.log(0.5), rel_tol=1e-6)


def test_the_score_is_unbiased_with_any_number_of_samples() -> None:
    """One sample takes each value that an enumeration of counts and masks gives, as often as it must."""
    random = model("tiny-llada-random")
    head, answer = [5, 17, 99, 30], [124, 11]
    expected = []
    for hidden in ((0,), (1,), (0, 1)):
        ids = torch.tensor([head + [random.mask_id if i in hidden else t for i, t in enumerate(answer)]])
        log_p = random.logits(random.forward(ids, None)).log_softmax(-1)[0, len(head) :]
        expected.append(sum(float(log_p[i, answer[i]]) for i in hidden) * 2 / len(hidden))
    values = [dllm.score(random, head, answer, samples=1, seed=seed) for seed in range(64)]
    found = [sum(math.isclose(v, e, rel_tol=1e-9) for v in values) for e in expected]
    assert sum(found) == 64 and 8 < found[0] < 24 and 8 < found[1] < 24 and 22 < found[2] < 42  # 16, 16 and 32
    # two samples are one of each count: what is left of the variance is which column one of them hides
    pairs = {round(dllm.score(random, head, answer, samples=2, seed=seed), 6) for seed in range(16)}
    assert pairs == {round((expected[i] + expected[2]) / 2, 6) for i in (0, 1)}


def test_the_score_is_seeded_and_independent_of_the_batch(tiny: Any) -> None:
    a = dllm.score(tiny, [3, 4, 5], [6, 7, 8, 9], samples=24, batch_size=5, seed=1)
    assert math.isclose(a, dllm.score(tiny, [3, 4, 5], [6, 7, 8, 9], samples=24, batch_size=24, seed=1), rel_tol=1e-9)
    assert a != dllm.score(tiny, [3, 4, 5], [6, 7, 8, 9], samples=24, seed=2)
    guided = dllm.score(tiny, [3, 4, 5], [6, 7, 8, 9], samples=8, cfg_scale=1.0)
    assert guided < 0


def test_any_module_of_the_package_offers_its_names_lazily() -> None:
    assert set(dllm.__all__) <= set(dir(dllm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dllm.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "thresold"}, "did you mean 'threshold'"),
        ({"sampler": "low_confidence"}, "here it is called 'confidence'"),
        ({"sampler": "threshold:tua=1"}, "did you mean 'tau'"),
        ({"sampler": "threshold:tau=-1"}, "tau=-1 must be"),
        ({"sampler": "factor:nothing"}, "unknown preset"),
        ({"sampler": "confidence+margin"}, "both decide the score"),
        ({"sampler": "threshold+factor"}, "both decide the select"),
        ({"sampler": "threshold+threshold"}, "named twice"),
        ({"sampler": {"tau": 0.9}}, "needs the key 'name'"),
        ({"sampler": ""}, "empty sampler name"),
        ({"sampler": 3}, "a sampler is a name"),
        ({"sampler": "threshold:tau=[1"}, r"'\[1' is no value"),
        ({"cache": "daul"}, "did you mean 'dual'"),
        ({"cache": "dual:left=x"}, "left='x' must be an integer"),
        ({"cache": "dual:left=-1"}, "left=-1 must be at least 0"),
        ({"cache": "dual:left=1.5"}, "left=1.5 must be an integer"),
        ({"cache": "dual:lift=1"}, "unknown parameter 'lift' of cache 'dual'; did you mean 'left'"),
        ({"gen_length": 4}, "here it is max_new_tokens"),
        ({"max_lenght": 4}, r"did you mean 'max_length'\? Here that is max_new_tokens"),
        ({"mask_id": 4}, r"here it is dllm.load\(..., mask_id=...\)"),
        ({"generation_config": None}, r"dllm.generation_arguments\(config\) has its fields"),
        ({"stream": True}, r"dllm.stream\(model, prompt\)"),
        ({"bad_words_ids": [[1]]}, "logits_processor= takes transformers' processors"),
        ({"output_scores": True}, "logprobs=0 returns those of the tokens"),
        ({"num_beams": 4}, "n= gives several answers"),
        ({"guided_grammar": "x"}, "regex=, choices=, json_schema= and grammar= constrain the answer"),
        ({"unheard_of": 1}, "unknown argument 'unheard_of'; known: batch_size"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"temperature": -1}, "temperature=-1 must be"),
        ({"temperature": "hot"}, "temperature='hot' must be"),
        ({"top_p": 0}, r"top_p=0 must be in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 0}, "top_k=0 must be"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"block_length": 0}, "block_length=0"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"cfg_scale": -1}, "cfg_scale=-1"),
        ({"seed": 1.5}, "seed=1.5 must be an integer"),
        ({"early_stop": "no"}, "early_stop='no' must be True or False"),
        ({"eos": "x"}, "eos='x' must be a token id"),
        ({"eos": [3, 999]}, "eos holds 999, outside the vocabulary"),
        ({"stop": ""}, "none of them empty"),
        ({"min_new_tokens": 5}, "min_new_tokens=5 is more than max_new_tokens=4"),
        ({"max_new_tokens": 5000}, "exceed the model's 512 positions; at most 509 new tokens fit"),
        ({"suppress_tokens": [999]}, "outside the vocabulary"),
        ({"stop": "x"}, "stop strings need a tokenizer"),
        ({"infill": True}, "contains no mask token"),
    ],
)
def test_mistakes_get_one_clear_line(tiny: Any, arguments: dict, message: str) -> None:
    with pytest.raises(DllmError, match=message) as error:
        dllm.generate(tiny, [3, 4, 5], **{"max_new_tokens": 4, **arguments} if "infill" not in arguments else arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the list of prompts is empty"),
        (["a", [1]], "must be of one type"),
        ([1, "a"], "must be of one type"),
        (3.5, "a prompt is text, a list of token ids or a list of chat messages .*, not float"),
        (torch.tensor([1.5]), "not float"),
        (5, "not one id"),
        ({"role": "user", "content": "x"}, "not one message"),
        ([[[1]]], "not a list of lists"),
        ([1] * 600, "a prompt of 600 tokens exceeds the model's 512 positions"),
        ("text", "no tokenizer"),
        ([3, 158], "contains the mask token at position 1; pass infill=True"),
        ([3, 9999], "outside the vocabulary"),
    ],
)
def test_bad_prompts(tiny: Any, prompt: Any, message: str) -> None:
    with pytest.raises(DllmError, match=message):
        dllm.generate(tiny, prompt, max_new_tokens=4)


def test_a_string_that_is_no_model_suggests_the_prompt() -> None:
    with pytest.raises(DllmError, match="prompt="):
        dllm.generate("Why is the sky blue?")
    with pytest.raises(DllmError, match="not int"):
        dllm.generate(7, [1])


def test_arrays_are_prompts(tiny: Any) -> None:
    lists = [[3, 4, 5], [6, 7, 8]]
    expected = [o.tokens for o in dllm.generate(tiny, lists, max_new_tokens=4)]
    for given in (np.array(lists), torch.tensor(lists), [np.array(ids) for ids in lists]):
        assert [o.tokens for o in dllm.generate(tiny, given, max_new_tokens=4)] == expected


@pytest.mark.parametrize(
    ("prompt", "answer", "message"),
    [
        ([3], [], "the answer to score is empty"),
        ([3], [158], "no mask tokens"),
        ([3], [999], "the answer holds the id 999"),
        ([3], [4] * 512, "an answer of 512 tokens behind 1 exceeds the model's 512 positions"),
    ],
)
def test_what_cannot_be_scored(tiny: Any, prompt: list[int], answer: list[int], message: str) -> None:
    with pytest.raises(DllmError, match=message):
        dllm.score(tiny, prompt, answer, samples=1)


@pytest.mark.parametrize("samples", [0, 1.5, True, "8"])
def test_samples_of_a_score_are_a_number(tiny: Any, samples: Any) -> None:
    with pytest.raises(DllmError, match=r"samples=.* must be an integer of at least 1"):
        dllm.score(tiny, [5], [6], samples=samples)


def test_a_shifted_model_cannot_predict_the_first_position() -> None:
    dream = model("tiny-dream-random")
    with pytest.raises(DllmError, match="position 0 cannot be predicted"):
        dllm.generate(dream, [dream.mask_id, 4], infill=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_a_batch_size(tiny: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(type(tiny), "forward", full)
    with pytest.raises(DllmError, match="try batch_size=2"):
        dllm.generate(tiny, [[1]] * 5, max_new_tokens=4, batch_size=4)


def test_kinds_of_prompt_lists() -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert as_list("a") == (["a"], True)
    assert as_list(["a", "b"]) == (["a", "b"], False)
    assert as_list([1, 2]) == ([[1, 2]], True)
    assert as_list(chat) == ([chat], True)
    assert as_list([chat, chat]) == ([chat, chat], False)


def test_every_argument_is_documented() -> None:
    page = (GOLDEN.parents[1] / "docs" / "arguments.md").read_text(encoding="utf-8")
    assert [name for name in Arguments.__dataclass_fields__ if f"`{name}`" not in page] == []
