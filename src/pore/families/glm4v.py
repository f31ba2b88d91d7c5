"""GLM-4V: as Qwen-VL, but videos have the placeholder of images."""

from __future__ import annotations

from typing import Any

from torch import nn

from pore.cost.decoders import DecoderShape
from pore.cost.reading import size
from pore.cost.shapes import ANY_SIZE, ModelShape
from pore.cost.towers import tower_of
from pore.families.qwen_vl import QwenVL


class Glm4V(QwenVL):
    """`Glm4vForConditionalGeneration` (GLM-4.1V), GLM-4.5V, GLM-4.6V and GLM-OCR.

    Images and videos share one placeholder, so a prompt cannot contain both.
    """

    name = "GLM-4V"
    model_types = ("glm4v", "glm46v", "glm4v_moe", "glm_ocr")

    def token_features(self, model: nn.Module) -> nn.Module:
        """The convolution before the projector, which makes one token from a square of patches."""
        return self.tower(model).downsample  # type: ignore[return-value]

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """Squares of patches convolved, a matrix and a gated MLP."""
        vision, tower = config.vision_config, tower_of(config)
        merge, out = size(vision, "spatial_merge_size"), size(vision, "out_hidden_size")
        if vision.model_type == "glm_ocr_vision":
            wide = out * tower.channels
        else:
            wide = size(vision, "intermediate_size")
        projector = out * (tower.hidden * merge**2 + out + 3 * wide)
        return ModelShape(decoder, tower, projector, None, merge, varies=ANY_SIZE)

    def video_token(self, model: nn.Module) -> int:
        """The placeholder of images, which is not the video token of the config."""
        config: Any = model.config
        return int(config.image_token_id)
