"""What callers of transformers' `generate` pass beside the prompt: caches, padding, positions, processors and criteria
with a memory, records, streamers, pipelines."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch
from drafting_kit import VOCAB, Noise, Script, plain, tiny_verifier
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    LogitsProcessor,
    MaxLengthCriteria,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    WatermarkingConfig,
    pipeline,
)

import dllm
from dllm.drafting.config import SpecConfig
from dllm.drafting.hooks.candidates import assisted_by
from dllm.errors import DllmError

PROMPT = [3, 17, 5, 9, 22, 4, 31, 8, 2, 11]
N = 16
KINDS = ("llama", "mistral-swa", "gemma3-mixed")
BATCH = torch.tensor([PROMPT, [0, 0, 0, 0, *PROMPT[:6]], [0, 0, 0, 0, 0, 0, 0, 7, 1, 2]])
MASK = (BATCH != 0).long()


@pytest.fixture(scope="module")
def model():
    return tiny_verifier()


def both(model, ids, make=dict, **kw):
    """`generate` and the hook, each with arguments of its own from `make`."""
    kw = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": N, **kw}
    reference = model.generate(ids, **kw, **make())
    results = []
    ours = model.generate(
        ids, custom_generate=dllm.spec_generate, drafter=Noise(), spec={"length": "fixed:k=4"}, spec_results=results,
        **kw, **make(),
    )  # fmt: skip
    return reference, ours


def same(model, ids, make=dict, **kw):
    reference, ours = both(model, ids, make, **kw)
    assert ours.tolist() == reference.tolist()
    return ours


# -- padding, caches, positions


@pytest.mark.parametrize("tree", [0, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_the_second_turn_of_a_padded_chat(kind, tree):
    """The cache of a padded first turn holds its padding; the second turn says so in its mask."""
    model = tiny_verifier(kind)
    ids, mask = BATCH[1:2], MASK[1:2]

    def turns(first, second):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=7, do_sample=False, return_dict_in_generate=True, **first
        )
        new = torch.tensor([[9, 1, 4]])
        whole = torch.cat([out.sequences, new], 1)
        seen = torch.cat([mask, torch.ones(1, whole.shape[1] - mask.shape[1], dtype=torch.long)], 1)
        cache = out.past_key_values
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        kw = dict(attention_mask=seen, past_key_values=cache, max_new_tokens=N, do_sample=False)
        return model.generate(whole, **kw, **second).tolist()

    ours = dict(custom_generate=dllm.spec_generate, drafter=Noise(), spec={"tree": tree, "length": "fixed:k=4"})
    text = turns({}, {})
    assert turns({}, ours) == text  # their first turn, our second
    assert turns(ours, {}) == text and turns(ours, ours) == text


@pytest.mark.parametrize("tree", [0, 6])
def test_padding_between_two_turns(tree):
    """A mask may hold holes where turns were padded one by one."""
    for kind in KINDS:
        model = tiny_verifier(kind)
        ids = torch.tensor([[0, 0, 3, 17, 5, 0, 0, 9, 22, 4]])
        text = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=N, do_sample=False).tolist()
        ours = model.generate(
            ids, attention_mask=(ids != 0).long(), max_new_tokens=N, do_sample=False, repetition_penalty=1.0,
            custom_generate=dllm.speculator(Noise(), tree=tree, length="fixed:k=4"),
        )  # fmt: skip
        assert ours.tolist() == text


def test_only_the_new_ids_behind_a_cache(model):
    """transformers takes the new ids alone where the mask covers the whole text."""
    ids, new = torch.tensor([PROMPT]), torch.tensor([[9, 1, 4]])

    def second(**kw):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        mask = torch.ones(1, len(PROMPT) + 3, dtype=torch.long)
        return model.generate(
            new, attention_mask=mask, past_key_values=cache, max_new_tokens=N, do_sample=False, **kw
        ).tolist()

    text = second()
    assert text[0] == [*new[0], *plain(model, [*PROMPT, 9, 1, 4], N)[len(PROMPT) + 3 :]]
    assert second(custom_generate=dllm.spec_generate, drafter=Noise()) == text
    with pytest.raises(DllmError, match="past_key_values"):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        model.generate(ids, past_key_values=cache, max_new_tokens=4, custom_generate=dllm.spec_generate)


def test_position_ids_of_ones_own(model):
    ids = torch.tensor([PROMPT])
    usual = torch.arange(len(PROMPT))[None]
    plain_text = same(model, ids, position_ids=usual)
    shifted = same(model, ids, position_ids=usual + 40 * (usual > 4))
    assert shifted.tolist() != plain_text.tolist()
    with pytest.raises(DllmError, match="position_ids"):
        both(model, BATCH, attention_mask=MASK, position_ids=usual.expand(3, -1) + 1)


# -- processors and criteria that remember


class Counter(LogitsProcessor):
    """Forbids another token at every call."""

    def __init__(self):
        self.calls, self.seen = 0, []

    def __call__(self, input_ids, scores):
        self.calls += 1
        self.seen.append(int(input_ids[0, -1]))
        scores[:, (7 * self.calls) % VOCAB :: 3] = float("-inf")
        return scores


class PerRow(LogitsProcessor):
    """Holds a tensor of one entry a row."""

    def __init__(self):
        self.total = None

    def __call__(self, input_ids, scores):
        last = input_ids[:, -1]
        self.total = last if self.total is None else self.total + last
        scores[torch.arange(len(scores)), self.total % VOCAB] += 50
        return scores


def closure():
    calls = 0

    def allowed(batch, ids):
        nonlocal calls
        calls += 1
        return [t for t in range(VOCAB) if (t + int(ids[-1]) + batch) % 3]

    return allowed


def counting():
    calls = []

    def apply(input_ids, scores):
        calls.append(1)
        scores[:, (11 * len(calls)) % VOCAB :: 4] = float("-inf")
        return scores

    return apply


REMEMBERING = {
    "guidance": lambda: dict(guidance_scale=1.6, negative_prompt_ids=None),
    "negative": lambda: dict(guidance_scale=1.6, negative_prompt_ids=torch.tensor([[5, 6]] * 3)),
    "counter": lambda: dict(logits_processor=[Counter()]),
    "per row": lambda: dict(logits_processor=[PerRow()]),
    "function": lambda: dict(logits_processor=[counting()]),
    "prefix": lambda: dict(prefix_allowed_tokens_fn=closure()),
    "watermark": lambda: dict(watermarking_config=WatermarkingConfig(bias=6.0, seeding_scheme="lefthash")),
    "selfhash": lambda: dict(watermarking_config=WatermarkingConfig(bias=6.0, seeding_scheme="selfhash")),
    "synthid": lambda: dict(watermarking_config=SynthIDTextWatermarkingConfig(keys=[3, 5, 8], ngram_len=3)),
    "penalty": lambda: dict(repetition_penalty=1.5, no_repeat_ngram_size=2),
}


@pytest.mark.parametrize("law", REMEMBERING)
def test_processors_with_a_memory(model, law):
    one = law != "negative"
    if one:
        same(model, BATCH[:1], REMEMBERING[law])
    same(model, BATCH, REMEMBERING[law], attention_mask=MASK)


def test_processors_with_a_memory_in_a_batch_of_speculate(model):
    prompts = [PROMPT, PROMPT[:6], [7, 1, 2]]
    kw = dict(max_new_tokens=N, length="fixed:k=4")
    for make in (Counter, PerRow, counting):
        alone = [dllm.speculate(model, Noise(), p, logits_processor=[make()], **kw).sequences for p in prompts]
        together = dllm.speculate(model, Noise(), prompts, logits_processor=[make()], **kw)
        assert [o.sequences for o in together] == alone
    stuck = Counter()
    stuck.lock = threading.Lock()
    with pytest.raises(DllmError, match="Counter cannot be copied"):
        dllm.speculate(model, Noise(), prompts, logits_processor=[stuck], **kw)


class Countdown(StoppingCriteria):
    """Ends a row some calls after its text held a multiple of 3."""

    def __init__(self):
        self.left = None

    def __call__(self, input_ids, scores, **kwargs):
        if self.left is None:
            self.left = torch.full((len(input_ids),), 6)
        self.left -= (input_ids[:, -1] % 3 == 0).long()
        return self.left <= 0


@pytest.mark.parametrize(
    "criteria",
    [
        lambda: [Countdown()],
        lambda: [MaxLengthCriteria(max_length=len(PROMPT) + 5)],
        lambda: [EosTokenCriteria(eos_token_id=list(range(0, VOCAB, 5)))],
    ],
    ids=["countdown", "length", "end"],
)
def test_criteria_with_a_memory_and_criteria_that_replace_the_own(model, criteria):
    same(model, BATCH[:1], lambda: dict(stopping_criteria=criteria()))
    if criteria()[0].__class__ is not Countdown:
        same(model, BATCH, lambda: dict(stopping_criteria=criteria()), attention_mask=MASK)
        return
    # rows that end early go on alone in `generate` where there is no end token: compare up to each row's end
    ours = both(model, BATCH, lambda: dict(stopping_criteria=criteria()), attention_mask=MASK)[1]
    for row, mask in zip(BATCH, MASK, strict=True):
        alone = model.generate(
            row[None], attention_mask=mask[None], max_new_tokens=N, do_sample=False, stopping_criteria=criteria()
        )[0].tolist()
        assert any(line[: len(alone)] == alone and not any(line[len(alone) :]) for line in ours.tolist())


# -- records


@pytest.mark.parametrize(
    "law", [{}, dict(repetition_penalty=1.4), dict(eos_token_id=list(range(0, VOCAB, 7)))], ids=str
)
@pytest.mark.parametrize("tree", [0, 6])
def test_scores_and_logits_are_those_of_generate(model, law, tree):
    kw = dict(
        max_new_tokens=N, do_sample=False, return_dict_in_generate=True, output_scores=True, output_logits=True, **law
    )
    ids = torch.tensor([PROMPT])
    reference = model.generate(ids, **kw)
    text = reference.sequences[0].tolist()
    out = model.generate(
        ids, custom_generate=dllm.speculator(Script(text, "sometimes"), tree=tree, length="fixed:k=5"), **kw
    )
    assert out.sequences.tolist() == reference.sequences.tolist()
    for name in ("scores", "logits"):
        theirs, ours = getattr(reference, name), getattr(out, name)
        assert len(ours) == len(theirs) == len(text) - len(PROMPT)
        assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))
        assert torch.allclose(torch.stack(ours), torch.stack(theirs), atol=1e-5)
    steps = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert steps.shape == (1, len(ours))
    only = model.generate(ids, custom_generate=dllm.spec_generate, **{**kw, "output_logits": False})
    assert only.logits is None and len(only.scores) == len(theirs)
    bare = model.generate(ids, custom_generate=dllm.spec_generate, **{**kw, "return_dict_in_generate": False})
    assert bare.tolist() == reference.sequences.tolist()


def test_scores_of_a_batch(model):
    kw = dict(
        attention_mask=MASK, max_new_tokens=N, do_sample=False, return_dict_in_generate=True, output_scores=True,
        eos_token_id=list(range(0, VOCAB, 7)), repetition_penalty=1.2,
    )  # fmt: skip
    reference = model.generate(BATCH, **kw)
    out = model.generate(BATCH, custom_generate=dllm.spec_generate, drafter=Noise(), **kw)
    assert out.sequences.tolist() == reference.sequences.tolist() and len(out.scores) == len(reference.scores)
    ours, theirs = torch.stack(out.scores, 1), torch.stack(reference.scores, 1)  # (B, steps, V)
    ended = False
    for row in range(3):
        new = out.sequences[row, BATCH.shape[1] :].tolist()
        n = next((i + 1 for i, t in enumerate(new) if t % 7 == 0), len(new))
        assert torch.allclose(ours[row, :n], theirs[row, :n], atol=1e-5) and not ours[row, n:].any()
        ended |= n < len(new)
    assert ended


# -- streamers, tokenizers, pipelines


def read(model, tokenizer, call):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    pieces, failed = [], []

    def work():
        try:
            call(streamer)
        except DllmError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    pieces = list(streamer)
    thread.join()
    return "".join(pieces), failed


def test_a_streamer_reaches_its_reader():
    v = dllm.load_verifier("tiny-ar", device="cpu")
    tokenizer = v.tokenizer
    ids = tokenizer("Tom has 12 apples.", return_tensors="pt")["input_ids"]
    kw = dict(max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(v.generate(ids, **kw)[0, ids.shape[1] :])
    for way in (
        lambda s: v.generate(ids, custom_generate=dllm.speculator("suffix", streamer=s), **kw),
        lambda s: v.generate(ids, custom_generate=dllm.spec_generate, drafter="suffix", spec_streamer=s, **kw),
        lambda s: v.generate(ids, custom_generate=dllm.spec_generate, drafter="suffix", streamer=s, **kw),
    ):
        assert read(v, tokenizer, way) == (text, [])
    two = ids.repeat(2, 1)
    for way in (
        lambda s: v.generate(two, custom_generate=dllm.speculator(streamer=s), **kw),
        lambda s: v.generate(
            ids, custom_generate=dllm.speculator(Noise(vocab=3), tree=3, search="x", streamer=s), **kw
        ),
    ):
        assert len(read(v, tokenizer, way)[1]) == 1  # an error ends the stream, it does not hang its reader


def test_a_bound_speculator_stops_at_strings():
    v = dllm.load_verifier("tiny-ar", device="cpu")
    ids = v.tokenizer("Tom has 12 apples. He buys 7 more.", return_tensors="pt")["input_ids"]
    kw = dict(max_new_tokens=24, do_sample=False)
    text = v.tokenizer.decode(v.generate(ids, **kw)[0, ids.shape[1] :])
    stop = text[6:9]
    reference = v.generate(ids, stop_strings=[stop], tokenizer=v.tokenizer, **kw)
    results = []
    bound = dllm.speculator("lookup", tokenizer=v.tokenizer, stop_strings=stop, results=results)
    assert v.generate(ids, custom_generate=bound, **kw).tolist() == reference.tolist()
    assert results[0].finish_reason == "stop"
    bare = tiny_verifier()
    with pytest.raises(DllmError, match="tokenizer="):
        bare.generate(torch.tensor([PROMPT]), custom_generate=dllm.speculator(stop_strings="x"), max_new_tokens=2)
    with pytest.raises(DllmError, match="did you mean 'length'"):
        dllm.speculator("lookup", lenght=3)


def test_in_a_pipeline():
    v, drafter = dllm.load_verifier("tiny-ar", device="cpu"), dllm.load("tiny")
    pipe = pipeline("text-generation", model=v, tokenizer=v.tokenizer)
    prompts = ["Tom has 12 apples. He buys 7 more.", "Ann has 3 pens."]
    kw = dict(max_new_tokens=16, do_sample=False)
    for asked in (prompts[0], prompts):
        text = pipe(asked, **kw)
        assert pipe(asked, custom_generate=dllm.spec_generate, drafter=drafter, **kw) == text
        assert pipe(asked, custom_generate=dllm.speculator(drafter), **kw) == text
    assert pipe(prompts, batch_size=2, custom_generate=dllm.speculator(drafter), **kw) == pipe(prompts, **kw)


# -- transformers' own assisted generation


class Sevens(StoppingCriteria):
    """Stops at the third multiple of 7; counts its calls."""

    def __init__(self):
        self.calls, self.seen = 0, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        self.seen += int(input_ids[0, -1]) % 7 == 0
        return torch.tensor([self.seen >= 3])


@pytest.mark.parametrize("agree", ["always", "sometimes"])
def test_assisted_generation_ends_where_plain_decoding_does(model, agree):
    ids = torch.tensor([PROMPT])
    long = plain(model, PROMPT, 60)
    kw = dict(max_new_tokens=60, do_sample=False)
    for make in (Sevens, lambda: MaxLengthCriteria(max_length=len(PROMPT) + 9), Countdown):
        text = model.generate(ids, stopping_criteria=[make()], **kw)[0].tolist()
        assert len(text) < len(long)
        own = make()
        with assisted_by(model, Script(long, agree), SpecConfig(length="fixed:k=6")):
            assert model.generate(ids, stopping_criteria=[own], **kw)[0].tolist() == text
        assert getattr(own, "calls", len(text) - len(PROMPT)) == len(text) - len(PROMPT)


def test_assisted_generation_refuses_what_it_would_ignore_and_keeps_to_k(model):
    for spec in (SpecConfig(store=dllm.Store()), SpecConfig(corpus=[[1, 2]]), SpecConfig(ngrams="verifier")):
        with pytest.raises(DllmError, match="not read in assisted generation"), assisted_by(model, "suffix", spec):
            pass
    text = plain(model, PROMPT, 8)
    with assisted_by(model, Script([*text, *[1] * 9]), SpecConfig(length="fixed:k=6", k=2)) as drafts:
        assert model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)[0].tolist() == text
    assert drafts.k <= 2


def test_assisted_blocks_nest_and_leave_nothing_behind(model, tmp_path):
    text = plain(model, PROMPT, N)
    with assisted_by(model, Script(text, "never")) as outer:
        with assisted_by(model, Script(text)) as inner:
            assert plain(model, PROMPT, N) == text and plain(model, PROMPT, N) == text
        assert inner.drafter.forwards > 0 == outer.drafter.forwards
        assert plain(model, PROMPT, N) == text and outer.drafter.forwards > 0
        model.save_pretrained(tmp_path)
        with pytest.raises(DllmError, match="assistant_model"):
            model.generate(torch.tensor([PROMPT]), max_new_tokens=4, assistant_model=tiny_verifier())
        with pytest.raises(DllmError, match="remembers"):
            model.generate(torch.tensor([PROMPT]), max_new_tokens=4, guidance_scale=2.0)
    assert "prompt_lookup_num_tokens" not in (tmp_path / "generation_config.json").read_text()
    assert model.generation_config.prompt_lookup_num_tokens is None and plain(model, PROMPT, N) == text
    assert not any(name.startswith("_get_") or name.startswith("_prepare_") for name in vars(model))


def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "drafting.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("notes.jsonl").write_text('"Tom has 12 + 7 = 19 apples."')
    Path("kept.json").write_text("[5, 6, 7]")
    names: dict = {"other_model": dllm.load("tiny")}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for block in blocks:
        if "z-lab/" not in block:  # these are downloaded
            exec(block, names)
    assert len(blocks) > 4
    assert names["results"][0].tau > 1 and names["ids"].shape[1] > 1
