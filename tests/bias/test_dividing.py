"""What a position bias does to attention, and what RoPE alone would do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.biases import PROVENANCE, noisy, quick
from pore.bias.position_bias import PositionBias
from pore.bias.rope import rope_prior
from pore.errors import ProfileError, ProfileMismatchError, ScoreError


class TestDivide:
    @quick
    @given(st.floats(-0.02, 0.02), st.integers(1, 200), st.integers(0, 1000))
    def test_dividing_undoes_multiplying(self, rate: float, n: int, seed: int) -> None:
        bias = PositionBias.exponential(rate, n)
        worth = torch.rand(3, 2, n, generator=torch.Generator().manual_seed(seed))
        worth = worth.double()
        torch.testing.assert_close(bias.divide(worth * bias.values), worth)

    @quick
    @given(st.integers(0, 1000), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3))
    def test_no_scale_changes_a_ranking(self, seed: int, one: float, other: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        attention = torch.rand(100, generator=generator, dtype=torch.float64)
        curve = noisy(0.01, 100, noise=0.1, seed=seed)
        first = PositionBias(curve, "empirical").divide(attention)
        second = PositionBias(one * curve, "empirical").divide(other * attention)
        assert torch.equal(first.argsort(), second.argsort())

    @pytest.mark.parametrize(
        ("given_dtype", "wanted"),
        [
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ],
    )
    def test_precision(self, given_dtype: torch.dtype, wanted: torch.dtype) -> None:
        assert (
            PositionBias.exponential(0.1, 9).divide(torch.ones(9).to(given_dtype)).dtype == wanted
        )

    def test_columns_may_be_any_positions(self) -> None:
        bias = PositionBias.exponential(0.1, 20)
        attention = torch.rand(2, 4, 3)
        index = torch.tensor([[[5, 0, 19]], [[7, 7, 2]]])
        expected = attention / bias.values.float()[index]
        assert torch.equal(bias.divide(attention, index), expected)
        full = torch.rand(20)
        assert torch.equal(bias.divide(full, torch.arange(20)), bias.divide(full))

    def test_nothing_to_divide(self) -> None:
        empty = torch.zeros(0, 5)
        index = torch.zeros(0, 5, dtype=torch.long)
        assert PositionBias.exponential(0.1, 20).divide(empty, index).shape == (0, 5)

    def test_another_number_of_columns_is_refused(self) -> None:
        with pytest.raises(ProfileMismatchError, match=r"has 20, here are 25.*resample"):
            PositionBias.exponential(0.1, 20).divide(torch.ones(25))

    @pytest.mark.parametrize("place", [-1, 20])
    def test_positions_that_it_has_not_are_refused(self, place: int) -> None:
        with pytest.raises(ScoreError, match="0 to 19"):
            PositionBias.exponential(0.1, 20).divide(torch.ones(2), torch.tensor([0, place]))

    def test_input_that_is_no_attention_is_refused(self) -> None:
        bias = PositionBias.exponential(0.1, 3)
        with pytest.raises(ScoreError, match="floating"):
            bias.divide(torch.ones(3, dtype=torch.long))
        with pytest.raises(ScoreError, match="integers"):
            bias.divide(torch.ones(3), torch.ones(3))
        with pytest.raises(ScoreError, match="do not fit"):
            bias.divide(torch.ones(2, 3), torch.zeros(4, 3, dtype=torch.long))

    def test_made_in_inference_mode_used_in_training(self) -> None:
        with torch.inference_mode():
            bias = PositionBias.fit(torch.rand(9) + 1, "empirical")
        attention = torch.rand(9, requires_grad=True)
        bias.divide(attention).sum().backward()  # type: ignore[no-untyped-call]
        assert attention.grad is not None


class TestRope:
    @pytest.mark.parametrize(
        ("head_dim", "negative"), [(128, 1707), (64, 725), (32, 474), (16, 91)]
    )
    def test_where_the_prior_turns_negative(self, head_dim: int, negative: int) -> None:
        prior = rope_prior(torch.arange(2000), head_dim=head_dim)
        assert prior[0].item() == pytest.approx(math.sqrt(head_dim))
        assert int((prior <= 0).nonzero()[0]) == negative

    def test_its_values(self) -> None:
        prior = rope_prior(torch.tensor([0, 10, 100, 300, 600]), head_dim=128)
        expected = torch.tensor([11.3, 7.6, 5.4, 3.5, 2.35], dtype=torch.float64)
        torch.testing.assert_close(prior, expected, rtol=0.01, atol=0)

    def test_it_is_a_rotated_dot_product(self) -> None:
        distance, d, theta = 37, 64, 5e5
        angle = distance * theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        # All-ones (x, y) turned by the angle is (cos − sin, cos + sin).
        turned = (angle.cos() - angle.sin()) + (angle.cos() + angle.sin())
        prior = rope_prior(torch.tensor(distance), head_dim=d, theta=theta)
        torch.testing.assert_close(prior, turned.sum() / math.sqrt(d))

    def test_the_last_visual_token_is_nearest(self) -> None:
        bias = PositionBias.rope(576, head_dim=128, text_tokens=20)
        prior = rope_prior(torch.tensor([595, 20]), head_dim=128)
        assert bias.growth == pytest.approx((prior[1] / prior[0]).item())
        assert bias.parameters["raised"] == 0

    def test_it_never_reaches_zero(self) -> None:
        bias = PositionBias.rope(2000, head_dim=128, text_tokens=20)
        assert bias.parameters["raised"] > 0
        assert (bias.values > 0).all()
        assert "raised to the floor" in repr(bias)

    @pytest.mark.parametrize(
        "wrong",
        [{"n": 0}, {"head_dim": 7}, {"head_dim": 0}, {"text_tokens": 0}, {"theta": -1.0}],
    )
    def test_numbers_out_of_range_are_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ProfileError):
            PositionBias.rope(**{"n": 9, "head_dim": 8, "text_tokens": 1, **wrong})


class TestResample:
    @quick
    @given(st.floats(-0.01, 0.01), st.integers(2, 600), st.integers(1, 600))
    def test_an_exponential_stays_one(self, rate: float, n: int, wanted: int) -> None:
        exponential = PositionBias.exponential(rate, n)
        one = exponential.resample(wanted)
        other = PositionBias(exponential.values, "empirical").resample(wanted)
        assert len(one) == wanted
        torch.testing.assert_close(one.values, other.values)
        assert one.parameters["rate"] == pytest.approx(rate * n / wanted, abs=1e-12)

    def test_the_same_number_changes_nothing_but_the_note(self) -> None:
        bias = PositionBias.fit(noisy(0.01, 36, 0.2), "empirical", provenance=PROVENANCE)
        same = bias.resample(36)
        torch.testing.assert_close(same.values, bias.values)
        assert same.provenance.source == "gqa; resampled from 36 to 36 positions"
        assert same.r2 is None
        assert same.residuals is None

    def test_by_grid(self) -> None:
        bias = PositionBias.exponential(0.01, 576, grid=(24, 24)).resample(grid=(12, 12))
        assert len(bias) == 144
        assert bias.grid == (12, 12)

    def test_one_position_is_stretched_flat(self) -> None:
        assert PositionBias(torch.ones(1), "empirical").resample(4).values.tolist() == [1, 1, 1, 1]

    def test_contradictions_are_refused(self) -> None:
        bias = PositionBias.exponential(0.01, 576)
        for wrong in ({}, {"n": 0}, {"n": 10, "grid": (3, 3)}, {"n": 1 << 40}):
            with pytest.raises(ProfileError):
                bias.resample(**wrong)
