"""One tiny random model of every family, made from its own config class, with prompts for it."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from helpers.models import IMAGE, PAD, SIDE, N, in_float64, tiny_llava, tiny_siglip_llava

TEXT = range(3, 60)
"""Token ids of text."""
LAYERS = 6


def since(version: str) -> bool:
    """Whether transformers can what it could not before a version."""
    return Version(transformers.__version__) >= Version(version)


class Case(ABC):
    """A family: how to make a model of it and what its prompts look like.

    A prompt is a list of text token ids, in which a number below 0 stands for image -1 - number,
    and one of -100 or below for video -100 - number.
    """

    name: str
    layers: int = LAYERS
    tiled = False
    """Whether images come in several grids."""
    deepstack: bool = False
    """Whether the first decoder layers add features to the visual tokens."""
    videos: str | None = None
    """Whether there are "videos", also "mixed" with images in one prompt."""
    beams: bool = True
    """Whether transformers itself can search with beams; Llama 4 cannot in 5.23."""
    static: bool = True
    """Whether transformers itself can generate with a static cache."""
    counted: bool = True
    """Whether FLOPs are known."""
    close: float = 2e-5
    """Tolerance: the norms and rotary tables of most families go through float32."""

    @abstractmethod
    def build(self) -> Any:
        """A model in float64."""

    @abstractmethod
    def image_ids(self, image: int) -> list[int]:
        """Token ids that stand for an image in a prompt."""

    @abstractmethod
    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        """What the processor gives for these images, in the order of the prompts."""

    def content(self, image: int) -> list[bool]:
        """Which of `image_ids` stand for patches."""
        return [token == self.placeholder for token in self.image_ids(image)]

    def video_ids(self, video: int) -> list[int]:
        """Token ids that stand for a video in a prompt."""
        raise NotImplementedError

    def video_content(self, video: int) -> list[bool]:
        """Which of `video_ids` stand for patches."""
        return [token == self.video_placeholder for token in self.video_ids(video)]

    def encode_videos(self, videos: Sequence[int]) -> dict[str, Tensor]:
        """What the processor gives for these videos, in the order of the prompts."""
        raise NotImplementedError

    def extra(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Further inputs that the processor gives."""
        return {}

    def answered(self, ids: Tensor, mask: Tensor, count: int) -> dict[str, Tensor]:
        """`extra` of a prompt and the `count` tokens of an answer behind it."""
        return self.extra(ids, mask)

    @cache  # noqa: B019 - cases live as long as the tests
    def model(self) -> Any:
        torch.manual_seed(0)
        made = self.build().eval()
        made.generation_config.pad_token_id = PAD
        made.generation_config.eos_token_id = None
        return made

    def row(self, prompt: Sequence[int]) -> list[int]:
        """The token ids of a prompt."""
        ids: list[int] = []
        for token in prompt:
            if token >= 0:
                ids.append(token)
            else:
                ids += self.image_ids(-1 - token) if token > -100 else self.video_ids(-100 - token)
        return ids

    def inputs(self, prompts: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
        """Model inputs of several prompts, padded on a side."""
        rows = [self.row(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        fill = [[PAD] * (longest - len(row)) for row in rows]
        pairs = list(zip(rows, fill, strict=True))
        ids = torch.tensor([f + r if side == "left" else r + f for r, f in pairs])
        marks = [([1] * len(r), [0] * len(f)) for r, f in pairs]
        mask = torch.tensor([f + r if side == "left" else r + f for r, f in marks])
        images = [-1 - token for prompt in prompts for token in prompt if -100 < token < 0]
        videos = [-100 - token for prompt in prompts for token in prompt if token <= -100]
        found = {"input_ids": ids, "attention_mask": mask, **self.extra(ids, mask)}
        found |= self.encode(images) if images else {}
        return found | (self.encode_videos(videos) if videos else {})

    def visual(self, prompts: Sequence[Sequence[int]], side: str = "left") -> Tensor:
        """(B, L) bool, True at the tokens of `inputs` that stand for patches."""
        rows = []
        for prompt in prompts:
            row: list[bool] = []
            for token in prompt:
                if token >= 0:
                    row.append(False)
                elif token > -100:
                    row += self.content(-1 - token)
                else:
                    row += self.video_content(-100 - token)
            rows.append(row)
        longest = max(map(len, rows))
        fill = [[False] * (longest - len(row)) for row in rows]
        pairs = zip(rows, fill, strict=True)
        return torch.tensor([f + r if side == "left" else r + f for r, f in pairs])

    @property
    def placeholder(self) -> int:
        """The token id of visual content."""
        return int(self.model().config.image_token_id)

    @property
    def video_placeholder(self) -> int:
        """The token id of visual content of videos."""
        return int(self.model().config.video_token_id)


def noise(seed: int, *shape: int) -> Tensor:
    """Pixels of an image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def text_config(kind: str, **more: Any) -> Any:
    """A tiny decoder: 4 heads in groups of 2, sharp attention."""
    return getattr(transformers, kind)(
        **{
            "vocab_size": 120,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **more,
        }
    )


TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "initializer_range": 0.3,
}
"""A tower of 8 x 8 patches."""


class Llava(Case):
    name = "LLaVA-1.5"

    def build(self) -> Any:
        return tiny_llava(layers=LAYERS, tower_layers=4)

    def image_ids(self, image: int) -> list[int]:
        return [IMAGE] * N

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([noise(i, 3, 8 * SIDE, 8 * SIDE) for i in images])}


class LlavaSiglip(Llava):
    """A tower without a CLS token."""

    name = "LLaVA-1.5 with SigLIP"

    def build(self) -> Any:
        return tiny_siglip_llava(layers=LAYERS)


class LlavaNext(Case):
    name = "LLaVA-NeXT"
    config, kind = "LlavaNextConfig", "LlavaNextForConditionalGeneration"
    text, tower = "LlamaConfig", "clip_vision_model"
    tiled = True
    sizes = ((60, 50), (20, 60))

    def build(self) -> Any:
        tower = {
            "model_type": self.tower,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 16,
            "vision_use_head": False,
            "initializer_range": 0.3,
        }
        config = getattr(transformers, self.config)(
            text_config=text_config(self.text).to_dict(),
            vision_config=tower,
            image_token_index=IMAGE,
            video_token_index=101,
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        )
        kind = getattr(transformers, self.kind)
        return in_float64(kind._from_config(config, dtype=torch.float64))

    def image_ids(self, image: int) -> list[int]:
        return [IMAGE] * (72, 34)[image % 2]

    def content(self, image: int) -> list[bool]:
        rows, columns = ((8, 6), (4, 8))[image % 2]
        base = [True] * 16
        if image % 2:  # 20 x 60 on 32 x 64: 21 pixels high, so rows 0 and 3 show nothing else
            rows = 2
        return base + ([True] * columns + [False]) * rows

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        pixels = torch.stack([noise(i, 5, 3, 32, 32) for i in images])
        sizes = torch.tensor([self.sizes[i % 2] for i in images])
        return {"pixel_values": pixels, "image_sizes": sizes}


class LlavaOnevision(LlavaNext):
    name = "LLaVA-OneVision"
    config, kind = "LlavaOnevisionConfig", "LlavaOnevisionForConditionalGeneration"
    text, tower = "Qwen2Config", "siglip_vision_model"
    videos = "mixed"

    def video_ids(self, video: int) -> list[int]:
        return [101] * 9

    def video_content(self, video: int) -> list[bool]:
        return [True] * (len(self.video_ids(video)) - 1) + [False]

    def encode_videos(self, videos: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values_videos": torch.stack([noise(50 + i, 2, 3, 32, 32) for i in videos])}


class LlavaNextVideo(LlavaOnevision):
    name = "LLaVA-NeXT-Video"
    config, kind = "LlavaNextVideoConfig", "LlavaNextVideoForConditionalGeneration"
    text, tower = "LlamaConfig", "clip_vision_model"

    def video_ids(self, video: int) -> list[int]:
        return [101] * 8

    def video_content(self, video: int) -> list[bool]:
        return [True] * 8


class VideoLlava(Case):
    """Frames have a CLS token."""

    name = "Video-LLaVA"
    videos = "mixed"

    def build(self) -> Any:
        config = transformers.VideoLlavaConfig(
            text_config=text_config("LlamaConfig").to_dict(),
            vision_config={"model_type": "clip_vision_model", **TOWER, "patch_size": 8}
            | {"num_hidden_layers": 4, "projection_dim": 16},
            image_token_index=IMAGE,
            video_token_index=101,
        )
        kind = transformers.VideoLlavaForConditionalGeneration
        return in_float64(kind._from_config(config, dtype=torch.float64))

    def image_ids(self, image: int) -> list[int]:
        return [IMAGE] * 16

    def video_ids(self, video: int) -> list[int]:
        return [101] * (2 * 17)

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        named = inspect.signature(self.model().model.forward).parameters
        name = "pixel_values" if "pixel_values" in named else "pixel_values_images"
        return {name: torch.stack([noise(i, 3, 32, 32) for i in images])}

    def encode_videos(self, videos: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values_videos": torch.stack([noise(50 + i, 2, 3, 32, 32) for i in videos])}


class Qwen2VL(Case):
    name = "Qwen2-VL"
    config, kind = "Qwen2VLConfig", "Qwen2VLForConditionalGeneration"
    text = "Qwen2VLTextConfig"
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}  # noqa: RUF012
    sizes: dict[str, Any] = {}  # noqa: RUF012
    grids = ((1, 8, 12), (1, 6, 6))
    video_grids = ((2, 4, 6), (3, 4, 4))
    videos = "mixed"
    vision: dict[str, Any] = {  # noqa: RUF012
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "initializer_range": 0.3,
    }

    def build(self) -> Any:
        config = getattr(transformers, self.config)(
            text_config=text_config(self.text, rope_parameters=self.rope, **self.sizes).to_dict(),
            vision_config=dict(self.vision),  # 5.16 writes into it
            image_token_id=100,
            video_token_id=101,
            vision_start_token_id=102,
            vision_end_token_id=103,
        )
        kind = getattr(transformers, self.kind)
        # Grouped matrix products know no float64.
        return kind._from_config(config, dtype=torch.float64, experts_implementation="eager")

    def image_ids(self, image: int) -> list[int]:
        frames, height, width = self.grids[image % 2]
        return [102, *[100] * (frames * height * width // 4), 103]

    def video_ids(self, video: int) -> list[int]:
        frames, height, width = self.video_grids[video % 2]
        return [102, *[101] * (frames * height * width // 4), 103]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        grids = [self.grids[i % 2] for i in images]
        return {"pixel_values": self.pixels(images, grids), "image_grid_thw": torch.tensor(grids)}

    def encode_videos(self, videos: Sequence[int]) -> dict[str, Tensor]:
        grids = [self.video_grids[i % 2] for i in videos]
        pixels = self.pixels([50 + i for i in videos], grids)
        return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor(grids)}

    def pixels(self, seeds: Sequence[int], grids: Sequence[tuple[int, int, int]]) -> Tensor:
        size = 3 * self.vision["temporal_patch_size"] * self.vision["patch_size"] ** 2
        each = zip(seeds, grids, strict=True)
        return torch.cat([noise(seed, t * h * w, size) for seed, (t, h, w) in each])

    def extra(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == 100).int() + 2 * (ids == 101).int()}


class Qwen25VL(Qwen2VL):
    """The tower attends in windows of 2 x 2 tokens, in its last block to the whole image."""

    name = "Qwen2.5-VL"
    config, kind = "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"
    text = "Qwen2_5_VLTextConfig"
    vision: dict[str, Any] = {  # noqa: RUF012
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "initializer_range": 0.3,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }


class Qwen3VL(Qwen2VL):
    """Three decoder layers add features of lower tower blocks; methods prune before and within."""

    name = "Qwen3-VL"
    deepstack = True
    config, kind = "Qwen3VLConfig", "Qwen3VLForConditionalGeneration"
    text = "Qwen3VLTextConfig"
    vision: dict[str, Any] = {  # noqa: RUF012
        "depth": 4,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "initializer_range": 0.3,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    }

    def video_ids(self, video: int) -> list[int]:
        frames, height, width = self.video_grids[video % 2]
        return [
            i for t in range(frames) for i in (30 + t, 102, *[101] * (height * width // 4), 103)
        ]


class Qwen35(Qwen3VL):
    """Every other decoder layer is recurrent, in float32."""

    name = "Qwen3.5"
    beams = since("5.21") or not since("5.18")  # between, it got features of images wrong
    close = 5e-4
    deepstack = False
    config, kind = "Qwen3_5Config", "Qwen3_5ForConditionalGeneration"
    text = "Qwen3_5TextConfig"
    sizes: dict[str, Any] = {  # noqa: RUF012
        "initializer_range": 0.2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
    }
    rope = Qwen3VL.rope | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    vision = {k: v for k, v in Qwen3VL.vision.items() if k[:9] != "deepstack"}  # noqa: RUF012


class Glm4V(Qwen3VL):
    """Videos have the placeholder of images, and come without any."""

    name = "GLM-4V"
    beams = since("5.18")  # before, it lost count of the images when it repeated samples
    deepstack = False
    videos = "videos"
    config, kind = "Glm4vConfig", "Glm4vForConditionalGeneration"
    text = "Glm4vTextConfig"
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}  # noqa: RUF012
    vision: dict[str, Any] = {  # noqa: RUF012
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "image_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "initializer_range": 0.3,
    }
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


EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


class Qwen3VLMoE(Qwen3VL):
    name = "Qwen3-VL-MoE"
    config, kind = "Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration"
    text, sizes = "Qwen3VLMoeTextConfig", EXPERTS


class Qwen35MoE(Qwen35):
    name = "Qwen3.5-MoE"
    config, kind = "Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration"
    text = "Qwen3_5MoeTextConfig"
    sizes = Qwen35.sizes | EXPERTS | {"shared_expert_intermediate_size": 16}


class Glm45V(Glm4V):
    name = "GLM-4.5V"
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
    config, kind = "Glm46VConfig", "Glm46VForConditionalGeneration"


class GlmOcr(Glm4V):
    name = "GLM-OCR"
    config, kind = "GlmOcrConfig", "GlmOcrForConditionalGeneration"
    text = "GlmOcrTextConfig"


class InternVL(Case):
    """Image 0 is two tiles and the whole view, image 1 the whole view alone."""

    name = "InternVL"
    beams = since("5.18")  # before, it repeated tiles one by one, and mixed images up
    tiled = True

    def build(self) -> Any:
        tower = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "initializer_range": 0.3,
        }
        config = transformers.InternVLConfig(
            text_config=text_config("Qwen2Config").to_dict(),
            vision_config=tower,
            image_token_id=IMAGE,
            image_seq_length=16,
        )
        kind = transformers.InternVLForConditionalGeneration
        return kind._from_config(config, dtype=torch.float64)

    def image_ids(self, image: int) -> list[int]:
        return [91, *[IMAGE] * (16 if image % 2 else 48), 92]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        tiles = [noise(10 * i + k, 3, 32, 32) for i in images for k in range(1 if i % 2 else 3)]
        return {"pixel_values": torch.stack(tiles)}


def _lend_llama4_what_it_lacks() -> None:
    """Let Llama 4 run on transformers 5.24.0, where it fails unpruned too.

    Its forward reads `image_outputs` of its decoder's output, which has none.
    """
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    if since("5.24") and not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        MoeCausalLMOutputWithPast.image_outputs = None


class Llama4(Case):
    """Image 0 is two tiles and the whole view, image 1 the whole view alone."""

    name = "Llama 4"
    tiled = True
    beams = False
    static = since("5.20")
    sizes: dict[str, Any] = {}  # noqa: RUF012

    def build(self) -> Any:
        tower = {
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "initializer_range": 0.3,
        }
        text = text_config(
            "Llama4TextConfig",
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            **self.sizes,
        )
        config = transformers.Llama4Config(
            text_config=text.to_dict(),
            vision_config=tower,
            boi_token_index=101,
            eoi_token_index=102,
            image_token_index=100,
        )
        kind = transformers.Llama4ForConditionalGeneration
        _lend_llama4_what_it_lacks()
        return kind._from_config(config, dtype=torch.float64)

    def image_ids(self, image: int) -> list[int]:
        tile = [100] * 16
        tiles = [] if image % 2 else [*tile, 103, *tile, 104]
        return [101, *tiles, 105, *tile, 102]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        tiles = [noise(10 * i + k, 3, 32, 32) for i in images for k in range(1 if i % 2 else 3)]
        return {"pixel_values": torch.stack(tiles)}


class SmolVLM(Case):
    """Image 0 is two tiles and the whole view, image 1 the whole view alone."""

    name = "SmolVLM"
    config, kind = "SmolVLMConfig", "SmolVLMForConditionalGeneration"
    tiled = True

    def build(self) -> Any:
        config = getattr(transformers, self.config)(
            text_config=text_config("LlamaConfig").to_dict(),
            vision_config=TOWER,
            scale_factor=2,
            image_token_id=IMAGE,
        )
        kind = getattr(transformers, self.kind)
        return in_float64(kind._from_config(config, dtype=torch.float64))

    def image_ids(self, image: int) -> list[int]:
        fake, whole, newline = 91, 92, 93
        tile = [IMAGE] * 16
        single = [fake, whole, *tile, fake]
        return single if image % 2 else [fake, 94, *tile, fake, 95, *tile, newline, *single]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        tiles = [noise(10 * i + k, 3, 32, 32) for i in images for k in range(1 if i % 2 else 3)]
        return {"pixel_values": torch.stack(tiles)}

    def inputs(self, prompts: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
        """Tiles are given by sample, filled up with zeros."""
        found = super().inputs(prompts, side)
        if "pixel_values" in found:
            tiles = found["input_ids"].eq(IMAGE).sum(1) // 16
            of_sample = found["pixel_values"].split(tiles.tolist())
            found["pixel_values"] = nn.utils.rnn.pad_sequence(of_sample, batch_first=True)
        return found


class Idefics3(SmolVLM):
    name = "Idefics3"
    config, kind = "Idefics3Config", "Idefics3ForConditionalGeneration"


class Gemma3(Case):
    """With prompts longer than the sliding window, which still shows some of every image."""

    name = "Gemma 3"
    static = since("5.20")

    def build(self) -> Any:
        kinds = ["sliding_attention", "sliding_attention", "full_attention"] * (LAYERS // 3)
        config = transformers.Gemma3Config(
            text_config=text_config(
                "Gemma3TextConfig",
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=32,
                layer_types=kinds,
            ).to_dict(),
            vision_config={"model_type": "siglip_vision_model", **TOWER},
            mm_tokens_per_image=16,
            image_token_index=100,
            boi_token_index=101,
            eoi_token_index=102,
        )
        kind = transformers.Gemma3ForConditionalGeneration
        model = kind._from_config(config, dtype=torch.float64)
        nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
        return model

    def image_ids(self, image: int) -> list[int]:
        return [101, *[100] * 16, 102]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([noise(i, 3, 32, 32) for i in images])}

    def extra(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": (ids == 100).int()}


class AyaVision(Case):
    """Image 0 is two tiles and the whole view, image 1 the whole view alone; sliding windows."""

    name = "Aya Vision"
    tiled = True
    beams = since("5.18")  # before, it repeated tiles one by one, and mixed images up
    config, kind = "AyaVisionConfig", "AyaVisionForConditionalGeneration"
    more: dict[str, Any] = {"image_token_index": IMAGE}  # noqa: RUF012

    def build(self) -> Any:
        kinds = ["sliding_attention", "sliding_attention", "full_attention"] * (LAYERS // 3)
        config = getattr(transformers, self.config)(
            text_config=text_config(
                "Cohere2Config", sliding_window=32, layer_types=kinds, logit_scale=1.0
            ).to_dict(),
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER},
            **self.more,
        )
        return getattr(transformers, self.kind)._from_config(config, dtype=torch.float64)

    def image_ids(self, image: int) -> list[int]:
        tile = [IMAGE] * 16
        tiles = [] if image % 2 else [103, *tile, 104, *tile]
        return [101, *tiles, 105, *tile, 102]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        tiles = [noise(10 * i + k, 3, 32, 32) for i in images for k in range(1 if i % 2 else 3)]
        return {"pixel_values": torch.stack(tiles)}


class Cohere2Vision(AyaVision):
    """A line break behind every tile."""

    name = "Command A Vision"
    config, kind = "Cohere2VisionConfig", "Cohere2VisionForConditionalGeneration"
    more: dict[str, Any] = {  # noqa: RUF012
        "image_token_id": IMAGE,
        "alignment_intermediate_size": 32,
    }

    def image_ids(self, image: int) -> list[int]:
        tiles = [*[IMAGE] * 16, 103] * (1 if image % 2 else 3)
        return [101, *tiles, 102]


class Mistral3(Case):
    """Every row of an image ends with a token, the last one with another."""

    name = "Mistral 3"
    merge = 2
    grids = ((4, 6), (3, 3))
    text, sizes = "MistralConfig", {"sliding_window": None}

    def build(self) -> Any:
        config = transformers.Mistral3Config(
            text_config=text_config(self.text, **self.sizes).to_dict(),
            vision_config=self.tower(),
            image_token_index=100,
            vision_feature_layer=-1,
            spatial_merge_size=self.merge,
        )
        kind = transformers.Mistral3ForConditionalGeneration
        return kind._from_config(config, dtype=torch.float64)

    def tower(self) -> dict[str, Any]:
        return {"model_type": "pixtral", **TOWER, "image_size": 64}

    def image_ids(self, image: int) -> list[int]:
        height, width = self.grids[image % 2]
        return [*([*[100] * width, 101] * height)[:-1], 102]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        """Images are padded to the largest."""
        sizes = [[4 * self.merge * side for side in self.grids[i % 2]] for i in images]
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        pixels = torch.zeros(len(images), 3, height, width, dtype=torch.float64)
        for one, i, size in zip(pixels, images, sizes, strict=True):
            one[:, : size[0], : size[1]] = noise(i, 3, *size)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


class Pixtral(Mistral3):
    """A LLaVA with another tower."""

    name = "Pixtral"
    merge = 1

    def build(self) -> Any:
        config = transformers.LlavaConfig(
            text_config=text_config(self.text, **self.sizes).to_dict(),
            vision_config=self.tower(),
            image_token_index=100,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        kind = transformers.LlavaForConditionalGeneration
        return kind._from_config(config, dtype=torch.float64)


class Ministral3(Mistral3):
    """Queries are scaled by their positions, here from the 16th on."""

    name = "Ministral 3"
    text = "Ministral3Config"
    sizes: dict[str, Any] = {  # noqa: RUF012
        "sliding_window": None,
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 32.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        },
    }


class Mistral4(Ministral3):
    """The cache holds latent states of all heads in common; a mixture of experts."""

    name = "Mistral 4"
    text = "Mistral4Config"
    sizes: dict[str, Any] = {  # noqa: RUF012
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "rope_parameters": Ministral3.sizes["rope_parameters"] | {"partial_rotary_factor": 0.5},
    }

    def build(self) -> Any:
        model = super().build()
        # Grouped matrix products know no float64.
        model.set_experts_implementation("eager")
        return model


class LightOnOcr(Mistral3):
    """Rows of an image follow one another."""

    name = "LightOnOCR"
    text, sizes = "Qwen3Config", {"head_dim": 8}

    def build(self) -> Any:
        config = transformers.LightOnOcrConfig(
            text_config=text_config(self.text, **self.sizes).to_dict(),
            vision_config=self.tower(),
            image_token_id=100,
            spatial_merge_size=self.merge,
        )
        kind = transformers.LightOnOcrForConditionalGeneration
        return kind._from_config(config, dtype=torch.float64)

    def image_ids(self, image: int) -> list[int]:
        height, width = self.grids[image % 2]
        return [100] * (height * width)


class PaliGemma(Case):
    name = "PaliGemma"
    text = "GemmaConfig"
    sizes: dict[str, Any] = {}  # noqa: RUF012

    def build(self) -> Any:
        config = transformers.PaliGemmaConfig(
            text_config=text_config(self.text, head_dim=8, **self.sizes).to_dict(),
            vision_config={
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
                **TOWER,
                "patch_size": 8,
            },
            projection_dim=32,
            hidden_size=32,
            image_token_index=100,
        )
        kind = transformers.PaliGemmaForConditionalGeneration
        return kind._from_config(config, dtype=torch.float64)

    def image_ids(self, image: int) -> list[int]:
        return [100] * 16

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([noise(i, 3, 32, 32) for i in images])}

    def extra(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": torch.zeros_like(ids)}

    def answered(self, ids: Tensor, mask: Tensor, count: int) -> dict[str, Tensor]:
        """Tokens of the answer are no part of what sees each other."""
        behind = torch.arange(ids.shape[1]) >= ids.shape[1] - count
        return {"token_type_ids": behind.long().expand_as(ids)}


class PaliGemma2(PaliGemma):
    """Every other layer has a sliding window, shorter than the prompts, and logits are capped."""

    name = "PaliGemma 2"
    static = False
    text = "Gemma2Config"
    sizes: dict[str, Any] = {  # noqa: RUF012
        "query_pre_attn_scalar": 4,
        "sliding_window": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 30.0,
    }


class Gemma4(Case):
    """A small one: inputs for every layer, and the last two look at keys of layers 2 and 3."""

    name = "Gemma 4"
    counted = False
    grids = ((2, 6), (3, 3))
    ragged = (
        "num_frames_per_video" in inspect.signature(transformers.Gemma4Model.forward).parameters
    )
    """Whether videos may have several lengths."""
    # transformers 5.20 itself takes those, but does not hand them on to what needs them.
    lost = ragged and "num_frames_per_video=" not in inspect.getsource(
        transformers.Gemma4Model.forward
    )
    videos = None if lost else "mixed"
    video_grids = ((2, 2, 3), (3 if ragged else 2, 2, 2))
    patches, values, side = 48, 48, 2
    """The most of an image, numbers in each, and how many along a side become a token."""
    window = 32
    sizes: dict[str, Any] = {  # noqa: RUF012
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 120,
        "use_double_wide_mlp": True,
    }

    def build(self) -> Any:
        config = transformers.Gemma4Config(
            text_config=text_config(
                "Gemma4TextConfig",
                head_dim=8,
                global_head_dim=16,
                sliding_window=self.window,
                layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
                **self.sizes,
            ),
            vision_config=transformers.Gemma4VisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                patch_size=4,
                pooling_kernel_size=2,
                position_embedding_size=16,
                initializer_range=0.3,
            ),
            image_token_id=100,
            video_token_id=101,
            audio_token_id=102,
            boi_token_id=103,
            eoi_token_id=104,
        )
        kind = transformers.Gemma4ForConditionalGeneration
        # Grouped matrix products know no float64.
        model = kind._from_config(config, dtype=torch.float64, experts_implementation="eager")
        nn.init.normal_(model.model.vision_tower.patch_embedder.position_embedding_table, std=0.3)
        return model

    def image_ids(self, image: int) -> list[int]:
        height, width = self.grids[image % 2]
        return [103, *[100] * (height * width), 104]

    def video_ids(self, video: int) -> list[int]:
        frames, height, width = self.video_grids[video % 2]
        return [i for t in range(frames) for i in (30 + t, 103, *[101] * (height * width), 104)]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        pixels, positions = self.pixels(images, [self.grids[i % 2] for i in images])
        return {"pixel_values": pixels, "image_position_ids": positions}

    def encode_videos(self, videos: Sequence[int]) -> dict[str, Tensor]:
        sizes = [self.video_grids[i % 2] for i in videos]
        frames = [(height, width) for count, height, width in sizes for _ in range(count)]
        seeds = [
            50 + 10 * i + t for i, size in zip(videos, sizes, strict=True) for t in range(size[0])
        ]
        pixels, positions = self.pixels(seeds, frames)
        if not self.ragged:
            shape = (len(videos), -1, self.patches)
            pixels, positions = pixels.view(*shape, self.values), positions.view(*shape, 2)
            return {"pixel_values_videos": pixels, "video_position_ids": positions}
        return {
            "pixel_values_videos": pixels,
            "video_position_ids": positions,
            "num_frames_per_video": torch.tensor([count for count, *_ in sizes]),
        }

    def pixels(
        self, seeds: Sequence[int], grids: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Patches and where they lie, (x, y), filled up to the most that an image may have."""
        pixels = torch.zeros(len(grids), self.patches, self.values, dtype=torch.float64)
        positions = torch.full((len(grids), self.patches, 2), -1)
        for i, (seed, (height, width)) in enumerate(zip(seeds, grids, strict=True)):
            rows, columns = (torch.arange(self.side * n) for n in (height, width))
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            count = x.numel()
            positions[i, :count] = torch.stack([x.flatten(), y.flatten()], -1)
            pixels[i, :count] = noise(seed, count, self.values)
        return pixels, positions

    def extra(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == 100).int() + 2 * (ids == 101).int()}


class Gemma4MoE(Gemma4):
    """A large one: images see themselves where windows slide, keys are values in other layers."""

    name = "Gemma 4 with experts"
    static = since("5.23")  # 5.16 makes other masks for it
    sizes: dict[str, Any] = {  # noqa: RUF012
        "use_bidirectional_attention": "vision",
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    }


class Gemma4Unified(Gemma4):
    """Without a tower; images see themselves in every layer."""

    name = "Gemma 4 Unified"
    static = False  # its masks for that are not those of its forward
    side = 1
    patches, values = 12, 192

    def build(self) -> Any:
        config = transformers.Gemma4UnifiedConfig(
            text_config=text_config(
                "Gemma4UnifiedTextConfig",
                head_dim=8,
                global_head_dim=16,
                sliding_window=self.window,
                layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
                use_bidirectional_attention="vision",
            ),
            vision_config=transformers.Gemma4UnifiedVisionConfig(
                patch_size=4,
                pooling_kernel_size=2,
                mm_embed_dim=16,
                mm_posemb_size=16,
                output_proj_dims=16,
                initializer_range=0.3,
            ),
            image_token_id=100,
            video_token_id=101,
            audio_token_id=102,
            boi_token_id=103,
            eoi_token_id=104,
        )
        kind = transformers.Gemma4UnifiedForConditionalGeneration
        model = kind._from_config(config, dtype=torch.float64)
        nn.init.normal_(model.model.embed_vision.pos_embedding, std=0.3)
        return model


CASES: list[Case] = [
    Llava(),
    LlavaSiglip(),
    LlavaNext(),
    LlavaOnevision(),
    VideoLlava(),
    Qwen2VL(),
    Qwen25VL(),
    Qwen3VL(),
    Qwen35(),
    Glm4V(),
    InternVL(),
    Llama4(),
    SmolVLM(),
    Gemma3(),
    Mistral3(),
    Pixtral(),
    AyaVision(),
    PaliGemma(),
    PaliGemma2(),
    Gemma4(),
    Gemma4MoE(),
]

# Models whose adapter is that of a case above, and whose own code differs little.
COUSINS: list[Case] = [
    LlavaNextVideo(),
    Qwen3VLMoE(),
    Qwen35MoE(),
    Glm45V(),
    Glm46V(),
    GlmOcr(),
    Idefics3(),
    Ministral3(),
    Mistral4(),
    LightOnOcr(),
    Gemma4Unified(),
    Cohere2Vision(),
]
