"""GLM-4V and its successors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cases.base import of, since
from cases.qwen_vl import LATER_TOWER, Qwen3VL


class Glm4V(Qwen3VL):
    """Videos have the placeholder of images; prompts have either images or videos."""

    name = "GLM-4V"
    beams = since("5.18")  # before, it lost count of the images when it repeated samples
    deepstack = False
    videos = "videos"
    config, kind = "Glm4vConfig", "Glm4vForConditionalGeneration"
    text = "Glm4vTextConfig"
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}  # noqa: RUF012
    vision = LATER_TOWER | {"image_size": 32}
    start, end = 104, 105  # of a video

    def video_ids(self, video: int) -> list[int]:
        frames = super().video_ids(video)
        return [self.start, *(100 if i == 101 else i for i in frames), self.end]

    def extra(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        in_video = (ids == self.start).cumsum(1) > (ids == self.end).cumsum(1)
        return {"mm_token_type_ids": (ids == 100) * (1 + in_video.int())}

    @property
    def video_placeholder(self) -> int:
        return self.placeholder


class Glm45V(Glm4V):
    name = "GLM-4.5V"
    cousin = True
    config, kind = "Glm4vMoeConfig", "Glm4vMoeForConditionalGeneration"
    text = "Glm4vMoeTextConfig"
    rope = Glm4V.rope | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    sizes: dict[str, Any] = {  # noqa: RUF012
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }


class Glm46V(Glm4V):
    name = "GLM-4.6V"
    cousin = True
    config, kind = "Glm46VConfig", "Glm46VForConditionalGeneration"


class GlmOcr(Glm4V):
    name = "GLM-OCR"
    cousin = True
    config, kind = "GlmOcrConfig", "GlmOcrForConditionalGeneration"
    text = "GlmOcrTextConfig"


PUBLISHED = {
    "GLM-4V": of("Glm4vConfig"),
    "GLM-4.5V": of("Glm4vMoeConfig"),
    "GLM-4.6V": of("Glm46VConfig"),
    "GLM-OCR": of("GlmOcrConfig"),
}
