"""`custom_generate`, streaming, stop strings, processors, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drafting_kit import KINDS, VOCAB, Noise, Script, Silent, plain, tiny_verifier
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)

import dllm
from dllm.decoding.stopping import Stops
from dllm.drafting.drafters import Drafter
from dllm.drafting.proposal import chain
from dllm.errors import DllmError

PROMPT = [3, 17, 5, 9, 22, 4, 31, 8, 2, 11]
N = 20


@pytest.fixture(scope="module")
def model():
    return tiny_verifier()


@pytest.fixture(scope="module")
def text(model):
    return plain(model, PROMPT, N)


def call(model, ids, **kw):
    ids = torch.tensor([ids]) if isinstance(ids, list) else ids
    kw.setdefault("attention_mask", torch.ones_like(ids))
    kw.setdefault("do_sample", False)
    return model.generate(ids, custom_generate=dllm.spec_generate, **kw)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tree", [0, 6])
def test_generate_equals_generate(kind, tree):
    model = tiny_verifier(kind)
    text = plain(model, PROMPT, N)
    results = []
    out = call(
        model, PROMPT, max_new_tokens=N, drafter=Script(text, "sometimes"), spec={"tree": tree, "length": "fixed:k=5"},
        spec_results=results,
    )  # fmt: skip
    assert out[0].tolist() == text and results[0].n_verify < N


def test_left_padded_batch_equals_generate(model):
    ids = torch.tensor([PROMPT, [0, 0, 0, 0, *PROMPT[:6]], [0, 0, 0, 0, 0, 0, 0, 7, 1, 2]])
    mask = (ids != 0).long()
    reference = model.generate(ids, attention_mask=mask, max_new_tokens=N, do_sample=False, eos_token_id=[5, 6])
    out = call(model, ids, attention_mask=mask, max_new_tokens=N, eos_token_id=[5, 6], drafter=Noise())
    assert out.tolist() == reference.tolist()
    penalty = dict(repetition_penalty=1.7, no_repeat_ngram_size=2, max_new_tokens=N, attention_mask=mask)
    reference = model.generate(ids, do_sample=False, **penalty)
    assert call(model, ids, drafter=Noise(), **penalty).tolist() == reference.tolist()


@pytest.mark.parametrize(
    "law",
    [
        dict(repetition_penalty=1.5),
        dict(no_repeat_ngram_size=2),
        dict(min_new_tokens=15, eos_token_id=list(range(0, VOCAB, 3))),
        dict(bad_words_ids=[[5], [7, 8]], suppress_tokens=[1, 2, 3]),
        dict(max_length=len(PROMPT) + 7),
    ],
    ids=lambda law: next(iter(law)),
)
@pytest.mark.parametrize("tree", [0, 5])
def test_processors_apply_at_every_node(model, text, law, tree):
    law = {"max_new_tokens": N, **law} if "max_length" not in law else law
    reference = model.generate(
        torch.tensor([PROMPT]), do_sample=False, attention_mask=torch.ones(1, len(PROMPT)), **law
    )
    for drafter in (Noise(), Script(reference[0].tolist(), "sometimes")):
        out = call(model, PROMPT, drafter=drafter, spec={"tree": tree, "length": "fixed:k=4"}, **law)
        assert out.tolist() == reference.tolist()


def test_top_k_one_is_greedy(model, text):
    out = call(model, PROMPT, max_new_tokens=N, do_sample=True, top_k=1, drafter=Noise())
    assert out[0].tolist() == text


class Even(StoppingCriteria):
    """Stops behind the token 7 places after the prompt: a criterion only seen token by token."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([len(row) == len(PROMPT) + 7 for row in input_ids])


class Forbid(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, int(input_ids[0, -1])] = float("-inf")  # never twice in a row: depends on the node's own prefix
        return scores


def test_criteria_are_asked_after_every_token(model, text):
    out = call(model, PROMPT, max_new_tokens=N, drafter=Script(text), stopping_criteria=StoppingCriteriaList([Even()]))
    assert out[0].tolist() == text[: len(PROMPT) + 7]


def test_custom_processor(model):
    kw = dict(max_new_tokens=N, logits_processor=LogitsProcessorList([Forbid()]))
    reference = model.generate(torch.tensor([PROMPT]), do_sample=False, attention_mask=torch.ones(1, len(PROMPT)), **kw)
    assert call(model, PROMPT, drafter=Noise(), **kw).tolist() == reference.tolist()


class Tape:
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        self.puts.append(value.reshape(-1).tolist())

    def end(self):
        self.ended = True


def test_streamer(model, text):
    tape = Tape()
    call(model, PROMPT, max_new_tokens=N, drafter=Script(text, "sometimes"), spec_streamer=tape)
    assert tape.ended and tape.puts[0] == PROMPT and [t for put in tape.puts[1:] for t in put] == text[len(PROMPT) :]
    tape = Tape()
    dllm.speculate(model, Script(text), PROMPT, max_new_tokens=N, streamer=tape)
    assert tape.ended and [t for put in tape.puts for t in put] == text[len(PROMPT) :]


def test_continue_from_a_cache(model):
    first = call(model, PROMPT, max_new_tokens=5, return_dict_in_generate=True, drafter=Noise())
    ids = torch.cat([first.sequences, torch.tensor([[9, 1, 4]])], 1)
    reference = plain(model, ids[0].tolist(), N)
    second = call(model, ids, max_new_tokens=N, past_key_values=first.past_key_values, drafter=Noise())
    assert second[0].tolist() == reference


class Letters:
    """A tokenizer of one letter per id, for stop strings."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(65 + int(i)) for i in ids)

    def __call__(self, text):
        return {"input_ids": [ord(c) - 65 for c in text]}


def test_the_models_own_generation_config_is_its_law(model):
    """Qwen2.5's generation config holds a repetition penalty: `generate` applies it unasked, and so do we."""
    own = tiny_verifier()
    own.generation_config.repetition_penalty = 1.7
    own.generation_config.min_new_tokens = 4
    own.generation_config.eos_token_id = list(range(0, VOCAB, 2))
    text = plain(own, PROMPT, N)
    assert text != plain(model, PROMPT, N)
    assert dllm.speculate(own, Noise(), PROMPT, max_new_tokens=N).sequences == text
    outs = dllm.speculate(own, Noise(), [PROMPT, PROMPT[:4]], max_new_tokens=N, length="fixed:k=3")
    assert [o.sequences for o in outs] == [text, plain(own, PROMPT[:4], N)]


@pytest.mark.parametrize("agree", ["always", "sometimes"])
def test_stop_strings(model, text, agree):
    letters = Letters()
    stop = letters.decode(text[len(PROMPT) + 6 : len(PROMPT) + 8])
    whole = letters.decode(text[len(PROMPT) :])
    prompt = letters.decode(PROMPT)
    kw = dict(max_new_tokens=N, tokenizer=letters, length="fixed:k=6")
    out = dllm.speculate(model, Script(text, agree), prompt, stop=stop, **kw)
    cut = whole.index(stop)
    assert (
        out.text == whole[:cut]
        and out.tokens == text[len(PROMPT) : len(PROMPT) + cut]
        and out.sequences == text[: len(PROMPT) + cut + 2]
        and out.finish_reason == "stop"
    )
    assert dllm.speculate(model, Script(text, agree), prompt, stop=["~", stop], **kw).tokens == out.tokens
    with pytest.raises(DllmError, match="empty"):
        dllm.speculate(model, None, prompt, stop="", **kw)


def test_a_stop_string_of_many_tokens_a_sign():
    class Bytes:
        def decode(self, ids, skip_special_tokens=False):
            return bytes(ids).decode(errors="replace")

    ducks = list(("\N{DUCK}" * 4).encode())  # 16 tokens
    stops, text = Stops.of((), "\N{DUCK}" * 4, Bytes()), [65, *ducks]
    assert [stops.ended(text[:n], seen=n - 1) for n in range(1, 18)] == [False] * 16 + [True]


# -- refusals and fallbacks


def test_beams_static_and_wrong_padding_are_refused(model):
    with pytest.raises(DllmError, match="num_beams"):
        call(model, PROMPT, max_new_tokens=4, num_beams=2)
    with pytest.raises(DllmError, match="static"):
        call(model, PROMPT, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(DllmError, match="left"):
        call(model, torch.tensor([[3, 4, 0]]), attention_mask=torch.tensor([[1, 1, 0]]), max_new_tokens=4)
    with pytest.raises(DllmError, match="one text"):
        call(model, torch.tensor([PROMPT, PROMPT]), max_new_tokens=4, spec_streamer=Tape(), drafter=Noise())


def test_what_would_be_lost_silently_is_refused(model):
    with pytest.raises(DllmError, match="output_hidden_states: not recorded"):
        call(model, PROMPT, max_new_tokens=4, return_dict_in_generate=True, output_hidden_states=True)
    config = GenerationConfig()
    with pytest.raises(DllmError, match=r"only text.*pixel_values"):
        dllm.spec_generate(model, torch.tensor([PROMPT]), generation_config=config, pixel_values=torch.zeros(1))
    with pytest.raises(DllmError, match=r"only text.*token_type_ids"):
        dllm.spec_generate(model, torch.tensor([PROMPT]), generation_config=config, token_type_ids=torch.ones(1, 10))
    for way in (dict(assistant_model=tiny_verifier()), dict(prompt_lookup_num_tokens=3)):
        with pytest.raises(DllmError, match="drafter="):
            call(model, PROMPT, max_new_tokens=4, drafter=Noise(), **way)


def test_recurrent_and_encoder_decoder_verifiers_are_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(DllmError, match=r"recurrent|linear|rolled back"):
        dllm.speculate(mamba, None, PROMPT)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(DllmError, match="encoder-decoder"):
        dllm.speculate(t5, None, PROMPT)
    with pytest.raises(DllmError, match="causal LM"):
        dllm.speculate(object(), None, PROMPT)


class Always(Drafter):
    def __init__(self, token, banned=()):
        self.token, self.banned, self.name = token, frozenset(banned), "always"

    def draft(self, ids, k, *, generator=None):
        return chain([self.token] * k, [0.9] * k)


def test_ids_out_of_range_and_special_ids(model):
    with pytest.raises(DllmError, match="outside the verifier's vocabulary"):
        dllm.speculate(model, Always(VOCAB), PROMPT, max_new_tokens=4)
    with pytest.raises(DllmError, match="special id 39"):
        dllm.speculate(model, Always(39, [39]), PROMPT, max_new_tokens=4)
    with pytest.raises(DllmError, match="id 400 is outside"):
        dllm.speculate(model, None, [1, 400], max_new_tokens=4)
    with pytest.raises(DllmError, match="empty"):
        dllm.speculate(model, None, [], max_new_tokens=4)
    with pytest.raises(DllmError, match="256"):
        dllm.speculate(model, None, [1] * 300, max_new_tokens=4)


class Broken(Noise):
    def draft(self, ids, k, *, generator=None):
        return self.need.lattice(torch.full((k, VOCAB), float("nan")), len(ids))


def test_nan_is_counted_and_falls_back(model, text):
    out = dllm.speculate(model, Broken(), PROMPT, max_new_tokens=N, length="fixed:k=4")
    assert out.sequences == text and out.draft_failures > 0 and out.n_verify == N


class BrokenLater(Noise):
    """Unusable from the second chunk on."""

    def draft(self, ids, k, *, generator=None):
        bad = len(ids) > len(PROMPT)
        return self.need.lattice(torch.full((k, VOCAB), float("nan")) if bad else torch.eye(k, VOCAB), len(ids))


def test_a_chunk_that_fails_ends_the_draft(model, text):
    out = dllm.speculate(model, BrokenLater(), PROMPT, max_new_tokens=N, length="failfast:chunk=2,tau=0.01")
    assert out.sequences == text and out.draft_failures > 0 and out.rounds[0].nodes == 2


def test_a_silent_drafter_is_plain_decoding(model, text):
    out = dllm.speculate(model, Silent(), PROMPT, max_new_tokens=N)
    assert out.sequences == text and out.n_verify == N


def test_options_are_checked(model):
    with pytest.raises(DllmError, match="did you mean 'length'"):
        dllm.speculate(model, None, PROMPT, lenght="cost")
    with pytest.raises(DllmError, match="did you mean 'viterbi'"):
        dllm.speculate(model, Noise(), PROMPT, search="viterby")
    with pytest.raises(DllmError, match="carry"):
        dllm.speculate(model, Noise(), PROMPT, carry="sometimes")
    with pytest.raises(DllmError, match="tokenizer"):
        dllm.speculate(tiny_verifier(), None, "a string")
    with pytest.raises(DllmError, match="prompt"):
        dllm.speculate(model, None)
    with pytest.raises(DllmError, match=r"grafts that cost no forward.*tree=32"):
        dllm.speculate(model, Noise(), PROMPT, graft=Noise())
    with pytest.raises(DllmError, match="a prompt is"):
        dllm.speculate(model, None, 3.5)
    with pytest.raises(DllmError, match="top_p"):
        dllm.speculate(model, None, PROMPT, temperature=1.0, top_p=0.0)
    for name, value in (
        ("max_new_tokens", "5"), ("max_new_tokens", 2.5), ("max_new_tokens", -1), ("temperature", "hot"),
        ("temperature", float("nan")), ("top_k", 1.5), ("top_p", "a"), ("seed", "x"), ("seed", 1 << 70),
    ):  # fmt: skip
        with pytest.raises(DllmError, match=f"^{name}="):
            dllm.speculate(model, None, PROMPT, **{name: value})
    with pytest.raises(DllmError, match="the name of a search"):
        dllm.speculate(model, Noise(), PROMPT, search={"name": ["eal"]})


def test_forms_of_a_prompt(model):
    one = dllm.speculate(model, None, PROMPT, max_new_tokens=3).sequences
    for prompt in (tuple(PROMPT), np.array(PROMPT), torch.tensor(PROMPT), [np.int64(t) for t in PROMPT]):
        assert dllm.speculate(model, None, prompt, max_new_tokens=3).sequences == one
    for prompts in ([PROMPT, PROMPT], np.array([PROMPT, PROMPT]), [torch.tensor(PROMPT)] * 2):
        assert [r.sequences for r in dllm.speculate(model, None, prompts, max_new_tokens=3)] == [one, one]


def test_position_limit_of_the_verifier():
    model = tiny_verifier()
    prompt = [3] * 250
    out = dllm.speculate(model, Noise(), prompt, max_new_tokens=6, length="fixed:k=8")
    assert out.sequences == plain(model, prompt, 6)


def test_the_cache_holds_all_but_the_last_token(model, text):
    """After every round, and after a tree commit the next logits equal a forward without a cache."""
    from dllm.drafting.config import SpecConfig
    from dllm.drafting.loop import rounds
    from dllm.drafting.request import Request
    from dllm.drafting.verifier import Verifier

    for kind in KINDS:
        model = tiny_verifier(kind)
        text = plain(model, PROMPT, N)
        for tree in (0, 6):
            v = Verifier(model)
            session = v.open()
            seen = []
            verify = session.verify
            session.verify = lambda rows, taps, verify=verify, seen=seen: [seen.append(x := verify(rows, taps)) or x[0]]
            cfg = SpecConfig(tree=tree, length="fixed:k=4")
            for _, (row,) in rounds(v, Script(text, "sometimes"), [Request(PROMPT, 30)], cfg, session=session):
                assert session.cache.get_seq_length() == session.past == len(row.ids) - 1
                at = row.result.sequences[: len(row.ids) - row.stats.emitted]
                with torch.no_grad():
                    expected = model(torch.tensor([at])).logits[0, -1]
                assert torch.allclose(seen[-1][0][0], expected, atol=1e-9)
