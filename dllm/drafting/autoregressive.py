"""A small causal LM as drafter: the classic of speculative decoding, here mostly as the baseline to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from dllm.drafting.drafters import Drafter, Need
from dllm.drafting.lattice import DraftFailure
from dllm.drafting.proposal import EMPTY, Proposal, Rows, chain, fit, sent
from dllm.drafting.verifier import CausalLM, check_rollback, embedding
from dllm.errors import DllmError


class ARDrafter(Drafter):
    """Draft k tokens one by one with a transformers causal LM of the same vocabulary; its cache is rolled back each
    round.

    Greedy chains as point proposals, draws as sampled ones (each row is the law of its token given the tokens before
    it).
    """

    name = "ar"
    chains_only = True

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.cache = DynamicCache()
        self.known: list[int] = []

    def reset(self, ids: Sequence[int], need: Need) -> None:
        """An empty cache. Errors: another vocabulary, a cache that cannot be rolled back."""
        super().reset(ids, need)
        size = embedding(self.model).shape[0]
        if min(size, need.vocab) < 0.9 * max(size, need.vocab):
            raise DllmError(f"drafter ({size} ids) and verifier ({need.vocab} ids) share no vocabulary")
        self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        check_rollback(self.model, self.cache)
        self.cache.activate_past_recording()  # type: ignore[no-untyped-call]
        self.known = []

    def draft(self, ids: Sequence[int], k: int, *, generator: torch.Generator | None = None) -> Proposal:
        """`k` forwards of one token each, fewer behind an end token or at the last position."""
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)  # foreign
        k = k if limit is None else min(k, limit - len(ids))
        if k < 1:
            return EMPTY
        tokens: list[int] = []
        rows: list[Tensor] = []
        while len(tokens) < k and not (tokens and tokens[-1] in self.need.eos):
            row = self._row(self._feed([*ids, *tokens]))
            if not bool(torch.isfinite(row).all()):
                if tokens:
                    break
                raise DraftFailure("the drafter returned NaN or infinite logits")
            token = torch.multinomial(row, 1, generator=generator) if self.need.sampled else row.argmax()
            tokens.append(int(token))
            rows.append(row)
        if self.need.sampled:
            return chain(tokens, rows=Rows(torch.stack(rows)))
        return chain(tokens, [float(row.max()) for row in rows])

    def _row(self, logits: Tensor) -> Tensor:
        logits = fit(logits.float(), self.need.vocab)[None]
        if self.need.sampled and self.need.warp is not None:
            logits = self.need.warp(logits)
        return torch.softmax(logits, -1)[0].cpu()  # the one wait for a token

    def _feed(self, ids: list[int]) -> Tensor:
        """Logits behind `ids`; the cache is first rolled back to the longest prefix that it shares with them."""
        pairs = enumerate(zip(self.known, ids[:-1], strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(self.known), len(ids) - 1))
        if same < len(self.known):  # a crop also trims a sliding window, after which nothing more can be taken back
            self.cache.crop(same - len(self.known))
        self.forwards += 1
        device = embedding(self.model).device
        with torch.inference_mode():
            out = self.model(
                input_ids=sent([ids[same:]], device),
                position_ids=torch.arange(same, len(ids), device=device)[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        if not self.cache.is_croppable:  # a running state, which shows in the first forward
            raise DllmError(
                f"{type(self.model).__name__} is recurrent: its state cannot be rolled back; use another drafter"
            )
        self.known = list(ids)
        last: Tensor = out.logits[0, -1]
        return last
