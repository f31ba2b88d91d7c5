"""Shortening a running decoder: hidden states, RoPE, positions, masks and what the cache holds.

Nothing is derived anew that the model has already made: masks and rotary tables of the short
sequence are those of the long one, taken at the kept positions. So padding, sliding windows and
bidirectional image blocks stay what the model means by them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pore.errors import ModelStateError


def pack(kept: Tensor, right: bool) -> tuple[Tensor, Tensor]:
    """Choose the positions that a shortened batch keeps, filled up to a common length.

    Args:
        kept: (B, L) bool, True at the tokens that stay.
        right: Whether shorter rows are filled on the right, as a batch that is padded there; on the
            left the last token of every sample stays last.

    Returns:
        index (B, M), the old position of every new one, ascending among the kept; and
        valid (B, M) bool, False at filling.
    """
    counts = kept.sum(-1)
    length = int(counts.max())
    order = (~kept if right else kept).long().argsort(dim=-1, stable=True)
    index = order[:, :length] if right else order[:, order.shape[1] - length :]
    slots = torch.arange(length, device=kept.device)
    valid = slots < counts[:, None] if right else slots >= length - counts[:, None]
    return index, valid


def take(states: Tensor, index: Tensor, dim: int) -> Tensor:
    """Take positions along one dimension of a tensor whose batch may be broadcast.

    Args:
        states: (..., B or 1, ..., L, ...) with the batch in the dimension before or at the front.
        index: (B, M) positions, for each sample.
        dim: Dimension of length L; the batch is dimension 0, or 1 where a leading dimension holds
            the planes of a multi-dimensional rotary embedding.

    Returns:
        The states at the positions, with the batch expanded to B.
    """
    index = index.to(states.device)
    dim = dim % states.dim()
    batch_dim = dim - 1
    sizes = list(states.shape)
    sizes[batch_dim] = index.shape[0]
    states = states.expand(sizes)
    shape = [1] * states.dim()
    shape[batch_dim], shape[dim] = index.shape
    sizes[dim] = index.shape[1]
    return states.gather(dim, index.view(shape).expand(sizes))


class Track:
    """What the layers from one stage on hold in the cache, in positions of the full sequence.

    Attributes:
        columns: (B, M) the position in the full sequence of every slot of the cache.
        valid: (B, M) bool, False at filling.
        full: Whether all slots are valid.
    """

    def __init__(self, columns: Tensor, valid: Tensor, full: bool) -> None:
        self.columns = columns
        self.valid = valid
        self.full = full

    @classmethod
    def unpruned(cls, tokens: Tensor) -> Track:
        """The track of a sequence that nothing was dropped from.

        Args:
            tokens: (B, n) bool, False at padding.
        """
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return cls(columns, tokens, bool(tokens.all()))

    def extended(self, columns: Tensor, valid: Tensor, full: bool) -> Track:
        """This track with further slots.

        Args:
            columns: (B, m) positions of the new slots in the full sequence.
            valid: (B, m) bool.
            full: Whether all new slots are valid.
        """
        device = self.columns.device
        return Track(
            torch.cat([self.columns, columns.to(device)], 1),
            torch.cat([self.valid, valid.to(device)], 1),
            self.full and full,
        )

    def cropped(self, seen: int) -> Track:
        """This track without the slots of tokens at or behind position `seen`.

        Assisted decoding takes rejected tokens back from the end of the cache.
        """
        if self.columns.shape[1] == 0 or int(self.columns[0, -1]) < seen:
            return self
        length = int((self.columns[0] < seen).sum())
        return Track(self.columns[:, :length], self.valid[:, :length], self.full)


class Shortened:
    """One forward's tokens as the layers from one stage on get them.

    Args:
        index: (B, m) positions kept, in the chunk that entered the decoder; None keeps all.
        track: What these layers' cache holds, this chunk included.
        length: Tokens of this chunk that the layers see (m).
        config: The decoder's config, which names the attention implementation.
        rotary: Makes rotary tables for states (B, m, D) at positions (B, m), where the tokens are
            numbered anew; None where they keep their positions.
    """

    def __init__(
        self,
        index: Tensor | None,
        track: Track,
        length: int,
        config: Any,
        rotary: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> None:
        self.index = index
        self.track = track
        self.length = length
        self._config = config
        self._rotary = rotary
        self._made: dict[tuple[Any, ...], Any] = {}

    def kwargs(
        self, kwargs: dict[str, Any], hidden: Tensor, attention: nn.Module | None
    ) -> dict[str, Any]:
        """The keyword arguments of a decoder layer for the short sequence.

        Args:
            kwargs: What the model passes to the layer.
            hidden: (B, m, D) the hidden states that enter the layer.
            attention: The layer's attention module; None in a recurrent layer.

        Returns:
            A copy with mask, positions and rotary embedding shortened; the same object where
            nothing is to be changed, as for most decoded tokens.
        """
        unmasked = self.track.full and kwargs.get("attention_mask") is None
        if self.index is None and self._rotary is None and unmasked:
            return kwargs
        kwargs = dict(kwargs)
        if self._rotary is not None:
            tables, positions = self._memo(self._rotary, hidden, self._numbered_anew)
            kwargs.update(position_embeddings=tables, position_ids=positions)
        elif self.index is not None:
            for name in ("position_embeddings", "position_ids"):
                if kwargs.get(name) is not None:
                    kwargs[name] = self._memo(kwargs[name], hidden, self._positions)
            if "position_ids" in kwargs and "flash" in self._config._attn_implementation:
                # Positions with gaps would be read as packed sequences, which reads the device
                # in every layer and forgets what is in the cache. RoPE is in the tables.
                kwargs["position_ids"] = None
        if attention is None:
            kwargs["attention_mask"] = self._memo(self.track, hidden, self._present)
            return kwargs
        cache = kwargs.get("past_key_values")
        layer: int = attention.layer_idx  # type: ignore[assignment]
        slots = self.track.columns.shape[1]
        if cache is not None:
            slots = cache.get_mask_sizes(self.length, layer)[0]
        mask = kwargs.get("attention_mask")
        kwargs["attention_mask"] = self._memo(
            mask, hidden, lambda m, h: self._mask(m, h, slots), slots
        )
        return kwargs

    def _memo(self, value: Any, hidden: Tensor, make: Any, *key: Any) -> Any:
        # Layers are given the same few objects: each is shortened once per device.
        name = (id(value), hidden.device, *key)
        if name not in self._made:
            # `value` is held too, so that no other object gets its id.
            self._made[name] = (value, make(value, hidden))
        return self._made[name][1]

    def _numbered_anew(self, rotary: Any, hidden: Tensor) -> tuple[Any, Tensor]:
        positions = (self.track.valid.cumsum(-1) - 1).clamp(min=0)[:, -self.length :]
        positions = positions.to(hidden.device)
        return rotary(hidden, positions), positions

    def _positions(self, value: Any, hidden: Tensor) -> Any:
        assert self.index is not None
        if isinstance(value, (tuple, list)):
            return tuple(take(table, self.index, -2) for table in value)
        return take(value, self.index, -1)

    def _present(self, track: Track, hidden: Tensor) -> Tensor | None:
        """(B, m) which tokens of this chunk are no filling, for a layer that looks at no others."""
        if track.full or self.length == 1:
            return None
        return track.valid[:, -self.length :].to(hidden.device)

    def _mask(self, mask: Any, hidden: Tensor, slots: int) -> Any:
        if mask is None and self.track.full:
            return None  # purely causal, and an ascending choice of positions still is
        columns, valid = (x.to(hidden.device) for x in (self.track.columns, self.track.valid))
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask.expand(columns.shape[0], -1).gather(1, columns) * valid.to(mask.dtype)
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            return self._causal(hidden, valid, slots)
        mask = mask.expand(columns.shape[0], -1, -1, -1)
        if self.index is not None:
            mask = take(mask.transpose(0, 1), self.index, -2).transpose(0, 1)
        heads, queries = mask.shape[1:3]
        mask = mask.gather(-1, columns[:, None, None].expand(-1, heads, queries, -1))
        closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        if not self.track.full:
            mask = mask.masked_fill(~valid[:, None, None], closed)
        return nn.functional.pad(mask, (0, slots - mask.shape[-1]), value=closed)

    def _causal(self, hidden: Tensor, valid: Tensor, slots: int) -> Any:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

        implementation = self._config._attn_implementation
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=hidden.shape[0],
            q_length=self.length,
            kv_length=slots,
            q_offset=valid.shape[1] - self.length,
            kv_offset=0,
            mask_function=causal_mask_function,
            attention_mask=nn.functional.pad(valid, (0, slots - valid.shape[1])),
            allow_is_causal_skip=False,
            dtype=hidden.dtype,
            config=self._config,
            device=hidden.device,
        )


def token_mask(attention_mask: Any, batch: int, seen: int, length: int, device: Any) -> Tensor:
    """Which tokens of the sequence so far are no padding, read off whatever mask the model got.

    Args:
        attention_mask: None, (B, n), a prepared (B, 1, q, n) bool or additive mask, or several of
            them by kind of layer.
        batch: Samples B.
        seen: Tokens in the cache.
        length: Tokens of this forward.
        device: Where to put the result.

    Returns:
        (B, seen + length) bool.

    Raises:
        ModelStateError: The mask is of a form that does not tell.
    """
    total = seen + length
    if isinstance(attention_mask, Mapping):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    if attention_mask is None:
        return torch.ones(batch, total, dtype=torch.bool, device=device)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        raise ModelStateError(
            f"An attention mask of type {type(attention_mask).__name__} does not tell padding from "
            "tokens; pass the tokenizer's 2-D attention_mask."
        )
    tokens = attention_mask.to(device)
    if tokens.dim() == 4:  # the last query looks at every token that is no padding
        tokens = tokens[:, 0, -1]
        tokens = tokens if tokens.dtype == torch.bool else tokens > -1e4
    tokens = tokens[:, :total].bool().expand(batch, -1)
    if tokens.shape[1] < total:
        raise ModelStateError(
            f"The attention mask covers {tokens.shape[1]} tokens, but {seen} are cached and "
            f"{length} are given; pass a mask over all of them."
        )
    return tokens
