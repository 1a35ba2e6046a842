"""Tiny verifiers and scripted drafters for the tests of dllm.drafting."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dllm.drafting.config import SpecConfig
from dllm.drafting.drafters import Drafter
from dllm.drafting.lattice import Lattice
from dllm.drafting.loop import rounds
from dllm.drafting.proposal import EMPTY, chain
from dllm.drafting.request import Request
from dllm.drafting.verifier import Session

VOCAB = 40
SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
KINDS = ("llama", "qwen3", "mistral-swa", "gemma3-mixed")


def tiny_verifier(kind="llama", attn="sdpa", dtype=torch.float64, seed=0):
    """A random causal LM whose greedy text is varied (large embeddings make the distributions peaked)."""
    torch.manual_seed(seed + (kind == "gemma3-mixed"))  # its seed 0 repeats one token
    if kind == "llama":
        model = LlamaForCausalLM._from_config(LlamaConfig(**SMALL), attn_implementation=attn)
    elif kind == "qwen3":
        model = Qwen3ForCausalLM._from_config(Qwen3Config(**SMALL), attn_implementation=attn)
    elif kind == "mistral-swa":
        model = MistralForCausalLM._from_config(MistralConfig(**SMALL, sliding_window=7), attn_implementation=attn)
    elif kind == "gemma3-mixed":
        config = Gemma3TextConfig(
            **{**SMALL, "num_hidden_layers": 3},
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
        model = Gemma3ForCausalLM._from_config(config, attn_implementation=attn)
    else:
        raise KeyError(kind)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            std = 0.4 if "embed" in name or "head" in name else 0.25
            if kind.startswith("gemma") and "embed" in name:
                std = 0.03  # tied and scaled: a larger one only ever repeats the last token
            torch.nn.init.normal_(p, std=std)
    return model.to(dtype).eval()


def plain(model, ids, n, **kw):
    """The verifier's own greedy text."""
    mask = torch.ones(1, len(ids), dtype=torch.long)
    out = model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=n, do_sample=False, **kw)
    return out[0].tolist()


def golden(name):
    return AutoModelForCausalLM.from_pretrained(f"tests/golden/checkpoints/{name}", dtype=torch.float32).eval()


def from_columns(columns, start=0):
    """A lattice written out by hand: per slot a list of (token, log-probability)."""
    width = max((len(c) for c in columns), default=1)
    tokens = torch.full((len(columns), width), -1, dtype=torch.long)
    logp = torch.full((len(columns), width), float("-inf"))
    for i, column in enumerate(columns):
        for j, (t, lp) in enumerate(sorted(column, key=lambda e: -e[1])):
            tokens[i, j], logp[i, j] = t, lp
    return Lattice(tokens, logp, tokens[:, 0], start)


class Script(Drafter):
    """Drafts a known text: every slot right, none right, or every `period`-th wrong. As a lattice or as a finished
    chain."""

    name = "script"

    def __init__(self, text, agree="always", lattice=True, period=3):
        self.text, self.agree, self.lattice, self.period = list(text), agree, lattice, period

    def draft(self, ids, k, *, generator=None):
        self.forwards += 1
        tokens = self.text[len(ids) : len(ids) + k]
        columns = []
        for i, right in enumerate(tokens):
            wrong = (right + 1) % VOCAB
            bad = self.agree == "never" or (self.agree == "sometimes" and (len(ids) + i) % self.period == 0)
            best, other = (wrong, right) if bad else (right, wrong)
            columns.append(
                [(best, -0.2), ((right + 5) % VOCAB, -3.0)] + ([(other, -2.0)] if self.agree != "never" else [])
            )
        if self.lattice:
            return from_columns(columns, len(ids))
        return chain([c[0][0] for c in columns], [0.8] * len(columns))


class Noise(Drafter):
    """Random lattices: useless, but legal."""

    name = "noise"

    def __init__(self, seed=0, vocab=VOCAB):
        self.generator, self.vocab = torch.Generator().manual_seed(seed), vocab

    def draft(self, ids, k, *, generator=None):
        self.forwards += 1
        return self.need.lattice(3 * torch.randn(k, self.vocab, generator=self.generator), len(ids))


class Silent(Drafter):
    name = "silent"

    def draft(self, ids, k, *, generator=None):
        return EMPTY


class Clock:
    """Time that passes only where it is told to: what costs what is then a matter of arithmetic."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class TimedScript(Script):
    """A scripted drafter whose drafts take `seconds`, a number or a function of k."""

    def __init__(self, clock, text, agree="always", seconds=0.0):
        super().__init__(text, agree)
        self.clock, self.seconds, self.asked = clock, seconds, []

    def draft(self, ids, k, *, generator=None):
        self.clock.now += self.seconds(k) if callable(self.seconds) else self.seconds
        self.asked.append(k)
        return super().draft(ids, k, generator=generator)


class TimedSession(Session):
    """A verifier that writes `texts` and takes 10 ms (1 + 0.03 n) for n columns of each row, times `scale(rows)`."""

    def __init__(self, clock, texts, scale=lambda rows: 1.0):
        self.clock, self.texts, self.scale = clock, texts, scale

    def verify(self, rows, taps=()):
        width = max(len(row.ids) + len(row.proposal) for row in rows if row is not None)
        self.clock.now += 0.01 * (1 + 0.03 * width) * self.scale(len(rows))
        return [row and self._logits(row, text) for row, text in zip(rows, self.texts, strict=True)]

    def _logits(self, row, text):
        """Chains and trees alike: the token of the text at every node's depth."""
        at = self.at[id(text)] + len(row.ids)
        out = torch.zeros(1 + len(row.proposal), VOCAB)
        for i, depth in enumerate((0, *row.proposal.depths)):
            if at + depth < len(text):
                out[i, text[at + depth]] = 9.0
        return out

    def commit(self, paths):
        return [None] * len(paths)


class TimedVerifier:
    """What the loop asks of a verifier, beside its session."""

    vocab, max_positions, tokenizer, model = VOCAB, None, None, None
    turn, restarts, stretches = None, False, False

    def check_ids(self, ids):
        pass

    def can(self, what):
        return True


def timed(clock, controller, drafts, n, prompt=4, scale=lambda rows: 1.0, **spec):
    """Decode `n` tokens for each of `drafts` (drafters over their own texts), as one batch; results, seconds."""
    texts = [d.text for d in drafts]
    requests = [Request(text[:prompt], prompt + n) for text in texts]
    session, start = TimedSession(clock, texts, scale), clock.now
    session.at = dict.fromkeys(map(id, texts), 0)
    rows = []
    for _, rows in rounds(TimedVerifier(), ByText(drafts), requests, SpecConfig(**spec), controller, session):
        session.at = {id(text): row.cached for text, row in zip(texts, rows, strict=True)}
    return [row.result for row in rows], clock.now - start


class ByText(Drafter):
    """The drafter of each text, by the text that it is given."""

    name = "timed"

    def __init__(self, drafts):
        self.drafts = drafts

    def reset(self, ids, need):
        super().reset(ids, need)
        self.mine = next(d for d in self.drafts if d.text[: len(ids)] == list(ids))
        self.mine.need = need

    def draft(self, ids, k, *, generator=None):
        self.forwards += 1
        return self.mine.draft(ids, k, generator=generator)


class Words:
    """A tokenizer over an explicit list of pieces, longest match first."""

    def __init__(self, pieces):
        self.pieces = list(pieces)

    def get_vocab(self):
        return {p: i for i, p in enumerate(self.pieces)}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.pieces[i] for i in ids)

    def __call__(self, text, add_special_tokens=True):
        ids = []
        while text:
            piece = max((p for p in self.pieces if text.startswith(p)), key=len)
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return {"input_ids": ids}
