"""What the config.json of a drafter that reads hidden states says. The formats differ in keys, in which slots propose,
and in what a slot of a sliding layer sees; the network is one.

| format | recognised by |
|---|---|
| DFlash (z-lab, SpecForge) | `dflash_config` |
| JetSpec | `dflash_config.causal_head` |
| DFlash 2 | `dflash_config.conv_kernel_size` |
| DFlare | "DFlare" in the architecture, or `dflare_config` |
| Domino, DSpark (SpecForge) | `dflash_config.projector_type` |
| DSpark (DeepSpec) | architecture `Qwen3DSparkModel` |
| speculators | `speculators_model_type` |
| transformers' own class | `model_type: muse_glimmer_assistant` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from dllm.errors import DllmError, unknown

Raw: TypeAlias = Mapping[str, Any]  # of a config.json
NATIVE = "muse_glimmer_assistant"
OWN_VOCABULARY = "Qwen3DSparkModel"
ARCHITECTURES = ("DFlash", "DSpark", "DFlare", "Domino")
MARKOV = ("vanilla", "gated", "rnn")
PLAIN_ROPE = ("default", "linear", "llama3", "yarn")  # turned by the position alone


class Sight(NamedTuple):
    """What a slot of a layer sees. Positions p of the slot, q of a key, a of the anchor."""

    reach: int | None = None  # of the text: p - q < reach; None: all of it
    anchored: bool = False  # the same for all slots: a - q < reach
    causal: bool = False  # of the block: slots up to itself, else all
    near: bool = False  # of the block: only slots less than `reach` away


class Order(NamedTuple):
    """The part of a head that makes a slot's logits depend on the tokens before it."""

    kind: str  # "vanilla", "gated", "rnn", "selector", "domino"
    rank: int
    top: int = 0  # candidates of a slot, of a selector
    state: int = 0  # of the recurrent state, of Domino
    skip: int = 0  # first slots that do without, of Domino
    confidence: str = ""  # of each drafted token: by "hidden" or "hidden+token"; "": not told


@dataclass(frozen=True)
class HeadConfig:
    """A head of a few layers over the states of a verifier. `block` is the anchor and its masks."""

    form: str
    rope: Raw  # keys of transformers' configurations
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    bias: bool
    layers: tuple[Sight, ...]
    taps: tuple[int, ...]
    depth: int | None  # layers of the verifier, where the file says
    vocab: int | None  # of the verifier, likewise
    block: int
    mask: int | str  # the mask token's id, or what it is called in the verifier's vocabulary
    slots: tuple[int, int]  # first slot that proposes, and the one behind the last
    own: int | None = None  # ids of a head of its own, beside an embedding of its own; None: both are the verifier's
    rows: int | None = None  # of the verifier's ids as many as are ever drafted; None: all
    slim: int | None = None  # width inside of a head of its own, of two factors (SlimSpec); None: the verifier's rows
    fused: bool = False  # each layer mixes the taps by itself and has projections for the text
    convolution: tuple[int, int] | None = None  # kernel, channels of a group
    order: Order | None = None
    scale: float = 1.0  # of the block's embeddings
    multiplier: float = 1.0  # of the logits, before the cap
    cap: float = 0.0  # cap tanh(logit / cap); 0: none

    @property
    def reach(self) -> int | None:
        """How much of the text is ever seen; None: all of it."""
        far = [sight.reach for sight in self.layers]
        return None if None in far else max(n for n in far if n is not None)

    @property
    def columns(self) -> int | None:
        """Logits of a head of its own; None: the verifier's head gives them."""
        return self.own if self.slim is None else self.rows or self.vocab

    @property
    def conditions(self) -> bool:
        """Whether a path may stand in place of the first masks: where no slot sees those behind it."""
        return self.order is None and all(sight.causal for sight in self.layers)


def is_head(raw: Raw) -> bool:
    """Whether a config.json is that of a drafter over hidden states."""
    keys = ("dflash_config", "dflare_config", "flexdraft_config", "speculators_model_type")
    known = any(kind in _architecture(raw) for kind in ARCHITECTURES)
    return known or raw.get("model_type") == NATIVE or any(key in raw for key in keys)


def read_head(raw: Raw) -> HeadConfig:
    """The configuration of a head. Errors: DllmError for formats and settings that are not hosted, and absent keys."""
    if "flexdraft_config" in raw:
        raise DllmError("FlexDraft drafts inside the verifier's own layers, which a verifier here cannot run piecewise")
    if "speculators_model_type" in raw:
        return _speculators(raw)
    if raw.get("model_type") == NATIVE:
        return _native(raw)
    return _dflash(raw)


def _architecture(raw: Raw) -> str:
    names = raw.get("architectures") or [""]
    return str(names[0])


def _number(raw: Raw, key: str, low: int = 1) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise DllmError(f"config.json of a drafter needs {key}, a whole number of at least {low}; it has {value!r}")
    return value


def _sizes(raw: Raw) -> dict[str, Any]:
    """What all formats say in the same words. Errors: what no format has."""
    if raw.get("hidden_act", "silu") != "silu":
        raise DllmError(f"drafters over hidden states have hidden_act 'silu', not {raw['hidden_act']!r}")
    hidden, heads = _number(raw, "hidden_size"), _number(raw, "num_attention_heads")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in PLAIN_ROPE:
        raise DllmError(f"rope_type {kind!r} of a drafter is not hosted: {', '.join(PLAIN_ROPE)}")
    rotary = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings", "head_dim")
    return dict(
        rope={key: raw[key] for key in rotary if raw.get(key) is not None},
        hidden_size=hidden,
        intermediate_size=_number(raw, "intermediate_size"),
        heads=heads,
        kv_heads=_number(raw, "num_key_value_heads"),
        head_dim=raw.get("head_dim") or hidden // heads,
        eps=float(raw.get("rms_norm_eps", 1e-6)),
        bias=bool(raw.get("attention_bias", False)),
        vocab=raw.get("vocab_size"),
    )


def _windows(raw: Raw) -> list[int | None]:
    """The window of each layer, None where it sees all. Errors: kinds that are not known."""
    n = _number(raw, "num_hidden_layers")
    kinds = list(raw.get("layer_types") or ["full_attention"] * n)
    if len(kinds) != n or set(kinds) - {"full_attention", "sliding_attention"}:
        raise DllmError(f"layer_types of a drafter names {n} full or sliding layers, not {kinds}")
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _taps(ids: object, n: int, depth: int | None) -> tuple[int, ...]:
    """Tapped layers; without a list those that the public codes take for n draft layers."""
    if ids is None and depth is not None:
        ids = [depth // 2] if n == 1 else [round(1 + i * (depth - 4) / (n - 1)) for i in range(n)]
    if not isinstance(ids, list | tuple) or not ids or not all(isinstance(i, int) for i in ids):
        raise DllmError("config.json of a drafter names the verifier's layers that it reads: target_layer_ids")
    return tuple(ids)


def _native(raw: Raw) -> HeadConfig:
    """transformers' class: slots of a sliding layer see both ways, at most the window away."""
    windows, block = _windows(raw), _number(raw, "block_size", 2)
    taps = _taps(raw.get("target_layer_ids"), len(windows), None)
    sights = tuple(Sight() if w is None else Sight(w + 1, near=True) for w in windows)
    mask = _number(raw, "mask_token_id", 0)
    return HeadConfig(
        "DFlash", layers=sights, taps=taps, depth=None, block=block, mask=mask, slots=(1, block), **_sizes(raw)
    )


def _speculators(raw: Raw) -> HeadConfig:
    """speculators: its indices are those of `hidden_states`, one more than layers; a head of its own."""
    kind, inner = raw["speculators_model_type"], raw.get("transformer_layer_config")
    if kind != "dflash" or not isinstance(inner, Mapping):
        raise DllmError(f"of speculators' formats 'dflash' is hosted, not {kind!r}")
    sizes, windows, block = _sizes(inner), _windows(inner), _number(raw, "block_size", 2)
    if raw.get("target_hidden_size") not in (None, sizes["hidden_size"]):
        raise DllmError(
            "a drafter narrower than its verifier is not hosted: target_hidden_size differs from hidden_size"
        )
    ids = raw.get("aux_hidden_state_layer_ids")
    taps = _taps(None if ids is None else [i - 1 for i in ids], len(windows), None)
    causal = not raw.get("sliding_window_non_causal", False)
    sights = tuple(Sight() if w is None else Sight(w + 1, anchored=True, causal=causal) for w in windows)
    shifted = bool(raw.get("sample_from_anchor", False))
    return HeadConfig(
        "DFlash (speculators)", layers=sights, taps=taps, depth=None, block=block,
        mask=_number(raw, "mask_token_id", 0), slots=(0, block) if shifted else (1, block),
        own=raw.get("draft_vocab_size") or sizes["vocab"], **sizes,
    )  # fmt: skip


def _dflash(raw: Raw) -> HeadConfig:
    """z-lab's keys and those of all who followed: SpecForge, JetSpec, AngelSlim, DeepSpec."""
    architecture = _architecture(raw)
    told: dict[str, Any] = {**raw, **(raw.get("dflare_config") or {}), **(raw.get("dflash_config") or {})}
    if told.get("attention_sink_bias"):
        raise DllmError("a drafter with attention_sink_bias is not hosted")
    if told.get("target_hidden_size") not in (None, raw.get("hidden_size")):
        raise DllmError(
            "a drafter narrower than its verifier is not hosted: target_hidden_size differs from hidden_size"
        )
    block, depth = _number(told, "block_size", 2), raw.get("num_target_layers")
    sights = _sights(raw, told)
    projector = told.get("projector_type") or ("dspark" if architecture == OWN_VOCABULARY else "dflash")
    if projector not in ("dflash", "dspark", "domino"):
        raise unknown("projector_type", str(projector), ("dflash", "dspark", "domino"))
    shifted = projector == "dspark" or bool(told.get("shift_label") or told.get("draft_shift"))
    end = block if projector == "dspark" or not shifted else block - 1
    form, order, convolution = "JetSpec" if told.get("causal_head") else "DFlash", None, None
    if fused := "DFlare" in architecture or "dflare_config" in raw:
        form = "DFlare"
    if projector == "dspark":
        form, order = "DSpark", _markov(told)
    elif projector == "domino":
        if not shifted:
            raise DllmError("Domino is hosted with shift_label: true, as its published heads are")
        state, skip = _number(told, "gru_hidden_dim"), _number(told, "pure_draft_prefix_len", 0)
        form, order = "Domino", Order("domino", _number(told, "emb_dim"), state=state, skip=skip)
    elif told.get("conv_kernel_size"):
        form, convolution = "DFlash 2", (_number(told, "conv_kernel_size"), _number(told, "conv_group_size"))
        order = Order("selector", _number(told, "selector_rank"), top=_number(told, "selector_top_k"))
    mask = told.get("mask_token") if told.get("mask_token_id") is None else told["mask_token_id"]
    if not isinstance(mask, int | str):
        raise DllmError("config.json of a drafter names its mask: mask_token_id")
    sizes = _sizes(raw)
    rows = None if told.get("draft_vocab_size") is None else _number(told, "draft_vocab_size")
    if rows is not None and (architecture == OWN_VOCABULARY or (order is not None and order.kind not in MARKOV)):
        raise DllmError("draft_vocab_size is hosted for heads that have no head of their own, with DSpark's orders")
    slim = None if told.get("head_rank") is None else _number(told, "head_rank")
    if slim is not None and (architecture == OWN_VOCABULARY or slim >= sizes["hidden_size"]):
        raise DllmError("head_rank is hosted for heads without a vocabulary of their own, and below their hidden_size")
    return HeadConfig(
        form, layers=sights, taps=_taps(told.get("target_layer_ids"), len(sights), depth), depth=depth, block=block,
        mask=mask, slots=(0 if shifted else 1, end), own=sizes["vocab"] if architecture == OWN_VOCABULARY else None,
        rows=rows, slim=slim, fused=fused, convolution=convolution, order=order,
        scale=float(told.get("input_embedding_scale") or 1.0), multiplier=float(told.get("output_multiplier") or 1.0),
        cap=float(told.get("final_logit_softcapping") or 0.0),
        **sizes,
    )  # fmt: skip


def _sights(raw: Raw, told: Raw) -> tuple[Sight, ...]:
    """As vLLM and SpecForge read these keys: a key that says causal or not counts for all layers, else sliding layers
    are causal and full ones are not."""
    windows = _windows(raw)
    if told.get("use_swa") and not any(windows):
        windows = [told.get("swa_window_size") or raw.get("sliding_window")] * len(windows)
    said = raw.get("is_causal", told.get("causal"))
    said = True if told.get("causal_head") else said
    sights = []
    for window in windows:
        causal = bool(window) if said is None else bool(said)
        sights.append(Sight(window, causal=causal, near=window is not None and not causal))
    return tuple(sights)


def _markov(told: Raw) -> Order:
    kind = str(told.get("markov_head_type", "vanilla"))
    if kind not in MARKOV:
        raise unknown("markov_head_type", kind, MARKOV)
    seen = "hidden+token" if told.get("confidence_head_with_markov") else "hidden"
    return Order(kind, _number(told, "markov_rank"), confidence=seen if told.get("enable_confidence_head") else "")
