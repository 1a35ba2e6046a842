"""Attention weights as a need: exact for the rows and layers that are asked for, from the keys of this very forward,
with every cache, in ragged batches, under lookahead; and nothing is computed when nobody asks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from golden_cases import GOLDEN, model
from safetensors.torch import load_file
from scripted import Scripted, tiny
from test_models_known import CASES, SWITCHES, filled, sample_ids
from torch import Tensor

import dllm
from dllm.decoding.canvas import Span, State
from dllm.decoding.prediction import Prediction, rows_at
from dllm.decoding.slots import Attention, Needs, Sampler
from dllm.decoding.step import step
from dllm.errors import DllmError
from dllm.models import transformer
from dllm.models.transformer import Rows
from dllm.samplers import Bundle, Context, Method, registry

RANDOM, DREAM, SDAR = "tiny-llada-random", "tiny-dream-random", "tiny-sdar-random"
CACHES = [
    "none", "prefix", "dual", "dual:left=2,right=3", "interval:warmup=1,every=3", "delayed:every=3", "dllm_cache",
    "none:near=2,tail=1", "dual:near=2,tail=1,recent=6",
]  # fmt: skip
PROMPTS = [[3, 4, 5, 6, 7, 8], [9, 10], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
CALL: dict[str, Any] = {"max_new_tokens": 12, "block_length": 6, "early_stop": False}
CLAD = {"name": "clad", "tau": 0.4, "layers": 1}


# -- the forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", sorted(p.parent.name for p in GOLDEN.glob("given/*/attention.json")))
def test_weights_are_those_of_the_released_code(checkpoint: str) -> None:
    folder = GOLDEN / "given" / checkpoint
    tables, net = load_file(folder / "attention.safetensors"), model(checkpoint)
    for entry in json.loads((folder / "attention.json").read_text())["entries"]:
        ids = torch.tensor([entry["input_ids"]])
        at = torch.arange(ids.shape[1])[None]
        for layer, expected in zip(entry["layers"], tables[entry["key"]], strict=True):
            weights = net.forward_with(ids, rows=Rows(frozenset({layer}), at, ids.shape[1])).said.weights
            assert torch.equal(weights.cols, at)
            assert (weights.table[0] - expected).abs().max() < 5e-6


class Kernels:
    """What the fused kernels were given and gave, layer by layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Tensor, ...]] = []
        attend = transformer.Attention._attend

        def watch(attention: Any, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
            out = attend(attention, q, keys, values, mask, causal)
            shared = q.shape[1] // keys.shape[1]
            self.seen.append((q, *(x.repeat_interleave(shared, 1) for x in (keys, values)), mask, out))
            return out

        monkeypatch.setattr(transformer.Attention, "_attend", watch)

    def weights(self, layer: int) -> Tensor:
        """(N, heads, Q, K), after a check that times the values they are the output of the kernel."""
        q, keys, values, mask, out = self.seen[layer]
        scores = q @ keys.mT / q.shape[-1] ** 0.5
        weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
        assert (weights @ values - out).abs().max() < 1e-12
        return weights


def folded(weights: Tensor, columns: Tensor, width: int) -> Tensor:
    """(Q, L) of one row's (Q, K), each key's weight at its position."""
    out = torch.zeros(len(weights), width, dtype=weights.dtype)
    for k, column in enumerate(columns.tolist()):
        if column >= 0:  # only padding sees padding
            out[:, column] += weights[:, k]
    return out


@pytest.mark.parametrize("chunk", [1, 1 << 26])
@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("name", CASES)
def test_times_the_values_they_are_the_output_of_the_kernel(
    name: str, switches: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of forward, in float64; whatever is read, the hidden states and the store stay as they are."""
    monkeypatch.setattr(transformer, "SCORES", chunk)
    case, net = CASES[name](), tiny(layers=3, std=0.25, **SWITCHES[switches])
    ids, width = sample_ids(case), 16
    stores = [filled(net) if case.stored else None for _ in range(2)]
    plain = net.forward(ids, case.pos, **case.options, store=stores[0], known=case.known)
    kernels, pos = Kernels(monkeypatch), torch.arange(ids.shape[1]).expand_as(ids) if case.pos is None else case.pos
    at = torch.tensor([[2, 0, -1], [3, -1, 1], [1, 1, 0]])
    out = net.forward_with(
        ids, case.pos, rows=Rows(frozenset({0, 2}), at, width), **case.options, store=stores[1], known=case.known
    )
    said = out.said
    assert torch.equal(said.hidden, plain) and not out.layers and said.weights is not None
    if stores[0] is not None and stores[1] is not None:
        assert all(torch.equal(a, b) for a, b in zip(stores[0].keys, stores[1].keys, strict=True))
    for n in range(len(ids)):
        columns = torch.arange(case.known.slots) if case.stored else pos[n]
        columns = torch.cat([columns, pos[n]]) if case.known.private else columns
        for r, query in enumerate(at[n].tolist()):
            own = [folded(kernels.weights(layer)[n].mean(0), columns, width)[query] for layer in (0, 2)]
            real = query >= 0 and pos[n, query] >= 0
            assert said.weights.cols[n, r] == (pos[n, query] if query >= 0 else -1)
            expected = sum(own) / 2 if real else torch.zeros(width)
            assert (said.weights.table[n, r] - expected).abs().max() < 1e-12
            assert not real or abs(said.weights.table[n, r].sum() - 1) < 1e-12


def test_a_layer_that_is_read_runs_beside_compiled_ones() -> None:
    plain, compiled = (tiny(layers=3, std=0.25) for _ in range(2))
    compiled.transformer.compile_layers("eager")
    ids, rows = torch.arange(8)[None], Rows(frozenset({1}), torch.arange(8)[None], 8)
    a, b = (net.forward_with(ids, rows=rows).said for net in (plain, compiled))
    assert a.weights is not None and b.weights is not None
    assert (a.hidden - b.hidden).abs().max() < 1e-12 and (a.weights.table - b.weights.table).abs().max() < 1e-12
    torch._dynamo.reset()


def test_half_precision_is_read_in_single() -> None:
    net = tiny(layers=2, std=0.25).to(dtype=torch.bfloat16)
    weights = net.forward_with(torch.arange(8)[None], rows=Rows(frozenset({0}), torch.arange(8)[None], 8)).said.weights
    assert weights.table.dtype == torch.float32 and (weights.table.sum(2) - 1).abs().max() < 1e-6


# -- in a decode ----------------------------------------------------------------------------------------------------


class Notes:
    """Steps that note the attention each of them reads: (row of the call, step) -> column -> (L,)."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], dict[int, Tensor]] = {}

    def __call__(self, s: Sampler, state: State, window: Span, pred: Prediction) -> State:
        for row in range(state.rows):
            found = {c: pred.attention[row, i] for i, c in enumerate(pred.cols[row].tolist()) if c >= 0}
            self.rows[int(state.seed[row]), int(state.step[row])] = found
        return step(s, state, window, pred)

    def same(self, other: Notes, but: int = 0) -> bool:
        """Whether the rows of another decode, whose first one is our row `but`, read the same."""
        theirs = {(row + but, n): found for (row, n), found in other.rows.items()}
        mine = {key: self.rows[key] for key in theirs}
        for key, found in mine.items():
            assert found.keys() == theirs[key].keys()
            for column, weights in found.items():
                wide = min(len(weights), len(theirs[key][column]))
                assert (weights[:wide] - theirs[key][column][:wide]).abs().max() < 1e-12
                assert not weights[wide:].any()
        return bool(mine)


def noted(checkpoint: str, prompts: Any, cache: str, **more: Any) -> Notes:
    notes = Notes()
    dllm.generate(model(checkpoint), prompts, **{**CALL, "sampler": CLAD, "cache": cache, "check": notes, **more})
    return notes


def settings() -> list[tuple[str, str]]:
    return [(c, cache) for c in (RANDOM, DREAM) for cache in CACHES] + [(SDAR, "block"), (SDAR, "block_dual")]


@pytest.mark.parametrize(("checkpoint", "cache"), settings())
def test_every_cache_reads_the_rows_of_its_own_forwards(
    checkpoint: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that a step reads are those of the kernel of its forward, in the layer that was asked for."""
    net, kernels, checked = model(checkpoint), Kernels(monkeypatch), [0]

    def check(s: Sampler, state: State, window: Span, pred: Prediction) -> State:
        calls, kernels.seen = kernels.seen, []
        q, keys, _, mask, _ = calls[-1]  # the last layer's
        (plan,) = fed.pop()
        scores = q @ keys.mT / q.shape[-1] ** 0.5
        weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1).mean(1)
        for row in range(state.rows):
            stored = plan["store"] is not None
            columns = torch.arange(keys.shape[2]) if stored else plan["pos"][row]
            table = folded(weights[row], columns, pred.attention.shape[2])
            places = {c: i for i, c in enumerate(plan["pos"][row].tolist()) if c >= 0}
            for i, column in enumerate(pred.cols[row].tolist()):
                if column >= 0:
                    assert (pred.attention[row, i] - table[places[column]]).abs().max() < 1e-12
                    assert abs(float(pred.attention[row, i].sum()) - 1) < 1e-12
                    checked[0] += 1
        return step(s, state, window, pred)

    fed: list[tuple[Any]] = []
    forward = net.forward_with

    def watch(ids: Tensor, pos: Tensor, **options: Any) -> Any:
        fed.append(({"pos": pos, **options},))
        return forward(ids, pos, **options)

    monkeypatch.setattr(net, "forward_with", watch)
    dllm.generate(net, PROMPTS, sampler=CLAD, cache=cache, check=check, batch_size=2, **CALL)
    assert checked[0] > 30


@pytest.mark.parametrize(("checkpoint", "cache"), settings())
def test_a_row_reads_in_a_ragged_batch_what_it_reads_alone(checkpoint: str, cache: str) -> None:
    together = noted(checkpoint, PROMPTS, cache, batch_size=2)
    for i, prompt in enumerate(PROMPTS):
        assert together.same(noted(checkpoint, prompt, cache), but=i)


@pytest.mark.parametrize("setting", [{"rows": 4}, {"rows": 3, "retain": False, "max_rows": 7}], ids=str)
@pytest.mark.parametrize(("checkpoint", "cache"), settings())
def test_answers_that_were_guessed_hold_the_same_weights(checkpoint: str, cache: str, setting: dict[str, Any]) -> None:
    plain, ahead = noted(checkpoint, PROMPTS, cache), noted(checkpoint, PROMPTS, cache, lookahead=setting)
    assert plain.rows.keys() == ahead.rows.keys() and plain.same(ahead)


@pytest.mark.parametrize("mode", ["exact", "fast", "guarded"])
@pytest.mark.parametrize("form", ["memo", "chain"])
@pytest.mark.parametrize("cache", ["none", "dual", "delayed"])
def test_every_mode_of_the_lookahead_decodes_the_same(mode: str, form: str, cache: str) -> None:
    net = model(RANDOM, "float64" if mode == "exact" else "float32")
    call = {**CALL, "sampler": {**CLAD, "tau": 0.8}, "cache": cache, "trace": True}
    plain = dllm.generate(net, PROMPTS, **call)
    ahead = dllm.generate(net, PROMPTS, lookahead={"rows": 4, "mode": mode, "form": form}, **call)
    assert [o.trace.commits for o in ahead] == [o.trace.commits for o in plain]
    assert sum(o.nfe for o in ahead) < sum(o.nfe for o in plain) or mode == "guarded"


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_guidance_reads_the_conditional_copy(cache: str) -> None:
    """At scale 0+ the tokens are the plain ones, and so are the weights: the copy without a prompt has others."""
    plain, guided = (noted(RANDOM, PROMPTS, cache, **more) for more in ({}, {"cfg_scale": 1e-300}))
    assert plain.same(guided)


def test_lopa_reads_its_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever copy wins a step, the weights read are those of a forward of that copy's canvas alone."""
    net, won = model(RANDOM), set[int]()

    def check(s: Sampler, state: State, window: Span, pred: Prediction) -> State:
        from dllm.samplers.lopa import Tried, Winner

        assert isinstance(pred.extra, Winner)
        branch, token = state.columns[Tried]
        for row in range(state.rows):
            copy = int(pred.extra.branch[row])
            won.add(copy)
            ids = torch.where((branch[row] == copy) & (copy > 0), token[row], state.canvas.ids[row])
            ids = ids[: int(state.canvas.length[row])][None]
            at = torch.arange(ids.shape[1])[None]
            own = net.forward_with(ids, rows=Rows(frozenset({1}), at, ids.shape[1])).said.weights
            inside = pred.cols[row] >= 0
            expected = rows_at(own, pred.cols[row : row + 1])[0][inside]
            assert (pred.attention[row][inside][:, : ids.shape[1]] - expected).abs().max() < 1e-12
        return step(s, state, window, pred)

    dllm.generate(net, PROMPTS[:2], sampler=["lopa", CLAD], check=check, cache="none", **CALL)
    assert len(won) > 1


# -- who pays -------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(layer, rows) of each time that a layer's weights are computed."""
    seen, weights = [], transformer.Attention._weights

    def watch(attention: Any, q: Tensor, keys: Tensor, mask: Tensor | None, rows: Tensor) -> Tensor:
        net = model(RANDOM).transformer
        layers = [layer.self_attn for layer in net.layers]
        seen.append((layers.index(attention), rows.shape[1]))
        return weights(attention, q, keys, mask, rows)

    monkeypatch.setattr(transformer.Attention, "_weights", watch)
    return seen


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_nothing_is_computed_when_nobody_asks(cache: str, read: list[tuple[int, int]]) -> None:
    for sampler in ("threshold", "prophet", "lopa", "wino"):
        dllm.generate(model(RANDOM), PROMPTS, sampler=sampler, cache=cache, **CALL)
    dllm.generate(model(RANDOM), PROMPTS, cache=cache, lookahead=4, **CALL)
    assert read == []


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_what_is_asked_is_computed_in_those_layers_and_rows_alone(cache: str, read: list[tuple[int, int]]) -> None:
    out = dllm.generate(model(RANDOM), PROMPTS[0], sampler=CLAD, cache=cache, **CALL)
    assert read == [(1, CALL["block_length"])] * out.nfe


# -- the need -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "depth", "layers"),
    [
        (Attention(("last", 4)), 32, {28, 29, 30, 31}),
        (Attention(("last", 4)), 28, {24, 25, 26, 27}),
        (Attention(("last", 4)), 2, {0, 1}),
        (Attention(("share", 0.3)), 32, set(range(22, 32))),
        (Attention(("share", 0.3)), 28, set(range(19, 28))),
        (Attention(("share", 1.0)), 2, {0, 1}),
        (Attention(frozenset({3, 5})), 6, {3, 5}),
    ],
)
def test_layers_are_named_for_the_depth_of_a_model(asked: Attention, depth: int, layers: set[int]) -> None:
    assert asked.of(depth, "clad").layers == layers


def test_layers_that_are_not_there_are_an_error() -> None:
    with pytest.raises(DllmError, match=r"sampler 'clad' reads layer 7; this model has layers 0 to 1"):
        dllm.generate(model(RANDOM), [1, 2], sampler="clad:layers=[1, 7]", max_new_tokens=4)
    for layers in (0, -1, [], ["a"], True, 1.5, None):
        with pytest.raises(DllmError, match="no number of last layers and no list of layers"):
            dllm.generate(model(RANDOM), [1, 2], sampler={"name": "clad", "layers": layers}, max_new_tokens=4)


def test_a_model_without_attention_weights_is_refused_in_one_line() -> None:
    with pytest.raises(DllmError, match=r"sampler 'clad' reads attention weights, and this model gives none.*natively"):
        dllm.generate(Scripted(torch.zeros(3, 5)), [0], sampler="clad", max_new_tokens=3)


@dataclass(frozen=True)
class Reads(Method):
    """Ranks by the attention that a column gives to the first column."""

    last: int = 1
    rows: str = "window"
    name: ClassVar[str] = "reads"

    def bundle(self, context: Context) -> Bundle:
        needs = Needs(attention=Attention(("last", self.last), self.rows))  # type: ignore[arg-type]
        return Bundle(score=lambda view, soft: soft.attention[..., 0], needs=needs)


def test_samplers_that_read_the_same_layers_compose_and_others_are_named() -> None:
    context = Context(8, None, (24,), 59, (2,), 60, 512)
    both = registry.build([Reads(last=4, rows="all"), "clad"], context)
    assert both.needs.attention == Attention(("last", 4), "all")
    both = registry.build(["clad", Reads(last=4, rows="all")], context)
    assert both.needs.attention == Attention(("last", 4), "all")
    wrong = r"samplers 'reads' and 'clad' read the attention of different layers, the last 1 layers and the last 4"
    with pytest.raises(DllmError, match=wrong):
        registry.build([Reads(), "clad"], context)


def test_a_score_may_read_it_too() -> None:
    out = dllm.generate(model(RANDOM), PROMPTS, sampler=Reads(rows="all"), cache="dual", **CALL)
    assert all(len(o.tokens) == 12 for o in out)


def test_a_sampler_that_reads_without_asking_is_told() -> None:
    class Slip(Method):
        name = "slip"

        def bundle(self, context: Context) -> Bundle:
            return Bundle(score=lambda view, soft: soft.attention[..., 0])

    with pytest.raises(DllmError, match=r"its needs do not ask for: Needs\(attention=\.\.\.\)"):
        dllm.generate(model(RANDOM), [1, 2], sampler=Slip(), max_new_tokens=4)
