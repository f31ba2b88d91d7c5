"""Photographs of real sizes, and each family's own processor with the settings of its checkpoints.

Processors are made in code, with a tokenizer that knows little more than their special tokens.
Models are random and tiny but for what decides how many visual tokens there are: the sizes of
images, patches and merging. Nothing in their towers mixes patches, so that a visual token changes
only where the picture changes that it shows.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from pore.families.registry import family_of

SIZES: dict[str, tuple[int, int]] = {
    "photograph": (512, 600),
    "portrait": (480, 1040),
    "panorama": (1900, 400),
    "tiny": (24, 17),
    "one pixel high": (250, 1),
    "one pixel wide": (1, 150),
    "one pixel": (1, 1),
    "4K": (3840, 2160),
}
"""(width, height) of the pictures, all made of one photograph."""


@cache
def photograph(name: str) -> Image.Image:
    """A picture of one of the `SIZES`: the photograph cropped to its shape, and resized.

    It is matplotlib's own of Grace Hopper, 512 by 600 pixels; the panorama is three of them side by
    side.
    """
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as file:
        whole = file.convert("RGB")
    width, height = SIZES[name]
    if width > 2 * height:
        tiled = Image.new("RGB", (3 * whole.width, whole.height))
        for i in range(3):
            tiled.paste(whole, (i * whole.width, 0))
        whole = tiled
    share = min(whole.width / width, whole.height / height)
    crop = (max(round(width * share), 1), max(round(height * share), 1))
    left, top = (whole.width - crop[0]) // 2, (whole.height - crop[1]) // 4
    box = (left, top, left + crop[0], top + crop[1])
    return whole.crop(box).resize((width, height), Image.Resampling.BICUBIC)


def marked(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The picture with its colours inverted in a box (left, top, right, bottom) of shares."""
    pixels = np.asarray(picture).copy()
    left, top, right, bottom = in_pixels(picture, box)
    pixels[top:bottom, left:right] = 255 * (pixels[top:bottom, left:right] < 128)
    return Image.fromarray(pixels)


def in_pixels(
    picture: Image.Image, box: tuple[float, float, float, float]
) -> tuple[int, int, int, int]:
    """A box of shares in whole pixels of a picture, at least one each way."""
    width, height = picture.size
    left, top = int(box[0] * width), int(box[1] * height)
    right, bottom = max(round(box[2] * width), left + 1), max(round(box[3] * height), top + 1)
    return left, top, right, bottom


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, newlines and special tokens.

    Args:
        special: Further special tokens.
        named: Special tokens that it has as attributes, such as image_token.
    """
    tags = [f"<row_{i}_col_{j}>" for i in range(1, 12) for j in range(1, 12)]
    words = ["<unk>", "<pad>", "<bos>", "look", "\n", "\n\n", "\n\n\n", *tags]
    words += [word for word in (*special, *named.values()) if word not in words]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Split(Regex(r"\n+|[^\s]+"), "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        extra_special_tokens=named,
    )
    made.add_tokens([*special, *named.values(), *tags], special_tokens=True)
    return made


TEMPLATE = (
    "{%% for message in messages %%}{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}%s{%% else %%} {{ part['text'] }}{%% endif %%}"
    "{%% endfor %%}{%% endfor %%}"
)


def processor(kind: Any, image_processor: Any, tokens: Any, image: str, **more: Any) -> Any:
    """A processor of a class of transformers, or of one of that name.

    Those with a video processor are made without one, which needs torchvision.
    """
    check = ProcessorMixin.check_argument_for_proper_class
    ProcessorMixin.check_argument_for_proper_class = lambda *_: None  # type: ignore[method-assign,assignment,misc]
    try:
        parts = {"image_processor": image_processor, "tokenizer": tokens, **more}
        made = getattr(transformers, kind) if isinstance(kind, str) else kind
        return made(**parts, chat_template=TEMPLATE % image)
    finally:
        ProcessorMixin.check_argument_for_proper_class = check  # type: ignore[method-assign]


TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16384,
    "pad_token_id": 1,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@dataclass(frozen=True, eq=False)
class Kind:
    """A family with its processor.

    Attributes:
        name: The family.
        checkpoint: Whose settings it has.
        processor: Makes the processor.
        model: Makes the model; it is given the tokenizer.
        kwargs: Further arguments of every call of the processor.
        refuses: Names of the `SIZES` that the processor itself refuses, with what it says.
        breaks: Names of those that the model itself fails on, with the reason.
    """

    name: str
    checkpoint: str
    processor: Callable[[], Any]
    model: Callable[[Any], Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    refuses: dict[str, str] = field(default_factory=dict)
    breaks: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


MIXES = {"out_proj", "o_proj", "projection_layer"}
"""Names of the layers through which attention in towers gives what it has found."""


@cache
def parts(kind: Kind) -> tuple[Any, Any]:
    """The processor and the model of a family."""
    made = kind.processor()
    torch.manual_seed(0)
    model = kind.model(made.tokenizer).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3)  # no layer of zeros
        if "language_model" not in name and not MIXES.isdisjoint(name.split(".")):
            nn.init.zeros_(weight)  # attention adds nothing
    return made, model


def _made(kind: str, config: Any) -> Any:
    return getattr(transformers, kind)._from_config(config, dtype=torch.float32)


def _config(kind: str, text: str, sizes: dict[str, Any] | None = None, **more: Any) -> Any:
    language = getattr(transformers, text)(**TEXT | (sizes or {}))
    return getattr(transformers, kind)(text_config=language.to_dict(), **more)


def _id(tokens: Any, name: str) -> int:
    found = tokens.convert_tokens_to_ids(name)
    assert isinstance(found, int)
    assert found != tokens.unk_token_id
    return found


# -- LLaVA ---------------------------------------------------------------------------------------


def _clip(side: int = 336, patch: int = 14) -> dict[str, Any]:
    sizes = {"image_size": side, "patch_size": patch, "projection_dim": 16}
    return {"model_type": "clip_vision_model", **TOWER, **sizes}


def _siglip(side: int = 384, patch: int = 14) -> dict[str, Any]:
    sizes = {"image_size": side, "patch_size": patch, "vision_use_head": False}
    return {"model_type": "siglip_vision_model", **TOWER, **sizes}


def _llava_tokens() -> Any:
    return tokenizer(image_token="<image>", video_token="<video>")


def _llava(pad: bool) -> Any:
    settings = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    images: Any
    if pad:  # as LLaVA-1.5 was trained
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        images = LlavaImageProcessorPil(do_pad=True, **settings)
    else:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        images = CLIPImageProcessorPil(**settings)
    more = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    more["num_additional_image_tokens"] = 1
    return processor("LlavaProcessor", images, _llava_tokens(), "<image>", **more)


def _llava_model(tokens: Any) -> Any:
    config = _config(
        *("LlavaConfig", "LlamaConfig"),
        vision_config=_clip(),
        vision_feature_layer=-1,
        image_token_index=_id(tokens, "<image>"),
    )
    return _made("LlavaForConditionalGeneration", config)


def _llava_siglip() -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    more: dict[str, Any] = {"patch_size": 14, "vision_feature_select_strategy": "full"}
    return processor("LlavaProcessor", images, _llava_tokens(), "<image>", **more)


def _llava_siglip_model(tokens: Any) -> Any:
    config = _config(
        *("LlavaConfig", "Qwen2Config"),
        vision_config=_siglip(),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=_id(tokens, "<image>"),
    )
    return _made("LlavaForConditionalGeneration", config)


def _next(kind: str) -> Any:
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    more: dict[str, Any] = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    more |= {"num_additional_image_tokens": 1}
    more |= {"video_processor": None} if "Video" in kind else {}
    return processor(f"{kind}Processor", images, _llava_tokens(), "<image>", **more)


def _next_model(kind: str, tokens: Any) -> Any:
    config = _config(
        *(f"{kind}Config", "LlamaConfig"),
        vision_config=_clip(),
        vision_feature_layer=-1,
        image_token_index=_id(tokens, "<image>"),
        video_token_index=_id(tokens, "<video>"),
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )
    return _made(f"{kind}ForConditionalGeneration", config)


def _onevision() -> Any:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    more: dict[str, Any] = {"num_image_tokens": 729, "vision_feature_select_strategy": "full"}
    return processor(
        *("LlavaOnevisionProcessor", LlavaOnevisionImageProcessorPil(), _llava_tokens()),
        *("<image>",),
        video_processor=None,
        **more,
    )


def _onevision_model(tokens: Any) -> Any:
    config = _config(
        *("LlavaOnevisionConfig", "Qwen2Config"),
        vision_config=_siglip(),
        vision_feature_layer=-1,
        image_token_index=_id(tokens, "<image>"),
        video_token_index=_id(tokens, "<video>"),
    )
    return _made("LlavaOnevisionForConditionalGeneration", config)


# -- Qwen-VL and GLM-4V --------------------------------------------------------------------------

_QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


def _qwen(kind: str, patch: int, least: int, most: int) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": least, "longest_edge": most}
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return processor(kind, images, tokenizer(**_QWEN), image, video_processor=None)


def _qwen_model(kind: str, text: str, tower: dict[str, Any], tokens: Any, **sizes: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = _config(
        *(f"{kind}Config", text, {"rope_parameters": rope, **sizes}),
        vision_config={"depth": 0, "num_heads": 2, "spatial_merge_size": 2, **tower},
        image_token_id=_id(tokens, "<|image_pad|>"),
        video_token_id=_id(tokens, "<|video_pad|>"),
        vision_start_token_id=_id(tokens, "<|vision_start|>"),
        vision_end_token_id=_id(tokens, "<|vision_end|>"),
    )
    return _made(f"{kind}ForConditionalGeneration", config)


_QWEN2 = {"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 1, "patch_size": 14}
_QWEN25 = {
    "hidden_size": 16,
    "out_hidden_size": 16,
    "intermediate_size": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [],
}
_QWEN3 = {
    "hidden_size": 16,
    "out_hidden_size": 16,
    "intermediate_size": 16,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [],
}
_QWEN35 = {k: v for k, v in _QWEN3.items() if k[:9] != "deepstack"}
_QWEN35_TEXT = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["full_attention"] * 2,
}
_RATIO = "absolute aspect ratio must be smaller than 200"
_THIN = {"one pixel high": _RATIO}

_GLM = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
}


def _glm(kind: str) -> Any:
    images: Any
    if kind == "Glm4v":
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

        images = Glm4vImageProcessorPil()
    else:
        from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

        images = Glm46VImageProcessorPil()
    image = "<|begin_of_image|><|image|><|end_of_image|>"
    return processor(f"{kind}Processor", images, tokenizer(**_GLM), image, video_processor=None)


def _glm_model(kind: str, tokens: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = _config(
        *(f"{kind}Config", "Glm4vTextConfig", {"rope_parameters": rope}),
        vision_config={
            "depth": 0,
            "hidden_size": 16,
            "out_hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "image_size": 336,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        image_token_id=_id(tokens, "<|image|>"),
        video_token_id=_id(tokens, "<|video|>"),
        image_start_token_id=_id(tokens, "<|begin_of_image|>"),
        image_end_token_id=_id(tokens, "<|end_of_image|>"),
        video_start_token_id=_id(tokens, "<|begin_of_video|>"),
        video_end_token_id=_id(tokens, "<|end_of_video|>"),
    )
    return _made(f"{kind}ForConditionalGeneration", config)


# -- tiles of squares of patches ------------------------------------------------------------------


def _internvl() -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    images = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1, max_patches=12
    )
    tokens = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    more: dict[str, Any] = {"image_seq_length": 256, "video_processor": None}
    return processor("InternVLProcessor", images, tokens, "<IMG_CONTEXT>", **more)


def _internvl_model(tokens: Any) -> Any:
    config = _config(
        *("InternVLConfig", "Qwen2Config"),
        vision_config={**TOWER, "image_size": 448, "patch_size": 14},
        image_token_id=_id(tokens, "<IMG_CONTEXT>"),
        image_seq_length=256,
    )
    return _made("InternVLForConditionalGeneration", config)


def _aya() -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    images = GotOcr2ImageProcessorPil(
        size={"height": 364, "width": 364}, crop_to_patches=True, min_patches=1, max_patches=12
    )
    marks = ("<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>")
    tiles = [f"TILE_{i}" for i in (*range(1, 13), "GLOBAL")]
    tokens = tokenizer(*marks, "TILE", *tiles, image_token="<image>")
    more: dict[str, Any] = {"patch_size": 28, "img_size": 364}
    return processor("AyaVisionProcessor", images, tokens, "<image>", **more)


def _aya_model(tokens: Any) -> Any:
    config = _config(
        *("AyaVisionConfig", "Cohere2Config"),
        vision_config=_siglip(364, 14),
        vision_feature_layer=-1,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        alignment_intermediate_size=32,
        image_token_index=_id(tokens, "<|IMG_PATCH|>"),
    )
    return _made("AyaVisionForConditionalGeneration", config)


_LLAMA4 = (
    "<|image|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)


def _llama4() -> Any:
    images = transformers.Llama4ImageProcessor(max_patches=16)
    return processor("Llama4Processor", images, tokenizer(*_LLAMA4), "<|image|>", patch_size=14)


def _llama4_model(tokens: Any) -> Any:
    config = _config(
        *("Llama4Config", "Llama4TextConfig"),
        {"head_dim": 8, "intermediate_size_mlp": 16, "num_local_experts": 2},
        vision_config={
            **TOWER,
            "intermediate_size": 64,
            "image_size": 336,
            "patch_size": 14,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        boi_token_index=_id(tokens, "<|image_start|>"),
        eoi_token_index=_id(tokens, "<|image_end|>"),
        image_token_index=_id(tokens, "<|patch|>"),
    )
    return _made("Llama4ForConditionalGeneration", config)


def _idefics3(kind: str, side: int, most: int, length: int) -> Any:
    images: Any
    if kind == "SmolVLM":
        from transformers.models.smolvlm import processing_smolvlm

        processing_smolvlm.num2words = str  # a package that only videos need
        from transformers.models.smolvlm.image_processing_pil_smolvlm import (
            SmolVLMImageProcessorPil as Processor,
        )
    else:
        from transformers.models.idefics3.image_processing_pil_idefics3 import (  # type: ignore[assignment]
            Idefics3ImageProcessorPil as Processor,
        )
    images = Processor(size={"longest_edge": most}, max_image_size={"longest_edge": side})
    tokens = tokenizer(
        "<end_of_utterance>",
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )
    more: dict[str, Any] = {"image_seq_len": length}
    if kind == "SmolVLM":  # what its chat template reads
        more["video_processor"] = SimpleNamespace(num_frames=1, fps=1)
    return processor(f"{kind}Processor", images, tokens, "<image>", **more)


def _idefics3_model(kind: str, side: int, patch: int, scale: int, tokens: Any) -> Any:
    config = _config(
        *(f"{kind}Config", "LlamaConfig"),
        vision_config={**TOWER, "image_size": side, "patch_size": patch},
        scale_factor=scale,
        image_token_id=_id(tokens, "<image>"),
    )
    return _made(f"{kind}ForConditionalGeneration", config)


# -- Gemma ----------------------------------------------------------------------------------------

_GEMMA = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}


def _gemma3() -> Any:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    images = Gemma3ImageProcessorPil(
        size={"height": 896, "width": 896},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    tokens = tokenizer(**_GEMMA)
    more: dict[str, Any] = {"image_seq_length": 256}
    return processor("Gemma3Processor", images, tokens, "<start_of_image>", **more)


def _gemma3_model(tokens: Any) -> Any:
    config = _config(
        *("Gemma3Config", "Gemma3TextConfig"),
        {"head_dim": 8, "layer_types": ["full_attention"] * 2},
        vision_config=_siglip(896, 14),
        mm_tokens_per_image=256,
        image_token_index=_id(tokens, "<image_soft_token>"),
        boi_token_index=_id(tokens, "<start_of_image>"),
        eoi_token_index=_id(tokens, "<end_of_image>"),
    )
    return _made("Gemma3ForConditionalGeneration", config)


_GEMMA4 = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


def _gemma4() -> Any:
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    images = Gemma4ImageProcessorPil(patch_size=16, max_soft_tokens=280, pooling_kernel_size=3)
    parts = {"feature_extractor": None, "video_processor": None}
    return processor("Gemma4Processor", images, tokenizer(**_GEMMA4), "<|image|>", **parts)


def _gemma4_model(tokens: Any) -> Any:
    sizes = {"head_dim": 8, "global_head_dim": 8, "layer_types": ["full_attention"] * 2}
    small = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": TEXT["vocab_size"]}
    config = _config(
        *("Gemma4Config", "Gemma4TextConfig", {**sizes, **small, "num_kv_shared_layers": 0}),
        vision_config={
            "model_type": "gemma4_vision",
            **TOWER,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 16,
            "pooling_kernel_size": 3,
        },
        image_token_id=_id(tokens, "<|image|>"),
        video_token_id=_id(tokens, "<|video|>"),
        audio_token_id=_id(tokens, "<|audio|>"),
        boi_token_id=_id(tokens, "<|image>"),
        eoi_token_id=_id(tokens, "<image|>"),
    )
    return _made("Gemma4ForConditionalGeneration", config)


def _pixtral(patch: int, merge: int, most: int) -> Any:
    from transformers.models.pixtral import image_processing_pil_pixtral

    if not is_torchvision_available():
        # The processor reads one function of that module, which both backends have.
        name = "transformers.models.pixtral.image_processing_pixtral"
        sys.modules.setdefault(name, image_processing_pil_pixtral)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    images = image_processing_pil_pixtral.PixtralImageProcessorPil(
        size={"longest_edge": most}, patch_size={"height": patch, "width": patch}
    )
    tokens = tokenizer("[IMG_BREAK]", "[IMG_END]", image_token="[IMG]")
    more: dict[str, Any] = {"patch_size": patch, "spatial_merge_size": merge}
    return processor(PixtralProcessor, images, tokens, "[IMG]", **more)


def _mistral3_model(kind: str, tokens: Any) -> Any:
    patch, side = (14, 1540) if kind == "Mistral3" else (16, 1024)
    more: dict[str, Any] = {"spatial_merge_size": 2}
    if kind == "Llava":
        more = {"vision_feature_select_strategy": "full"}
    config = _config(
        *(f"{kind}Config", "MistralConfig"),
        vision_config={"model_type": "pixtral", **TOWER, "image_size": side, "patch_size": patch},
        vision_feature_layer=-1,
        image_token_index=_id(tokens, "[IMG]"),
        **more,
    )
    return _made(f"{kind}ForConditionalGeneration", config)


def _paligemma() -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images: Any = SiglipImageProcessorPil(size={"height": 448, "width": 448})
    images.image_seq_length = 1024
    return processor("PaliGemmaProcessor", images, tokenizer(image_token="<image>"), "<image>")


def _paligemma_model(tokens: Any) -> Any:
    config = _config(
        *("PaliGemmaConfig", "GemmaConfig", {"head_dim": 8}),
        vision_config=_siglip(448, 14),
        projection_dim=16,
        image_token_index=_id(tokens, "<image>"),
    )
    return _made("PaliGemmaForConditionalGeneration", config)


def _video_llava() -> Any:
    images = transformers.VideoLlavaImageProcessor()
    more: dict[str, Any] = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    more |= {"num_additional_image_tokens": 1, "video_processor": None}
    return processor("VideoLlavaProcessor", images, _llava_tokens(), "<image>", **more)


def _video_llava_model(tokens: Any) -> Any:
    config = _config(
        *("VideoLlavaConfig", "LlamaConfig"),
        vision_config=_clip(224),
        vision_feature_layer=-1,
        image_token_index=_id(tokens, "<image>"),
        video_token_index=_id(tokens, "<video>"),
    )
    return _made("VideoLlavaForConditionalGeneration", config)


KINDS: list[Kind] = [
    Kind("LLaVA-1.5", "llava-1.5-7b", lambda: _llava(False), _llava_model),
    Kind("LLaVA-1.5, letterboxed", "llava-v1.5-7b", lambda: _llava(True), _llava_model),
    Kind("LLaVA with SigLIP", "llava-interleave-qwen", _llava_siglip, _llava_siglip_model),
    Kind(
        *("LLaVA-NeXT", "llava-v1.6-vicuna-7b"),
        lambda: _next("LlavaNext"),
        lambda tokens: _next_model("LlavaNext", tokens),
    ),
    Kind(
        *("LLaVA-NeXT-Video", "LLaVA-NeXT-Video-7B"),
        lambda: _next("LlavaNextVideo"),
        lambda tokens: _next_model("LlavaNextVideo", tokens),
    ),
    Kind("LLaVA-OneVision", "llava-onevision-qwen2-7b-ov", _onevision, _onevision_model),
    Kind(
        *("Qwen2-VL", "Qwen2-VL-7B-Instruct"),
        lambda: _qwen("Qwen2VLProcessor", 14, 3136, 12845056),
        lambda tokens: _qwen_model("Qwen2VL", "Qwen2VLTextConfig", _QWEN2, tokens),
        refuses=_THIN,
    ),
    Kind(
        *("Qwen2.5-VL", "Qwen2.5-VL-7B-Instruct"),
        lambda: _qwen("Qwen2_5_VLProcessor", 14, 3136, 12845056),
        lambda tokens: _qwen_model("Qwen2_5_VL", "Qwen2_5_VLTextConfig", _QWEN25, tokens),
        refuses=_THIN,
    ),
    Kind(
        *("Qwen3-VL", "Qwen3-VL-8B-Instruct"),
        lambda: _qwen("Qwen3VLProcessor", 16, 65536, 16777216),
        lambda tokens: _qwen_model("Qwen3VL", "Qwen3VLTextConfig", _QWEN3, tokens),
        refuses=_THIN,
    ),
    Kind(
        *("Qwen3.5", "Qwen3.5"),
        lambda: _qwen("Qwen3VLProcessor", 16, 65536, 16777216),
        lambda tokens: _qwen_model("Qwen3_5", "Qwen3_5TextConfig", _QWEN35, tokens, **_QWEN35_TEXT),
        refuses=_THIN,
    ),
    Kind(
        *("GLM-4V", "GLM-4.1V-9B-Thinking"),
        lambda: _glm("Glm4v"),
        lambda tokens: _glm_model("Glm4v", tokens),
        refuses=_THIN,
    ),
    Kind(
        *("GLM-4.6V", "GLM-4.6V"),
        lambda: _glm("Glm46V"),
        lambda tokens: _glm_model("Glm46V", tokens),
        refuses=_THIN,
    ),
    Kind("InternVL", "InternVL3-8B-hf", _internvl, _internvl_model),
    Kind("Aya Vision", "aya-vision-8b", _aya, _aya_model),
    Kind("Llama 4", "Llama-4-Scout-17B-16E-Instruct", _llama4, _llama4_model),
    Kind(
        *("SmolVLM", "SmolVLM2-2.2B-Instruct"),
        lambda: _idefics3("SmolVLM", 384, 1536, 81),
        lambda tokens: _idefics3_model("SmolVLM", 384, 14, 3, tokens),
    ),
    Kind(
        *("Idefics3", "Idefics3-8B-Llama3"),
        lambda: _idefics3("Idefics3", 364, 1456, 169),
        lambda tokens: _idefics3_model("Idefics3", 364, 14, 2, tokens),
    ),
    Kind("Gemma 3", "gemma-3-4b-it", _gemma3, _gemma3_model),
    Kind(
        *("Gemma 3, pan and scan", "gemma-3-4b-it", _gemma3, _gemma3_model),
        kwargs={"do_pan_and_scan": True},
    ),
]

KINDS += [
    Kind(
        *("Mistral 3", "Mistral-Small-3.1-24B-Instruct-2503"),
        lambda: _pixtral(14, 2, 1540),
        lambda tokens: _mistral3_model("Mistral3", tokens),
        breaks=dict.fromkeys(("tiny", "one pixel"), "it squeezes a single visual token away"),
    ),
    Kind(
        *("Pixtral", "pixtral-12b"),
        lambda: _pixtral(16, 1, 1024),
        lambda tokens: _mistral3_model("Llava", tokens),
    ),
    Kind("Gemma 4", "gemma-4-E4B-it", _gemma4, _gemma4_model),
    Kind("PaliGemma", "paligemma2-3b-mix-448", _paligemma, _paligemma_model),
    Kind(
        *("Video-LLaVA", "Video-LLaVA-7B-hf", _video_llava, _video_llava_model),
        refuses=dict.fromkeys(("one pixel high", "one pixel"), "mean must have 1 elements"),
    ),
]


def features(model: Any, inputs: Any) -> Tensor:
    """(n, D) the features that the model puts at the placeholders of its images."""
    wanted = {
        name: value.float() if value.is_floating_point() else value
        for name, value in inputs.items()
        if name not in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    }
    encode = family_of(model).base(model).get_image_features
    old, new = "pixel_values_images", "pixel_values"  # of Video-LLaVA, by version of transformers
    if old in wanted and old not in inspect.signature(encode).parameters:
        wanted[new] = wanted.pop(old)
    with torch.no_grad():
        found = encode(**wanted)
    if not isinstance(found, (Tensor, list, tuple)):  # Llama 4's are not projected yet
        pooled = found.pooler_output
        found = found.last_hidden_state if pooled is None else pooled
    if isinstance(found, (list, tuple)):
        found = torch.cat([one.flatten(0, -2) for one in found])
    return found.flatten(0, -2)
