"""Sums of a calibration depend on what the model computes of each sample, and on nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pore
from helpers.calibrations import LAYERS, K, make_processor, make_samples
from helpers.models import N, tiny_llava
from helpers.whose import Call, ways
from pore.calibration.batch import Batch
from pore.calibration.calibrating import calibrate
from pore.calibration.host import HostCalibration
from pore.calibration.sums import Calibration
from pore.calibration.table import Rows, Table
from pore.data.samples import Sample
from pore.errors import CalibrationError


def everything(found: Calibration) -> Any:
    """All sums of a calibration."""
    assert found.halves is not None
    assert sum(half.images for half in found.halves) == found.count
    return found.sums, found.squares, found.halves, found.table


class TestSums:
    """They depend on what the model computes of each sample, and on nothing else."""

    empty = Calibration(pore.bias.Provenance(), "float32", ("",), samples=b"", table=Table())

    @settings(max_examples=25)
    @given(
        st.lists(
            st.lists(st.floats(0, 2**30) | st.floats(0, 1), min_size=N, max_size=N),
            min_size=1,
            max_size=12,
        ),
        st.randoms(use_true_random=False),
    )
    def test_batches_order_and_shards(self, rows: list[list[float]], random: Any) -> None:
        def through(order: list[int]) -> Calibration:
            state = self.empty
            while order:
                size = random.randint(1, len(order))
                part, order = order[:size], order[size:]
                samples = [Sample(str(i), None, "w6") for i in part]
                marks = b"".join(i.to_bytes(12, "big") for i in part)
                attention = np.array([rows[i] for i in part])
                distance = np.broadcast_to(np.arange(16, 0, -1), attention.shape)
                read = [Rows((4, 4), attention, np.arange(size), distance)]
                state = state.including(Batch(samples, marks, read, []))
            return state

        numbers = list(range(len(rows)))
        whole = through(numbers)
        random.shuffle(numbers)
        assert everything(through(numbers)) == everything(whole)
        cut = random.randint(0, len(numbers))
        parts = through(numbers[:cut]), through(numbers[cut:])
        if all(part.count for part in parts):
            merged = parts[0].merge(parts[1])
            assert everything(merged) == everything(whole)
        assert Calibration.from_json(whole.to_json()) == whole

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @ways
    def test_one_by_one_nothing_moves(self, way: Any, dtype: torch.dtype, tmp_path: Path) -> None:
        """Shards, a limit, another order: to the last bit, in any number format."""
        samples = make_samples(7)
        call = Call(tiny_llava(layers=LAYERS, dtype=dtype), make_processor(), samples, tmp_path)
        go = partial(way, call, batch_size=1)

        def sums(found: Any) -> Any:
            stages = found.stages if isinstance(found, HostCalibration) else (found,)
            return [(stage.sums, stage.squares, stage.count) for stage in stages]

        whole = sums(go(samples))
        assert sums(go(samples[:3]).merge(go(samples[3:]))) == whole
        assert sums(go(samples[::-1])) == whole
        file = tmp_path / "state.json"
        go(samples, checkpoint=file, limit=3)
        assert sums(go(samples, checkpoint=file)) == whole

    def test_in_other_batches_they_move_by_rounding(self) -> None:
        given = (tiny_llava(dtype=torch.float32), make_processor(), make_samples(9))
        one, other = (calibrate(*given, K, batch_size=size) for size in (1, 4))
        torch.testing.assert_close(other.mean, one.mean, rtol=5e-6, atol=0)


class TestGeometricMean:
    """The mean logarithm shows P where the arithmetic mean is that of a few large values."""

    def measured(self, count: int, spread: float) -> tuple[Calibration, np.ndarray]:
        random = np.random.default_rng(1)
        true = np.exp(np.linspace(0, 2, 64))
        state = Calibration(pore.Provenance(), "float32", ("",), samples=b"", table=Table())
        for number in range(count):
            rows = 1e-3 * true * np.exp(spread * random.standard_normal((1, 64)))
            distance = np.arange(64, 0, -1)[None]
            read = [Rows((8, 8), rows, np.zeros(1, int), distance)]
            sample = Sample(str(number), None, "w6")
            state = state.including(Batch([sample], number.to_bytes(12, "little"), read, []))
        return state, true

    def test_it_is_the_exponential_of_the_mean_logarithm(self) -> None:
        found, _ = self.measured(1, 0.5)
        torch.testing.assert_close(found.mean_attention("geometric"), found.mean)
        torch.testing.assert_close(found.mean_attention(), found.mean)

    def test_it_finds_a_bias_under_heavy_tails(self) -> None:
        found, true = self.measured(60, 2.5)

        def error(bias: Any) -> float:
            return float((bias.values.log() - torch.from_numpy(true).log()).std())

        for kind in ("exponential", "spline", "empirical", "auto"):
            geometric = found.fit(kind, "geometric")
            assert geometric.parameters["geometric"] == 1
            assert error(geometric) < 0.5
            assert "of the geometric mean" in repr(geometric)
        arithmetic = found.fit("empirical")
        assert error(found.fit("exponential", "geometric")) < 0.2
        assert error(arithmetic) > 2 * error(found.fit("empirical", "geometric"))

    def test_a_bias_is_drawn_with_the_mean_that_it_was_fitted_to(self) -> None:
        found, _ = self.measured(60, 0.5)
        mean, error = found.mean_of(found.fit("spline", "geometric"))
        torch.testing.assert_close(mean, found.mean_attention("geometric"))
        # Of a logarithm of standard deviation 0.5, over 60 images.
        torch.testing.assert_close(
            (error / mean).mean(), torch.tensor(0.5 / 60**0.5).double(), rtol=0.1, atol=0
        )
        mean, error = found.mean_of(found.fit("spline"))
        torch.testing.assert_close(mean, found.mean)
        torch.testing.assert_close(error, found.sem)

    def test_attention_of_zero_has_a_logarithm(self) -> None:
        state, _ = self.measured(2, 0.1)
        rows = np.zeros((1, 64))
        read = [Rows((8, 8), rows, np.zeros(1, int), np.arange(64, 0, -1)[None])]
        state = state.including(Batch([Sample("z", None, "w6")], bytes(12), read, []))
        assert bool((state.mean_attention("geometric") > 0).all())

    def test_an_older_file_has_none(self) -> None:
        state, _ = self.measured(2, 0.1)
        with pytest.raises(CalibrationError, match="older pore"):
            replace(state, halves=None).fit("spline", "geometric")
