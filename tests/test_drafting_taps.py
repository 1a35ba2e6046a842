"""Hidden states of the verifier reach a drafter that taps layers: those of every token that stays, once."""

from __future__ import annotations

import pytest
import torch
from drafting_kit import KINDS, Noise, Script, plain, tiny_verifier
from replay import standing_in

from dllm.drafting import Fallback, Verifier
from dllm.drafting.front import calibrate, speculate
from dllm.drafting.hooks.candidates import assisted_by
from dllm.drafting.hooks.transformers import speculator
from dllm.errors import DllmError

torch.set_num_threads(1)
PROMPT = [5, 9, 33, 10, 12, 34, 7, 31, 19]
BATCH = [PROMPT, PROMPT[1:5], PROMPT[2:8]]
N = 24


class Tapped(Script):
    """A script that keeps what it is handed, of each of its texts."""

    taps = (1, -1)

    def __init__(self, texts, agree="sometimes"):
        super().__init__([], agree)
        self.texts, self.all = texts, []

    def reset(self, ids, need):
        super().reset(ids, need)
        self.text = next(text for text in self.texts if text[: len(ids)] == list(ids))
        self.had = []
        self.all.append((self.text, self.had))

    def take(self, states, start):
        assert start == sum(map(len, self.had)), "each token once, in order"
        self.had.append(states.clone())


def check(model, drafter):
    """Every text's states are those of one forward over it. The last round's are not handed over."""
    for text, had in drafter.all:
        states = torch.cat(had)
        expected = model(torch.tensor([text]), output_hidden_states=True).hidden_states
        expected = torch.stack([expected[tap + 1][0] for tap in drafter.taps], 1)
        assert N / 2 < len(states) < len(text) and len(had) > 3
        assert torch.allclose(states, expected[: len(states)], atol=1e-9)


def texts(model, prompts):
    return [plain(model, prompt, N) for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tree", [0, 6])
def test_states_of_what_stays_are_handed_over_in_order(kind, tree):
    model = tiny_verifier(kind)
    drafter = Tapped(texts(model, [PROMPT]))
    out = speculate(model, drafter, PROMPT, max_new_tokens=N, tree=tree, length="fixed:k=4")
    assert out.sequences == drafter.texts[0]
    check(model, drafter)


@pytest.mark.parametrize("kind", ["llama", "gemma3-mixed"])
def test_each_row_of_a_ragged_batch_gets_its_own_states(kind):
    model = tiny_verifier(kind)
    drafter = Tapped(texts(model, BATCH))
    speculate(model, drafter, BATCH, max_new_tokens=N, length="fixed:k=4")
    assert len(drafter.all) == 3
    check(model, drafter)


def test_padding_of_a_prompt_has_no_states():
    model = tiny_verifier()
    drafter = Tapped(texts(model, BATCH))
    width = max(map(len, BATCH))
    for rows in ([[0] * 5 + BATCH[1]], [[0] * (width - len(p)) + p for p in BATCH]):
        drafter.all.clear()
        ids = torch.tensor(rows)
        generate = speculator(drafter, length="fixed:k=4")
        model.generate(
            ids, attention_mask=(ids != 0).long(), max_new_tokens=N, do_sample=False, custom_generate=generate
        )
        assert len(drafter.all) == len(rows)
        check(model, drafter)


@pytest.mark.parametrize("prompts,tree", [(BATCH, 0), ([PROMPT], 6)])
def test_states_of_captured_rounds_are_those_of_eager_ones(prompts, tree):
    model = tiny_verifier()
    drafter = Tapped(texts(model, prompts))
    with standing_in():
        speculate(model, drafter, prompts, max_new_tokens=N, tree=tree, length="fixed:k=4", graphs=True)
    check(model, drafter)


def test_nothing_is_tapped_that_nobody_reads():
    model, asked = tiny_verifier(), []
    model.register_forward_pre_hook(lambda _, args, kw: asked.append(kw.get("output_hidden_states")), with_kwargs=True)
    speculate(model, Noise(), PROMPT, max_new_tokens=6)
    assert asked and not any(asked)
    asked.clear()
    drafter = Tapped(texts(model, [PROMPT]))
    asked.clear()
    speculate(model, Noise(), PROMPT, max_new_tokens=6, tree=4, graft=drafter)
    assert asked and all(indices == [0, 2] for indices in asked), "each layer once, by its index in hidden_states"


def test_a_drafter_behind_another_one_and_a_calibration_get_states_too():
    model = tiny_verifier()
    drafter = Tapped(texts(model, [PROMPT]))
    speculate(model, Fallback(drafter), PROMPT, max_new_tokens=N, length="fixed:k=4")
    check(model, drafter)
    drafter.texts.append([5] * 64)
    calibrate(model, drafter, [5] * 8, lengths=(0, 2), repeats=1)
    assert len(torch.cat(drafter.all[-1][1])) == 7


def test_who_cannot_give_states_is_refused_in_one_line():
    model = tiny_verifier()
    drafter = Tapped(texts(model, [PROMPT]))
    with pytest.raises(DllmError, match=r"does not give the hidden states of layers -1, 7"):
        drafter.taps = (7, -1)
        speculate(model, drafter, PROMPT, max_new_tokens=4)
    drafter.taps = (1, -1)
    ids = torch.tensor([PROMPT])
    first = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with pytest.raises(DllmError, match="hidden states, and those of an earlier turn are gone"):
        model.generate(
            first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False,
            custom_generate=speculator(drafter),
        )  # fmt: skip
    with pytest.raises(DllmError, match="states, which assisted generation hides"), assisted_by(model, drafter):
        pass
    forward = model.forward
    model.forward = lambda *a, **kw: forward(*a, **{**kw, "output_hidden_states": False})
    with pytest.raises(DllmError, match="LlamaForCausalLM does not give the hidden states"):
        speculate(Verifier(model), drafter, PROMPT, max_new_tokens=4)
