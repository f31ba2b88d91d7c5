"""Several pictures in one figure; merged and averaged tokens drawn as what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from pore import plotting
from pore.data.coverage import Coverage
from pore.errors import InputError

SIDE = 4
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
PICTURE = PIL.Image.fromarray(PIXELS)


def seen(**how: Any) -> plotting.Seen:
    """A picture of 4 × 4 tokens of 8 × 8 pixels."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    boxes = 8.0 * torch.stack([x, y, x + 1, y + 1], -1).view(-1, 4).double()
    frames = torch.tensor([[0, 0, 32, 32]], dtype=torch.float64)
    covered = Coverage((32, 32), boxes, torch.zeros(16, dtype=torch.long), frames)
    return plotting.Seen(PICTURE, [covered], **how)


def hatches(axis: Any) -> list[int]:
    """How many cells each hatched collection has."""
    return [len(one.get_paths()) for one in axis.collections if one.get_hatch()]


def test_pictures_lie_below_each_other() -> None:
    pytest.importorskip("matplotlib")
    one = plotting.layouts([seen(kept=[[1, 2]])])
    two = plotting.layouts([seen(kept=[[1, 2]], caption="a"), seen(kept=[[3]], caption="b")])
    assert two.get_figheight() == pytest.approx(2 * one.get_figheight())
    axes = [axis for part in two.subfigs for axis in part.axes]
    assert [axis.get_title("left") for axis in axes] == ["a", "b"]
    assert [axis.get_xlabel()[:26] for axis in axes] == [
        "one view, 2 of 16 tokens",
        "one view, 1 of 16 tokens",
    ]
    with pytest.raises(InputError, match="no pictures"):
        plotting.layouts([])


def test_merged_tokens_are_hatched() -> None:
    pytest.importorskip("matplotlib")
    dropped = plotting.layouts([seen(kept=[[1, 2]])])
    assert hatches(dropped.axes[0]) == []
    assert dropped.legends == []
    for merges, words in (("all", "merged into tokens that stay"), ("some", "dropped, or merged")):
        figure = plotting.layouts([seen(kept=[[1, 2]], merges=merges, extra=3)])
        assert hatches(figure.axes[0]) == [14]
        (text,) = figure.legends[0].get_texts()
        assert words in text.get_text()
        assert figure.axes[0].get_xlabel().endswith("2 of 16 tokens, and 3 of no single patch")


def test_averages_are_drawn_as_averages() -> None:
    pytest.importorskip("matplotlib")
    figure = plotting.layouts([seen(kept=[[0, 2, 8, 10]], merges="all", averaged=(2, 2))])
    (axis,) = figure.axes
    (image,) = axis.images
    means = PIXELS.reshape(2, 16, 2, 16, 3).mean((1, 3)).astype(np.uint8)
    np.testing.assert_array_equal(image.get_array(), means)
    assert axis.get_xlabel() == "16 tokens averaged to 2×2 = 4"
    assert hatches(axis) == []
    assert figure.legends == []


def test_merged_tokens_of_frames_are_hatched() -> None:
    pytest.importorskip("matplotlib")
    one = plotting.Frame(PICTURE, (4, 4), (0, 5), "frame 1", "some")
    figure = plotting.strip([one, plotting.Frame(PICTURE, (4, 4), (1,), "frame 2", "some")])
    assert [hatches(axis) for axis in figure.axes] == [[14], [15]]
    assert len(figure.legends) == 1
    assert plotting.strip([plotting.Frame(PICTURE, (4, 4), (0,), "frame 1")]).legends == []
