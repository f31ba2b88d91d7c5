"""Drawing a scene: its objects over a textured background."""

from __future__ import annotations

import numpy as np

from pore.embedded.glyphs import glyphs
from pore.embedded.splits import Split, generator
from pore.embedded.things import BOX, COLORS, LETTERS, SHAPES, SIDE, SIZES, Thing

Image = np.ndarray


def opacity(thing: Thing) -> Image:
    """Opacity of an object as a ``(16, 16)`` array of uint8, its centre at ``[8, 8]``."""
    found: Image
    if thing.category == "digit":
        found = glyphs()["digits"][thing.sample]
    elif thing.category == "shape":
        found = glyphs()["shapes"][SHAPES.index(thing.name), SIZES.index(thing.size)]
    else:
        found = glyphs()["letters"][LETTERS.index(thing.name), SIZES.index(thing.size)]
    return found


def draw(
    split: Split, index: int, things: tuple[Thing, ...], size: tuple[int, int] = (SIDE, SIDE)
) -> Image:
    """Draw objects over the background of scene ``index``, as ``(height, width, 3)`` uint8.

    `size` is (width, height) in pixels, each anything up to the side of a texture. Integers all the
    way, so that every machine draws the same picture.
    """
    width, height = size
    rng = generator(split, index, 1)
    textures = glyphs()["textures"]
    side = textures.shape[-1] + 1
    rooms = (len(textures), side - height, side - width, 4)
    which, top, left, flip = rng.integers(rooms).tolist()
    texture = textures[which, top : top + height, left : left + width]
    texture = texture[:: 1 - 2 * (flip & 1), :: 1 - (flip & 2)].astype(np.int32)
    base = rng.integers(15, 56, 3)
    image = base + (texture[..., None] * rng.integers(20, 71, 3) >> 8)
    half = BOX // 2
    for thing in things:
        window = image[thing.y - half : thing.y + half, thing.x - half : thing.x + half]
        color = np.clip(np.add(COLORS[thing.color], thing.tint), 0, 255)
        alpha = opacity(thing)[..., None].astype(np.int32)
        window += (color - window) * alpha // 255
    return image.astype(np.uint8)
