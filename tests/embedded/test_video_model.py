"""The embedded model of videos: it is the one of images with another decoder, and it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from pore.data.loading import load_model
from pore.data.prompts import build_inputs, render
from pore.data.sources import load_samples, scenes_for
from pore.embedded import EMBEDDED_VIDEO, embedded_model, embedded_video_model
from pore.evaluation import examples, survey
from pore.evaluation.guided import Guiding
from pore.evaluation.results import SurveySettings
from pore.evaluation.sizes import ImageSizes
from pore.families.registry import images_of
from pore.identity import names_of


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(EMBEDDED_VIDEO)


def test_it_is_small_and_known_by_name(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    assert sum(p.stat().st_size for p in Path(embedded_video_model()).iterdir()) < 12e6
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert names_of(model)["model"] == EMBEDDED_VIDEO
    assert scenes_for(model, "fresh") == "embedded:fresh:video"
    written = render(processor, "Does the red star move?", shown="video")
    assert written == "USER: <video>\nDoes the red star move? ASSISTANT:"


def test_tower_and_first_layers_are_those_of_the_model_of_images(loaded: tuple[Any, Any]) -> None:
    images = LlavaForConditionalGeneration.from_pretrained(embedded_model()).state_dict()
    videos = loaded[0].state_dict()
    frozen = ("vision_tower", "language_model.layers.0.", "language_model.layers.1.")
    same = [name for name in images if any(part in name for part in frozen)]
    assert len(same) > 90
    assert all(torch.equal(images[name], videos[name]) for name in same)


@pytest.mark.slow
def test_it_answers(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    samples = list(load_samples("embedded:calibration:video", limit=16))
    inputs = build_inputs(processor, samples)
    assert (inputs["input_ids"] == model.config.video_token_index).sum(1).tolist() == [288] * 16
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=4)
    new = out[:, inputs["input_ids"].shape[1] :]
    written = processor.batch_decode(new, skip_special_tokens=True)
    right = [w.strip() == s.answer for w, s in zip(written, samples, strict=True)]
    assert sum(right) >= 14


def test_methods_for_videos_are_asked_about_videos_only(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    guiding = Guiding(model, processor, max_new_tokens=3, itself=True)
    settings = SurveySettings(keeps=(0.5,))
    for videos in (True, False):
        sizes = ImageSizes(288, 288, 288, any_size=True, videos=videos)
        planned, _ = survey.lineup(model, settings, guiding, sizes)
        names = {pruner.name for _, pruner in planned}
        assert (names >= {"EVS", "DyCoke", "UniformFrames"}) == videos
        assert {"FastV", "VidCom2"} <= names
        assert all(p.counts(288, 8)[-1] == 144 for _, p in planned if p.name == "EVS")


def test_sizes_say_whether_they_are_of_videos(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    inputs = build_inputs(processor, list(load_samples("embedded:test:video", limit=2)))
    found = ImageSizes.of(model, images_of(model, inputs))
    assert (found.most, found.any_size, found.videos) == (288, True, True)


def test_the_demo_draws_frames(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    (sample,) = load_samples("embedded:test:video", limit=1)
    figure = examples._drawing(model, processor, sample)([[0, 36, 37]], "FastV: “left” ✓")
    shown = [axis.get_xlabel() for axis in figure.axes]
    assert shown == ["1 of 36", "2 of 36", *["0 of 36"] * 6]
