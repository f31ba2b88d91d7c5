"""Shards, merged in any order, and what comes of the sums."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pore
from helpers.calibrations import K, run
from helpers.models import SIDE, N
from pore.calibration import exact
from pore.data.prompts import build_inputs, processor_settings
from pore.data.samples import Sample
from pore.errors import CalibrationError


def test_merged_shards_equal_the_whole(model: Any, processor: Any, samples: list[Sample]) -> None:
    samples = samples[:7]
    whole = run(model, processor, samples, batch_size=1)
    parts = [
        run(model, processor, samples[i::3], batch_size=1, source=f"shard {i}") for i in range(3)
    ]
    a, b, c = parts
    merged = a.merge(b).merge(c)
    assert merged == c.merge(a.merge(b)) == b.merge(c).merge(a)
    # Not only close: integers add up to the same in any order.
    assert (merged.sums, merged.squares) == (whole.sums, whole.squares)
    assert torch.equal(merged.mean, whole.mean)
    assert torch.equal(merged.fit().values, whole.fit().values)
    assert merged.count == 7
    assert merged.provenance.source == "shard 0; shard 1; shard 2"


def test_merging_what_does_not_go_together_is_refused(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    one = run(model, processor, samples[:4])
    with pytest.raises(CalibrationError, match="same samples, which would count twice"):
        one.merge(run(model, processor, samples[:4]))
    with pytest.raises(CalibrationError, match="layer is 3 here and 2 there"):
        one.merge(run(model, processor, samples[4:8], 2))
    merged = one.merge(run(model, processor, samples[4:8]))
    with pytest.raises(CalibrationError, match="not the first ones"):
        run(model, processor, samples, checkpoint=merged.save(tmp_path / "merged.json"))


@pytest.mark.parametrize("values", [[0.0, 1.0, 0.5, 2**-60], [3.75, 2**20 + 2**-30, 1e-300, 2**30]])
def test_units_are_rounded_once(values: list[float]) -> None:
    units = exact.units(np.array([values]))[0]
    assert [int(u) for u in units] == [round(Fraction(v) * 2**62) for v in values]


def test_fit_carries_where_it_comes_from(model: Any, processor: Any, samples: list[Sample]) -> None:
    found = run(model, processor, samples, normalize="visual", source="noise")
    bias = found.fit("empirical")
    assert len(bias) == len(found) == N
    assert bias.grid == (SIDE, SIDE)
    torch.testing.assert_close(bias.values, found.mean / found.mean.mean())
    origin = bias.provenance
    assert (origin.layer, origin.normalize, origin.samples) == (K, "visual", 13)
    assert origin.source == "noise"
    assert origin.template == "USER: <image> {question} ASSISTANT:"
    assert origin.processor is not None
    assert origin.processor["size"] == {"height": 32, "width": 32}
    assert pore.PositionBias.from_json(bias.to_json()) == bias
    bias.check(n=N, layer=K, normalize="visual", processor=processor_settings(processor))
    with (
        pore.FastV(keep=4, layer=K, normalize="visual", reweight=bias)(model) as pruned,
        torch.no_grad(),
    ):
        model(**build_inputs(processor, samples[:2], dtype=torch.float64))
    assert "4" in str(pruned.report)


def test_band_covers_the_mean(model: Any, processor: Any, samples: list[Sample]) -> None:
    found = run(model, processor, samples)
    low, high = found.band(0.95)
    torch.testing.assert_close((high - low) / 2, 1.959964 * found.sem)
    torch.testing.assert_close((high + low) / 2, found.mean)
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        found.band(95)
    assert run(model, processor, samples[:1]).std.isnan().all()
