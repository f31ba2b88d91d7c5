"""Where the parts of the vision tower are, and how its patches become visual tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pore.errors import UnsupportedModelError
from pore.families.parts import ModelParts
from pore.layout import Packing
from pore.tensors.gathering import widened
from pore.tensors.pooling import Pooling


class TowerParts(ModelParts):
    """Where a family keeps its vision tower and projector, for methods that act there.

    The defaults fit CLIP and SigLIP, in a model that holds `vision_tower` and
    `multi_modal_projector`.

    Attributes:
        tower_refusal: Why no method can act in the vision tower; None where they can.
        cls_first: Whether a CLS token of the vision tower comes before the patches.
        merged: Whether a visual token is made of several patches, see `merge_size`.
        packed: Whether all images go through the vision tower in one sequence, see `packing`.
        keeps_cls: Whether the CLS token of the vision tower is a visual token, too.
        pools_after: The method of `base(model)` that makes visual tokens of what the projector
            gives, (I, n, D) to (I, N, D); None where the projector already gives them.
    """

    tower_refusal: ClassVar[str | None] = (
        "nothing is said of its tower (`tower_refusal`). Use a method that acts on the embeddings "
        "or in the decoder."
    )
    cls_first: ClassVar[bool] = True
    merged: ClassVar[bool] = False
    packed: ClassVar[bool] = False
    keeps_cls: ClassVar[bool] = False
    pools_after: ClassVar[str | None] = None

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower."""
        return self.base(model).vision_tower  # type: ignore[return-value]

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """All layers of the vision tower."""
        return _vision(self.tower(model)).encoder.layers  # type: ignore[no-any-return]

    def tower_attention(self, layer: nn.Module) -> nn.Module:
        """The self-attention module of a layer of the vision tower."""
        return layer.self_attn  # type: ignore[return-value]

    def tower_read(self, model: nn.Module) -> int:
        """Index of the tower layer whose output the projector reads: the last if none is named."""
        chosen: Any = getattr(model.config, "vision_feature_layer", -1)
        if not isinstance(chosen, int):
            raise UnsupportedModelError(
                f"The projector reads several tower layers ({chosen}), so no single one says which "
                "patches matter; use a method that acts in the decoder."
            )
        # hidden_states[0] are the embeddings, so entry i is the output of layer i - 1.
        return chosen + len(self.tower_layers(model)) if chosen < 0 else chosen - 1

    def tower_attended(self, model: nn.Module, layer: int) -> int:
        """The tower layer whose attention is read in place of a layer's own.

        This is the layer itself, unless it attends only within windows.
        """
        return layer

    def pooling_head(self, model: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """The pooling head of a SigLIP tower that was loaded with it, see `pooled`; or None."""
        vision: Any = _vision(self.tower(model))
        head = getattr(vision, "head", None)
        return partial(pooled, vision.post_layernorm, head) if hasattr(head, "probe") else None

    def tower_has_cls(self, model: nn.Module) -> bool:
        """Whether the tower has a CLS token beside the patches (CLIP does, SigLIP does not)."""
        return hasattr(_vision(self.tower(model)).embeddings, "class_embedding")

    def projector(self, model: nn.Module) -> nn.Module:
        """The module that takes the tower's patch features, (I, N, C), to the decoder's width.

        It gives (I, N, D), or (I * N, D).
        """
        return self.base(model).multi_modal_projector  # type: ignore[return-value]

    def token_features(self, model: nn.Module) -> nn.Module:
        """The module whose first argument is one feature for every visual token, (I, N, C).

        This is the projector, or, if patches are merged, the part of it after the merging.
        """
        return self.projector(model)

    def merge_size(self, model: nn.Module) -> int:
        """Patches along a side of the square that becomes one visual token, where `merged`."""
        raise NotImplementedError

    def groups(self, model: nn.Module, patches: int) -> Tensor:
        """The patches that every visual token is made of.

        Called in families with `merged`. The default is for square images whose patches and tokens
        are in raster order.

        Args:
            model: The model.
            patches: Patches of an image that goes through the vision tower.

        Returns:
            (N, g) the places in the tower of the patches of every visual token, these in order.
        """
        size, side = self.merge_size(model), math.isqrt(patches)
        rows = torch.arange(patches).view(side // size, size, side // size, size)
        return rows.transpose(1, 2).reshape(-1, size * size)

    def pooling(self, model: nn.Module, patches: int) -> Pooling:
        """Which patches every visual token is made of, and to which shares: equal ones by default.

        Called in families with `merged`.

        Args:
            model: The model.
            patches: Patches of an image that goes through the vision tower.
        """
        return Pooling(self.groups(model, patches), patches)

    def packing(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Packing:
        """How images lie in the sequence of a call of `tower(model)`, in families with `packed`.

        Args:
            model: The model.
            args: Positional arguments of the call.
            kwargs: Its keyword arguments.
        """
        raise NotImplementedError

    def pixels(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The pixels among the arguments of a call of `tower(model)`.

        Returns:
            (I, 3, H, W) pixel values, one entry per image.
        """
        pixels: Tensor = args[0] if args else kwargs["pixel_values"]
        return pixels

    def views(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The pictures that go through the vision tower for one image, as the processor makes them.

        Args:
            model: The model.
            inputs: What the processor makes of the image and a prompt.

        Returns:
            (3, H, W) pixel values for every tile, in the order of its visual tokens.
        """
        pixels: Tensor = inputs["pixel_values"]
        return list(pixels.reshape(-1, *pixels.shape[-3:]))


def pooled(norm: nn.Module, head: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """What SigLIP's pooling head makes of pictures, and what it attends to.

    Args:
        norm: The norm before the head.
        head: The head.
        states: (P, n, C) states of the patches after the last layer.

    Returns:
        (P, C) vectors and (P, n) weights, averaged over heads, both at least float32.
    """
    states = norm(states)
    found, weights = head.attention(head.probe.expand(len(states), -1, -1), states, states)
    found = found + head.mlp(head.layernorm(found))
    return widened(found[:, 0]), widened(weights[:, 0])


def _vision(tower: Any) -> Any:
    # Some towers hold embeddings and layers one level deeper.
    return getattr(tower, "vision_model", tower)
