"""Attention as it would be without RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pore.engine.corrections import AttentionCorrection
from pore.engine.readers import LayerAttention


@dataclass(frozen=True)
class WithoutRoPE(AttentionCorrection):
    """Ranks by the attention that the layer would have if RoPE rotated neither queries nor keys.

    The decay of attention with distance comes from RoPE; without it a near token has no advantage
    (FEATHER, arXiv 2412.13180). Nothing is calibrated. The layer's projections run once more.

        pruner = pore.FastV(keep=128, reweight=pore.corrections.WithoutRoPE())

    With `normalize="visual"` FastV then ranks by FEATHER's score.
    """

    kind: ClassVar[str] = "without RoPE"  # type: ignore[misc] # of every instance

    def through(self, attention: LayerAttention) -> LayerAttention:
        """The attention of the layer without RoPE."""
        return attention.without_rope
