"""Conversations as OpenAI's clients write them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import PIL.Image


def picture(seed: int, side: int = 40) -> PIL.Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def data_url(image: PIL.Image.Image) -> str:
    """A picture as a data URL."""
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def user(text: str, *images: PIL.Image.Image) -> dict[str, Any]:
    """A user's message with images before its text."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
