"""Curves fitted to a mean attention: found again, positive, and refused where none fits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers.biases import fitted_kinds, noisy, quick
from pore.bias.position_bias import PositionBias
from pore.errors import ProfileError, ScoreError


class TestFit:
    @quick
    @given(st.floats(-9, 9), st.integers(3, 600), st.floats(1e-9, 1e6))
    def test_an_exponential_is_found_again(self, growth: float, n: int, scale: float) -> None:
        rate = growth / (n - 1)
        bias = PositionBias.fit(scale * noisy(rate, n))
        assert bias.rate == pytest.approx(rate, abs=1e-7)
        assert bias.parameters["rate"] == pytest.approx(rate, abs=1e-7)
        assert bias.parameters["amplitude"] == pytest.approx(scale * 1e-3, rel=1e-5)
        assert bias.r2 == pytest.approx(1, abs=1e-6)

    @quick
    @given(st.floats(-0.004, 0.008), st.integers(0, 10**6))
    def test_a_noisy_exponential_is_found_again(self, rate: float, seed: int) -> None:
        bias = PositionBias.fit(noisy(rate, 576, noise=0.2, seed=seed))
        # Steep curves rest on few points: six standard errors of least squares, to first order.
        i = np.arange(576)
        curve = np.exp(rate * i)
        slopes = np.stack([curve, i * curve], 1)
        inverse = np.linalg.inv(slopes.T @ slopes)
        spread = inverse @ (slopes.T * (0.2 * curve) ** 2) @ slopes @ inverse
        assert bias.rate == pytest.approx(rate, abs=6 * spread[1, 1] ** 0.5)
        amplitude = bias.parameters["amplitude"] / 1e-3
        assert amplitude == pytest.approx(1, abs=6 * spread[0, 0] ** 0.5)

    def test_the_squares_are_those_of_the_attention_not_of_its_logarithm(self) -> None:
        # The two differ where the noise is not relative.
        attention = noisy(0.005, 576) + 2e-3 * torch.rand(
            576, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        bias = PositionBias.fit(attention)
        assert bias.residuals is not None
        best = bias.residuals.square().sum()
        i = torch.arange(576)
        a, b = bias.parameters["amplitude"], bias.parameters["rate"]
        torch.testing.assert_close(bias.residuals, attention - a * torch.exp(b * i))
        for da, db in ((1.001, 0), (0.999, 0), (1, 1e-6), (1, -1e-6)):
            assert (attention - da * a * torch.exp((b + db) * i)).square().sum() > best
        line = np.polyfit(i, attention.log(), 1)
        assert (attention - math.exp(line[1]) * torch.exp(line[0] * i)).square().sum() > best

    @quick
    @given(st.floats(-4, 6), st.floats(0.05, 5), st.integers(20, 600))
    def test_an_offset_is_found_again(self, growth: float, offset: float, n: int) -> None:
        assume(abs(growth) > 0.5)
        attention = noisy(growth / (n - 1), n) + offset * 1e-3
        bias = PositionBias.fit(attention, "exponential+offset")
        torch.testing.assert_close(bias.values, attention / attention.mean(), rtol=1e-5, atol=0)
        assert bias.parameters["offset"] == pytest.approx(offset * 1e-3, rel=1e-2)

    def test_a_straight_line_is_an_exponential_with_offset(self) -> None:
        line = torch.linspace(1, 3, 100, dtype=torch.float64)
        bias = PositionBias.fit(line, "exponential+offset")
        torch.testing.assert_close(bias.values, line / 2, rtol=1e-5, atol=0)

    def test_an_offset_cannot_take_the_bias_below_zero(self) -> None:
        # Of its own, least squares would cross zero here.
        attention = (torch.linspace(-1, 3, 200, dtype=torch.float64)).clamp(1e-3)
        bias = PositionBias.fit(attention, "exponential+offset")
        assert bias.values.min() > 0

    def test_a_cubic_needs_no_knots(self) -> None:
        x = torch.linspace(0, 1, 576, dtype=torch.float64)
        cubic = 1 + 1.5 * x - 3 * x**2 + 3 * x**3
        bias = PositionBias.fit(
            cubic + 0.01 * torch.randn(576, generator=torch.Generator().manual_seed(0)), "spline"
        )
        assert bias.parameters == {"knots": 0}
        torch.testing.assert_close(bias.values, cubic / cubic.mean(), rtol=0.01, atol=0)

    def test_a_spline_takes_the_knots_it_needs(self) -> None:
        x = torch.linspace(0, 1, 576, dtype=torch.float64)
        bias = PositionBias.fit(2 + torch.sin(12 * x), "spline")
        assert bias.parameters["knots"] > 0
        assert bias.r2 is not None
        assert bias.r2 > 0.99

    @quick
    @given(
        fitted_kinds,
        st.lists(st.floats(1e-7, 1.0), min_size=5, max_size=80),
    )
    def test_what_is_fitted_is_positive(self, kind: Any, attention: list[float]) -> None:
        try:
            bias = PositionBias.fit(attention, kind)
        except ProfileError:
            assume(False)
        assert (bias.values > 0).all()
        assert bias.values.mean().item() == pytest.approx(1, abs=1e-9)
        assert bias.residuals is not None
        curve = torch.tensor(attention, dtype=torch.float64) - bias.residuals
        torch.testing.assert_close(curve / curve.mean(), bias.values, rtol=1e-6, atol=1e-9)

    @quick
    @given(fitted_kinds, st.floats(1e-8, 1e8))
    def test_the_scale_of_the_attention_does_not_matter(self, kind: Any, scale: float) -> None:
        attention = noisy(0.003, 144, noise=0.1)
        one, other = PositionBias.fit(attention, kind), PositionBias.fit(scale * attention, kind)
        torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=0)
        assert one.r2 == pytest.approx(other.r2, abs=1e-6)

    def test_flat_attention_has_no_bias(self) -> None:
        bias = PositionBias.fit(torch.full((50,), 2e-3))
        assert bias.rate == pytest.approx(0, abs=1e-9)
        assert bias.r2 == 1

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-3])
    def test_attention_that_is_none_is_refused(self, value: float) -> None:
        attention = noisy(0.003, 50)
        attention[7] = value
        with pytest.raises(ScoreError, match="mean attention holds"):
            PositionBias.fit(attention)

    def test_attention_of_no_tokens_is_refused(self) -> None:
        with pytest.raises(ScoreError, match="zero everywhere"):
            PositionBias.fit(torch.zeros(50))
        with pytest.raises(ScoreError, match="vector"):
            PositionBias.fit(torch.ones(5, 5))
        with pytest.raises(ScoreError, match="at least 3"):
            PositionBias.fit([1.0, 2.0])

    def test_a_sink_is_no_exponential(self) -> None:
        attention = torch.full((50,), 1e-9)
        attention[-1] = 1
        with pytest.raises(ProfileError, match="sink"):
            PositionBias.fit(attention)

    def test_curves_that_cross_zero_are_refused(self) -> None:
        x = torch.linspace(-1, 1, 100, dtype=torch.float64)
        with pytest.raises(ProfileError, match="not positive everywhere"):
            PositionBias.fit((x - 0.8).clamp(0) + 1e-6 * (x > 0.9), "spline")
        with pytest.raises(ProfileError, match="more samples"):
            PositionBias.fit([1.0, 0.0, 2.0], "empirical")

    def test_other_kinds_are_refused(self) -> None:
        with pytest.raises(ProfileError, match="choose exponential"):
            PositionBias.fit(noisy(0, 9), "rope")

    def test_the_grid_must_fit(self) -> None:
        with pytest.raises(ProfileError, match="does not have 9 positions"):
            PositionBias.fit(noisy(0, 9), grid=(3, 4))
