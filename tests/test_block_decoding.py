"""Block-causal decoding: the `block` cache is exact, for every prompt length, batch and sampler."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from golden_cases import model as golden
from scripted import Scripted, peaks
from scripted import tiny as random_model

import dllm
from dllm.call.cache_error import cache_error
from dllm.errors import DllmError
from dllm.models.native import NativeModel

MASK = 39
PROMPTS = [[5], [7, 8, 9, 10], [4, 4, 11, 12, 13, 3, 2, 1, 30]]


tiny = partial(random_model, block_size=4)


def run(model, prompt, **arguments):
    arguments = {"max_new_tokens": 13, "trace": True, "early_stop": False} | arguments
    return dllm.generate(model, prompt, **arguments)


def story(out):
    """Everything that a cache may not change."""
    return out.sequences, out.trace.commits, out.nfe, out.finish_reason


SAMPLERS = [
    "threshold:tau=0.3",
    "confidence",
    "factor:f=2",
    "sdar:sequential",
    "sdar:entropy_bounded,gamma=3",
    "dream",
    "localleap",
    "editing:tau=0.2,edit=0.15,rounds=2",
    "random",
]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_block_equals_none_and_a_row_alone_equals_a_row_in_a_batch(sampler, shift):
    model = tiny(shift=shift)
    together = run(model, PROMPTS, sampler=sampler, batch_size=2)
    full = run(model, PROMPTS, sampler=sampler, batch_size=2, cache="none")
    assert [story(o) for o in together] == [story(o) for o in full]
    assert {o.cache for o in together} == {"block"} and {o.cache for o in full} == {"none"}
    for i, prompt in enumerate(PROMPTS[:2]):
        assert story(run(model, prompt, sampler=sampler, seed=i)) == story(together[i])


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("options", [{}, {"block_length": 8}, {"block_length": 3}, {"cfg_scale": 0.7}])
def test_logits_equal_a_full_forward(shift, options):
    errors = cache_error(tiny(shift=shift), PROMPTS, sampler="threshold:tau=0.3", max_new_tokens=13, **options)
    assert all(errors) and max(e.max for row in errors for e in row) < 1e-12


def test_nothing_that_a_forward_with_masks_computed_is_read(monkeypatch):
    """After every forward, what lies behind the clean blocks is overwritten with large values: nothing changes."""
    model, policy = tiny(), dllm.decoding.cache.block.Block
    plain = run(model, PROMPTS, sampler="threshold:tau=0.3")
    forward, spoiled = NativeModel.forward, []

    def spoil(self, ids, pos=None, *, store=None, **rest):
        hidden = forward(self, ids, pos, store=store, **rest)
        if store is not None:
            clean = torch.where(rest["keep"], pos, -1).amax(1)
            for row, lane in enumerate(rest["lane"].tolist()):
                reached = max(int(clean[row]) + 1, reach.get(lane, 0)) if int(pos[row].amin()) else int(clean[row]) + 1
                reach[lane] = reached
                for layer in (*store.keys, *store.values):
                    layer[lane, :, reached:] = 1e6
                    spoiled.append(reached)
        return hidden

    reach: dict[int, int] = {}
    monkeypatch.setattr(NativeModel, "forward", spoil)
    assert policy.exact
    assert [story(o) for o in run(model, PROMPTS, sampler="threshold:tau=0.3")] == [story(o) for o in plain]
    assert max(spoiled) > 12


def test_each_column_is_computed_once_clean_and_once_per_step_of_its_block():
    """The clean block rides in the next block's first forward: no forward of its own, and never again after it."""
    model, prompt = tiny(), [1, 2, 3, 4, 5, 6]
    out = run(model, prompt, sampler="sdar:sequential", max_new_tokens=10)  # columns 6..15: blocks 1, 2, 3
    assert out.nfe == 10
    steps = 8 + 4 + (4 + 4) + 3 * 4 + (4 + 4) + 3 * 4  # prompt and block 1; its second step; then commit and open, ...
    assert out.positions == steps


def test_a_partial_first_block_keeps_its_prompt_tokens():
    model = tiny()
    for length in range(1, 9):
        prompt = list(range(1, length + 1))
        out = run(model, prompt, sampler="sdar:low_confidence_static,steps=1", max_new_tokens=6)
        assert out.sequences[:length] == prompt
        first = out.trace.commits[0]
        assert [c for c, _ in first] == list(range(length, (length // 4 + 1) * 4))


@pytest.mark.parametrize("sampler", ["daedal", "daedal:initial=3,tau_low=0.5", "daedal:initial=2,growth=geometric"])
def test_a_length_that_changes_ends_in_an_open_block(sampler):
    """No masks complete the last block: what is inserted before them would move them into the answer."""
    model = tiny()
    options = {"sampler": sampler, "max_new_tokens": 10, "eos": 7, "early_stop": True}
    for prompt in PROMPTS:
        plain, cached = (run(model, prompt, cache=cache, **options) for cache in ("none", "block"))
        assert plain.sequences == cached.sequences and plain.trace.commits == cached.trace.commits
        assert plain.finish_reason in ("length", "stop") and plain.nfe <= 10 + 10
        assert len(plain.sequences) <= len(prompt) + 10


def test_whole_blocks_are_fed_but_max_new_tokens_is_kept():
    model = tiny()
    whole = run(model, [1, 2, 3], max_new_tokens=2, sampler="threshold:tau=1")
    short = run(model, [1, 2, 3], max_new_tokens=2, sampler="threshold:tau=1", early_stop=True)
    assert len(whole.trace.final) == 8 and len(whole.sequences) == len(short.sequences) == 5
    assert short.nfe == 2 and whole.nfe == 5
    assert short.sequences[:4] == whole.sequences[:4] and MASK not in short.sequences
    # the end of the positions cuts the last block
    assert len(run(tiny(max_positions=6), [1, 2, 3], max_new_tokens=3).trace.final) == 6


def test_the_default_is_the_models_own_block():
    out = run(tiny(), [1, 2, 3, 4, 5])
    assert out.cache == "block" and out.trace.windows[0] == [4, 8] and out.trace.windows[-1] == [16, 20]


def test_infilling_across_blocks():
    model = tiny()
    prompt = [1, 2, MASK, 4, 5, MASK, 7, 8, 9, 10, 11, 12, 13, MASK, 15]
    outs = [run(model, prompt, infill=True, max_new_tokens=4, cache=c, sampler="confidence") for c in ("none", "block")]
    assert story(outs[0]) == story(outs[1])
    assert [t for i, t in enumerate(outs[1].sequences[:15]) if prompt[i] != MASK] == [t for t in prompt if t != MASK]


@pytest.mark.parametrize("sampler", ["prophet", "adablock:delimiters=[3, 8]", "klass", "saber", "hierarchy", "credit"])
def test_other_samplers_of_the_library(sampler):
    model = tiny()
    outs = [run(model, PROMPTS, sampler=sampler, cache=cache, batch_size=2) for cache in ("none", "block")]
    assert [story(o) for o in outs[0]] == [story(o) for o in outs[1]]


def test_fast_dllm_v2_opens_a_block_with_its_first_token():
    """The forward that commits a finished block writes the next one's first column, whatever its confidence."""
    model = tiny(shift=1)
    outs = [run(model, PROMPTS, sampler="fast_dllm_v2:tau=1,sub=2", cache=c, batch_size=2) for c in ("none", "block")]
    assert [story(o) for o in outs[0]] == [story(o) for o in outs[1]]
    out = outs[1][1]  # a prompt of one whole block
    assert out.trace.commits[0][0][0] == 4 and out.trace.windows[0] == [4, 5] and out.trace.windows[1] == [4, 6]
    assert run(model, PROMPTS[1], sampler="fast_dllm_v2:tau=1,sub=2", max_new_tokens=4).positions == 4 + 4 + 4 + 4
    with pytest.raises(DllmError, match="shifted logits"):
        run(tiny(), PROMPTS, sampler="fast_dllm_v2")
    with pytest.raises(DllmError, match="divide"):
        run(model, PROMPTS, sampler="fast_dllm_v2:sub=3")


def test_block_dual_recomputes_the_window_alone_where_logits_are_not_shifted():
    """Also while its first column is masked: the row that predicts it lies inside."""
    model, call = tiny(), {"sampler": "confidence", "block_length": 2, "max_new_tokens": 8, "early_stop": False}
    whole, window = (dllm.generate(model, [1, 2, 3, 4], cache=cache, **call) for cache in ("block", "block_dual"))
    assert window.nfe == whole.nfe == 8
    # the block before and the block in each opening forward, then three of the window's two columns or of the block
    assert (window.positions, whole.positions) == (2 * (8 + 3 * 2), 2 * (8 + 3 * 4))


def test_block_dual_is_exact_when_a_block_opens_and_rows_are_independent():
    model, options = tiny(shift=1), {"sampler": "fast_dllm_v2:tau=1,sub=2", "cache": "block_dual"}
    together = run(model, PROMPTS, batch_size=2, **options)
    for i, prompt in enumerate(PROMPTS):
        assert story(run(model, prompt, seed=i, **options)) == story(together[i])
    errors = cache_error(model, PROMPTS[1], max_new_tokens=12, early_stop=False, **options)
    assert [e.max < 1e-12 for e in errors[:4]] == [True, True, True, False]  # the fourth step reruns two columns only
    assert max(e.max for e in errors) > 1e-6
    assert together[1].positions < run(model, PROMPTS, sampler=options["sampler"])[1].positions


@pytest.mark.parametrize(("cache", "block", "words"), [
    ("dual", 4, "'block'"), ("delayed", 4, "block-causal"), ("block", None, "'prefix' or 'dual'"),
])  # fmt: skip
def test_a_cache_of_the_other_kind_is_an_error(cache, block, words):
    with pytest.raises(DllmError, match=words):
        run(tiny(block_size=block), [1, 2], cache=cache)


def test_token_editing_by_hand():
    """Block of 3: two commits, an edit while the block is open, another after its last mask, then a quiet forward."""
    tables = [
        peaks([(1, 0.96), (2, 0.50), (3, 0.97)], 6),  # commits 1 . 3
        peaks([(4, 0.95), (2, 0.60), (3, 0.99)], 6),  # nothing above tau: the best mask, 2; and 1 -> 4
        peaks([(4, 0.99), (5, 0.93), (2, 0.80)], 6),  # no mask left: 2 -> 5; 3 stays, 0.80 < 0.9
        peaks([(4, 0.99), (5, 0.93), (2, 0.89)], 6),  # quiet: the block is left
        peaks([(1, 0.99), (1, 0.99), (1, 0.99), (0, 0.97)], 6),  # next block; the first one is never edited again
    ]
    commits = [[[1, 1], [3, 3]], [[1, 4], [2, 2]], [[2, 5]], [], [[4, 0]]]
    options = {"sampler": "editing", "block_length": 3, "max_new_tokens": 4, "trace": True, "early_stop": False}
    out = dllm.generate(Scripted(tables), [0], **options)
    assert out.trace.commits == [*commits, []] and out.sequences == [0, 4, 5, 3, 0]
    assert out.nfe == 6, "the last block, too, has its quiet forward"
    # without rounds a block is left with its last mask
    out = dllm.generate(Scripted([*tables[:2], *tables[4:]]), [0], **options | {"sampler": "editing:rounds=0"})
    assert out.trace.commits == [*commits[:2], [[4, 0]]] and out.nfe == 3


def test_fast_dllm_v2_ends_as_soon_as_no_mask_stands_before_an_end():
    """As the released loop, which looks before every forward; `whole_block` completes the sub-block."""
    model, options = tiny(shift=1), {"sampler": "fast_dllm_v2:tau=0.3,sub=4", "max_new_tokens": 16}
    saved = 0
    for cache in ("block", "block_dual"):
        plain = run(model, [1, 2, 3, 4], cache=cache, **options)
        for end in set(plain.sequences[4:]):
            written, closed = {}, None
            for forward, pairs in enumerate(plain.trace.commits, 1):
                written |= dict(pairs)
                prefix = next((c for c in range(4, 20) if c not in written), 20)
                if closed is None and end in [written[c] for c in range(4, prefix)]:
                    closed = forward
            out = run(model, [1, 2, 3, 4], cache=cache, eos=end, **{**options, "early_stop": True})
            assert out.nfe == closed
            late = {**options, "sampler": options["sampler"] + ",whole_block=true", "early_stop": True}
            saved += run(model, [1, 2, 3, 4], cache=cache, eos=end, **late).nfe - closed
    assert saved > 0


@pytest.mark.parametrize("start", [1, 2, 3, 5])
def test_schedules_follow_the_models_blocks(start):
    """A prompt ends inside a block: the first block is short, for every rule that counts steps or columns of one."""
    model, prompt = tiny(), list(range(1, start + 1))
    options = {"max_new_tokens": 14, "steps": 7}
    plain = run(model, prompt, sampler="confidence", **options)
    assert story(run(model, prompt, sampler="klass:kappa=1", **options)) == story(plain)
    for window in ("slowfast:tau=1,truncate=false", "daedal:tau_high=1,tau_eos=0,tau_expand=0"):
        out = run(model, prompt, sampler=window, eos=7, max_new_tokens=14)
        assert all(lo // 4 == (hi - 1) // 4 for lo, hi in out.trace.windows if hi > lo), window


def test_a_lookahead_over_a_stale_block_cache_is_the_rows_own():
    """What one row's steps keep in the store tells nothing of another's."""
    model, prompts = tiny(), [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
    options = {"sampler": "freedave", "cache": "block_dual", "max_new_tokens": 24}
    for size in (1, 3):
        for i, out in enumerate(run(model, prompts, batch_size=size, **options)):
            alone = run(model, prompts[i], seed=i, **options)
            assert (alone.sequences, alone.nfe) == (out.sequences, out.nfe)


@pytest.mark.parametrize("sampler", ["editing:edit=0.3", "hierarchy:tau_low=0.7,tau_remask=0.3", "confidence"])
def test_a_window_over_two_blocks_reads_no_column_that_its_row_never_computed(sampler):
    """Blocks of 3 columns in a model of blocks of 4; the third row takes the place of a finished one, store and all."""
    model = golden("tiny-sdar-random")
    options = {"sampler": sampler, "cache": "block_dual", "block_length": 3, "max_new_tokens": 12, "early_stop": False}
    prompts = [[48, 95, 69, 64, 147, 108, 149, 115], [*range(40, 57)], [86, 96]]
    for prompt, row in zip(prompts, dllm.generate(model, prompts, batch_size=2, **options), strict=True):
        [alone] = dllm.generate(model, [prompt], **options)
        assert (row.sequences, row.nfe, row.positions) == (alone.sequences, alone.nfe, alone.positions)
