"""Heads over the verifier's hidden states against the public codes: what they compute, draft and have accepted."""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from golden_cases import GOLDEN, read
from replay import waits
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

import dllm
from dllm.cli import main
from dllm.drafting import Argmax, Lattice, Need, SpecConfig, as_drafter, as_verifier
from dllm.drafting.accept import Judge
from dllm.drafting.drafters import Ask, ask
from dllm.drafting.hidden.backbone import Rotary
from dllm.drafting.hidden.config import read_head
from dllm.drafting.hidden.drafter import Context, text_of
from dllm.drafting.hidden.head import Head
from dllm.drafting.loop import rounds
from dllm.drafting.request import Request
from dllm.drafting.search import CPSSample, Sample
from dllm.errors import DllmError
from dllm.eval import run as run_config
from dllm.models.arguments import Checkpoint

torch.set_num_threads(1)
TARGET = "tiny-qwen3-ar-deep-random"
HEADS = [
    f"tiny-{kind}-qwen3-ar-deep"
    for kind in (
        "dflash-trained", "dflash-sliding", "dflash-speculators-trained", "dflash2-scaled", "dspark-gated",
        "dspark-dflashconfig", "domino", "dflare", "jetspec-trained",
    )
]  # fmt: skip
NATIVE = pytest.mark.skipif("muse_glimmer_assistant" not in CONFIG_MAPPING, reason="transformers before 5.23")
CHAINS = ("dspark-dflashconfig", "domino")  # their state is of the whole block
GREEDY = dict(search="argmax", length="fixed:k=64", carry="off", order=0)


def folder(name):
    return str(GOLDEN / "checkpoints" / name)


@cache
def verifier():
    return as_verifier(AutoModelForCausalLM.from_pretrained(folder(TARGET), dtype=torch.float64).eval())


@cache
def states():
    return load_file(GOLDEN / "given" / TARGET / "taps.safetensors")


def opened(name, ids, **need):
    """A head that has read nothing of a text yet."""
    v, drafter = verifier(), as_drafter(folder(name)).fork()
    drafter.reset(ids, Need(v.vocab, v.eos, model=v.model, **need))
    return drafter


def told(drafter, case, start, end):
    """The states of a part of the text."""
    found = [states()[f"{case['entry']}.tap{tap}"][start:end] for tap in drafter.taps]
    drafter.take(torch.stack(found, 1), start)


def tokens(draft, anchor):
    """What a greedy search makes of it."""
    return list((Argmax()(draft, [anchor]) if isinstance(draft, Lattice) else draft).tokens)


def close(ours, theirs):
    return (ours.float() - torch.as_tensor(theirs)).abs().max() < 1e-4


# -- the network


@pytest.mark.parametrize("name", HEADS)
@torch.inference_mode()
def test_states_logits_and_drafts_are_those_of_the_public_code(name):
    tensors = load_file(GOLDEN / "given" / name / "forward.safetensors")
    for case in read(name, "forward"):
        drafter = opened(name, case["ids"])
        for i, turn in enumerate(case["rounds"]):
            told(drafter, case, *turn["context"])
            anchor, masks = turn["anchor_id"], [drafter.mask] * (drafter.head.config.block - 1)
            hidden = drafter.hidden([[anchor, *masks]], [drafter.context])[0]
            raw = (drafter.head.lm_head or verifier().model.get_output_embeddings())(hidden)
            assert close(hidden, tensors[case["hidden"]][i])
            assert raw.argmax(-1).tolist() == turn["argmax"] and close(raw.amax(-1), turn["max_logit"])
            draft = drafter.draft([*case["ids"][: turn["anchor"]], anchor], 99)
            assert tokens(draft, anchor) == turn["drafted"]
            if "confidence_logits" in turn:
                before = torch.tensor([anchor, *turn["drafted"][:-1]])
                assert close(drafter.confidence(hidden, before), turn["confidence_logits"])
            if "conditioned" in turn:
                path = turn["conditioned"]["fill"]
                draft = drafter.draft([*case["ids"][: turn["anchor"]], anchor, *path], 99)
                assert draft.argmax.tolist() == turn["conditioned"]["argmax"][len(path) :]
                best = drafter.logits(
                    drafter.hidden([[anchor, *path, *masks[len(path) :]]], [drafter.context])[0]
                ).amax(-1)[1:]
                assert close(best, turn["conditioned"]["max_logit"])


@pytest.mark.parametrize("name", [n for n in HEADS if "gated" in n or "dflash2" in n])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pair_scores_are_those_of_the_heads_weights_in_every_dtype(name, dtype):
    """A head in bfloat16 has other weights; what is computed with them is not rounded once more."""
    head = as_drafter(folder(name)).made.at(torch.device("cpu"), dtype)
    exact, generator = deepcopy(head).double(), torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(8, head.config.hidden_size, generator=generator).to(dtype)
    ids, columns = torch.randint(0, head.config.vocab, (2, 8, 16), generator=generator)
    found, right = (h.order.scores(hidden.to(h.order.right), h.order.right, ids, columns) for h in (head, exact))
    assert right.abs().max() > 3
    torch.testing.assert_close(found.double(), right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in HEADS if "gated" in n or "dflash2" in n])
def test_pair_scores_on_a_lattice_are_those_of_the_public_code(name):
    known = {case["entry"] for case in read(name, "forward")}
    for case in (case for case in read(name, "lattice") if case["entry"] in known):
        (start, end), width = case["context"], len(case["candidate_ids"][0])
        drafter = opened(name, [], m_max=width)
        told(drafter, case, start, end)
        entry = next(c for c in read(name, "forward") if c["entry"] == case["entry"])
        draft = drafter.draft([*entry["ids"][:end], case["anchor_id"]], 99)
        assert draft.tokens[:, :width].tolist() == case["candidate_ids"]
        law = case["laws"]["candidates" if "candidates" in case["laws"] else "candidates_times_mass"]
        own = [slot for slot, ids in enumerate(draft.tokens[:, width:].tolist()) if max(ids, default=-1) < 0]
        assert own == list(range(draft.k)) or not case["greedy_inside_candidates"], "the walk adds what it needs"
        for slot, rows in ((slot, law["log_q"][slot]) for slot in own):
            assert torch.allclose(draft.pairs.logq[slot, : len(rows), :width], torch.tensor(rows), atol=1e-3)
        assert tokens(draft, case["anchor_id"]) == case["greedy_walk"]


# -- the loop


def run(name, cases, **options):
    """Texts, and (start, draft, accepted) of each row's rounds after the first."""
    requests = [
        Request(
            list(c["prompt_ids"]),
            len(c["prompt_ids"]) + c["params"]["max_new_tokens"],
            frozenset(c["params"]["stop_token_ids"] or ()),
        )
        for c in cases
    ]
    seen, rows = [[] for _ in cases], []
    for emitted, rows in rounds(verifier(), as_drafter(folder(name)), requests, SpecConfig(**{**GREEDY, **options})):
        for turns, row, new in zip(seen, rows, emitted, strict=True):
            if new:
                turns.append((len(row.ids) - len(new) - 1, list(row.proposal.tokens), row.stats.accepted))
    return [row.ids for row in rows], [turns[1:] for turns in seen]


@pytest.mark.parametrize("name", HEADS)
def test_rounds_are_those_of_the_public_loop_alone_and_in_a_ragged_batch(name):
    cases = read(name, "e2e")
    alone = [run(name, [case]) for case in cases]
    for texts, turns in (run(name, cases), *alone):
        some = cases if len(texts) > 1 else [cases[alone.index((texts, turns))]]
        for case, text, mine in zip(some, texts, turns, strict=True):
            theirs = [t for t in case["rounds"] if t["remaining"] >= 2]  # loops differ where nothing can be drafted
            assert text == case["output_ids"] and len(mine) >= len(theirs)
            for (start, draft, accepted), other in zip(mine, theirs, strict=False):
                n = len(draft)
                assert n and (start, draft) == (other["start"], other["drafted"][:n])
                assert accepted == min(other["accepted"], n)


@pytest.mark.parametrize("name", [n for n in HEADS if not any(kind in n for kind in CHAINS)])
def test_trees_keep_the_verifiers_text(name):
    for case in read(name, "e2e")[:2]:
        (text,), (turns,) = run(name, [case], tree=12, search="tree")
        assert text == case["output_ids"]
        assert max(len(draft) for _, draft, _ in turns) > len(case["rounds"][0]["drafted"])


@NATIVE
def test_transformers_own_class_drafts_as_transformers_does():
    """Token for token, given as a module and as its folder's tensors; sliding and full layers."""
    head, ids, fed = native(), torch.tensor([[160, 182, 196, 169, 137, 12, 44]]), []
    hook = verifier().model.register_forward_pre_hook(
        lambda _, args, kw: fed.append(kw["input_ids"][0].tolist()), with_kwargs=True
    )
    options = dict(assistant_model=head, speculation_type="dflash", max_new_tokens=20, do_sample=False)
    theirs = verifier().model.generate(ids, **options)
    hook.remove()
    requests = [Request(ids[0].tolist(), 27)]
    ours = []
    for _, rows in rounds(verifier(), as_drafter(head), requests, SpecConfig(**GREEDY)):
        ours.append(list(rows[0].proposal.tokens))
    assert rows[0].ids == theirs[0].tolist()
    expected = [row[1:] for row in fed[1:]]
    assert any(expected) and all(mine == other[: len(mine)] for mine, other in zip(ours[1:], expected, strict=False))


@cache
def native():
    """The sliding head under the names of transformers' class, which has a rule of its own for windows."""
    raw = json.loads(Path(folder("tiny-dflash-sliding-qwen3-ar-deep"), "config.json").read_text())
    told = raw.pop("dflash_config")
    keep = ("hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads",
            "num_hidden_layers", "rms_norm_eps", "layer_types", "sliding_window")  # fmt: skip
    config = AutoConfig.for_model(
        "muse_glimmer_assistant", **{key: raw[key] for key in keep}, **told, block_size=raw["block_size"],
        rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]},
    )  # fmt: skip
    head = AutoModel.from_config(config).eval()
    names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    tensors = load_file(Path(folder("tiny-dflash-sliding-qwen3-ar-deep"), "model.safetensors"))
    head.load_state_dict({names.get(name, name): tensor for name, tensor in tensors.items()})
    return head.double()


@NATIVE
def test_a_folder_of_the_native_class_is_the_module(tmp_path):
    native().save_pretrained(tmp_path)
    prompt = [160, 182, 196, 169, 137]
    a, b = (dllm.speculate(verifier(), d, prompt, max_new_tokens=16, **GREEDY) for d in (native(), str(tmp_path)))
    assert a.sequences == b.sequences and a.spans == b.spans


@pytest.mark.parametrize("name", ["tiny-dflash-trained-qwen3-ar-deep", "tiny-dspark-gated-qwen3-ar-deep"])
def test_generate_with_a_head_keeps_padded_batches_as_they_are(name):
    cases = sorted(read(name, "e2e"), key=lambda c: len(c["prompt_ids"]))[-3:]
    width = max(len(c["prompt_ids"]) for c in cases)
    ids = torch.tensor([[0] * (width - len(c["prompt_ids"])) + c["prompt_ids"] for c in cases])
    mask = torch.tensor([[0] * (width - len(c["prompt_ids"])) + [1] * len(c["prompt_ids"]) for c in cases])
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    results = []
    generate = dllm.speculator(folder(name), results=results, length="fixed:k=4")
    model = verifier().model
    assert torch.equal(model.generate(ids, custom_generate=generate, **options), model.generate(ids, **options))
    assert sum(r.n_draft for r in results) > 6


@pytest.mark.parametrize("name", ["tiny-dflash-trained-qwen3-ar-deep", "tiny-dspark-gated-qwen3-ar-deep"])
@pytest.mark.parametrize("tree", [0, 12])
def test_a_head_goes_on_behind_the_cache_of_earlier_turns(name, tree):
    """It drafts as if it had read the text in one go."""
    model, results = verifier().model, []
    turn = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    options = dict(length="fixed:k=4", carry="off", order=0, tree=tree)
    generate = dllm.speculator(folder(name), results=results, **options)
    ids, cache, theirs = torch.tensor([[160, 182, 196, 169, 137]]), None, None
    for new in ([169, 137], [160], []):
        text = model.generate(ids, past_key_values=theirs, **turn)
        out = model.generate(ids, past_key_values=cache, custom_generate=generate, **turn)
        assert torch.equal(out.sequences, text.sequences)
        if cache is not None:
            whole = dllm.speculate(model, folder(name), ids[0].tolist(), max_new_tokens=8, **options)
            drafted = [(r.emitted, r.k, r.nodes) for r in whole.rounds[1:]]
            assert drafted and [(r.emitted, r.k, r.nodes) for r in results[-1].rounds][-len(drafted) :] == drafted
        cache, theirs = out.past_key_values, text.past_key_values
        ids = torch.cat([out.sequences, torch.tensor([new], dtype=torch.long)], 1)


def test_the_first_round_has_no_draft_and_is_no_failed_one():
    (result,) = [dllm.speculate(verifier(), folder(HEADS[0]), [160, 182, 196], max_new_tokens=12, length="adl")]
    first = result.rounds[0]
    assert (first.k, first.nodes, first.failed, first.forwards, first.observed) == (0, 0, False, 0, [])
    assert all(r.forwards == 1 and r.k == 5 for r in result.rounds[1:4])


@pytest.mark.parametrize("name", HEADS)
def test_a_draft_waits_for_the_device_once_a_row_and_states_never(name):
    case = read(name, "forward")[0]
    (start, end), anchor = case["rounds"][0]["context"], case["rounds"][0]["anchor_id"]
    ids, heads = [*case["ids"][:end], anchor], [opened(name, []) for _ in range(2)]
    states()
    assert not waits(lambda: [told(d, case, start, end - i) for i, d in enumerate(heads)])
    for rows in (1, 2):
        asks = [Ask(d, ids[: end + 1 - i], 3 - i) for i, d in enumerate(heads[:rows])]
        found = waits(lambda: heads[0].together(asks))  # noqa: B023
        assert sum(n for what, n in found.items() if "hidden/" in what) == rows
        # numbers that are sent without a wait, and tables that are on the host by then
        assert {what.rpartition("/")[-1].partition(".")[0] for what in found} <= {
            "proposal", "lattice", "vocabulary", "drafter",
        }  # fmt: skip


def test_a_bfloat16_verifier_leaves_the_head_as_it_was_for_the_next_one():
    head, model = as_drafter(folder(HEADS[0])), verifier().model
    ids, half = [160, 182, 196, 169, 137], deepcopy(model).bfloat16()
    loaded = {name: p.clone() for name, p in head.made.named_parameters()}
    first = dllm.speculate(model, head, ids, max_new_tokens=16, **GREEDY)
    dllm.speculate(half, head, ids, max_new_tokens=16, **GREEDY)
    again = dllm.speculate(model, head, ids, max_new_tokens=16, **GREEDY)
    assert again.sequences == first.sequences and again.spans == first.spans
    assert all(torch.equal(p, loaded[name]) for name, p in head.made.named_parameters())
    cast = [head.made.at(torch.device("cpu"), dtype) for dtype in (torch.bfloat16, torch.float64, torch.float32)]
    assert [next(h.parameters()).dtype for h in cast] == [torch.bfloat16, torch.float64, torch.float32]
    assert cast[0] is head.made.at(torch.device("cpu"), torch.bfloat16) and not cast[0].elsewhere
    assert len(head.made.elsewhere) == 2, "one a dtype, and itself"


# -- other doors


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An untrained DSpark head for the embedded verifier."""
    to, raw = tmp_path_factory.mktemp("head"), dict(
        architectures=["DSparkDraftModel"], block_size=4, hidden_size=128, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_hidden_layers=1, num_target_layers=6, vocab_size=664,
        dflash_config=dict(projector_type="dspark", markov_rank=4, mask_token_id=1, target_layer_ids=[1, 3]),
    )  # fmt: skip
    c = read_head(raw)
    torch.manual_seed(0)
    head = Head(c, Rotary(c.rope, c.head_dim))
    parameters = dict(head.named_parameters())
    save_file({name: parameters[own].detach() for name, own in head.names().items()}, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(raw))
    return str(to)


def test_the_command_line_drafts_with_a_head(small, monkeypatch, capsys):
    argv = [
        "dllm",
        "speculate",
        "Tom has 12 apples.",
        "--drafter",
        small,
        "-n",
        "10",
        "--compare",
        "--length",
        "fixed:k=4",
    ]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stop:
        main()
        raise SystemExit(0)
    shown = capsys.readouterr().out
    assert not stop.value.code
    assert [line.split()[-1] for line in shown.splitlines() if "equal to plain" in line] == ["yes"]
    assert [line.split()[-1] for line in shown.splitlines() if "draft forwards" in line] != ["0"]


def test_an_evaluation_drafts_with_a_head(small, tmp_path):
    told = {
        "name": "heads", "model": "tiny", "tasks": ["word_problems"], "limit": 1, "warmup": 0,
        "generate": {"max_new_tokens": 12},
        "matrix": [{"label": d, "speculate": {"verifier": "tiny-ar", "drafter": d}} for d in ("none", small)],
    }  # fmt: skip
    run_config(told, out=tmp_path, progress=False)
    one, two = (json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines())
    assert one["text"] == two["text"] and not one["error"] and not two["error"]
    assert f"drafter {small}" in json.loads((tmp_path / "env.json").read_text())["weights"]


def test_a_head_takes_no_settings_of_a_diffusion_model(small):
    with pytest.raises(DllmError, match="mask_id: a head over the verifier's states has its verifier's"):
        as_drafter(Checkpoint(name=small, mask_id=3))


# -- laws


DRAWN = {
    "domino": None, "dspark-dflashconfig": None, "dspark-gated": Sample(), "dflash2-scaled": CPSSample(),
    "dflash-speculators-trained": Sample(),
}  # fmt: skip


@pytest.mark.parametrize("name,search", DRAWN.items())
def test_draws_have_the_rows_that_are_handed_over(name, search):
    """Two tokens of a draft, drawn 1 000 times, against the rows that came with the first draws."""
    case = read(f"tiny-{name}-qwen3-ar-deep", "forward")[0]
    warp = Judge(True).warp
    drafter = opened(
        f"tiny-{name}-qwen3-ar-deep", [], sampled=True, warp=warp, draws=0 if search is None else search.draws
    )
    told(drafter, case, *case["rounds"][0]["context"])
    ids, g = (
        [*case["ids"][: case["rounds"][0]["anchor"]], case["rounds"][0]["anchor_id"]],
        torch.Generator().manual_seed(5),
    )
    laws, counts = {}, {}
    for _ in range(1000):
        draft = ask(drafter, ids, 2, g)
        p = search(draft, ids, generator=g) if isinstance(draft, Lattice) else draft
        assert p.kind == "sampled"
        for j, before in enumerate(((), p.tokens[:1])):
            laws.setdefault(before, p.rows.dense(j, verifier().vocab))
            counts.setdefault(before, Counter())[p.tokens[j]] += 1
    for before, seen in counts.items():
        n, law = sum(seen.values()), laws[before]
        likely = (law * n >= 8).nonzero()[:, 0].tolist()
        rest = n - sum(seen[t] for t in likely)
        expected = [float(law[t]) * n for t in likely]
        if len(likely) > 1 and n > 200:
            assert (
                chisquare([*(seen[t] for t in likely), rest + 1e-9], [*expected, n - sum(expected) + 1e-9]).pvalue
                > 1e-5
            )
        assert all(law[t] > 0 for t in seen)


# -- bad input


def edited(tmp_path, name, change=None, tensors=None):
    """A copy of a head with another config or other tensors."""
    source = Path(folder(name))
    raw = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    if change:
        change(raw)
    if tensors:
        tensors(weights)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(weights, tmp_path / "model.safetensors")
    return str(tmp_path)


DFLASH, MARKOV = "tiny-dflash-trained-qwen3-ar-deep", "tiny-dspark-dflashconfig-qwen3-ar-deep"
SPECULATORS = "tiny-dflash-speculators-trained-qwen3-ar-deep"


@pytest.mark.parametrize("name,change,match", [
    (DFLASH, lambda w: w.pop("layers.1.mlp.up_proj.weight"), "lacks layers.1.mlp.up_proj.weight"),
    (DFLASH, lambda w: w.update({"mask_embedding": torch.zeros(48)}), "also holds mask_embedding"),
    (DFLASH, lambda w: w.update({"fc.weight": torch.zeros(48, 96)}), r"fc.weight has shape \(48, 96\)"),
    (DFLASH, lambda w: w["norm.weight"].fill_(float("nan")), "NaN or infinite values in norm.weight"),
    (MARKOV, lambda w: w.pop("confidence_head.proj.bias"), "lacks confidence_head.proj.bias"),
    (SPECULATORS, lambda w: w["d2t"].add_(1), "d2t and t2d of a drafter name different ids"),
    (SPECULATORS, lambda w: w.pop("lm_head.weight"), "lacks lm_head.weight"),
])  # fmt: skip
def test_tensors_are_accounted_for(tmp_path, name, change, match):
    with pytest.raises(DllmError, match=match):
        as_drafter(edited(tmp_path, name, tensors=change))


@pytest.mark.parametrize("name,change,match", [
    (DFLASH, dict(num_target_layers=4), "another verifier: it reads 4 layers, the verifier has 6"),
    (DFLASH, dict(vocab_size=300), "a vocabulary of 300, the verifier has 255"),
    (DFLASH, dict(dflash_config=dict(mask_token_id=1, target_layer_ids=[1, 2, 5])), "may lie in -1 to 4"),
    (DFLASH, dict(dflash_config=dict(mask_token="<|MASK|>", target_layer_ids=[1, 2, 3])), "give the verifier's"),
    (DFLASH, dict(dflash_config=dict(mask_token_id=999, target_layer_ids=[1, 2, 3])), "999 is no id of the verifier's"),
])  # fmt: skip
def test_a_head_for_another_verifier_is_refused(tmp_path, name, change, match):
    head = edited(tmp_path, name, change=lambda raw: raw.update(change))
    with pytest.raises(DllmError, match=match) as error:
        dllm.speculate(verifier(), head, [5, 6, 7], max_new_tokens=4)
    assert "\n" not in str(error.value)


def test_a_narrower_verifier_is_refused():
    with pytest.raises(DllmError, match="reads states of 48, the verifier has"):
        dllm.speculate("tiny-ar", folder(DFLASH), [5, 6, 7], max_new_tokens=4)


@pytest.mark.parametrize("change,match", [
    (dict(speculators_model_type="eagle3"), "'dflash' is hosted, not 'eagle3'"),
    (dict(flexdraft_config={}), "FlexDraft drafts inside"),
    (dict(hidden_act="gelu"), "hidden_act 'silu', not 'gelu'"),
    (dict(block_size=None), "needs block_size"),
    (dict(layer_types=["linear_attention"] * 2), "2 full or sliding layers"),
    (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "rope_type 'dynamic'"),
    (dict(target_hidden_size=96), "narrower than its verifier"),
    (dict(dflash_config=dict(projector_type="dsprak")), "did you mean 'dspark'"),
    (dict(dflash_config=dict(target_layer_ids=[1, 2, 3])), "names its mask"),
])  # fmt: skip
def test_configurations_that_are_not_hosted_are_refused(change, match):
    raw = json.loads(Path(folder(DFLASH), "config.json").read_text())
    with pytest.raises(DllmError, match=match):
        read_head({**raw, **change})


# -- configurations


def config(name=DFLASH, told=None, **change):
    raw = json.loads(Path(folder(name), "config.json").read_text())
    raw["dflash_config"] = {**raw.get("dflash_config", {}), **(told or {})}
    return read_head({**raw, **change})


def test_tapped_layers_have_a_default():
    for depth, layers, taps in (
        (36, 5, (1, 9, 17, 25, 33)),
        (64, 5, (1, 16, 31, 46, 61)),
        (36, 1, (18,)),
        (2, 2, (1, -1)),
    ):
        kinds = ["full_attention"] * layers
        c = config(
            told=dict(target_layer_ids=None), num_target_layers=depth, num_hidden_layers=layers, layer_types=kinds
        )
        assert c.taps == taps


@NATIVE
def test_windows_follow_the_format():
    sliding = "tiny-dflash-sliding-qwen3-ar-deep"
    window, full = config(sliding).layers
    assert window == (7, False, True, False) and full == (None, False, False, False)
    assert config(sliding, is_causal=False).layers[0] == (7, False, False, True)
    assert all(sight.causal for sight in config(sliding, told=dict(causal=True)).layers)
    assert config(told=dict(use_swa=True, swa_window_size=9)).layers == ((9, False, True, False),) * 2
    assert read_head(native().config.to_dict()).layers[0] == (8, False, False, True)
    raw = json.loads(Path(folder(SPECULATORS), "config.json").read_text())
    raw["transformer_layer_config"] |= dict(
        layer_types=["sliding_attention"] * 2, sliding_window=7, use_sliding_window=True
    )
    assert read_head(raw).layers == ((8, True, True, False),) * 2
    assert read_head({**raw, "sliding_window_non_causal": True}).layers == ((8, True, False, False),) * 2


def test_early_names_of_tensors_are_known(tmp_path):
    def older(weights):
        for name in [n for n in weights if n.startswith("markov_head.")]:
            weights[f"logit_head.{name}"] = weights.pop(name)

    as_drafter(edited(tmp_path, MARKOV, tensors=older))
    old = {"hidden_norm.weight": "context_norm.weight", "norm.weight": "final_norm.weight"}

    def published(weights):
        for name, other in old.items():
            weights[other] = weights.pop(name)
        weights["fc.weight"] = torch.zeros(48, 144)

    as_drafter(edited(tmp_path, "tiny-dflare-qwen3-ar-deep", tensors=published))


def test_a_context_forgets_what_no_layer_sees_and_takes_a_text_back():
    context, n = Context(reach=100), 0

    def seen():
        context.catch_up(lambda states, pos: (states[:, 0, 0].view(1, 1, -1, 1), pos.view(1, 1, -1, 1)))
        text = text_of([context])
        assert text.keys.flatten().tolist() == text.values.flatten().tolist() == text.pos[0].tolist()
        return text.pos[0].tolist()

    def take(count, start):
        context.take(torch.arange(start, start + float(count)).view(-1, 1, 1), start)

    for i in range(40):
        take(37, n)
        n += 37
        if i % 7 == 3:  # drafts come now and then
            assert len(seen()) >= min(n, 100) and seen()[-1] == n - 1
    assert context.held < 200 and seen() == list(range(n - 100, n))
    assert context.stored[0].shape[2] < 400
    take(3, n - 5)
    assert seen()[-1] == n - 3
    take(4, n - 2)
    take(4, n + 2)
    take(1, n + 3)  # within what waits
    assert seen()[-5:] == list(range(n - 1, n + 4))
    take(250, n + 4)
    assert seen() == list(range(n + 154, n + 254)) and context.end == n + 254
    with pytest.raises(DllmError, match="were not handed over"):
        take(1, n + 900)
    take(2, 0)
    assert seen() == [0, 1] and context.first == 0
