"""A small LLaVA that was really trained, and the scenes it was trained on.

The checkpoint is a standard folder: a CLIP tower, an MLP projector and a LLaMA decoder, with
processor, tokenizer and chat template. See ``docs/embedded-model.md``.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["EMBEDDED", "TAUGHT_LAYER", "embedded_model"]

EMBEDDED = "embedded"
"""What the model is called, in place of a hub id or folder."""

TAUGHT_LAYER = 4
"""The decoder layer whose attention was supervised in training, unlike in real models. Methods that
read it or layers above it get better attention than they would elsewhere."""


def embedded_model() -> str:
    """Path of the checkpoint folder that ships with the package.

    Example:
        >>> from transformers import AutoProcessor, LlavaForConditionalGeneration
        >>> model = LlavaForConditionalGeneration.from_pretrained(embedded_model())
        >>> processor = AutoProcessor.from_pretrained(embedded_model())
    """
    return str(Path(__file__).parent / "checkpoint")
