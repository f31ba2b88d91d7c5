"""Diagnoses of biases that are put in by hand, so that the right answer is known."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.pages import checked_page
from helpers.sums import GRID, WHERE, N, attention_of, measured, sums_of
from pore.bias.coordinates import OVER, Over
from pore.calibration.host import HostCalibration
from pore.calibration.page import write_page
from pore.calibration.sums import Calibration
from pore.calibration.typical import Tokens, Typical
from pore.errors import BudgetError, CalibrationError, ScoreError

RISING = np.exp(1.5 * WHERE)


SPIKE = np.where(WHERE > 11 / 12, 4.8, np.where(WHERE < 1 / 12, 0.43, 0.37))
"""Flat, then a spike over the last twelfth: as at layer 1 of SmolLM2-135M with 144 positions."""


def rising(images: int = 200) -> Calibration:
    return sums_of(attention_of(RISING, images))


class TestVerdicts:
    def test_an_exponential_is_found_and_divided_by(self) -> None:
        found = rising().diagnose()
        (axis,) = found.axes
        assert found.verdict == "divide"
        assert axis.kind == "exponential"
        assert axis.refused == {}
        assert axis.span == pytest.approx(np.exp(1.5 * 11 / 12), rel=0.05)
        assert axis.fitted == pytest.approx(np.exp(1.5 * 11 / 12), rel=0.05)
        # A curve without fault is off by what the mean of 100 images varies by.
        spread = np.sqrt(np.expm1(0.6**2) / 100)
        assert found.noise == pytest.approx(spread, rel=0.1)
        assert found.error == pytest.approx(spread, rel=0.1)
        assert found.flat == pytest.approx(np.hypot(1.5 / np.sqrt(12), spread), rel=0.05)
        assert np.median(found.standard_error) == pytest.approx(spread / np.sqrt(2), rel=0.1)
        assert found.within is not None
        assert 0.88 < found.within / N < 0.98
        assert found.before[2] > 0.6
        assert found.after == pytest.approx((1 / 3, 1 / 3, 1 / 3), abs=0.03)
        assert "last third of the image has 34 % of it instead of 66 %" in found.advice

    def test_what_changes_is_that_of_the_images_measured(self) -> None:
        """They are log-normal and independent here, as those that are drawn."""
        rows = attention_of(RISING, 200)
        curve = rising().fit().values.numpy()
        kept = [np.argsort(-scores, axis=1)[:, : N // 4] for scores in (rows, rows / curve)]
        both = [len(set(a) & set(b)) for a, b in zip(*kept, strict=True)]
        changed = rising().diagnose("exponential").changed
        assert changed == pytest.approx(1 - np.mean(both) / (N // 4), abs=0.02)

    def test_a_spike_is_no_exponential(self) -> None:
        sums = sums_of(attention_of(SPIKE, 200))
        found = sums.diagnose("exponential")
        assert found.verdict == "do not divide"
        assert re.search(r"it is \d,\d{3} times smaller than the attention", found.advice)
        assert found.axes[0].fitted is not None
        assert found.axes[0].fitted > 100 * found.axes[0].span
        assert found.error is not None
        assert found.error > found.flat
        found = sums.diagnose()
        assert found.axes[0].kind is found.axes[0].fitted is found.changed is found.unsure is None
        assert found.verdict == "do not divide"
        assert (
            "No curve can be divided by. exponential: in a part of the image it is" in found.advice
        )
        assert 'kind="empirical", is off by 9.6 %' in found.advice
        assert sums.diagnose("empirical").verdict == "divide"

    def test_a_curve_that_is_too_steep_is_no_help(self) -> None:
        end = sums_of(attention_of(np.where(WHERE > 0.9, 5.0, 1.0), 200))
        found = end.diagnose("exponential")
        assert found.verdict == "do not divide"
        assert found.axes[0].refused == {}
        assert re.search(r"spans 3\d.*-fold .*, and the attention 5.*-fold", found.advice)
        # One that is hardly better than none is none either.
        end = sums_of(attention_of(np.where(WHERE > 0.95, 2.0, 1.0), 200))
        found = end.diagnose("exponential")
        assert found.verdict == "do not divide"
        assert "hardly better than no bias at all" in found.advice
        assert "The spline curve is off by 10 % only: fit that." in found.advice

    def test_no_bias_needs_no_division(self) -> None:
        found = sums_of(attention_of(np.ones(N), 200)).diagnose()
        assert found.verdict == "little bias"
        assert "there is hardly any bias" in found.advice

    def test_few_images_cannot_tell(self) -> None:
        few = sums_of(attention_of(np.ones(N), 6))
        assert few.diagnose().verdict == "more images"
        assert "cannot be told from chance" in few.diagnose().advice
        found = few.diagnose("empirical")
        assert found.verdict == "more images"
        assert found.advice.startswith("Calibrate on more images before you divide by P.")
        assert re.search(r"P of the other do not agree on \d\d % of what is kept", found.advice)

    def test_a_bias_that_one_curve_misses_and_another_does_not(self) -> None:
        valley = 1 + 8 * (WHERE - 0.5) ** 2
        sums = sums_of(attention_of(valley, 400))
        found = sums.diagnose("exponential")
        assert found.verdict in ("do not divide", "little bias")
        assert sums.diagnose().axes[0].kind == "spline"
        assert sums.diagnose().verdict == "divide"
        offset = sums_of(attention_of(0.3 + np.exp(6 * (WHERE - 1)), 400)).diagnose("exponential")
        assert "+offset curve is off by" in offset.advice
        assert "only: fit that." in offset.advice


def test_more_images_make_it_surer() -> None:
    few, many = (rising(images).diagnose("spline") for images in (20, 320))
    assert few.unsure is not None
    assert many.unsure is not None
    assert 0 < many.unsure < few.unsure
    assert many.noise == pytest.approx(few.noise / 4, rel=0.15)


def test_half_of_what_the_halves_do_not_agree_on_is_what_more_images_change() -> None:
    found, true = [], []
    for seed in range(8):
        sums = sums_of(attention_of(RISING, 40, seed=seed))
        found.append(sums.diagnose("spline").unsure)
        typical = Typical(Tokens(sums.mean.numpy(), sums.std.numpy(), np.zeros(N, int)), 0.25)
        kept = [typical.kept(curve) for curve in (sums.fit("spline").values.numpy(), RISING)]
        true.append(typical.apart(*kept))
    halves = np.array(found, dtype=float)
    assert np.mean(true) == pytest.approx(halves.mean() / 2, rel=0.25)


class TestAnySize:
    @pytest.mark.parametrize("over", OVER)
    def test_a_bias_of_no_size_is_divided_by(self, over: Over) -> None:
        found = measured(over, noise=0.3, count=60).diagnose_any_size(over=over)
        assert found.verdict == "divide"
        assert [axis.name for axis in found.axes] == (
            ["row", "column"] if over == "place" else [over]
        )
        assert found.error is not None
        assert found.error < 0.3 * found.flat
        assert found.before[2] > found.before[0]
        assert found.after == pytest.approx((1 / 3, 1 / 3, 1 / 3), abs=0.06)
        assert f"over the {found.axes[0].name}" in str(found)

    def test_of_one_size_it_is_that_of_positions(self) -> None:
        sums = rising()
        positions = sums.diagnose(mean="geometric")
        raster = sums.diagnose_any_size(over="raster")
        assert raster.changed == pytest.approx(positions.changed, abs=0.02)
        assert raster.before == pytest.approx(positions.before, abs=0.02)
        assert raster.flat == pytest.approx(positions.flat, rel=0.05)
        # A bin of three positions is surer than one position.
        ratio = np.median(positions.standard_error) / np.median(raster.standard_error)
        assert ratio == pytest.approx(np.sqrt(3), rel=0.2)

    def test_sums_of_mixed_sizes_need_it(self) -> None:
        with pytest.raises(CalibrationError, match="fit_any_size"):
            measured("raster", count=4).diagnose()


def test_stages_have_one_each() -> None:
    host = HostCalibration((rising(), rising()))
    assert [one.verdict for one in host.diagnose("exponential")] == ["divide"] * 2
    assert [one.axes[0].name for one in host.diagnose_any_size()] == ["distance"] * 2


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(ScoreError, match="in both halves"):
        rising(1).diagnose()
    with pytest.raises(CalibrationError, match="older pore"):
        replace(rising(), halves=None).diagnose()
    with pytest.raises(CalibrationError, match="older pore"):
        replace(rising(), table=None).diagnose_any_size()
    with pytest.raises(BudgetError, match="145"):
        rising().diagnose(keep=145)


ABOUT: Any = {"model": "a <model>", "command": "pore calibrate", "setup": {"date": "a & b"}}


class TestPage:
    def written(self, sums: Calibration, over: Over | None, path: Path) -> str:
        host = HostCalibration((sums, sums))
        biases = host.fit() if over is None else host.fit_any_size(over=over)
        told = host.diagnose() if over is None else host.diagnose_any_size(over=over)
        return self.read(write_page(path, host, biases, told, host.stability(over=over), **ABOUT))

    def read(self, path: Path) -> str:
        text = path.read_text()
        checked_page(text)
        assert "$" not in text
        assert "a &lt;model&gt;" in text
        assert "a &amp; b" in text
        return text

    @pytest.mark.slow
    def test_of_one_size(self, tmp_path: Path) -> None:
        text = self.written(rising(), None, tmp_path / "page.html")
        assert text.count("<img ") == 8  # three figures of a stage, and the pair of the first
        assert "200 images keeps about 99." in text
        assert text.count("Divide by P. P (exponential)") == 4  # at the top, and in the sections
        assert "<td>34 %</td>" in text

    @pytest.mark.slow
    def test_of_any_size(self, tmp_path: Path) -> None:
        text = self.written(measured("place"), "place", tmp_path / "page.html")
        assert text.count("<img ") == 4
        assert "form over the column" in text

    def test_where_there_is_no_p(self, tmp_path: Path) -> None:
        host = HostCalibration((sums_of(attention_of(SPIKE, 50)),))
        path = write_page(tmp_path / "page.html", host, None, host.diagnose(), "unknown", **ABOUT)
        text = self.read(path)
        assert "Do not divide by P. No curve can be divided by." in text
        assert "image/png" not in text

    @pytest.mark.slow
    def test_where_there_is_no_diagnosis(self, tmp_path: Path) -> None:
        host = HostCalibration((rising(2),))
        path = write_page(tmp_path / "page.html", host, host.fit(), ["<no>"], "<none>", **ABOUT)
        assert "No diagnosis: &lt;no&gt;" in self.read(path)


def test_tokens_that_get_no_attention_are_kept_last() -> None:
    mean = np.where(np.arange(N) < 6, 0.0, 1.0)
    typical = Typical(Tokens(mean, mean, np.arange(N) * 3 // N), N - 6)
    assert not typical.kept()[:, :6].any()
    assert GRID[0] * GRID[1] == N
