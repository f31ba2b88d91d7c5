"""Where the visual tokens of a video lie on its frames, in every family that takes videos."""

from __future__ import annotations

from typing import Any

import PIL.Image
import pytest
import torch

from cases import CASES
from cases.base import Case
from pore._videos import Video
from pore.data import seen_frames as module
from pore.data.samples import Sample
from pore.data.seen_frames import seen_frames

FRAMES = tuple(PIL.Image.new("RGB", (6, 4), (i, 0, 0)) for i in range(4))
SAMPLE = Sample("a", Video(FRAMES, (0, 5, 10, 15), 5.0), "What moves?")
WITH_VIDEOS = [case for case in CASES if case.videos is not None]
FIRST_OF = {"Video-LLaVA": 1}
"""Tokens of a frame before those that show it: the CLS token."""


def given(monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any]) -> None:
    """Let a processor make these inputs, of frames that it sees whole."""
    monkeypatch.setattr(module, "build_inputs", lambda *_: inputs)
    monkeypatch.setattr(module, "_seen", lambda *_: None)


@pytest.mark.parametrize("case", WITH_VIDEOS, ids=lambda case: case.name)
def test_every_token_of_a_frame_has_a_place(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [1, 2, *case.video_ids(0), 3]
    given(monkeypatch, {"input_ids": torch.tensor([ids]), **case.encode_videos([0])})
    found = seen_frames(case.model(), None, SAMPLE)
    # The model has two grids of tokens; of four frames, each shows two, and the first is drawn.
    assert [frame.number for frame in found] == [0, 10]
    assert [frame.picture for frame in found] == [FRAMES[0], FRAMES[2]]
    count = sum(case.video_content(0))
    skipped = FIRST_OF.get(case.name, 0)
    assert [frame.first for frame in found] == [skipped, count // 2 + skipped]
    for frame in found:
        assert frame.grid[0] * frame.grid[1] == count // 2 - skipped
        assert frame.kept([range(count)]) == list(range(count // 2 - skipped))


def test_frames_that_come_as_images(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in CASES if case.name == "LLaVA-1.5")
    ids = [1, *case.image_ids(0), 2, *case.image_ids(1), 3]
    given(monkeypatch, {"input_ids": torch.tensor([ids]), **case.encode([0, 1])})
    found = seen_frames(case.model(), None, SAMPLE)
    assert [(frame.image, frame.first, frame.number) for frame in found] == [(0, 0, 0), (1, 0, 10)]
    assert [frame.kept([[0, 2], [1]]) for frame in found] == [[0, 2], [1]]
