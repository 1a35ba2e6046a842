"""The network of a head: a few pre-norm layers whose slots see the verifier's states as further keys.

Every layer projects the fused states of the text to keys and values with the very weights that it has for the block
(DFlare: with weights of their own, and a fusion of its own). They are computed once, as states arrive; the block's own
are never kept. Positions are those of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dllm.drafting.hidden.config import HeadConfig, Raw, Sight


class Text(NamedTuple):
    """What a draft sees of its texts, padded to one length."""

    keys: Tensor  # (layers, B, G, S, D)
    values: Tensor
    pos: Tensor  # (B, S) positions, -1 is padding
    padded: bool  # whether there is any


class Rotary:
    """Turns queries and keys by their positions. No module, so that its float32 frequencies are never cast."""

    def __init__(self, rope: Raw, head_dim: int) -> None:
        config = Qwen3Config(**{**rope, "head_dim": head_dim})
        given: Raw = dict(config.rope_parameters or {})
        powers = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        self.frequencies: Tensor = 1.0 / given["rope_theta"] ** powers  # (D / 2,)
        self.scaling = 1.0
        if given["rope_type"] != "default":
            self.frequencies, self.scaling = ROPE_INIT_FUNCTIONS[given["rope_type"]](config)

    def __call__(self, x: Tensor, pos: Tensor) -> Tensor:
        """x (B, heads, L, D) at positions (B, L)."""
        self.frequencies = self.frequencies.to(x.device)
        angle = pos[:, None, :, None].float() * self.frequencies  # (B, 1, L, D / 2)
        cos, sin = ((f(angle) * self.scaling).to(x.dtype) for f in (torch.cos, torch.sin))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Sees(NamedTuple):
    """What a layer's slots see beside themselves."""

    pos: Tensor  # (B, Q) of the slots
    rotary: Rotary
    keys: Tensor  # (B, G, S, D) of the text
    values: Tensor
    mask: Tensor | None  # (B, 1, Q, S + Q); None: everything


class RMSNorm(nn.Module):
    """In float32, as Qwen3's."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size)."""
        wide = x.float()
        normed: Tensor = self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return normed


class Attention(nn.Module):
    """Queries of the block over the text and the block."""

    def __init__(self, c: HeadConfig) -> None:
        super().__init__()
        self.head_dim, size, kv = c.head_dim, c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.q_proj, self.o_proj = nn.Linear(c.hidden_size, size, c.bias), nn.Linear(size, c.hidden_size, c.bias)
        self.k_proj, self.v_proj = (nn.Linear(c.hidden_size, kv, c.bias) for _ in range(2))
        self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.eps) for _ in range(2))
        if c.fused:
            self.k_proj_target, self.v_proj_target = (nn.Linear(c.hidden_size, kv, c.bias) for _ in range(2))
        self.fused = c.fused

    def keys(self, context: Tensor, pos: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, n, D) of the text's context (B, n, H)."""
        k, v = (self.k_proj_target, self.v_proj_target) if self.fused else (self.k_proj, self.v_proj)
        return rotary(self.k_norm(self._split(k(context))).transpose(1, 2), pos), self._split(v(context)).transpose(
            1, 2
        )

    def forward(self, x: Tensor, sees: Sees) -> Tensor:
        """x (B, Q, H) -> (B, Q, H)."""
        pos, rotary = sees.pos, sees.rotary
        q = rotary(self.q_norm(self._split(self.q_proj(x))).transpose(1, 2), pos)
        k = rotary(self.k_norm(self._split(self.k_proj(x))).transpose(1, 2), pos)
        v = self._split(self.v_proj(x)).transpose(1, 2)
        keys, values = torch.cat([sees.keys, k], 2), torch.cat([sees.values, v], 2)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=sees.mask, enable_gqa=True)
        mixed: Tensor = self.o_proj(rearrange(out, "b h q d -> b q (h d)"))
        return mixed

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b n h d", d=self.head_dim)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: HeadConfig) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(c.hidden_size, c.intermediate_size, False) for _ in range(2))
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Q, H)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Convolution(nn.Module):
    """DFlash 2: a short causal convolution along the block before and after a sublayer, its kernel the sum of a fixed
    one and one that the input asks for, by groups of channels."""

    def __init__(self, size: int, kernel: int, group: int) -> None:
        super().__init__()
        self.kernel, self.group = kernel, group
        self.base_kernel = nn.Parameter(torch.zeros(2, kernel, size))
        self.kernel_projection = nn.Linear(size, 2 * kernel * size // group, False)

    def around(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """The sublayer of x (B, Q, H) between the two convolutions."""
        asked = self.kernel_projection(x).unflatten(-1, (2, self.kernel, -1))  # (B, Q, 2, kernel, H / group)
        before, after = (self.base_kernel + asked.repeat_interleave(self.group, -1)).unbind(2)
        return self._mixed(sublayer(self._mixed(x, before)), after)

    def _mixed(self, y: Tensor, kernel: Tensor) -> Tensor:
        """y_t, y_{t-1}, ... weighted by kernel (B, Q, kernel, H); nothing is before slot 0."""
        past = [F.pad(y, (0, 0, o, 0))[:, : y.shape[1]] for o in range(self.kernel)]
        return (torch.stack(past, 2) * kernel).sum(2)


class Layer(nn.Module):
    """Attention and SwiGLU, pre-norm and residual."""

    def __init__(self, c: HeadConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(c.hidden_size, c.eps) for _ in range(2))
        self.convolved = c.convolution is not None
        if c.convolution is not None:
            self.attention_conv, self.mlp_conv = (Convolution(c.hidden_size, *c.convolution) for _ in range(2))

    def forward(self, x: Tensor, sees: Sees) -> Tensor:
        """x (B, Q, H)."""
        attention, mlp = partial(self.self_attn, sees=sees), self.mlp
        y = self.input_layernorm(x)
        x = x + (self.attention_conv.around(y, attention) if self.convolved else attention(y))
        y = self.post_attention_layernorm(x)
        out: Tensor = x + (self.mlp_conv.around(y, mlp) if self.convolved else mlp(y))
        return out


class Backbone(nn.Module):
    """All layers, from the verifier's states and the block's embeddings to the states of the slots."""

    def __init__(self, c: HeadConfig, rotary: Rotary) -> None:
        super().__init__()
        self.sights, self.rotary = c.layers, rotary
        self.layers = nn.ModuleList(Layer(c) for _ in c.layers)
        self.hidden_norm, self.norm = (RMSNorm(c.hidden_size, c.eps) for _ in range(2))
        if c.fused:
            self.layer_fusion_weights = nn.Parameter(torch.zeros(len(c.layers), len(c.taps)))
        else:
            self.fc = nn.Linear(len(c.taps) * c.hidden_size, c.hidden_size, False)
        self.fused = c.fused

    def keys(self, states: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (layers, G, n, D) of states (n, T, H) at positions (n,)."""
        if self.fused:
            mixed = torch.einsum("lt,nth->lnh", self.layer_fusion_weights.softmax(-1), states)
            contexts = list(self.hidden_norm(mixed)[:, None])
        else:
            contexts = [self.hidden_norm(self.fc(states.flatten(1)))[None]] * len(self.layers)
        attentions = [layer.self_attn for layer in self.layers if isinstance(layer, Layer)]
        pairs = zip(attentions, contexts, strict=True)
        made = [attention.keys(context, pos[None], self.rotary) for attention, context in pairs]
        keys, values = zip(*made, strict=True)
        return torch.cat(keys), torch.cat(values)

    def forward(self, x: Tensor, pos: Tensor, text: Text) -> Tensor:
        """States (B, Q, H) behind the last norm, of the block's embeddings (B, Q, H) at positions (B, Q)."""
        masks = {sight: seen(sight, pos, text) for sight in dict.fromkeys(self.sights)}
        for i, (layer, sight) in enumerate(zip(self.layers, self.sights, strict=True)):
            x = layer(x, Sees(pos, self.rotary, text.keys[i], text.values[i], masks[sight]))
        out: Tensor = self.norm(x)
        return out


def seen(sight: Sight, pos: Tensor, text: Text) -> Tensor | None:
    """(B, 1, Q, S + Q) what the slots at positions (B, Q) see of the text and of the block; None: everything."""
    if sight.reach is None and not sight.causal and not text.padded:
        return None
    old = (text.pos >= 0)[:, None]  # (B, 1, S)
    p = pos[:, :, None]
    if sight.reach is not None:
        old = old & ((p[:, :1] if sight.anchored else p) - text.pos[:, None] < sight.reach)
    away = p - pos[:, None]  # (B, Q, Q)
    own = away >= 0 if sight.causal else torch.ones_like(away, dtype=torch.bool)
    if sight.near and sight.reach is not None:
        own = own & (away.abs() < sight.reach)
    return torch.cat([old.expand(-1, pos.shape[1], -1), own], 2)[:, None]
