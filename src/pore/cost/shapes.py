"""Sizes of a vision-language model, as its FLOPs need them.

Every family reads them from its config itself, in `Family.shape`; to get them for a config, call
`pore.families.registry.shape_of`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pore.cost.decoders import DecoderShape
from pore.cost.towers import TowerShape
from pore.errors import UnsupportedModelError

MANY_TILES = "images are cut into tiles, as many as their size asks for"
"""A reason why images differ in their number of visual tokens, for `ModelShape.varies`."""

ANY_SIZE = "images have as many tokens as their size asks for"
"""Another."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a vision-language model: vision tower, projector, decoder.

    Attributes:
        decoder: The language model.
        tower: The vision tower; None if its type is not known here.
        projector: Multiply-adds with which the projector makes one visual token from the tower's
            patches; None if they are not known.
        visual_tokens: Visual tokens of one image or tile, as they come out of the projector; None
            if images come in any size.
        merge: Patches along a side of the square that becomes one visual token.
        stacked: Multiply-adds, per visual token, of the projectors for lower tower layers
            (DeepStack). They run on all tokens, before a method can drop any in the tower.
        frame_tokens: Number of tokens that the projector makes for a frame of a video, if it is not
            the same as for an image.
        varies: Why images differ in their number of visual tokens; None if they do not.
    """

    decoder: DecoderShape
    tower: TowerShape | None
    projector: int | None
    visual_tokens: int | None
    merge: int = 1
    stacked: int = 0
    frame_tokens: int | None = None
    varies: str | None = None

    @classmethod
    def of_decoder(cls, decoder: DecoderShape, model_type: object) -> ModelShape:
        """The shape of a model whose decoder alone is known."""
        varies = f"they are not known (model_type {model_type!r})"
        return cls(decoder, None, None, None, varies=varies)

    @classmethod
    def of_tiles(
        cls, decoder: DecoderShape, tower: TowerShape, projector: int, merge: int
    ) -> ModelShape:
        """The shape of a model that cuts images into tiles and makes a token of merge² patches."""
        tokens = (tower.side // merge) ** 2
        return cls(decoder, tower, projector, tokens, merge, varies=MANY_TILES)

    @property
    def image_tokens(self) -> int:
        """Number of visual tokens of every image.

        Raises:
            UnsupportedModelError: Images differ in it.
        """
        if self.varies is not None or self.visual_tokens is None:
            raise UnsupportedModelError(
                "This needs the same number of visual tokens in all images, but in this model "
                f"{self.varies}. Say how large the image is, where that can be said: --image of "
                "pore bench and pore flops, `visual` of pore.schedule, `inputs` of "
                "pore.bench.measure."
            )
        return self.visual_tokens

    @property
    def tower_layers(self) -> int:
        """Layers of the vision tower.

        Raises:
            UnsupportedModelError: The tower's type is not known here.
        """
        if self.tower is None:
            raise UnsupportedModelError("The sizes of this model's vision tower are not known.")
        return self.tower.layers
