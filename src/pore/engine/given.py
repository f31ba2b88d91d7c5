"""What the caller gives besides tokens and pixels: masks and positions, obeyed or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pore._compat.arguments import MASK, PACKED, POSITIONS, TOWER_READ
from pore.errors import InputError


def custom_masks(masks: Any, seen: int, length: int, made: bool) -> Any:
    """The caller's own masks of which token sees which, as a decoder takes them.

    Args:
        masks: The model's mask argument.
        seen: Tokens that came before, dropped ones included.
        length: Tokens of this forward.
        made: Whether such masks may come from transformers itself and only tell which tokens are
            padding, as in `generate` and for caches whose slots exist from the start.

    Returns:
        A (B or 1, 1 or H, length, seen + length) mask or several by kind of layer; None if
        the masks only tell tokens from padding.

    Raises:
        InputError: They are of other sizes.
    """
    parts = list(masks.values()) if isinstance(masks, Mapping) else [masks]
    parts = [part for part in parts if isinstance(part, Tensor) and part.dim() == 4]
    if made or not parts:
        return None
    for part in parts:
        if tuple(part.shape[-2:]) != (length, seen + length):
            raise InputError(
                f"A 4-D {MASK} must say which of all {seen + length} tokens so far, dropped ones "
                f"included, the {length} given tokens see; this one has shape {tuple(part.shape)}."
            )
    return masks


def chosen_masks(masks: Any, rows: Tensor, columns: Tensor, valid: Tensor) -> Any:
    """Masks at some of their rows and columns.

    Args:
        masks: (B or 1, 1 or H, q, k) bool or additive mask, or several by kind of layer.
        rows: (B, m) which of the q.
        columns: (B, n) which of the k.
        valid: (B, n) bool, False at columns that nothing sees.
    """
    if isinstance(masks, Mapping):
        return {kind: chosen_masks(mask, rows, columns, valid) for kind, mask in masks.items()}
    if masks is None:
        return None
    rows, columns, valid = (x.to(masks.device) for x in (rows, columns, valid))
    heads, (batch, count), width = masks.shape[1], rows.shape, masks.shape[-1]
    masks = masks.expand(batch, -1, -1, -1)
    masks = masks.gather(2, rows[:, None, :, None].expand(-1, heads, -1, width))
    masks = masks.gather(3, columns[:, None, None].expand(-1, heads, count, -1))
    closed = False if masks.dtype == torch.bool else torch.finfo(masks.dtype).min
    return masks.masked_fill(~valid[:, None, None], closed)


def positions_by_axis(given: Any, length: int, start: int, device: torch.device) -> Tensor:
    """The positions that a decoder gives the tokens of a call.

    Args:
        given: The positions that the decoder gets: (B or 1, L); (A, B, L) on several axes, with or
            without a plane of text positions in front; or None, and it counts.
        length: Tokens of the call, L.
        start: Slots in the first layer's cache before them.
        device: Where to put them where there are none.

    Returns:
        (A, B or 1, L) positions, A being 1 where there are no axes.
    """
    if not isinstance(given, Tensor):
        return torch.arange(start, start + length, device=device)[None, None]
    return given[-3:] if given.dim() == 3 else given[None]


def check_tower(inputs: Mapping[str, Any], config: Any) -> None:
    """Refuse arguments that make the projector read another tower layer than the config says.

    Args:
        inputs: The model's arguments by name.
        config: The model's config.

    Raises:
        InputError: There are such arguments; a method that reads the tower follows the config.
    """
    for name in TOWER_READ:
        given = inputs.get(name)
        if given is not None and given != getattr(config, name, given):
            raise InputError(
                f"The method reads what goes through the vision tower, where the config says "
                f"{name}={getattr(config, name)!r}; leave {name}={given!r} out, or set it in the "
                "config before the block."
            )


def check_unpacked(inputs: Mapping[str, Any], cached: bool) -> None:
    """Refuse several prompts with images in one row, told apart by their positions.

    Args:
        inputs: The model's arguments by name.
        cached: Whether there is a cache; without, transformers takes every gap for a new sample.

    Raises:
        InputError: There are several in a row.
    """
    positions, packed = inputs.get(POSITIONS), any(inputs.get(n) is not None for n in PACKED)
    if not packed and inputs.get(MASK) is None and isinstance(positions, Tensor):
        if positions.dim() == 3:  # a plane of text positions lies in front of the three axes
            positions = positions[0] if len(positions) == 4 else None
        if positions is not None:
            steps = positions.diff(dim=-1)
            packed = bool(((steps < 1) if cached else (steps != 1)).any())
    if packed:
        raise InputError(
            "Several prompts lie in one row, told apart by their positions, and each image must "
            "be pruned by the text of its own prompt: give every prompt its own row of the batch, "
            "padded, with an attention_mask."
        )
