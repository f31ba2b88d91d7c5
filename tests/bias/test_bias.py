"""The position bias: fits, division, checks, files, hub."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pore.bias import profiles
from pore.bias.curves import rope_prior
from pore.bias.position_bias import PositionBias
from pore.bias.provenance import Provenance
from pore.bias.stages import load_biases, save_biases
from pore.errors import ProfileError, ProfileMismatchError, ScoreError

quick = settings(max_examples=40)
fitted_kinds = st.sampled_from(["exponential", "exponential+offset", "spline", "empirical"])

PROVENANCE = Provenance(
    model="llava-hf/llava-1.5-7b-hf",
    revision="8c85e9a",
    layer=2,
    normalize="prompt",
    processor={"do_pad": False, "size": (336, 336)},
    template="USER: <image>\n{question} ASSISTANT:",
    samples=1000,
    date="2026-01-31",
    host="fastv",
    source="gqa",
)


def noisy(rate: float, n: int, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    """An exponential of mean attention about 1e-3 with relative noise."""
    curve = 1e-3 * torch.exp(rate * torch.arange(n, dtype=torch.float64))
    wobble = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return curve * (1 + noise * wobble).clamp(0.1)


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


class TestCheck:
    bias = PositionBias.exponential(0.003, 576, provenance=PROVENANCE)

    def test_the_same_conditions_pass(self) -> None:
        self.bias.check(
            n=576,
            model="llava-hf/llava-1.5-7b-hf",
            revision="8c85e9a",
            layer=2,
            normalize="prompt",
            processor={"do_pad": False, "size": [336, 336], "do_resize": True},
            template=PROVENANCE.template,
        )

    def test_all_that_differs_is_named(self) -> None:
        with pytest.raises(ProfileMismatchError) as caught:
            self.bias.check(n=144, layer=3, normalize="visual", processor={"do_pad": True})
        message = str(caught.value)
        assert "has 576, here are 144" in message
        assert "layer: the profile says 2, here it is 3" in message
        assert "normalize: the profile says 'prompt', here it is 'visual'" in message
        assert "processor.do_pad: the profile says False, here it is True" in message
        assert "bias.allowing('layer', 'normalize', 'processor')" in message
        assert "bias.resample(n)" in message

    def test_what_is_unknown_is_not_compared(self) -> None:
        self.bias.check()
        PositionBias.exponential(0.003, 576).check(n=576, model="a/b", layer=7, template="x")

    @pytest.mark.parametrize(
        "model",
        [
            "liuhaotian/llava-v1.5-7b",
            "llava-hf/llava-1.5-7b-hf",
            "/models/llava-1.5-7b-hf",
            "./llava-v1.5-7b/",
            "C:\\models\\llava-1.5-7b-hf",
            "/cache/hub/models--llava-hf--llava-1.5-7b-hf/snapshots/8c85e9a",
        ],
    )
    def test_the_same_weights_under_another_name(self, model: str) -> None:
        self.bias.check(model=model)

    @pytest.mark.parametrize(
        "model",
        [
            "llava-hf/llava-1.5-13b-hf",
            "liuhaotian/llava-v1.6-7b",
            "someone/llava-1.5-7b-hf",
            "/models/checkpoint-100",
        ],
    )
    def test_other_weights(self, model: str) -> None:
        with pytest.raises(ProfileMismatchError, match=r"model: .*allowing\('model'\)"):
            self.bias.check(model=model)

    def test_the_override_is_for_the_named_fields_only(self) -> None:
        allowed = self.bias.allowing("layer").allowing("model")
        allowed.check(layer=3, model="a/b")
        assert "not checked: layer, model" in repr(allowed)
        with pytest.raises(ProfileMismatchError, match="normalize"):
            allowed.check(normalize="visual")
        with pytest.raises(ProfileMismatchError):
            self.bias.check(layer=3)

    def test_what_cannot_be_allowed(self) -> None:
        with pytest.raises(ProfileError, match="resample"):
            self.bias.allowing("n")
        with pytest.raises(ProfileError, match="choose from model"):
            self.bias.allowing("samples")


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


class TestFiles:
    @quick
    @given(
        st.lists(st.floats(1e-7, 1.0), min_size=5, max_size=60),
        fitted_kinds,
        st.text(max_size=20),
        st.one_of(st.none(), st.integers(0, 100)),
    )
    def test_round_trip(
        self, attention: list[float], kind: Any, template: str, layer: int | None
    ) -> None:
        provenance = Provenance(template=template, layer=layer, processor={"size": (1, 2.5)})
        try:
            bias = PositionBias.fit(attention, kind, provenance=provenance)
        except ProfileError:
            return
        assert PositionBias.from_json(bias.to_json()) == bias

    def test_save_and_load(self, tmp_path: Path) -> None:
        bias = PositionBias.fit(noisy(0.01, 36, 0.1), grid=(6, 6), provenance=PROVENANCE)
        path = bias.save(tmp_path / "new" / "bias.json")
        assert PositionBias.load(path) == bias
        assert hash(PositionBias.load(path)) == hash(bias)
        assert PositionBias.from_pretrained(path) == bias
        assert PositionBias.from_pretrained(path.parent, filename="bias.json") == bias
        assert PositionBias.load(bias.allowing("layer").save(path)) == bias

    def test_copies_are_equal(self) -> None:
        bias = PositionBias.fit(noisy(0.01, 36, 0.1), provenance=PROVENANCE)
        assert copy.deepcopy(bias) == bias
        assert pickle.loads(pickle.dumps(bias)) == bias
        assert bias != PositionBias(bias.values, "exponential")
        assert bias != PositionBias.fit(noisy(0.01, 36, 0.1))
        assert bias != "a bias"

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ProfileError, match="Cannot read"):
            PositionBias.load(tmp_path / "none.json")

    def test_every_truncation_is_refused(self, tmp_path: Path) -> None:
        text = PositionBias.exponential(0.1, 3, provenance=PROVENANCE).to_json().rstrip()
        for length in range(len(text)):
            path = tmp_path / "bias.json"
            path.write_text(text[:length])
            with pytest.raises(ProfileError, match=r"bias\.json"):
                PositionBias.load(path)

    @pytest.mark.parametrize(
        "change",
        [
            {"schema": "other"},
            {"version": 2},
            {"version": "1"},
            {"version": True},
            {"kind": "quadratic"},
            {"kind": ["exponential"]},
            {"n": 4},
            {"n": -1},
            {"n": True},
            {"n": 10**12},
            {"grid": [1]},
            {"grid": [2, 2]},
            {"grid": [1.0, 3.0]},
            {"grid": [-1, -3]},
            {"values": [1.0, 1.0]},
            {"values": [1.0, 1.0, 0.0]},
            {"values": [1.0, 1.0, -1.0]},
            {"values": [1.0, 1.0, "1"]},
            {"values": [1.0, 1.0, None]},
            {"values": [1.0, 1.0, True]},
            {"values": [1.0, 1.0, [1.0]]},
            {"values": [1.0, 1.0, float("nan")]},
            {"values": [1.0, 1.0, float("inf")]},
            {"values": [1.0, 1.0, 10**400]},
            {"values": [1.0, 1e-308, 1e308]},
            {"values": "1, 1, 1"},
            {"values": None},
            {"residuals": [0.0]},
            {"residuals": {"0": 1}},
            {"r2": "high"},
            {"r2": True},
            {"parameters": {"rate": "high"}},
            {"parameters": {"rate": [1]}},
            {"parameters": []},
            {"provenance": {"layer": "two"}},
            {"provenance": {"layer": 2.0}},
            {"provenance": {"layer": -1}},
            {"provenance": {"model": 7}},
            {"provenance": {"normalize": ["prompt"]}},
            {"provenance": {"processor": [1]}},
            {"provenance": {"processor": "x"}},
            {"provenance": {"unheard": "of"}},
            {"provenance": []},
            {"surplus": 1},
        ],
        ids=str,
    )
    def test_what_is_wrong_inside_is_refused(self, change: dict[str, Any]) -> None:
        document = json.loads(PositionBias.exponential(0.1, 3).to_json())
        with pytest.raises(ProfileError):
            PositionBias.from_json(json.dumps({**document, **change}))

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\x80\x04\x95",
            b"\xff\xfe{}",
            b"null",
            b"[]",
            b"3",
            b"{}",
            b"[" * 200_000,
            b'{"schema": ' + b"1" * 10_000 + b"}",
            b'{"schema": "pore.position_bias", "version": 1}',
        ],
        ids=lambda data: str(data[:12]),
    )
    def test_what_is_no_profile_is_refused(self, data: bytes, tmp_path: Path) -> None:
        path = tmp_path / "bias.json"
        path.write_bytes(data)
        with pytest.raises(ProfileError, match=r"bias\.json"):
            PositionBias.load(path)

    def test_a_huge_file_is_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "huge.json"
        with open(path, "wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(ProfileError, match="larger than any"):
            PositionBias.load(path)


class TestHub:
    bias = PositionBias.exponential(0.003, 36, provenance=PROVENANCE)

    def test_push(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[str, dict[str, Any]]] = []

        class Api:
            def __init__(self, token: str | None) -> None:
                calls.append(("token", {"token": token}))

            def create_repo(self, repo_id: str, **kwargs: Any) -> None:
                calls.append((repo_id, kwargs))

            def upload_file(self, **kwargs: Any) -> SimpleNamespace:
                calls.append(("upload", kwargs))
                return SimpleNamespace(commit_url="https://hub/commit")

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        assert self.bias.push_to_hub("me/bias", private=True, token="t") == "https://hub/commit"
        token, create, upload = calls
        assert token[1] == {"token": "t"}
        assert create == ("me/bias", {"private": True, "exist_ok": True})
        assert upload[1]["repo_id"] == "me/bias"
        assert upload[1]["path_in_repo"] == "position_bias.json"
        assert PositionBias.from_json(upload[1]["path_or_fileobj"].decode()) == self.bias

    def test_pull(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def download(repo_id: str, filename: str, **kwargs: Any) -> str:
            assert (repo_id, filename) == ("me/bias", "position_bias.json")
            assert kwargs == {"revision": "v1", "token": None}
            return str(self.bias.save(tmp_path / "cached.json"))

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        assert PositionBias.from_pretrained("me/bias", revision="v1") == self.bias

    def test_what_the_hub_has_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def download(*_: Any, **__: Any) -> str:
            raise LocalEntryNotFoundError("no network")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        with pytest.raises(ProfileError, match="no local path, and the hub answers: no network"):
            PositionBias.from_pretrained("me/bias")

    def test_a_name_that_no_repository_can_have(self) -> None:
        with pytest.raises(ProfileError, match="no local path"):
            PositionBias.from_pretrained("no/such/path/at/all")


class TestPublished:
    def test_all_are_there(self) -> None:
        assert len(profiles.available()) == 40
        for host, benchmark in profiles.available():
            bias = profiles.published(host=host, benchmark=benchmark)
            assert len(bias) == 576
            assert bias.grid == (24, 24)
            assert 1.8 < bias.growth < 14.5
            bias.check(n=576, model="liuhaotian/llava-v1.5-7b")

    def test_one(self) -> None:
        bias = profiles.published(host="PyramidDrop", benchmark="GQA")
        assert bias.rate == pytest.approx(0.00399)
        assert bias.provenance.source is not None
        assert "2508.17807v2" in bias.provenance.source
        with pytest.raises(ProfileMismatchError, match="model"):
            bias.check(model="llava-hf/llava-1.5-13b-hf")

    def test_others_are_not_invented(self) -> None:
        with pytest.raises(ProfileError, match=r"2\.79.*calibrate"):
            profiles.published(host="fastv", benchmark="gqa")
        with pytest.raises(ProfileError, match="there are vqav2"):
            profiles.published(host="himap", benchmark="imagenet")


def test_repr_says_what_it_is() -> None:
    text = repr(PositionBias.fit(noisy(0.004, 576, 0.1), grid=(24, 24), provenance=PROVENANCE))
    for part in ("exponential", "576 positions (24×24)", "last/first", "R²", "layer 2", "gqa"):
        assert part in text


def test_values_must_be_positive() -> None:
    for values in ([1.0, 0.0], [1.0, math.nan], [1.0, math.inf], [], [[1.0]]):
        with pytest.raises(ProfileError):
            PositionBias(torch.tensor(values), "empirical")
    for rate in (math.nan, math.inf, 1e9):
        with pytest.raises(ProfileError):
            PositionBias.exponential(rate, 9)


class TestBiasesOfAHost:
    def test_several_in_one_file(self, tmp_path: Path) -> None:
        biases = tuple(PositionBias.exponential(rate, 4) for rate in (0.1, -0.2, 0.3))
        path = save_biases(tmp_path / "new" / "p.json", biases)
        assert load_biases(path) == load_biases(path.parent, filename="p.json") == biases
        with pytest.raises(ProfileError, match="several stages"):
            PositionBias.load(path)

    def test_one_is_a_position_bias(self, tmp_path: Path) -> None:
        bias = PositionBias.exponential(0.1, 4)
        path = save_biases(tmp_path / "p.json", [bias])
        assert PositionBias.load(path) == bias
        assert load_biases(path) == (bias,)

    def test_none_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ProfileError, match="1 to 1024 stages"):
            save_biases(tmp_path / "p.json", [])

    @pytest.mark.parametrize(
        "change",
        [
            {"stages": []},
            {"stages": {}},
            {"stages": [1]},
            {"stages": None},
            {"version": 2},
            {"surplus": 1},
            {"schema": "pore.calibration"},
        ],
        ids=str,
    )
    def test_damage_is_refused(self, tmp_path: Path, change: dict[str, Any]) -> None:
        path = save_biases(tmp_path / "p.json", [PositionBias.exponential(0.1, 4)] * 2)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ProfileError, match=r"p\.json: "):
            load_biases(path)
