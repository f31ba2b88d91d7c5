"""Videos: frames taken from files, and their way into a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.calibrations import make_processor
from helpers.checkpoint import save_video, save_video_checkpoint
from pore._videos import Video, VideoFile, chosen, is_video, read_video
from pore.data.files import from_jsonl
from pore.data.loading import load_model
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.data.seen_frames import seen_frames
from pore.errors import InputError
from pore.identity import picture_of


@given(st.integers(1, 400), st.integers(1, 64))
def test_frames_are_chosen_at_equal_distances(count: int, frames: int) -> None:
    numbers = chosen(count, frames)
    assert len(numbers) == len(set(numbers)) == min(count, frames)
    assert list(numbers) == sorted(numbers)
    assert numbers[-1] < count
    if len(numbers) > 1:
        assert (numbers[0], numbers[-1]) == (0, count - 1)
        steps = np.diff(numbers)
        assert steps.max() - steps.min() <= 1


def test_an_animated_picture_is_a_video(tmp_path: Path) -> None:
    path = save_video(tmp_path)
    assert is_video(path)
    video = read_video(path, 3)
    assert video.numbers == (0, 2, 5)
    assert video.rate == pytest.approx(4)
    left = [int(np.asarray(frame)[10, :, 0].argmax()) for frame in video.frames]
    assert left == [0, 8, 20]
    still = tmp_path / "still.gif"
    PIL.Image.new("RGB", (4, 4)).save(still)
    assert not is_video(still)


def test_a_folder_of_frames_is_a_video_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        PIL.Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    video = read_video(tmp_path, 8)
    assert [frame.getpixel((0, 0))[0] for frame in video.frames] == [1, 2, 10]
    assert video.rate is None


def test_ffmpeg_decodes_a_file(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(10):
            picture = PIL.Image.new("RGB", (64, 48), (20 * i, 20 * i, 20 * i))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    video = read_video(path, 4)
    assert video.numbers == (0, 3, 6, 9)
    assert video.rate == pytest.approx(5)
    assert [frame.size for frame in video.frames] == [(64, 48)] * 4
    grey = [np.asarray(frame).mean() for frame in video.frames]
    assert np.abs(np.subtract(grey, [0, 60, 120, 180])).max() < 12


def test_bad_videos_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no file or folder"):
        read_video(tmp_path / "missing.mp4", 8)
    with pytest.raises(InputError, match="no pictures in the folder"):
        read_video(tmp_path, 8)
    broken = tmp_path / "broken.gif"
    broken.write_bytes(b"GIF89a")
    with pytest.raises(InputError, match=r"broken\.gif cannot be read"):
        read_video(broken, 8)
    with pytest.raises(InputError, match="at least 1 frame"):
        read_video(broken, 0)
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "video.mp4").write_bytes(b"")
    with pytest.raises(InputError, match=r"pip install 'pore-vlm\[video\]'"):
        read_video(tmp_path / "video.mp4", 8)
    with pytest.raises(InputError, match="of one size"):
        Video((PIL.Image.new("RGB", (2, 2)), PIL.Image.new("RGB", (3, 2))), (0, 1))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("av")
    path = tmp_path / "video.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(InputError, match="FFmpeg says"):
        read_video(path, 8)


def test_videos_differ_by_their_frames_and_times(tmp_path: Path) -> None:
    one = read_video(save_video(tmp_path), 3)
    others = [
        Video(one.frames[::-1], one.numbers, one.rate),
        Video(one.frames, (0, 1, 2), one.rate),
        Video(one.frames, one.numbers, None),
    ]
    found = {picture_of(each) for each in (one, *others)}
    assert len(found) == 4
    assert picture_of(Video(one.frames, one.numbers, one.rate)) == picture_of(one)


def test_a_line_of_a_file_names_a_video(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = loaded
    video = save_video(tmp_path)
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(3):
        PIL.Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number}.png")
    lines = [
        {"video": video.name, "question": "What moves?", "frames": 2},
        {"video": "frames", "question": "What moves?"},
        {"video": "gone.mp4", "question": "What moves?"},
    ]
    file = tmp_path / "clips.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second, third = from_jsonl(file)
    assert first.of_video
    assert picture_of(first.image) != picture_of(VideoFile(video, 3))
    before = picture_of(second.image)
    PIL.Image.new("RGB", (32, 32), (9, 0, 0)).save(folder / "2.png")
    assert picture_of(second.image) != before
    asked = build_inputs(processor, [first], model.device, model.dtype)
    read = Sample("x", read_video(video, 2), "What moves?")
    expected = build_inputs(processor, [read], model.device, model.dtype)
    assert all(torch.equal(asked[name], expected[name]) for name in expected)
    with pytest.raises(InputError, match=r"clips.jsonl:3 cannot be used. There is no file"):
        third.load()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(str(save_video_checkpoint(tmp_path_factory.mktemp("model"))))


def test_images_and_videos_become_inputs(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = loaded
    video = read_video(save_video(tmp_path), 3)
    samples = [Sample("a", video, "w6 w7"), Sample("b", video, "w6")]
    inputs = build_inputs(processor, samples)
    assert inputs["pixel_values_videos"].shape == (2, 3, 3, 32, 32)
    placeholder = model.config.video_token_index
    assert (inputs["input_ids"] == placeholder).sum(1).tolist() == [12, 12]
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    image = build_inputs(processor, [Sample("c", video.frames[0], "w6")])
    assert "pixel_values_videos" not in image
    with pytest.raises(InputError, match="stands for a video"):
        build_inputs(processor, [Sample("d", video, processor.video_token)])


def test_what_takes_no_videos_says_so(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    sample = Sample("a", read_video(save_video(tmp_path), 3), "w6")
    with pytest.raises(InputError, match="LlavaProcessor takes no videos"):
        build_inputs(make_processor(), [sample])
    _, processor = loaded
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "video_processor", None)
        with pytest.raises(InputError, match="need torchvision"):
            build_inputs(processor, [sample])


def test_tokens_lie_on_what_is_seen_of_frames(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = loaded
    video = read_video(save_video(tmp_path, size=(64, 32)), 3)
    found = seen_frames(model, processor, Sample("a", video, "w6"))
    assert [frame.number for frame in found] == [0, 2, 5]
    assert {frame.grid for frame in found} == {(2, 2)}
    # Frames are cropped to the square in their middle.
    for frame, whole in zip(found, video.frames, strict=True):
        assert frame.picture.size == (32, 32)
        assert frame.picture.tobytes() == whole.crop((16, 0, 48, 32)).tobytes()
    kept = [[0, 5, 6, 11]]
    assert [frame.kept(kept) for frame in found] == [[0], [1, 2], [3]]
