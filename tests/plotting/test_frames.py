"""Frames of videos with what is kept of them: as a strip, and as a moving picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from pore import plotting
from pore.errors import InputError
from pore.plotting.style import BLUE


def frames(count: int, kept: tuple[int, ...] = (0, 3)) -> list[plotting.Frame]:
    image = PIL.Image.new("RGB", (20, 20), (200, 0, 0))
    return [plotting.Frame(image, (2, 2), kept, f"frame {i + 1}") for i in range(count)]


@pytest.mark.parametrize(("count", "panels"), [(1, 1), (3, 3), (8, 8), (9, 16)])
def test_a_strip_has_a_panel_for_every_frame(count: int, panels: int) -> None:
    figure = plotting.strip(frames(count), title="What moves?")
    axes = figure.axes
    assert len(axes) == panels
    assert sum(axis.get_visible() for axis in axes) == count
    assert [axis.get_title() for axis in axes[:count]] == [f"frame {i + 1}" for i in range(count)]
    assert axes[0].get_xlabel() == "2 of 4"
    shown = np.asarray(axes[0].images[0].get_array())
    assert shown[5, 5].tolist() == [200, 0, 0]
    assert shown[5, 15].min() > 200
    assert plotting.to_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["kept.gif", "kept.webp"])
def test_a_moving_picture_has_a_picture_for_every_frame(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new" / name
    some = frames(2, ()) + frames(1) + frames(1, (0, 1, 2, 3))
    # Encoders join pictures that are the same.
    some[0] = plotting.Frame(PIL.Image.new("RGB", (20, 20), "black"), (2, 2), (1,), "first")
    assert plotting.animated(some, path) == path
    with PIL.Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 4
        assert image.info["loop"] == 0
        image.seek(2)
        pixels = np.asarray(image.convert("RGB")).astype(int)
        image.seek(3)
        whole = np.asarray(image.convert("RGB")).astype(int)
    side = pixels.shape[0]
    assert side == 480
    assert np.abs(pixels[side // 4, side // 4] - [200, 0, 0]).max() < 8
    assert pixels[side // 4, 3 * side // 4].min() > 200
    blue = [int(BLUE[i : i + 2], 16) for i in (1, 3, 5)]
    assert np.abs(pixels[side // 4, side // 2 - 1] - blue).max() < 8
    assert np.abs(whole - [200, 0, 0]).max() < 8


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no frames"):
        plotting.strip([])
    with pytest.raises(InputError, match="no frames"):
        plotting.animated([], tmp_path / "a.gif")
    with pytest.raises(InputError, match=r"one of \.gif, \.webp"):
        plotting.animated(frames(1), tmp_path / "a.mp4")
    with pytest.raises(InputError, match="outside the grid"):
        plotting.strip(frames(1, (4,)))
    assert list(tmp_path.iterdir()) == []
