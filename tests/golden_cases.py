"""The golden decodes: which arguments of ours reproduce each public code's parameters, and how a case is compared.

The data and its provenance are described in `golden/README.md`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import dllm
from dllm.models.hub import load

GOLDEN = Path(__file__).parent / "golden"


@cache
def model(checkpoint: str, dtype: str = "float64", device: str = "cpu", **settled: Any) -> Any:
    return load(GOLDEN / "checkpoints" / checkpoint, dtype=dtype, device=device, **settled)


def cases(*methods: str) -> list[tuple[str, str]]:
    """(checkpoint, method) for every golden file of these methods."""
    files = sorted((GOLDEN / "given").glob("*/*.json"))
    return [(f.parent.name, f.stem) for f in files if f.stem in methods]


@cache
def read(checkpoint: str, method: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "given" / checkpoint / f"{method}.json").read_text())["cases"]


def _blocks(p: dict[str, Any]) -> dict[str, Any]:
    return {"max_new_tokens": p["gen_length"], "block_length": p["block_length"], "early_stop": False}


def _fastdllm(p: dict[str, Any], cache_: str) -> dict[str, Any]:
    sampler = "confidence" if p["threshold"] is None else {"name": "threshold", "tau": p["threshold"]}
    return {**_blocks(p), "steps": p["steps"], "sampler": sampler, "cache": cache_}


def _adablock(p: dict[str, Any], cache_: str) -> dict[str, Any]:
    return {
        "max_new_tokens": p["gen_length"],
        "block_length": p["init_block_length"],
        "early_stop": False,
        "cache": cache_,
        "sampler": {
            "name": "adablock",
            "delimiters": p["delimiter_ids"],
            "tau_delimiter": p["delimiter_threshold"],
            "tau": p["threshold"],
        },
    }


def _dream(p: dict[str, Any]) -> dict[str, Any]:
    return {
        "sampler": {"name": "dream", "alg": p["alg"], "alg_temp": p["alg_temp"] or 0, "eps": p["eps"]},
        "max_new_tokens": p["max_new_tokens"],
        "steps": p["steps"],
        "temperature": p["temperature"],
        "top_p": p["top_p"],
        "top_k": p["top_k"],
        "early_stop": False,
    }


def _fastdllm_dream(p: dict[str, Any]) -> dict[str, Any]:
    return {
        "sampler": {"name": "threshold", "preset": "fastdllm_dream", "tau": p["threshold"]},
        "max_new_tokens": p["max_new_tokens"],
        "block_length": p["block_length"],
        "cache": "dual" if p["dual_cache"] else "prefix",
        "early_stop": False,
    }


def _dsb(p: dict[str, Any]) -> dict[str, Any]:
    most = p["max_block_length"]
    return {"name": "dsb", "tau": p["threshold"], "max_length": None if most < 0 else most}


# method -> parameters of the reference -> arguments of `dllm.generate`
ARGUMENTS: dict[str, Any] = {
    "llada_generate": lambda p: {
        **_blocks(p),
        "steps": p["steps"],
        "sampler": {"low_confidence": "confidence", "random": "random"}[p["remasking"]],
        "cfg_scale": p["cfg_scale"],
        "temperature": p["temperature"],
    },
    "fastdllm_plain_quota": lambda p: _fastdllm(p, "none"),
    "fastdllm_plain_threshold": lambda p: _fastdllm(p, "none"),
    "fastdllm_prefix_quota": lambda p: _fastdllm(p, "prefix"),
    "fastdllm_prefix_threshold": lambda p: _fastdllm(p, "prefix"),
    "fastdllm_dual_quota": lambda p: _fastdllm(p, "dual"),
    "fastdllm_dual_threshold": lambda p: _fastdllm(p, "dual"),
    "factor_paper": lambda p: {**_blocks(p), "sampler": {"name": "factor", "f": p["factor"]}},
    "factor_compat": lambda p: {**_blocks(p), "sampler": {"name": "factor", "preset": "compat", "f": p["factor"]}},
    "eb_sampler": lambda p: {
        "max_new_tokens": p["gen_length"],
        "block_length": p["gen_length"],
        "early_stop": False,
        "cfg_scale": p["cfg_scale"],
        "sampler": {"name": "eb", "gamma": p["gamma"]},
    },
    "dinfer_threshold": lambda p: {
        **_blocks(p),
        "sampler": {"name": "threshold", "preset": "dinfer", "tau": p["threshold"]},
    },
    "dream_entropy": _dream,
    "dream_maskgit_plus": _dream,
    "dream_topk_margin": _dream,
    "fastdllm_dream_dual": _fastdllm_dream,
    "fastdllm_dream_prefix": _fastdllm_dream,
    "localleap": lambda p: {
        **_blocks(p),
        "sampler": {"name": "localleap", "kappa": p["threshold"], "tau": p["relaxed_threshold"], "radius": p["radius"]},
    },
    "dinfer_credit": lambda p: {
        **_blocks(p),
        "sampler": {
            "name": "credit",
            "preset": "dinfer",
            "alpha": p["credit_alpha"],
            "beta": p["decay_beta"],
            "gamma": p["boost_gamma"],
            "tau": p["threshold"],
        },
    },
    "prophet": lambda p: {
        "infill": True,
        "max_new_tokens": 0,
        "block_length": p["block_length"],
        "steps": p["steps"],
        "early_stop": False,
        "sampler": {
            "name": "prophet",
            "preset": "released",
            **dict(zip(("high", "mid", "low"), p["early_exit_thresholds"].values(), strict=True)),
        },
    },
    "adablock_none": lambda p: _adablock(p, "none"),
    "adablock_prefix": lambda p: _adablock(p, "prefix"),
    "adablock_dual": lambda p: _adablock(p, "dual"),
}
ARGUMENTS |= {
    "klass": lambda p: {
        **_blocks(p),
        "steps": p["steps"],
        "sampler": {
            "name": "klass",
            "history": "generation",
            "kappa": p["conf_threshold"],
            "epsilon": p["kl_threshold"],
            "n": p["kl_history_length"],
        },
    },
    "dinfer_hierarchy": lambda p: {
        **_blocks(p),
        "sampler": {"name": "hierarchy", "tau_high": p["threshold"], "tau_low": p["low_threshold"]},
    },
    "dsb_none": lambda p: {**_blocks(p), "sampler": _dsb(p)},
    "dsb_cache": lambda p: {**_blocks(p), "sampler": _dsb(p), "cache": {"name": "dual", "left": p["prefix_window"]}},
    "wino": lambda p: {
        **_blocks(p),
        "sampler": {"name": "wino", "tau_draft": p["threshold"], "tau_verify": p["threshold_back"]},
    },
    "saber": lambda p: {**_blocks(p), "sampler": {"name": "saber", "n": p["n"]}},
    "ccd": lambda p: {
        "sampler": {"name": "ccd", "seek": p["seek_mode"], "expand": p["expand_ratio"]},
        "max_new_tokens": p["max_new_tokens"],
        "steps": p["steps"],
        "temperature": p["temperature"],
        "top_p": p["top_p"],
        "top_k": p["top_k"],
        "early_stop": False,
    },
    "eoser": lambda p: {
        **_blocks(p),
        "steps": p["steps"],
        "eos": p["eos_token_id"],
        "sampler": {"name": "eoser", "gamma_min": p["eos_min_gamma"], "gamma_max": p["eos_max_gamma"], "whole": False},
    },
    "ass": lambda p: {
        "max_new_tokens": p["gen_length"],
        "steps": p["steps"],
        "eos": p["eos_token_id"],
        "early_stop": False,
        "sampler": {"name": "ass", "blocks": p["block_num"]},
    },
    "eoser_ass": lambda p: {
        **ARGUMENTS["ass"](p),
        "sampler": [
            {"name": "eoser", "gamma_min": p["eos_min_gamma"], "gamma_max": p["eos_max_gamma"]},
            {"name": "ass", "blocks": p["block_num"]},
        ],
    },
    "daedal": lambda p: {
        "max_new_tokens": p["max_gen_length"],
        "block_length": p["block_length"],
        "eos": p["eos_token_id"],
        "early_stop": False,
        "sampler": {
            "name": "daedal",
            "initial": p["initial_gen_length"],
            "tau_high": p["high_conf_threshold"],
            "tau_low": p["low_conf_threshold"],
            "factor": p["expansion_factor"],
            "tau_eos": p["eos_confidence_threshold"],
            "tau_expand": p["expand_eos_confidence_threshold"],
            "tail": p["eos_check_tokens"],
        },
    },
}
ARGUMENTS["llada_generate_cfg"] = ARGUMENTS["llada_generate"]


# -- attention-reading schedulers ------------------------------------------------------------------------------------


def _reading(p: dict[str, Any], sampler: dict[str, Any]) -> dict[str, Any]:
    """Whole blocks without a cache; the codes for LLaDA and for Dream call the same things differently."""
    p = {"gen_length": p.get("max_new_tokens"), **p}
    layers = {"layers": p["attention_layers"]} if "attention_layers" in p else {}
    return {**_blocks(p), "cache": "none", "sampler": {**layers, **sampler}}


def _dapd(p: dict[str, Any], sampler: dict[str, Any]) -> dict[str, Any]:
    taus = {"tau_min": p["tau_min"], "tau_max": p["tau_max"], "share": p["layer_ratio"]}
    return _reading(p, {"name": "dapd", **taus, **sampler})


ARGUMENTS |= {
    "clad": lambda p: _reading(
        p, {"name": "clad", "preset": "dream_compat" if "alg" in p else "published", "tau": p["threshold"]}
    ),
    "dawn": lambda p: _reading(
        p,
        {
            "name": "dawn",
            "anchors": "current",
            "tau_low": p["conf_threshold"] if "alg" in p else p["tau_low"],
            **{name: p[name] for name in ("tau_sink", "tau_edge", "tau_induce")},
        },
    ),
    "dapd_staged": lambda p: _dapd(p, {"variant": "staged"}),
    "dapd_direct": lambda p: _dapd(p, {"variant": "direct", "sure": p["direct_confidence"]}),
}


# -- codes that leave masks out ---------------------------------------------------------------------------------------
# They end when a finished block holds an EOS, and fill the rest with it. `whole` compares a decode that goes on.


def _pruned(p: dict[str, Any], cache_: dict[str, Any], **sampler: Any) -> dict[str, Any]:
    cached = "dream" if "alg" in p and cache_["name"] != "none" else "llada"
    if p["threshold"] is None:
        sampler = {"name": "confidence"}
    else:
        sampler = {"name": "threshold", "tau": p["threshold"], "lone_opening": cached == "dream", **sampler}
    new = p["max_new_tokens"] if "alg" in p else p["gen_length"]
    call = {"max_new_tokens": new, "block_length": p["block_length"], "steps": p["steps"], "early_stop": False}
    return {**call, "sampler": sampler, "cache": cache_}


def _dpad(name: str) -> Any:
    return lambda p: _pruned(p, {"name": name, "offsets": p["suffix_offsets"]})


PRUNED: dict[str, Any] = {
    "dpad_none": _dpad("none"),
    "dpad_prefix": _dpad("prefix"),
    "dpad_dual": _dpad("dual"),
    "streaming_prefix": lambda p: _pruned(
        p, {"name": "prefix", "near": p["window_size"], "tail": 1}, decay=p["confidence_alpha"]
    ),
}
ARGUMENTS |= PRUNED


# -- block-causal models ---------------------------------------------------------------------------------------------
# The codes decode whole blocks, so the number of new tokens depends on the prompt. Where they run a forward of its own
# to prefill the prompt or to store a finished block, ours folds that work into the next block's first forward: our
# forwards are theirs without the prefill and store forwards that wrote nothing. Rows of a batch share max_new_tokens: a
# row that goes on past its reference is compared up to there.


def _sdar(p: dict[str, Any]) -> dict[str, Any]:
    tau = {"tau": p["confidence_threshold"]} if "confidence_threshold" in p else {}
    sampler = {"name": "sdar", "preset": p["remasking_strategy"], "steps": p["denoising_steps"], **tau}
    return {"sampler": sampler, "block_length": p["block_length"], "early_stop": False}


def _llada2(p: dict[str, Any]) -> dict[str, Any]:
    steps = min(p["steps"], p["gen_length"] // p["minimal_topk"])
    sampler = {"name": "sdar", "tau": p["threshold"], "steps": steps, "whole_block": not p["eos_early_stop"]}
    return {"sampler": sampler, "block_length": p["block_length"], "eos": p["eos_id"]}


def _fast_dllm_v2(p: dict[str, Any]) -> dict[str, Any]:
    sampler = {"name": "fast_dllm_v2", "tau": p["threshold"], "sub": p["small_block_size"]}
    cache_ = "block_dual" if p["use_block_cache"] else "block"
    return {"sampler": sampler, "block_length": p["block_size"], "eos": p["stop_token"], "cache": cache_}


BLOCKWISE = {
    "sdar_static": _sdar,
    "sdar_sequential": _sdar,
    "sdar_dynamic": _sdar,
    "sdar_dynamic_partial_block": _sdar,
    "llada2": _llada2,
    "fast_dllm_v2": _fast_dllm_v2,
    "fast_dllm_v2_block_cache": _fast_dllm_v2,
}
ARGUMENTS |= BLOCKWISE


def new_tokens(method: str, case: dict[str, Any]) -> int:
    """Columns that the reference decodes behind this prompt."""
    p, given = case["params"], len(case["prompt_ids"])
    if method.startswith("fast_dllm_v2"):  # whole blocks, and the token that the last store forward yields
        return (given // p["block_size"] + p["max_new_tokens"] // p["block_size"]) * p["block_size"] + 1 - given
    return -(-(given + p["gen_length"]) // p["block_length"]) * p["block_length"] - given


def prompt(case: dict[str, Any]) -> list[int]:
    """The ids of the prompt; with constraints the whole canvas, where they are written already."""
    p, ids = case["params"], case["prompt_ids"]
    if not p.get("constraints"):
        return ids
    answer = [p["mask_id"]] * p["gen_length"]
    for column, token in p["constraints"].items():
        answer[int(column)] = token
    return ids + answer


def decode(
    checkpoint: str, method: str, group: list[dict[str, Any]], batch_size: int = 1, device: str = "cpu", **more: Any
) -> list[Any]:
    """Our decodes of cases that share their parameters, in one call."""
    arguments = {**ARGUMENTS[method](group[0]["params"]), **more}
    prompts = [prompt(case) for case in group]
    settled: dict[str, Any] = {"device": device}
    if method in BLOCKWISE:  # what the codes take as arguments is a property of the model here
        settled |= {"block_size": arguments["block_length"], "mask_id": group[0]["params"]["mask_id"]}
        arguments["max_new_tokens"] = max(new_tokens(method, case) for case in group)
    return dllm.generate(model(checkpoint, **settled), prompts, **arguments, batch_size=batch_size, trace=True)


def mismatch(case: dict[str, Any], out: Any) -> str | None:
    """What differs between a golden case and our output: ids, forwards or commits. None where all agree."""
    method = case["id"].partition("/")[0]
    if method in BLOCKWISE:
        return mismatch_of_blocks(case, out)
    if method in PRUNED:
        ours, theirs = ([sorted(pairs) for pairs in x] for x in (out.trace.commits, case["commits"]))
        return None if ours[: len(theirs)] == theirs else f"commits {ours} != {theirs}"
    if out.sequences != case["output_ids"]:
        return f"ids {out.sequences} != {case['output_ids']}"
    if out.nfe != case["nfe"] - case.get("extra", {}).get("idle_forwards", 0):
        return f"nfe {out.nfe} != {case['nfe']}"
    if "commits" in case:
        ours = [sorted(pairs) for pairs in out.trace.commits]
        theirs = [sorted(pairs) for pairs in case["commits"]]
        idle = case.get("extra", {}).get("idle_forwards", 0)
        if idle:
            ours, theirs = [p for p in ours if p], [p for p in theirs if p]
        if ours != theirs:
            return f"commits {ours} != {theirs}"
    if "canvases" in case and (ours := canvases(out.trace)) != case["canvases"][1:]:
        return f"canvases {ours} != {case['canvases'][1:]}"
    return None


def canvases(trace: Any) -> list[list[int]]:
    """The generated part after every forward, replayed from the trace; lengths may change."""
    start, ids, after = len(trace.prompt), {}, []
    for pairs, length in zip(trace.commits, trace.lengths, strict=True):
        ids |= dict(pairs)
        after.append([ids.get(column, trace.mask_id) for column in range(start, length)])
    return after


def mismatch_of_blocks(case: dict[str, Any], out: Any) -> str | None:
    """The same for the block-causal codes: see BLOCKWISE."""
    theirs = [sorted(pairs) for pairs in case["commits"]]
    kinds = case["extra"].get("forward_kinds", ["denoise"] * len(theirs))
    theirs = [pairs for pairs, kind in zip(theirs, kinds, strict=True) if pairs or kind == "denoise"]
    ours = [sorted(pairs) for pairs in out.trace.commits]
    if ours[: len(theirs)] != theirs:
        return f"commits {ours} != {theirs}"
    ends = len(case["prompt_ids"]) + new_tokens(case["id"].partition("/")[0], case)
    if len(out.trace.final) == ends and out.nfe != len(theirs):
        return f"nfe {out.nfe} != {len(theirs)} ({case['nfe']} with prefill and store forwards)"
    if out.trace.final[: len(case["output_ids"])] != case["output_ids"]:
        return f"ids {out.trace.final} != {case['output_ids']}"
    return None


def groups(checkpoint: str, method: str) -> list[list[dict[str, Any]]]:
    """The cases of a file, grouped by equal parameters (prompts differ: a ragged batch)."""
    by_params: dict[str, list[dict[str, Any]]] = {}
    for case in read(checkpoint, method):
        by_params.setdefault(json.dumps(case["params"], sort_keys=True), []).append(case)
    return list(by_params.values())
