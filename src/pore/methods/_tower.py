"""What methods on the embeddings read of the vision tower."""

from __future__ import annotations

import torch
from torch import Tensor

from pore.engine.stages import View
from pore.errors import InputError
from pore.tower.stages import TowerAttention


def tower_attention(view: View, kind: TowerAttention) -> Tensor:
    """(I, t) attention in the tower to what every visual token shows, averaged over heads.

    For a stage with `tower=True` and `tower_attention=kind`.

    Raises:
        InputError: Some tokens show no single patch, or a method in the tower has merged some.
    """
    assert view.tower is not None
    tile, patch = view.layout.shows()
    rows = []
    for i, (image, encoded) in enumerate(zip(view.layout.images, view.tower, strict=True)):
        weights = encoded.attention[kind].mean(1).flatten().to(patch.device)  # tile after tile
        tiling = image.tiling
        each, tiles = (image.count, 1) if tiling is None else (tiling.patches, tiling.tiles)
        single = (patch[i] >= 0) | ~view.layout.valid[i]
        if len(weights) != each * tiles or not bool(single.all()):
            raise InputError(
                "Some visual tokens stand for no single patch, so the vision tower's attention to "
                "them cannot be told; use this method without one before it that merges."
            )
        rows.append(weights[(tile[i] * each + patch[i]).clamp(0, each * tiles - 1)])
    return torch.stack(rows)
