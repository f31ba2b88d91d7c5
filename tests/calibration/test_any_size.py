"""Calibration on images of several sizes: a bias put in by hand is found again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pore
from helpers.sums import GRIDS, layout_of, measured, true_bias
from pore.bias.any_size import AnySizeBias
from pore.bias.coordinates import OVER, Over
from pore.bias.where import Where
from pore.calibration.batch import Batch
from pore.calibration.sums import Calibration
from pore.calibration.table import Rows, Table
from pore.data.samples import Sample
from pore.errors import CalibrationError, ProfileError, ScoreError
from pore.layout import Image, Layout


def error(bias: AnySizeBias, over: Over, grid: tuple[int, int]) -> float:
    """By what factor a bias misses the true one on images of some size, at worst."""
    layout = layout_of(grid, 12)
    ratio = np.log(bias.at(Where(layout)).numpy() / true_bias(over, layout))
    return float(np.abs(ratio - ratio.mean()).max())


@pytest.mark.parametrize("over", OVER)
def test_a_bias_of_no_size_is_found_on_images_of_all_sizes(over: Over) -> None:
    found = measured(over)
    assert found.mixed
    bias = found.fit_any_size("empirical", over)
    for grid in [*GRIDS, (18, 18), (10, 20)]:  # the last two were not measured
        assert error(bias, over, grid) < 0.15
    assert bias.sizes == (36, 576)


@pytest.mark.parametrize("over", OVER)
def test_the_form_it_is_made_by_is_the_best(over: Over) -> None:
    """Each bias is described best by the coordinate that it is a function of."""
    found = measured(over, count=120, noise=0.1)
    errors = {}
    for other in OVER:
        bias = found.fit_any_size("spline", other)
        errors[other] = max(error(bias, over, grid) for grid in [(5, 7), (18, 18)])
    assert min(errors, key=errors.__getitem__) == over


@pytest.mark.parametrize("over", OVER)
def test_a_curve_is_chosen_by_the_other_half(over: Over) -> None:
    bias = measured(over, noise=0.1).fit_any_size("auto", over)
    assert any(name.endswith("held-out error") for name in bias.parameters)
    assert error(bias, over, (18, 18)) < 0.25


@settings(max_examples=20)
@given(st.permutations(range(12)), st.integers(0, 12))
@pytest.mark.slow
def test_order_and_shards_make_no_difference(order: list[int], cut: int) -> None:
    def through(numbers: list[int]) -> Table:
        table = Table()
        for number in numbers:
            grid = GRIDS[number % len(GRIDS)]
            layout = layout_of(grid, 5 + number)
            where = Where(layout)
            attention = true_bias("place", layout) * (1 + number)
            rows = Rows(
                grid, attention, np.zeros(1, int), where.distance.numpy(), where.place.numpy()
            )
            table = table.including(rows, np.array([number % 2]))
        return table

    whole = through(list(range(12)))
    assert through(order) == whole
    assert through(order[:cut]).merged(through(order[cut:])) == whole
    assert Table.of_document(whole.document()) == whole


def test_images_of_different_sizes_have_no_mean_of_a_position() -> None:
    found = measured("distance", count=4)
    with pytest.raises(CalibrationError, match=r"from 36 to 576 .* fit_any_size"):
        found.fit()
    with pytest.raises(CalibrationError, match="fit_any_size"):
        _ = found.mean
    assert Calibration.from_json(found.to_json()) == found


def test_calibrations_of_different_sizes_merge() -> None:
    parts = [measured("distance", [grid]) for grid in ((6, 6), (12, 9))]
    assert not parts[1].mixed
    others = b"".join((10**6 + i).to_bytes(12, "little") for i in range(40))
    parts[1] = replace(parts[1], passes=("other",), samples=others)
    merged = parts[0].merge(parts[1])
    assert not parts[0].mixed
    assert merged.mixed
    assert merged.table is not None
    assert merged.table.sizes == {36: 40, 108: 40}


def test_an_older_file_has_one_size() -> None:
    old = replace(measured("distance", [(6, 6)]), table=None)
    with pytest.raises(CalibrationError, match="older pore"):
        old.fit_any_size()
    layout = layout_of((4, 4), 5)
    rows = Rows((4, 4), true_bias("place", layout), np.zeros(1, int), np.ones((1, 16), int))
    with pytest.raises(CalibrationError, match="begin again"):
        old.including(Batch([Sample("a", None, "w6")], bytes(12), [rows], []))


def test_a_power_of_the_distance_holds_beyond_what_was_measured() -> None:
    random = np.random.default_rng(0)
    state = Calibration(pore.Provenance(), "float32", ("",), samples=b"", table=Table())
    for number, grid in enumerate([(6, 6), (12, 9)] * 10):
        layout = layout_of(grid, 4 + number % 7)
        distance = Where(layout).distance.numpy()
        attention = distance**-0.6 * np.exp(0.1 * random.standard_normal(distance.shape)) * 1e-3
        rows = Rows(grid, attention, np.zeros(1, int), distance)
        sample = Sample(str(number), None, "w6")
        state = state.including(Batch([sample], number.to_bytes(12, "little"), [rows], []))
    bias = state.fit_any_size()
    assert bias.kind == "power"
    assert bias.parameters["power"] == pytest.approx(-0.6, abs=0.03)
    where = Where(layout_of((30, 30), 9))
    ratio = (bias.at(where) / where.distance.double() ** -0.6).log()
    assert float((ratio - ratio.mean()).abs().max()) < 0.1
    with pytest.raises(ProfileError, match="A power is one of the distance"):
        measured("place").fit_any_size("power", "place")


class TestUse:
    def bias(self) -> AnySizeBias:
        return measured("distance").fit_any_size("spline")

    def test_it_divides(self) -> None:
        bias, layout = self.bias(), layout_of((9, 12), 7)
        scores = torch.rand(1, 108)
        found = bias.correct(scores, Where(layout))
        torch.testing.assert_close(found, scores / bias.at(Where(layout)).float())

    def test_a_size_that_was_not_measured_is_warned_about(self) -> None:
        layout = layout_of((40, 40), 7)
        with pytest.warns(UserWarning, match="36 to 576 visual tokens, and here is one of 1600"):
            self.bias().correct(torch.rand(1, 1600), Where(layout))

    def test_it_is_saved_and_read(self, tmp_path: Any) -> None:
        for over in OVER:
            bias = measured(over, count=10).fit_any_size("spline", over)
            assert AnySizeBias.load(bias.save(tmp_path / "bias.json")) == bias
        with pytest.raises(ProfileError, match="no position bias for images of any size"):
            AnySizeBias.from_json("{}")

    def test_images_without_a_grid_have_a_distance_all_the_same(self) -> None:
        image = Image(0, 0, range(3, 23))
        layout = Layout.of([image], torch.ones(1, 30, dtype=torch.bool))
        assert self.bias().at(Where(layout)).shape == (1, 20)
        with pytest.raises(pore.PoreError, match="over the distance"):
            measured("place").fit_any_size("spline", "place").at(Where(layout))

    def test_the_strength_is_a_power(self) -> None:
        bias, where = self.bias(), Where(layout_of((9, 12), 7))
        torch.testing.assert_close(bias.with_strength(0.5).at(where), bias.at(where).sqrt())
        with pytest.raises(ProfileError, match="from 0 to 1"):
            bias.with_strength(-1)

    def test_scores_must_be_floating(self) -> None:
        with pytest.raises(ScoreError, match="floating"):
            self.bias().correct(torch.ones(1, 36, dtype=torch.long), Where(layout_of((6, 6), 3)))


def test_the_prior_of_rope_is_that_of_every_distance() -> None:
    bias = AnySizeBias.rope(head_dim=64, theta=1e5)
    where = Where(layout_of((6, 6), 9))
    fixed = pore.PositionBias.rope(36, head_dim=64, theta=1e5, text_tokens=9)
    ratio = bias.at(where)[0] / fixed.values
    torch.testing.assert_close(ratio, ratio[:1].expand(36))
