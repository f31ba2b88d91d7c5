"""The cost of a pruned run's sequence lengths, without any pruning code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.attention import attention_name
from pore._compat.caches import cache_argument, cache_in
from pore.changes import Changes

# The `model_type` of decoders whose prefill does exactly what `Attainable` does.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")


class Attainable(Changes):
    """Runs a LLaMA-like decoder on ever shorter sequences, with stock modules and no pruning code.

    Inside the `with` block, the decoder's prefill is a plain loop over its layers that gathers the
    given positions before a layer where the sequence gets shorter. A decode step is the stock
    forward over the shorter cache. Prompts must not be padded.

    Args:
        decoder: The decoder, with `rotary_emb`, `layers` and `norm`.
        cuts: For each layer where the sequence gets shorter, the (m,) positions to go on with,
            counted in the sequence that enters that layer. A cut at layer 0 numbers positions anew.
    """

    def __init__(self, decoder: nn.Module, cuts: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._decoder: Any = decoder
        self._cuts = dict(cuts)

    def __enter__(self) -> Attainable:
        super().__enter__()
        self.put(self._decoder, "forward", self._forward)
        return self

    def _forward(self, inputs_embeds: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        decoder, cache = self._decoder, cache_in(kwargs)
        past = cache.get_seq_length()
        if past and attention_name(decoder.config) != "eager":
            # Other kernels need no mask, so layers may have shorter caches.
            return type(decoder).forward(
                decoder,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask[:, : past + inputs_embeds.shape[1]],
                **kwargs,
            )
        cuts = {} if past else self._cuts
        hidden = inputs_embeds if 0 not in cuts else inputs_embeds[:, cuts[0]]
        positions = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        rotary = decoder.rotary_emb(hidden, position_ids=positions)
        mask = self._mask(hidden)
        named = cache_argument(decoder.layers[0].forward, cache)
        for i, layer in enumerate(decoder.layers):
            if i > 0 and i in cuts:
                kept = cuts[i]
                hidden = hidden[:, kept]
                rotary = tuple(table[:, kept] for table in rotary)
                mask = self._mask(hidden)
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                use_cache=True,
                **named,
            )
        return BaseModelOutputWithPast(decoder.norm(hidden), cache)

    def _mask(self, hidden: Tensor) -> Tensor | None:
        """The mask that makes attention causal: only eager attention needs one."""
        length = hidden.shape[1]
        if length == 1 or attention_name(self._decoder.config) != "eager":
            return None
        closed = torch.finfo(hidden.dtype).min
        return hidden.new_full((length, length), closed).triu(1)[None, None]


def cuts_of(tokens: Sequence[int], prompt: int, device: torch.device) -> dict[int, Tensor]:
    """Evenly spread positions to keep; which ones are kept does not change the cost."""
    where, before = {}, prompt
    for layer, count in enumerate(tokens):
        if count != before:
            where[layer] = torch.linspace(0, before - 1, count, device=device).round().long()
        before = count
    return where
