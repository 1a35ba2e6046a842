"""Hidden states of the verifier reach a drafter that taps layers: those of every token that stays, once."""

from __future__ import annotations

from copy import deepcopy

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


def conversation(model, lead, gap, **kw):
    """Three turns over one cache: padded in front by `lead` and before each later turn by `gap`. Per turn the ids, what
    of them is text, and how many come before the output; then the texts."""
    ids, real, cache, found = [0] * lead + PROMPT, [False] * lead + [True] * len(PROMPT), None, []
    for new in ([9, 1, 4], [12], []):
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.tensor([real]).long(), past_key_values=cache, max_new_tokens=N,
            do_sample=False, return_dict_in_generate=True, **kw,
        )  # fmt: skip
        ids, cache = out.sequences[0].tolist(), out.past_key_values
        real += [True] * (len(ids) - len(real))
        found.append((list(ids), list(real)))
        ids, real = ids + [0] * gap + new, real + [False] * gap + [True] * len(new)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tree,lead,gap", [(0, 0, 0), (6, 0, 0), (0, 3, 0), (6, 2, 2)])
def test_the_states_of_earlier_turns_are_computed_again(kind, tree, lead, gap):
    model, results = tiny_verifier(kind), []
    found = conversation(model, lead, gap)
    drafter = Tapped([[t for t, r in zip(*turn, strict=True) if r] for turn in found])
    ours = speculator(drafter, tree=tree, length="fixed:k=4", results=results)
    assert conversation(model, lead, gap, custom_generate=ours) == found
    for (shown, real), (_, had) in zip(found, drafter.all, strict=True):
        ids, mask, states = torch.tensor([shown]), torch.tensor([real]), torch.cat(had)
        at = (mask.long().cumsum(-1) - 1).clamp_min(0)
        out = model(ids, attention_mask=mask.long(), position_ids=at, output_hidden_states=True)
        expected = torch.stack([out.hidden_states[tap + 1][0] for tap in drafter.taps], 1)[mask[0]]
        assert len(expected) - 7 < len(states) < len(expected)
        assert torch.allclose(states, expected[: len(states)], atol=1e-9)
    assert [[r.replays for r in out.rounds] for out in results] == [
        [int(turn > 0), *[0] * (len(out.rounds) - 1)] for turn, out in enumerate(results)
    ]
    assert [out.n_verify - len(out.rounds) for out in results] == [0, 1, 1]
    assert all((out.wall["replay"] > 0) == (out.rounds[0].replays > 0) for out in results)
    assert all(out.tau > 1.5 for out in results) and results[2].rounds[0].k, "one new token: drafted for at once"


def test_states_of_earlier_turns_stand_where_position_ids_put_them():
    model, at = tiny_verifier(), torch.arange(len(PROMPT))[None] * 2
    with torch.no_grad():
        first = model(torch.tensor([PROMPT[:6]]), position_ids=at[:, :6], use_cache=True)
    kw = dict(max_new_tokens=N, do_sample=False, position_ids=at)
    ids = torch.tensor([PROMPT])
    text = model.generate(ids, past_key_values=deepcopy(first.past_key_values), **kw)[0].tolist()
    drafter = Tapped([text])
    out = model.generate(ids, past_key_values=first.past_key_values, custom_generate=speculator(drafter), **kw)
    expected = model(ids[:, :6], position_ids=at[:, :6], output_hidden_states=True).hidden_states
    assert out[0].tolist() == text
    assert torch.allclose(drafter.all[0][1][0], torch.stack([expected[2][0], expected[0][0]], 1), atol=1e-9)


def test_nothing_is_read_again_for_who_reads_the_text():
    model, results = tiny_verifier(), []
    found = conversation(model, 0, 0)
    assert conversation(model, 0, 0, custom_generate=speculator(Noise(), results=results)) == found
    assert not any(r.replays or r.t_replay for out in results for r in out.rounds)


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
    drafter.texts.append([9, 1])
    with pytest.raises(DllmError, match="states, which past_key_values does not hold: pass the ids of the whole text"):
        model.generate(
            torch.tensor([[9, 1]]), attention_mask=torch.ones(1, len(PROMPT) + 3, dtype=torch.long), max_new_tokens=4,
            past_key_values=first.past_key_values, do_sample=False, custom_generate=speculator(drafter),
        )  # fmt: skip
    with pytest.raises(DllmError, match="states, which assisted generation hides"), assisted_by(model, drafter):
        pass
    forward = model.forward
    model.forward = lambda *a, **kw: forward(*a, **{**kw, "output_hidden_states": False})
    with pytest.raises(DllmError, match="LlamaForCausalLM does not give the hidden states"):
        speculate(Verifier(model), drafter, PROMPT, max_new_tokens=4)
