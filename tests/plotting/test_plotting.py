"""The figures: that they show the numbers they are given, and refuse what they cannot show."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from matplotlib.figure import Figure

from helpers.sums import measured
from pore import plotting
from pore.bias.position_bias import PositionBias
from pore.errors import InputError, PoreError
from pore.plotting.places import _labels

GRID = (4, 6)
N = 24
MEAN = 1e-3 * np.exp(0.05 * np.arange(N)) * (1 + 0.1 * np.cos(np.arange(N)))
BIAS = PositionBias.fit(MEAN, grid=GRID)
IMAGE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def line(axis: Any, name: str) -> np.ndarray:
    (found,) = (one for one in axis.lines if one.get_label().startswith(name))
    return np.asarray(found.get_ydata())


def record(method: str, reweight: str | None, keep: float, flops: float | None) -> dict[str, Any]:
    return {
        "method": method,
        "reweight": reweight,
        "keep": keep,
        "flops": flops,
        "accuracy": keep,
        "ci": [keep - 0.05, keep + 0.05],
    }


def test_figure1_shows_both_maps_on_one_scale() -> None:
    figure = plotting.figure1(MEAN, BIAS)
    before, after, bar = figure.axes
    shown = [axis.images[0] for axis in (before, after)]
    np.testing.assert_allclose(shown[0].get_array(), (MEAN / MEAN.mean()).reshape(GRID))
    divided = MEAN / BIAS.values.numpy()
    np.testing.assert_allclose(shown[1].get_array(), (divided / divided.mean()).reshape(GRID))
    assert shown[0].get_clim() == shown[1].get_clim()
    assert "relative to the mean" in bar.get_ylabel()


def test_figure1_needs_a_grid() -> None:
    gridless = PositionBias.exponential(0.1, N)
    with pytest.raises(InputError, match="grid"):
        plotting.figure1(MEAN, gridless)
    assert len(plotting.figure1(MEAN, gridless, (2, 12)).axes) == 3


def test_figure2_shows_mean_fit_and_band() -> None:
    sem = 0.02 * MEAN
    figure = plotting.figure2(MEAN, BIAS, sem)
    left, right = figure.axes
    relative = MEAN / MEAN.mean()
    np.testing.assert_allclose(line(left, "mean attention"), relative)
    assert BIAS.residuals is not None
    fitted = (MEAN - BIAS.residuals.numpy()) / MEAN.mean()
    np.testing.assert_allclose(line(left, "fit"), fitted)
    np.testing.assert_allclose(line(right, "reweighted").mean(), 1.0)
    (band,) = left.collections
    vertices = band.get_paths()[0].vertices
    for x in (0, N - 1):
        ys = vertices[vertices[:, 0] == x][:, 1]
        assert ys.min() == pytest.approx(relative[x] * (1 - 1.96 * 0.02))
        assert ys.max() == pytest.approx(relative[x] * (1 + 1.96 * 0.02))
    assert len(right.collections) == 1


def test_figure2_without_fit_or_band() -> None:
    bias = PositionBias.exponential(0.05, N)
    left, _ = plotting.figure2(MEAN, bias).axes
    np.testing.assert_allclose(line(left, "fit"), bias.values)
    assert not left.collections


@pytest.mark.parametrize("draw", [plotting.figure1, plotting.figure2])
def test_lengths_must_fit(draw: Any) -> None:
    with pytest.raises(InputError, match="Expected 24 numbers"):
        draw(MEAN[:-1], BIAS)


def test_accuracy_over_flops() -> None:
    records = [
        record("unpruned", None, 0.9, 4e9),
        record("FastV", None, 0.5, 1e9),
        record("FastV", None, 0.7, 2e9),
        record("FastV", "exponential", 0.6, 1e9),
        record("Other", None, 0.6, None),
    ]
    (axis,) = plotting.accuracy_over_flops(records).axes
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["unpruned", "FastV", "FastV + PoRe"]
    (fastv,) = (c for c in axis.containers if c.get_label() == "FastV")
    np.testing.assert_allclose(fastv.lines[0].get_xydata(), [[1.0, 50.0], [2.0, 70.0]], atol=0.02)
    with pytest.raises(InputError, match="FLOPs"):
        plotting.accuracy_over_flops(records[-1:])


def test_many_methods_get_a_panel_for_each_place() -> None:
    records = [record("unpruned", None, 0.9, 4e9)]
    for i in range(9):
        place = ("tower", "embeddings", "decoder")[i % 3]
        more = {"acts_in": place, "looks_at": [i] if place == "decoder" else [], "keep": 4}
        for cost in (1e9, 2e9):
            records.append(record(f"M{i}", None, i / 10, cost * (1 + i / 20)) | more)
    records.append(records[-1] | {"reweight": "spline", "accuracy": 0.85})
    records.append(records[-1] | {"reweight": "rope", "accuracy": 0.1})
    figure = plotting.accuracy_over_flops(records, taught=5)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["In the vision tower", "Before the decoder", "Inside the decoder"]
    names = [sorted(text.get_text() for text in axis.texts) for axis in figure.axes]
    assert names == [["M0", "M3", "M6"], ["M1", "M4", "M7"], ["M2", "M5 †", "M8 †"]]
    heights = [[text.xyann[1] for text in axis.texts] for axis in figure.axes]
    assert all(len(places) == 3 for places in heights)
    ends = [line.get_xydata().tolist() for line in figure.axes[2].lines]
    assert [[2.8, 80.0], [2.8, 85.0]] in [np.round(end, 6).tolist() for end in ends]
    assert len(plotting.to_png(figure, dpi=40)) > 1000


def test_labels_do_not_overlap() -> None:
    axis = Figure().subplots()
    _labels(axis, [(5.0 + i / 10, 1.0, f"m{i}", "#000000") for i in range(8)], 2.0, 1.0)
    heights = [text.xy[1] for text in axis.texts]
    assert min(np.diff(heights)) > 0.95
    assert np.mean(heights) == pytest.approx(5.35)


def test_differences_have_a_row_for_each_host() -> None:
    records = [
        {
            "keep": keep,
            "method": method,
            "third": third,
            "difference": 0.1,
            "ci": [-0.1, 0.2],
            "p": 0.01 if third else 0.4,
        }
        for keep in (8, 4)
        for method in ("A", "B", "C")
        for third in (None, "top", "bottom")
    ]
    figure = plotting.differences(records)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["keep 8", "keep 4"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["A", "B", "C"]
    points = [line for line in figure.axes[0].lines if line.get_marker() in "D^ov"]
    assert len(points) == 9
    filled = [line.get_markerfacecolor() != "white" for line in points]
    assert filled == [False, True, True] * 3
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["all questions", "top", "bottom"]
    with pytest.raises(InputError, match="nothing to draw"):
        plotting.differences([])


def test_corrections_says_every_difference_and_which_are_clear() -> None:
    record = {"method": "FastV", "keep": 4, "ci": [0.0, 0.1], "looks_at": [1], "third": None}
    records = [
        {**record, "reweight": name, "difference": difference, "p": p}
        for name, difference, p in (("spline", 0.05, 0.001), ("mean", -0.2, 0.5))
    ]
    third = {**records[0], "third": "top", "difference": 0.9}
    axis = plotting.corrections([*records, third]).axes[0]
    assert {text.get_text(): text.get_fontweight() for text in axis.texts} == {
        "+5.0": "bold",
        "−20.0": "normal",
    }
    assert [label.get_text() for label in axis.get_yticklabels()] == ["spline", "mean"]
    with pytest.raises(InputError, match="nothing to draw"):
        plotting.corrections([third])


def test_kept_tokens_are_left_and_dropped_ones_fade() -> None:
    panels = [
        plotting.Panel("a", True, (0, 23)),
        plotting.Panel("b", False, cells=(2, 3)),
        plotting.Panel("c"),
    ]
    figure = plotting.kept_tokens(IMAGE, panels, GRID, title="why?")
    image, kept, averaged, none = (np.asarray(axis.images[0].get_array()) for axis in figure.axes)
    pixels = np.asarray(IMAGE)
    np.testing.assert_array_equal(image, pixels)
    np.testing.assert_array_equal(kept[:8, :8], pixels[:8, :8])
    np.testing.assert_array_equal(kept[24:, 40:], pixels[24:, 40:])
    assert kept[:8, 8:].min() > 200
    assert none.min() > 200
    np.testing.assert_array_equal(averaged[0, 0], pixels[:16, :16].mean((0, 1)).astype(np.uint8))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["image", "a  ✓", "b  ✗", "c"]
    below = [axis.get_xlabel() for axis in figure.axes]
    assert below == ["", "2 of 24 tokens", "averaged to 2×3", "0 of 24 tokens"]


@pytest.mark.parametrize("index", [-1, 24])
def test_kept_tokens_lie_on_the_grid(index: int) -> None:
    with pytest.raises(InputError, match="outside the grid"):
        plotting.kept_tokens(IMAGE, [plotting.Panel("a", None, (index,))], GRID)


def test_saved_whole(tmp_path: Path) -> None:
    path = plotting.save(plotting.figure2(MEAN, BIAS), tmp_path / "new" / "figure.png", dpi=50)
    with PIL.Image.open(io.BytesIO(path.read_bytes())) as image:
        assert image.format == "PNG"
        assert 300 < image.width < 400
    assert [one.name for one in path.parent.iterdir()] == ["figure.png"]


def test_missing_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PoreError, match=r"pip install 'pore-vlm\[plot\]'"):
        plotting.to_png(Figure())


@pytest.mark.slow
def test_matplotlib_is_imported_late_and_pyplot_never() -> None:
    code = (
        "import sys, pore; from pore import plotting; assert 'matplotlib' not in sys.modules; "
        "plotting.to_png(plotting.figure2([1, 2, 3], pore.PositionBias.exponential(0.1, 3))); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_style_is_put_back() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plotting.figure2(MEAN, BIAS)
    assert dict(matplotlib.rcParams) == before


def test_sizes_lie_on_one_curve_where_the_bias_is_of_none() -> None:
    sums = measured("place")
    bias = sums.fit_any_size("spline", "place")
    assert sums.table is not None
    figure = plotting.any_size(sums.table.levels("place"), bias)
    rows, columns = figure.axes
    assert [axis.get_xlabel().split(",")[0] for axis in (rows, columns)] == ["row", "column"]
    large, curve = line(rows, "512 to 724 tokens"), line(rows, "P (spline)")
    assert len(large) == len(curve) == 16
    np.testing.assert_allclose(large, curve, rtol=0.05)
    small = next(one for one in rows.lines if str(one.get_label()).startswith("32 to 45"))
    at = np.asarray(small.get_xdata())
    fit = np.interp(at, np.asarray(rows.lines[-2].get_xdata(), dtype=float), curve)
    np.testing.assert_allclose(np.asarray(small.get_ydata()), fit, rtol=0.1)


def test_distances_are_drawn_in_plain_numbers() -> None:
    sums = measured("distance", count=10)
    assert sums.table is not None
    bias = sums.fit_any_size("spline")
    (axis,) = plotting.any_size(sums.table.levels("distance"), bias).axes
    axis.figure.canvas.draw()
    shown = {label.get_text() for label in axis.get_xticklabels()}
    assert {"10", "100"} <= shown
