"""The prior of RoPE: what the rotary embedding alone does to equal queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pore.errors import ProfileError

ROPE_FLOOR = 0.1
"""The prior is at least this share of its value at distance 0; see `PositionBias.rope`."""


def rope_prior(distance: Tensor, *, head_dim: int, theta: float = 1e4) -> Tensor:
    """The scaled dot product of an all-ones query and key after RoPE; SparseVLM+ divides by it.

    W(Δ) = 2 / √d · Σ_f cos(Δ · theta^(−2f/d)), f from 0 to d/2 − 1 (arXiv 2410.04417, code
    version 2.0). It is √d at Δ = 0, oscillates, and can be zero or negative.

    Args:
        distance: Δ, in positions, of any shape.
        head_dim: d, the size of a rotated head.
        theta: Base of the rotary embedding.

    Returns:
        W, of the shape of `distance`, float64.

    Raises:
        ProfileError: `head_dim` is not even and positive, or `theta` not above 0.
    """
    if head_dim < 2 or head_dim % 2:
        raise ProfileError(f"RoPE needs an even head size, not {head_dim}.")
    if not (math.isfinite(theta) and theta > 0):
        raise ProfileError(f"RoPE needs a positive base theta, not {theta}.")
    distance = distance.to(torch.float64)
    half = torch.arange(head_dim // 2, dtype=torch.float64, device=distance.device)
    frequencies = theta ** (-2 * half / head_dim)
    angles = distance.unsqueeze(-1) * frequencies
    return angles.cos().sum(-1) * (2 / math.sqrt(head_dim))


def floored_prior(n: int, *, head_dim: int, theta: float, text_tokens: int) -> tuple[Tensor, int]:
    """The prior at visual tokens that follow each other, as in `PositionBias.rope`.

    Args:
        n: Number of visual tokens.
        head_dim: As in `rope_prior`.
        theta: As in `rope_prior`.
        text_tokens: Tokens after the last visual token, including the querying one.

    Returns:
        (n,) the prior, and how many of its values were raised to the floor.

    Raises:
        ProfileError: A number is out of range.
    """
    if text_tokens < 1:
        raise ProfileError(
            f"The RoPE prior needs text_tokens of at least 1, the querying token itself, "
            f"not {text_tokens}."
        )
    distance = torch.arange(n - 1 + text_tokens, text_tokens - 1, -1, dtype=torch.float64)
    prior = rope_prior(distance, head_dim=head_dim, theta=theta)
    floor = ROPE_FLOOR * math.sqrt(head_dim)
    return prior.clamp(min=floor), int((prior < floor).sum())
