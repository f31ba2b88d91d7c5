"""What `pore._compat.videos` uses of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.processing_utils import VideosKwargs
from transformers.utils import is_torchvision_available

from helpers.checkpoint import save_checkpoint, save_video_checkpoint
from pore._compat.videos import FramesAsImages, load_processor, video_arguments
from processors.base import tokenizer


def test_a_processor_of_videos_is_loaded_with_and_without_torchvision(tmp_path: Path) -> None:
    processor = load_processor(str(save_video_checkpoint(tmp_path)))
    assert type(processor).__name__ == "LlavaNextVideoProcessor"
    assert isinstance(processor, transformers.LlavaNextVideoProcessor)
    ours = isinstance(processor.video_processor, FramesAsImages)
    assert ours != is_torchvision_available()
    video = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}]}], add_generation_prompt=True
    )
    given = video_arguments([video], [range(3)], [None])
    made = processor(text=[text], return_tensors="pt", **given)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    expected = (torch.from_numpy(video).float() / 255 - mean) / std
    found = made["pixel_values_videos"][0].permute(0, 2, 3, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_without_torchvision_other_processors_take_images(tmp_path: Path) -> None:
    """Qwen-VL's processor of images needs none, but `AutoProcessor` cannot load it."""
    if is_torchvision_available():
        pytest.skip("torchvision is here")
    transformers.Qwen2_5_VLConfig().save_pretrained(tmp_path)
    tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>").save_pretrained(tmp_path)
    settings = '{"image_processor_type": "Qwen2VLImageProcessor"}'
    (tmp_path / "preprocessor_config.json").write_text(settings)
    with pytest.raises((ImportError, OSError, ValueError)):
        transformers.AutoProcessor.from_pretrained(tmp_path)
    processor = load_processor(str(tmp_path))
    assert isinstance(processor, transformers.Qwen2_5_VLProcessor)
    assert processor.video_processor is None
    assert processor.image_processor.merge_size == 2


def test_other_checkpoints_are_loaded_as_ever(tmp_path: Path) -> None:
    processor = load_processor(str(save_checkpoint(tmp_path)))
    assert type(processor) is transformers.LlavaProcessor


def test_processors_know_the_arguments_for_chosen_frames() -> None:
    given = video_arguments([np.zeros((2, 4, 6, 3), np.uint8)], [(0, 30)], [15.0])
    assert given.keys() - {"videos"} <= VideosKwargs.__annotations__.keys()
    (known,) = given["video_metadata"]
    assert known["frames_indices"] == [0, 30]
    metadata = transformers.video_utils.VideoMetadata(**known)
    assert metadata.timestamps == [0.0, 2.0]
