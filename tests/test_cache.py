"""Cache policies of bidirectional models: what they recompute, when they are exact, and that rows are independent."""

from __future__ import annotations

import pytest
from scripted import tiny

import dllm
from dllm.call.cache_error import cache_error
from dllm.call.job import prepare
from dllm.decoding.cache.registry import POLICIES, policy
from dllm.decoding.engine import opening
from dllm.decoding.meter import Meter
from dllm.errors import DllmError

MASK = 39
PROMPTS = [[5, 6], [1, 2, 3, 30, 31, 32, 33], [7, 8, 9, 10]]
CACHES = [
    "prefix",
    "dual",
    "dual:left=2,right=3",
    "interval:left=1,right=2,warmup=2,every=3",
    "delayed:every=3",
    "dllm_cache:prompt_every=5,response_every=3,rho=0.4",
]


def run(model, prompt, **arguments):
    arguments = {"max_new_tokens": 13, "block_length": 5, "trace": True, "early_stop": False} | arguments
    return dllm.generate(model, prompt, **arguments)


def story(out):
    return out.sequences, out.trace.commits, out.nfe, out.positions


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cache", CACHES)
def test_a_row_alone_equals_a_row_in_a_batch(cache, shift):
    """Also the number of recomputed positions: a refresh never depends on a neighbour."""
    model = tiny(shift=shift)
    together = run(model, PROMPTS, cache=cache, sampler="threshold:tau=0.2", batch_size=2)
    for i, prompt in enumerate(PROMPTS):
        assert story(run(model, prompt, cache=cache, sampler="threshold:tau=0.2", seed=i)) == story(together[i])
    assert sum(o.positions for o in together) < sum(o.nfe * o.canvas_length for o in together)


@pytest.mark.parametrize("sampler", ["threshold:tau=0.2", "confidence", "localleap", "prophet", "saber"])
@pytest.mark.parametrize("cache", CACHES)
def test_exact_with_one_layer(cache, sampler):
    """Keys of the first layer depend on the token alone: with one layer a cache errs only if it misses a change."""
    errors = cache_error(tiny(layers=1), PROMPTS, cache=cache, sampler=sampler, max_new_tokens=13, block_length=5)
    assert all(errors) and max(e.max for row in errors for e in row) < 1e-12


@pytest.mark.parametrize("cache", CACHES)
def test_lookahead_gives_the_same_tokens_in_no_more_forwards(cache):
    """A plan is a function of the state, so forwards can be foreseen under every policy."""
    plain, ahead = (run(tiny(), PROMPTS[:2], cache=cache, sampler="threshold:tau=0.3", lookahead=k) for k in (None, 4))
    assert [o.sequences for o in plain] == [o.sequences for o in ahead]
    assert all(b.nfe <= a.nfe for a, b in zip(plain, ahead, strict=True))


@pytest.mark.parametrize("cache", ["interval:every=1", "delayed:every=1", "dllm_cache:prompt_every=1"])
def test_a_refresh_at_every_step_is_exact(cache):
    errors = cache_error(tiny(), PROMPTS, cache=cache, max_new_tokens=9, block_length=5)
    assert max(e.max for row in errors for e in row) < 1e-12


@pytest.mark.parametrize("cache", CACHES)
def test_exact_at_a_refresh_and_stale_in_between(cache):
    errors = cache_error(tiny(), PROMPTS[1], cache=cache, max_new_tokens=10, block_length=5)
    assert errors[0].max < 1e-12 and max(e.max for e in errors) > 1e-3
    assert [e.step for e in errors] == list(range(10)) and errors[0].candidates == 5


def recomputed(cache, **arguments):
    """Columns of every forward of one row: prompt of 4, 10 new tokens in blocks of 5, one token a forward."""
    model, seen = tiny(), []
    forward = model.forward

    def note(ids, pos=None, **rest):
        seen.append([c for c in pos[0].tolist() if c >= 0])
        return forward(ids, pos, **rest)

    model.forward = note
    out = run(model, [1, 2, 3, 4], cache=cache, max_new_tokens=10, **arguments)
    return seen, [[c for c, _ in pairs] for pairs in out.trace.commits]


def test_interval_by_hand():
    seen, _ = recomputed("interval:left=1,right=2,warmup=2,every=3")
    whole, first, second = list(range(14)), list(range(3, 11)), list(range(8, 14))
    assert seen == [whole, whole, first, whole, first, whole, second, second, whole, second]


def test_interval_refreshes_for_either_reason():
    """While it warms up every step, and every other step of a block: neither hides the other."""
    seen, _ = recomputed("interval:left=1,right=2,warmup=4,every=2")
    assert [len(columns) == 14 for columns in seen] == [True] * 5 + [True, False, True, False, True]


def test_delayed_by_hand():
    """A step recomputes the masks that the step before it saw: its commits ride along once more."""
    seen, commits = recomputed("delayed:every=4")
    masks = set(range(4, 14))
    for step, columns in enumerate(seen):
        if step in (0, 1, 4, 5, 6, 9):  # the first two of a block, then the fourth after its opening
            assert columns == list(range(14))
        else:
            assert columns == sorted(masks - {c for pairs in commits[: step - 1] for c in pairs})


def test_dllm_cache_by_hand():
    seen, commits = recomputed("dllm_cache:prompt_every=8,response_every=3,rho=0.6")
    sizes = [len(columns) for columns in seen]
    assert sizes[0] == sizes[8] == 14 and sizes[3] == sizes[6] == sizes[9] == 10
    for step in (1, 2, 4, 5, 7):
        assert sizes[step] == 6 and set(commits[step - 1]) <= set(seen[step]), "the share, with what was just committed"
        assert min(seen[step]) >= 4, "the prompt is left alone"


@pytest.mark.parametrize("rho", [0.6, 0.51])  # of ten columns: rounded up
def test_dllm_cache_fills_its_share_with_what_was_computed_longest_ago(rho):
    """Six columns a step: the masks of the open block, its last commit, and as many of the second block as are left
    over, those first whose turn has not come yet."""
    seen, _ = recomputed(f"dllm_cache:prompt_every=20,response_every=20,rho={rho}")
    assert [len(columns) for columns in seen[1:5]] == [6] * 4
    assert [{c for c in columns if c >= 9} for columns in seen[1:4]] == [{9}, {10, 11}, {12, 13}]


@pytest.mark.parametrize(("cache", "private"), [("dual", True), ("delayed", False), ("dllm_cache", False)])
def test_scattered_columns_are_recomputed_with_those_that_are_looked_at(cache, private):
    call = {"max_new_tokens": 13, "block_length": 5, "sampler": "threshold+sched", "cache": cache}
    job = prepare(tiny(), PROMPTS, call)
    window = opening(job.sampler, job.policy, job.queue, Meter(len(PROMPTS)).rows).window
    assert window.aside.any() and window.step.cols[0, 14] and (window.step.aside is not None) == private


def test_caches_of_the_command_line():
    assert policy("dllm_cache:rho=0.5,response_every=2").rho == 0.5
    assert policy({"name": "interval", "every": 4}).every == 4 and policy(None).name == "none"
    assert policy("dual:left=2,right=3") == POLICIES["dual"](2, 3)  # what belongs to the model comes by name
    assert set(POLICIES) == {"none", "prefix", "dual", "interval", "delayed", "dllm_cache", "block", "block_dual"}


@pytest.mark.parametrize(("spec", "words"), [
    ("duel", "dual"), ("dual:lef=2", "left"), ("dual:left", "key=value"), ("dual:left=-1", "at least 0"),
    ("interval:every=-2", "at least 0"), ("delayed:every=0", "at least 1"), ("dllm_cache:rho=2", "rho"),
    ("dllm_cache:prompt_every=0", "at least 1"), ("dllm_cache:response_every=0", "at least 1"),
    ({"left": 3}, "needs the key 'name'"), ("dual:block_size=4", "left"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(spec, words):
    with pytest.raises(DllmError, match=words) as error:
        policy(spec)
    assert "\n" not in str(error.value)


def test_a_sampler_that_brings_a_lookahead_is_compared_at_every_step():
    (errors,) = cache_error(tiny(), PROMPTS[:1], cache="prefix", sampler="freedave", max_new_tokens=9, early_stop=False)
    assert len(errors) == 9
