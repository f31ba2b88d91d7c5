"""How many tokens a method leaves of an image that is cut into tiles.

The size of the image tells it, but no formula does: rounding in every tile, padding that is cut
off, and whether the ends of rows stay are the method's. So the method itself is asked, in a tower
with tiles as large and layers as many as the served one has, and next to no width.
"""

from __future__ import annotations

from functools import cached_property
from threading import Lock
from typing import Any

import torch

from pore._compat.making import seeded
from pore.checking.shrinking import shrink
from pore.engine.pruner import Pruner
from pore.families.registry import family_of_config
from pore.layout import Tiling
from pore.serving.vllm.tower import PrunedTower


class TiledCounts:
    """How many tokens are left, by an image's size.

    Args:
        config: The config of the whole model.
        pruner: A method that acts in the vision tower or on the embeddings.
        modules: As in `PrunedTower`.
    """

    def __init__(self, config: Any, pruner: Pruner, modules: tuple[str, ...]) -> None:
        self._config = config
        self._pruner = pruner
        self._modules = modules
        self._lock = Lock()  # a model is pruned by one thread at a time
        self._known: dict[Any, int] = {}

    def tiling(self, height: int, width: int) -> Tiling:
        """How an image of so many pixels becomes tokens, ends of rows among them."""
        with self._lock:
            return self._tower.tilings(torch.tensor([[height, width]]))[0]

    def left(self, height: int, width: int) -> int:
        """How many tokens are left of an image of so many pixels.

        Raises:
            PoreError: It has fewer than are to be kept.
        """
        tiling = self.tiling(height, width)
        key = tiling.grid, tiling.slots
        with self._lock:
            if key not in self._known:
                self._known[key] = self._asked(tiling)
            return self._known[key]

    def _asked(self, tiling: Tiling) -> int:
        side, tower = self._config.vision_config.image_size, self._tower
        pixels = torch.linspace(-1, 1, tiling.tiles * 3 * side**2)
        inputs = {
            "pixel_values": pixels.reshape(1, tiling.tiles, 3, side, side).to(tower.dtype),
            "image_sizes": torch.tensor([tiling.size]),
        }
        (image,) = tower.rows(len(tiling.slots), None, inputs)
        return len(image.kept)

    @cached_property
    def _tower(self) -> PrunedTower:
        """The tower, with random weights."""
        config = self._config
        tiny = shrink(config, family_of_config(config, config.model_type))
        for name in ("image_size", "patch_size", "num_hidden_layers"):
            setattr(tiny.vision_config, name, getattr(config.vision_config, name))
        tiny.image_grid_pinpoints = config.image_grid_pinpoints
        tiny.vision_feature_layer = config.vision_feature_layer
        with seeded(), torch.device("cpu"):
            return PrunedTower(tiny, self._pruner, self._modules)
