"""transformers' manners: processors, criteria, streamers, callbacks, pipelines, generation configs."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stdout
from threading import Thread
from typing import Any

import pytest
import torch
from scripted import Scripted, peaks, probabilities, tiny
from test_compositions import PROMPTS, model
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

import dllm
from dllm.errors import DllmError

PROBLEM = "Tom has 12 apples. He buys 7 more. How many apples does Tom have?"
LOOKING = [{"rows": 4, "form": form} for form in ("memo", "chain")]


@pytest.fixture(scope="module")
def embedded() -> Any:
    return dllm.load("tiny", dtype="float64")


def told(out: Any) -> tuple[Any, ...]:
    return out.text, out.tokens, out.sequences, out.finish_reason


# -- logits processors ----------------------------------------------------------------------------------------------


def test_a_processor_sees_what_stands_left_of_a_column_and_changes_it() -> None:
    table, seen = probabilities([[0.6, 0.3, 0.1]] * 3), []

    def other(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.extend(ids.tolist())
        scores[:, 0] = -torch.inf  # in its own copy
        return scores

    scripted = Scripted(table)
    out = dllm.generate(scripted, [2], max_new_tokens=3, block_length=1, logits_processor=other, logprobs=1)
    assert out.tokens == [1, 1, 1]
    assert seen == [[2], [2, 1], [2, 1, 1]]  # each block read its own column
    assert out.logprobs[0].logprob == pytest.approx(torch.tensor(0.75).log().item())
    masked: list[Any] = []
    dllm.generate(scripted, [2], max_new_tokens=2, block_length=2, logits_processor=lambda i, s: masked.append(i) or s)
    assert masked[1].tolist() == [[2, scripted.mask_id]]  # a mask is a mask


def test_transformers_own_processors() -> None:
    table = probabilities([[0.5, 0.3, 0.2]] * 4)
    call = dict(max_new_tokens=4, block_length=1)
    out = dllm.generate(Scripted(table), [2], logits_processor=RepetitionPenaltyLogitsProcessor(50.0), **call)
    assert out.tokens[:2] == [0, 1]  # nothing twice while something is left
    bias = LogitsProcessorList([SequenceBiasLogitsProcessor([[[0, 0], -50.0]])])
    assert dllm.generate(Scripted(table), [2], logits_processor=bias, **call).tokens == [0, 1, 0, 1]
    ngram = NoRepeatNGramLogitsProcessor(2)
    assert dllm.generate(Scripted(table), [2], logits_processor=ngram, **call).tokens == [0, 0, 1, 0]
    # masks are no words: in one block the n-gram before a column is not written
    wide = dllm.generate(Scripted(table), [2], logits_processor=ngram, max_new_tokens=4, sampler="threshold:tau=0.4")
    assert wide.tokens == [0, 0, 0, 0]


@pytest.mark.parametrize("more", [{}, {"temperature": 0.8}, {"cache": "dual"}, {"sampler": "wino"}], ids=str)
def test_processed_rows_are_the_same_alone_and_ahead(more: Any) -> None:
    penalty = RepetitionPenaltyLogitsProcessor(5.0)
    call = dict(max_new_tokens=12, block_length=4, eos=[], logits_processor=penalty) | more
    free = dllm.generate(model(), PROMPTS, **{**call, "logits_processor": None})
    outs = dllm.generate(model(), PROMPTS, batch_size=2, **call)
    assert [o.sequences for o in outs] != [o.sequences for o in free]
    for i, prompt in enumerate(PROMPTS):
        assert dllm.generate(model(), prompt, seed=i, **call).sequences == outs[i].sequences
    for lookahead in LOOKING:
        ahead = dllm.generate(model(), PROMPTS, batch_size=2, lookahead=lookahead, **call)
        assert [o.sequences for o in ahead] == [o.sequences for o in outs]
        assert all(a.nfe <= o.nfe for a, o in zip(ahead, outs, strict=True))


class Moody:
    pure = True

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: Any, scores: Any) -> Any:
        self.calls += 1
        return scores + self.calls if scores is not None else self.calls % 2 == 0


def silent(ids: Any, scores: Any) -> Any:
    return scores


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"logits_processor": 3}, r"logits_processor=3 must be a function of ids and scores, or several"),
        ({"logits_processor": ["x"]}, r"logits_processor=\['x'\] must be a function"),
        ({"logits_processor": lambda i, s: None}, "logits processor <lambda> returned NoneType for scores of shape"),
        ({"logits_processor": lambda i, s: s[:, :2]}, r"returned \[1, 2\] for scores of shape \[1, 40\]"),
        ({"logits_processor": lambda i, s: s - torch.inf}, r"\(<lambda>\) leaves no token for column 1"),
        ({"logits_processor": silent, "lookahead": 2}, "logits processor silent may remember .* set pure = True"),
        ({"logits_processor": Moody(), "lookahead": 2}, "logits processor Moody changes its mind"),
        ({"stopping_criteria": Moody(), "lookahead": 2}, "stopping criterion Moody changes its mind"),
        ({"stopping_criteria": MaxTimeCriteria(9.0), "lookahead": 2}, "criterion MaxTimeCriteria may remember"),
        ({"stopping_criteria": lambda i, s: "no"}, "stopping criterion <lambda> returned 'no', not True or False"),
        ({"stopping_criteria": silent, "infill": True}, "stopping criteria do not apply"),
        ({"on_step": 1}, "on_step=1 must be a function of a StepView"),
        ({"streamer": "x"}, r"streamer='x' has no put\(\) and end\(\)"),
        ({"callback_on_step_end": silent}, "on_step= sees every step"),
        ({"generation_config": {}}, r"dllm.generation_arguments\(config\) has its fields"),
    ],
)
def test_mistakes_get_one_clear_line(more: Any, message: str) -> None:
    prompt = [1, 39] if "infill" in more else [1]
    with pytest.raises(DllmError, match=message) as error:
        dllm.generate(tiny(), prompt, max_new_tokens=4, **more)
    assert "\n" not in str(error.value)


# -- stopping criteria ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["confidence", "threshold:tau=0.5", "wino"])
def test_an_answer_ends_where_a_criterion_first_holds_whatever_a_step_writes(embedded: Any, sampler: str) -> None:
    call = dict(max_new_tokens=32, block_length=8, sampler=sampler)
    free = dllm.generate(embedded, PROBLEM, **call)
    prompt = len(free.sequences) - len(free.tokens) - 1
    n = 7
    out = dllm.generate(embedded, PROBLEM, stopping_criteria=MaxLengthCriteria(prompt + n), **call)
    assert (out.tokens, out.finish_reason) == (free.tokens[:n], "stop")
    assert out.sequences == free.sequences[: prompt + n]
    assert out.nfe < free.nfe or sampler != "confidence"
    own = StoppingCriteriaList([EosTokenCriteria(free.tokens[4])])
    at = free.tokens.index(free.tokens[4]) + 1
    stopped = dllm.generate(embedded, PROBLEM, stopping_criteria=own, **call)
    assert stopped.tokens == free.tokens[:at]
    for lookahead in LOOKING:
        assert told(dllm.generate(embedded, PROBLEM, stopping_criteria=own, lookahead=lookahead, **call)) == told(
            stopped
        )
    whole = dllm.generate(embedded, PROBLEM, stopping_criteria=own, early_stop=False, **call)
    pieces = dllm.stream(embedded, PROBLEM, stopping_criteria=own, early_stop=False, **call)
    assert "".join(event.text for event in pieces) == whole.text
    assert whole.tokens == stopped.tokens
    assert len(whole.sequences) == prompt + 32


def test_a_stop_string_that_is_complete_at_the_same_token_comes_first(embedded: Any) -> None:
    free = dllm.generate(embedded, PROBLEM, max_new_tokens=32)
    word = embedded.tokenizer.decode(free.tokens[:3])
    plain = dllm.generate(embedded, PROBLEM, max_new_tokens=32, stop=word)
    both = dllm.generate(embedded, PROBLEM, max_new_tokens=32, stop=word,
                         stopping_criteria=EosTokenCriteria(free.tokens[2]))  # fmt: skip
    assert told(both) == told(plain)
    assert plain.text == ""


def test_each_row_ends_for_itself(embedded: Any) -> None:
    prompts = [PROBLEM, "What is 2+3?", "12+30="]
    frees = dllm.generate(embedded, prompts, max_new_tokens=24)
    wanted = frees[0].tokens[2]
    outs = dllm.generate(embedded, prompts, max_new_tokens=24, batch_size=2, stopping_criteria=EosTokenCriteria(wanted))
    for out, free in zip(outs, frees, strict=True):
        n = free.tokens.index(wanted) + 1 if wanted in free.tokens else len(free.tokens)
        assert out.tokens == free.tokens[:n]


def test_a_clock_ends_an_answer() -> None:
    out = dllm.generate(tiny(), [1], max_new_tokens=8, block_length=1, eos=[],
                        stopping_criteria=MaxTimeCriteria(0.0, time.time() - 1))  # fmt: skip
    assert (len(out.tokens), out.nfe, out.finish_reason) == (1, 1, "stop")


# -- the callback ---------------------------------------------------------------------------------------------------


def test_a_callback_sees_every_step_and_may_end_a_row() -> None:
    scripted, seen = Scripted(peaks([(1, 0.6), (3, 0.9), (2, 0.5), (1, 0.8)], 5)), list[Any]()
    call = dict(max_new_tokens=4, block_length=4)
    free = dllm.generate(scripted, [0], on_step=seen.append, **call)
    assert told(free) == told(dllm.generate(scripted, [0], **call))
    assert [view.step for view in seen] == [1, 2, 3, 4]
    assert [sum(view.masked) for view in seen] == [3, 2, 1, 0]
    assert (seen[0].ids[2], seen[0].start, seen[0].window, seen[0].request) == (3, 1, (1, 5), 0)
    out = dllm.generate(scripted, [0], on_step=lambda view: view.step == 3, **call)
    assert (out.nfe, out.tokens, out.finish_reason) == (3, [1, 3], "stop")  # up to the first mask
    with pytest.raises(TypeError):
        seen[0].ids[0] = 3


@pytest.mark.parametrize("lookahead", LOOKING, ids=str)
@pytest.mark.parametrize("sampler", ["confidence", "threshold:tau=0.3"])
def test_a_callback_sees_the_steps_of_the_plain_call(lookahead: Any, sampler: str) -> None:
    call = dict(max_new_tokens=12, block_length=4, eos=[], sampler=sampler)

    def run(**more: Any) -> tuple[list[Any], list[Any]]:
        seen: list[Any] = []

        def watch(view: Any) -> bool:
            seen.append((view.request, view.step, view.ids, view.masked, view.window))
            return view.request == 1 and view.step == 3

        return seen, [told(o) for o in dllm.generate(model(), PROMPTS, on_step=watch, **call, **more)]

    (steps, outs), (ahead, same) = run(), run(lookahead=lookahead)
    assert outs == same
    assert sorted(steps) == sorted(ahead)


def test_an_error_of_a_callback_reaches_the_caller() -> None:
    def fails(view: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        dllm.generate(tiny(), [1], max_new_tokens=4, on_step=fails)


# -- streamers ------------------------------------------------------------------------------------------------------


def test_text_streamers_get_the_answer_in_blocks(embedded: Any) -> None:
    call = dict(max_new_tokens=32, block_length=4)
    out = dllm.generate(embedded, PROBLEM, **call)
    printed = io.StringIO()
    with redirect_stdout(printed):
        again = dllm.generate(
            embedded,
            PROBLEM,
            streamer=TextStreamer(embedded.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **call,
        )
    assert told(again) == told(out)
    assert printed.getvalue() == out.text + "\n"
    streamer = TextIteratorStreamer(embedded.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = Thread(target=dllm.generate, args=(embedded, [PROBLEM]), kwargs={"streamer": streamer, **call})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces) == out.text
    assert len(pieces) > 2


class Recorder:
    def __init__(self) -> None:
        self.put_, self.ended = list[Any](), 0

    def put(self, value: Any) -> None:
        self.put_.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_prompt_and_tokens() -> None:
    recorder = Recorder()
    out = dllm.generate(tiny(), [1, 2], max_new_tokens=6, eos=[], streamer=recorder)
    assert recorder.put_[0] == [[1, 2]]
    assert [t for part in recorder.put_[1:] for t in part] == out.tokens
    assert recorder.ended == 1


@pytest.mark.parametrize(
    "wrong",
    [{"sampler": "nosuch"}, {"max_new_tokens": -1}, {"n": 2}, {"on_step": lambda view: 1 / 0}, {"prompt": [[1], [2]]}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_streamer_ends_when_a_call_fails(wrong: Any) -> None:
    recorder = Recorder()
    given = {"prompt": [1], "max_new_tokens": 4, **wrong}
    with pytest.raises((DllmError, ZeroDivisionError)):
        dllm.generate(tiny(), streamer=recorder, **given)
    assert recorder.ended == 1


def test_a_stream_takes_no_streamer() -> None:
    with pytest.raises(DllmError, match=r"streamer= belongs to dllm.generate"):
        dllm.stream(tiny(), [1], streamer=Recorder())
    with pytest.raises(DllmError, match="follows one answer, and this call has 2"):
        dllm.generate(tiny(), [[1], [2]], streamer=Recorder())


# -- pipelines and generation configs --------------------------------------------------------------------------------


def test_a_pipeline_says_what_generate_says(embedded: Any, caplog: Any) -> None:
    prompts = [PROBLEM, "What is 2+3?"]
    pipe = dllm.text_pipeline(embedded, max_new_tokens=24, block_length=8, return_full_text=False)
    outs = dllm.generate(embedded, prompts, max_new_tokens=24, block_length=8, chat=False)
    assert [r[0]["generated_text"] for r in pipe(prompts)] == [o.text for o in outs]
    assert [r[0]["generated_text"] for r in pipe(prompts, batch_size=2)] == [o.text for o in outs]
    chat = [{"role": "user", "content": PROBLEM}]
    answer = dllm.generate(embedded, chat, max_new_tokens=24, block_length=8).text
    assert pipe(chat)[0]["generated_text"] == answer
    assert pipe(chat, return_full_text=True)[0]["generated_text"][-1] == {"role": "assistant", "content": answer}
    sampled = pipe(PROBLEM, do_sample=True, temperature=0.9, num_return_sequences=2, sampler="threshold:tau=0.7")
    more = {"temperature": 0.9, "n": 2, "sampler": "threshold:tau=0.7"}
    drawn = dllm.generate(embedded, PROBLEM, max_new_tokens=24, block_length=8, chat=False, **more)
    assert [r["generated_text"] for r in sampled] == [o.text for o in drawn]
    assert not [r for r in caplog.records if "not supported" in r.message]
    stopped = pipe(PROBLEM, stop_sequence="has")[0]["generated_text"]
    cut = dllm.generate(embedded, PROBLEM, max_new_tokens=24, block_length=8, chat=False, stop="has")
    assert stopped == embedded.tokenizer.decode(cut.tokens)


def test_a_pipeline_goes_by_the_checkpoints_generation_config(embedded: Any) -> None:
    fresh = dllm.load("tiny", dtype="float64")
    fresh.generation_config = {"max_new_tokens": 5, "repetition_penalty": 1.5, "do_sample": False}
    out = dllm.text_pipeline(fresh, return_full_text=False)(PROBLEM)[0]["generated_text"]
    penalty = RepetitionPenaltyLogitsProcessor(1.5)
    assert out == dllm.generate(embedded, PROBLEM, max_new_tokens=5, chat=False, logits_processor=penalty).text


def test_a_saved_checkpoint_keeps_its_generation_config(embedded: Any, tmp_path: Any) -> None:
    fresh = dllm.load("tiny")
    fresh.generation_config = {"temperature": 0.6, "do_sample": True}
    fresh.save(tmp_path / "saved")
    again = dllm.load(tmp_path / "saved").generation_config
    assert (again["temperature"], again["do_sample"]) == (0.6, True)
    assert again["eos_token_id"] == list(fresh.eos_ids)


def test_what_a_generation_config_means() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, max_new_tokens=9, eos_token_id=[3])
    asked = dllm.generation_arguments(config)
    assert asked == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 9, "eos": [3]}
    assert dllm.generation_arguments({**asked, "do_sample": False, "eos": None}) == {"max_new_tokens": 9}
    assert dllm.generation_arguments(GenerationConfig(do_sample=True)) == {"temperature": 1.0}
    (penalty,) = dllm.generation_arguments({"repetition_penalty": 1.2, "pad_token_id": 0})["logits_processor"]
    assert isinstance(penalty, RepetitionPenaltyLogitsProcessor)
    with pytest.raises(DllmError, match=r"says num_beams=4, for which a canvas has no counterpart"):
        dllm.generation_arguments(GenerationConfig(num_beams=4))


def test_a_pipeline_needs_a_tokenizer() -> None:
    with pytest.raises(DllmError, match="a pipeline reads text, and this model has no tokenizer"):
        dllm.text_pipeline(tiny())
