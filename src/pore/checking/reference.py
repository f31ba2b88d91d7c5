"""What pruning must equal: the whole sequence, with dropped tokens hidden from some layer on.

Nothing is shortened here. Attention is computed from scratch on the queries and keys that a kernel
would get, with the masks that the model made for the full sequence. So a kernel that ignores masks,
a mask that does not arrive and a cache that loses tokens all show as a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pore.changes import Changes
from pore.families.base import Family
from pore.hooks import between
from pore.tensors.attention import row_logits


@contextmanager
def hidden_from(
    model: nn.Module, family: Family, first: int, dropped: Tensor, tokens: Tensor
) -> Iterator[dict[int, Tensor]]:
    """Hide tokens from one decoder layer and all later ones, in a forward without cache.

    Args:
        model: The model, unpruned.
        family: Its adapter.
        first: The first layer from which they are hidden.
        dropped: (B, L) bool, True at those tokens.
        tokens: (B, L) bool, False at padding.

    Yields:
        For every layer with attention, the weights (B, H, L, L) of the latest forward.
    """
    weights: dict[int, Tensor] = {}
    with Changes() as changes:
        for i, layer in enumerate(family.layers(model)):
            seen = tokens & ~dropped if i >= first else tokens
            if family.recurrent(layer):
                assert family.recurrent_mixer is not None
                mixer: nn.Module = getattr(layer, family.recurrent_mixer)
                changes.put(mixer, "forward", _mixed(mixer, seen))
            else:
                between(changes, family.attention(layer), _attention(i, seen, weights))
        yield weights


def _attention(layer: int, seen: Tensor, weights: dict[int, Tensor]) -> Callable[..., Any]:
    """A kernel that attends only to the tokens that are seen."""

    def attend(
        _: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *__: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        **___: Any,
    ) -> tuple[Tensor, Tensor]:
        batch, heads, length, width = query.shape
        logits = row_logits(
            query,
            key,
            rows=None,
            index=torch.arange(length, device=query.device).expand(batch, -1),
            valid=seen.to(query.device),
            mask=attention_mask,
            scaling=width**-0.5 if scaling is None else scaling,
            softcap=softcap,
            causal=is_causal is not False,
            window=sliding_window,
        )
        shares = logits.softmax(-1).nan_to_num(0.0)  # padding may see no token
        weights[layer] = shares
        values = value.repeat_interleave(heads // value.shape[1], 1).to(shares)
        out = (shares @ values).to(query.dtype)
        return out.transpose(1, 2).contiguous(), shares

    return attend


def _mixed(mixer: Any, seen: Tensor) -> Callable[..., Tensor]:
    """A recurrence over the tokens that are seen, one sample at a time, because it has no mask."""
    mix = mixer.forward

    def each(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for row, stays in enumerate(seen.to(hidden_states.device)):
            out[row, stays] = mix(hidden_states[row : row + 1, stays])[0]
        return out

    return each
