"""CLSE: spectral energy and the evolution factor, against the definition written out."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pore
from helpers.golden_files import draw
from helpers.models import batch, prompt, tiny_llava
from helpers.recording import Recording
from pore.cost.named import model_shape
from pore.errors import BudgetError, PoreError, ScoreError
from pore.layout import Image, Layout, Tiling
from pore.methods.clse import evolution, high_pass, spectral_energy

LAYERS = 6


def filtered(states: Tensor, cutoff: float) -> list[float]:
    """The energy at every place of a grid (H, W, C), by sums over frequencies."""
    height, width, channels = states.shape
    size = cutoff * min(height // 2, width // 2)
    places = [(y, x) for y in range(height) for x in range(width)]
    found = [0.0] * len(places)
    for c in range(channels):
        left = [0j] * len(places)
        for v, u in places:
            wave = [cmath.exp(2j * math.pi * (v * y / height + u * x / width)) for y, x in places]
            part = sum(
                float(states[y, x, c]) * w.conjugate()
                for (y, x), w in zip(places, wave, strict=True)
            )
            # Frequencies above half turn the other way round.
            b, a = (v + height // 2) % height - height // 2, (u + width // 2) % width - width // 2
            gain = 1 - math.exp(-(a * a + b * b) / (2 * size * size))
            left = [z + part * gain * w for z, w in zip(left, wave, strict=True)]
        found = [f + abs(z) / len(places) for f, z in zip(found, left, strict=True)]
    return [f / channels for f in found]


class TestEnergy:
    @pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 3), (2, 6), (3, 3)])
    @pytest.mark.parametrize("cutoff", [0.1, 0.8])
    def test_as_by_hand(self, height: int, width: int, cutoff: float) -> None:
        states = draw(height, height, width, 3).double()
        expected = torch.tensor(filtered(states, cutoff), dtype=torch.float64)
        got = high_pass(states, cutoff).flatten()
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)

    def test_what_is_the_same_everywhere_has_none(self) -> None:
        assert high_pass(torch.full((4, 6, 2), 3.0), 0.1).abs().max() < 1e-5

    def test_without_a_filter(self) -> None:
        states = draw(0, 4, 4, 2)
        assert torch.equal(high_pass(states, 0.0), states.abs().mean(-1))

    def test_a_single_row_loses_its_mean(self) -> None:
        states = draw(0, 1, 7, 2)
        expected = (states - states.mean(1, keepdim=True)).abs().mean(-1)
        torch.testing.assert_close(high_pass(states, 0.1), expected)

    def test_frames_and_tiles_are_filtered_apart(self) -> None:
        """Two tiles of 2 x 2 patches, of which the second lacks its last row."""
        tiling = Tiling(2, (1, 1), 4, (0, 1, 2, 3, 4, 5))
        image = Image(0, 0, range(6), tiling=tiling)
        layout = Layout.of([image], torch.ones(1, 6, dtype=torch.bool))
        states = draw(1, 1, 6, 3)
        got = spectral_energy(states, layout, 0.1)[0]
        first = high_pass(states[0, :4].view(2, 2, 3), 0.1).flatten()
        second = high_pass(states[0, 4:].view(1, 2, 3), 0.1).flatten()
        torch.testing.assert_close(got, torch.cat([first, second]))

    def test_images_of_several_sizes(self) -> None:
        images = [Image(0, 0, range(6), (2, 3)), Image(1, 0, range(4), (2, 2))]
        layout = Layout.of(images, torch.ones(2, 6, dtype=torch.bool))
        states = draw(1, 2, 6, 3)
        got = spectral_energy(states, layout, 0.1)
        torch.testing.assert_close(got[0], high_pass(states[0].view(2, 3, 3), 0.1).flatten())
        alone = high_pass(states[1, :4].view(2, 2, 3), 0.1).flatten()
        torch.testing.assert_close(got[1, :4], alone)

    def test_a_token_of_no_place_has_the_mean(self) -> None:
        image = Image(0, 0, range(5), (2, 2), count=4)
        layout = Layout.of([image], torch.ones(1, 5, dtype=torch.bool))
        layout.raster[0] = torch.tensor([0, 1, 2, 3, -1])
        got = spectral_energy(draw(2, 1, 5, 3), layout, 0.1)[0]
        torch.testing.assert_close(got[4], got[:4].mean())


class TestFactor:
    @given(st.integers(2, 9), st.integers(0, 999))
    def test_as_by_hand(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        before, after = torch.rand(2, 1, n, generator=generator, dtype=torch.float64)
        after = after * 3  # so that some are cut at 1
        one, other = before[0].tolist(), after[0].tolist()
        mean = sum(one) / n
        change = [min(abs(a - b) / (mean + b + 1e-6), 1.0) for a, b in zip(other, one, strict=True)]
        middle = sum(change) / n
        spread = math.sqrt(sum((c - middle) ** 2 for c in change) / (n - 1))
        expected = [1 / (1 + math.exp(-(c - middle) / (spread + 1e-6) / 0.7)) for c in change]
        got = evolution(before, after, torch.ones(1, n, dtype=torch.bool), 0.7)[0]
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))

    def test_a_smaller_image_is_standardised_by_itself(self) -> None:
        before, after = draw(1, 1, 8).abs(), draw(2, 1, 8).abs()
        valid = torch.arange(8)[None] < 5
        got = evolution(before, after, valid, 0.1)[:, :5]
        alone = evolution(before[:, :5], after[:, :5], valid[:, :5], 0.1)
        torch.testing.assert_close(got, alone)

    def test_one_token_has_half(self) -> None:
        one = torch.ones(1, 1)
        assert evolution(one, 2 * one, one.bool(), 0.1).item() == 0.5


class TestModel:
    def test_a_factor_at_the_first_stage_alone(self) -> None:
        model, inputs = tiny_llava(layers=LAYERS), batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)])
        recording = Recording(method := pore.CLSE((9, 6, 3), (2, 3, 5), since=1))
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
            with recording(model):
                model(**inputs)
        for number, view, selection in recording.seen:
            score = view.attention
            if number == 0:
                visual = [view.layout.gather(states[layer]) for layer in (1, 2)]
                energies = [high_pass(x.unflatten(1, (4, 4)), 0.1).flatten(1) for x in visual]
                score = score * evolution(*energies, view.layout.valid, 0.1)
            torch.testing.assert_close(method.score(number, view), score)
            for row, keep in zip(score, selection.keep, strict=True):
                best = row[: int(view.layout.counts[0])].topk(int(keep.sum())).indices
                assert sorted(best.tolist()) == keep.nonzero()[:, 0].tolist()

    def test_p_divides_the_attention(self) -> None:
        model, inputs = tiny_llava(layers=LAYERS), batch([prompt(3, 1, 5)])
        bias = pore.PositionBias.fit(torch.linspace(1, 4, 16), "empirical")
        recording = Recording(method := pore.CLSE((9, 6, 3), (1, 2, 3), reweight=bias))
        with torch.no_grad(), recording(model):
            model(**inputs)
        view = recording.seen[0].view
        plain = pore.CLSE((9, 6, 3), (1, 2, 3), by="evolution").score(0, view)
        expected = plain * view.corrected(view.attention)
        torch.testing.assert_close(method.score(0, view), expected)
        assert not torch.equal(view.corrected(view.attention), view.attention)


class TestBudget:
    def test_the_authors_ratio(self) -> None:
        assert pore.CLSE(64).remaining(576) == [344, 218, 64]
        assert pore.CLSE(192).remaining(576) == [576, 576, 192]
        assert pore.CLSE(0.1).remaining(500) == [269, 170, 50]
        assert pore.CLSE((330, 210, 62)).remaining(576) == [330, 210, 62]
        assert pore.CLSE(16, (1, 2)).remaining(64) == [32, 16]

    def test_their_mean_over_the_layers(self) -> None:
        counts = pore.CLSE((330, 210, 62)).counts(576, 32)
        assert sum(counts) / 32 == pytest.approx(208, abs=0.1)

    def test_usual_scales_with_the_depth(self) -> None:
        assert pore.CLSE.usual(64, model_shape("llava-1.5-7b")).layers == (1, 11, 21)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"since": 1}, BudgetError, "not before the first stage"),
        ({"since": -1}, BudgetError, "since must be a whole number"),
        ({"cutoff": -0.1}, ScoreError, "cutoff"),
        ({"temperature": 0.0}, ScoreError, "temperature"),
        ({"temperature": float("nan")}, ScoreError, "temperature"),
        ({"by": "clse"}, ScoreError, "'both' or 'attention' or 'evolution'"),
        ({"layers": (0, 1)}, BudgetError, "layers"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[PoreError], message: str) -> None:
    with pytest.raises(error, match=message):
        pore.CLSE(4, **settings)
