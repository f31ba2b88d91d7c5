"""Downsample with budgets that make no grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pore
from helpers.photographs import photograph
from pore.data.prompts import build_inputs
from pore.errors import PoreError
from pore.methods.downsample import fair_cells
from processors import KINDS
from processors.base import parts


@pytest.mark.parametrize(
    ("grid", "keep", "cells"),
    [
        ((12, 12), 0.5, 72),
        ((12, 12), 0.25, 36),
        ((12, 12), 0.222, 35),
        ((12, 12), 0.1, 16),
        ((24, 24), 128, 130),
        ((4, 4), 16, 16),
        ((4, 4), 13, 16),
    ],
)
def test_downsampling_gets_a_decent_grid(grid: tuple[int, int], keep: Any, cells: int) -> None:
    assert fair_cells(grid, keep) == cells


def test_images_of_any_size_each_get_a_decent_grid() -> None:
    (kind,) = (kind for kind in KINDS if kind.name == "Qwen2.5-VL")
    processor, model = parts(kind)
    names = ("photograph", "portrait")
    samples = [pore.Sample(name, photograph(name), "look") for name in names]
    inputs = build_inputs(processor, samples)
    kept = []
    with torch.no_grad(), pore.Downsample(keep=0.1, fair=True)(model) as run:
        model(**inputs)
    for sample in run.report:
        (image,) = sample.images
        assert image.grid is not None
        assert len(image.kept) == fair_cells(image.grid, 0.1)
        kept.append(len(image.kept) - round(0.1 * image.seen))
    assert max(kept) > 0  # for one of them the budget itself makes no decent grid
    with torch.no_grad(), pore.Downsample(keep=0.1)(model), pytest.raises(PoreError):
        model(**inputs)
