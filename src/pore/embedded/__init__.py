"""A small LLaVA that was really trained, the same for videos, and the scenes of both.

A checkpoint is a standard folder: a CLIP tower, an MLP projector and a LLaMA decoder, with
processor, tokenizer and chat template. See ``docs/embedded-model.md``.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "EMBEDDED",
    "EMBEDDED_VIDEO",
    "TAUGHT_LAYER",
    "embedded_model",
    "embedded_video_model",
]

EMBEDDED = "embedded"
"""What the model is called, in place of a hub id or folder."""

EMBEDDED_VIDEO = "embedded-video"
"""What the model of videos is called."""

TAUGHT_LAYER = 4
"""The decoder layer whose attention was supervised in both models, unlike in real models. Methods
that read it or layers above it get better attention than they would elsewhere."""


def embedded_model() -> str:
    """Path of the checkpoint folder that ships with the package.

    Example:
        >>> from transformers import AutoProcessor, LlavaForConditionalGeneration
        >>> model = LlavaForConditionalGeneration.from_pretrained(embedded_model())
        >>> processor = AutoProcessor.from_pretrained(embedded_model())
    """
    return str(Path(__file__).parent / "checkpoint")


def embedded_video_model() -> str:
    """Path of the checkpoint folder of the model of videos, a LLaVA-NeXT-Video.

    Its processor needs torchvision; `pore.data.loading.load_model` does without.
    """
    return str(Path(__file__).parent / "video_checkpoint")
