"""Maps of the attention lie where the visual tokens do, on one scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pore import plotting
from pore.data.coverage import Coverage
from pore.errors import InputError


def coverage(*frames: tuple[float, float, float, float]) -> Coverage:
    """Two tokens in every view, the left half and the right one."""
    boxes = []
    for left, top, right, bottom in frames:
        middle = (left + right) / 2
        boxes += [(left, top, middle, bottom), (middle, top, right, bottom)]
    views = torch.arange(len(frames)).repeat_interleave(2)
    made = torch.tensor(boxes, dtype=torch.float64), torch.tensor(frames, dtype=torch.float64)
    return Coverage((40, 20), made[0], views, made[1])


def test_maps_are_relative_to_their_means() -> None:
    covered = [coverage((0, 0, 40, 20))]
    figure = plotting.attention(covered, {"a": [[1.0, 3.0]], "b": [[-1.0, 2.0]]}, unit="attention")
    left, right, bar = figure.axes
    assert (left.get_title("left"), right.get_title("left")) == ("a", "b")
    assert bar.get_ylabel() == "attention, relative to the mean"
    values = [axis.collections[0].get_array() for axis in (left, right)]
    np.testing.assert_allclose(values, [[0.5, 1.5], [0.0, 2.0]])
    assert len({axis.collections[0].get_clim() for axis in (left, right)}) == 1
    corners = left.collections[0].get_paths()[1].vertices
    assert (corners.min(0).tolist(), corners.max(0).tolist()) == ([20, 0], [40, 20])


def test_views_that_overlap_have_rows_of_their_own() -> None:
    covered = [coverage((0, 0, 40, 20), (0, 0, 20, 20), (20, 0, 40, 20))]
    figure = plotting.attention(covered, {"a": [range(6)]}, unit="attention")
    whole, tiles, _ = figure.axes
    np.testing.assert_allclose(whole.collections[0].get_array(), [0, 0.4])
    np.testing.assert_allclose(tiles.collections[0].get_array(), [0.8, 1.2, 1.6, 2.0])


def test_what_does_not_fit_is_refused() -> None:
    covered = [coverage((0, 0, 40, 20))]
    with pytest.raises(InputError, match="the picture"):
        plotting.attention(covered, {"a": [[1.0]]}, unit="attention")
    with pytest.raises(InputError, match="NaN"):
        plotting.attention(covered, {"a": [[1.0, np.nan]]}, unit="attention")
    with pytest.raises(InputError, match="no attention"):
        plotting.attention([], {"a": []}, unit="attention")
