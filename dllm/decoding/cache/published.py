"""Published settings of caches that cut the masked tail, as presets: what stays of it by model, task and length.

All of them are for blocks of 32. Names are METHOD_MODEL_TASK, with the number of new tokens where there are several.
"""

from __future__ import annotations

from collections.abc import Mapping

Setting = Mapping[str, object]

# Streaming-dLLM, table 11 and scripts: the near window at 256 and at 512 new tokens. Its thresholds decay with alpha,
# which is `decay` of the sampler `threshold`: docs/caches.md has the pairs.
_STREAMING = {
    "dream": {"humaneval": (192, 128), "gsm8k": (32, 32), "mbpp": (192, 192), "math": (32, 32)},
    "llada": {"humaneval": (192, 256), "gsm8k": (96, 96), "mbpp": (32, 32), "math": (128, 256)},
    "llada15": {"humaneval": (96, 96), "gsm8k": (96, 128), "mbpp": (96, 96), "math": (96, 192)},
}

# DPad, scripts: k, a and the window.
_DPAD = {
    "llada_gsm8k": (4, 2.0, 256),
    "llada_math": (4, 2.0, 256),
    "llada_humaneval": (3, 2.3, 512),
    "llada_mbpp": (3, 2.3, 128),
    "llada15_gsm8k": (3, 1.6, 256),
    "llada15_math": (3, 1.6, 256),
    "llada15_humaneval": (3, 1.6, 128),
    "llada15_humaneval_threshold": (3, 2.3, 128),
    "llada15_mbpp": (3, 1.6, 512),
    "llada15_gsm8k_1024": (3, 1.6, 256),
    "dream_gsm8k": (4, 1.6, 256),
    "dream_math": (4, 1.6, 128),
    "dream_humaneval": (3, 2.3, 128),
    "dream_mbpp": (3, 1.6, 128),
    "dream_gsm8k_1024": (3, 2.3, 128),
    "dream_gsm8k_2048": (3, 2.3, 128),
}


def _drawn(k: float, a: float, window: int) -> Setting:
    return {"near": window, "tail": 0, "gaussian": (float(k), a)}


SETTINGS: Mapping[str, Setting] = {
    "streaming": {"near": 96, "tail": 1},  # the paper's typical window
    "dpad": _drawn(4, 2.0, 256),  # the command line's defaults
    **{
        f"streaming_{model}_{task}_{length}": {"near": near, "tail": 1}
        for model, tasks in _STREAMING.items()
        for task, windows in tasks.items()
        for length, near in zip((256, 512), windows, strict=True)
    },
    **{f"dpad_{name}": _drawn(*setting) for name, setting in _DPAD.items()},
}
