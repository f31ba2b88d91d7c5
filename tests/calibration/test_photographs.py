"""Calibration and pruning with photographs of mixed sizes in one batch, in every family."""

from __future__ import annotations

import pytest
import torch

import pore
from helpers.photographs import photograph
from pore.data.prompts import build_inputs
from processors import KINDS
from processors.base import Kind, parts_or_skip

NAMES = ("photograph", "portrait", "photograph", "portrait")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.at_once(3)
def test_a_family_is_calibrated_on_photographs_and_pruned_by_it(kind: Kind) -> None:
    processor, model = parts_or_skip(kind)
    samples = [
        pore.Sample(id=str(number), image=photograph(name), question=f"look {number}")
        for number, name in enumerate(NAMES)
    ]
    measured = pore.calibrate(
        model, processor, samples, layer=1, batch_size=2, progress=False, max_bad=0
    )
    assert measured.count >= len(samples)
    assert measured.table is not None
    (bias,) = [measured.fit_any_size("spline")] if measured.mixed else [measured.fit("empirical")]
    inputs = build_inputs(processor, samples[:2], torch.device("cpu"), torch.float32)
    with torch.no_grad(), pore.FastV(keep=0.5, layer=1, reweight=bias)(model) as run:
        model(**inputs)
    for sample in run.report:
        assert all(0 < len(image.kept) < image.seen for image in sample.images)
    sizes = {image.seen for sample in run.report for image in sample.images}
    assert measured.mixed == (len(measured.table.sizes) > 1)
    assert sizes <= measured.table.sizes.keys()
