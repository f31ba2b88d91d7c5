"""Golden files of DyCoke: which tokens of which frames stay, and in which order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pore
from helpers.videos import video_view

_KEYS = {"features", "kept_indices", "kept_indices_in_output_order", "per_frame", "tokens"}


def check(file: Any) -> float:
    """Assert that pore gives what the file holds; the largest relative difference."""
    tensors: dict[str, Tensor] = file.tensors
    if "keys_prefill" in tensors:
        pytest.skip("the cache that every decoded token sees in part is not offered")
    assert tensors.keys() == _KEYS, tensors.keys() ^ _KEYS
    features = tensors["features"]
    (stage,) = pore.DyCoke(1 - file.params["merging_ratio"], faithful=True).stages()
    made = stage.rule(video_view([features]))
    mask = made.keep[0].view(features.shape[:2])
    assert torch.equal(mask.sum(1), tensors["per_frame"])
    assert torch.equal(mask.flatten().nonzero()[:, 0], tensors["kept_indices"])
    assert made.features is not None
    assert made.raster is not None
    assert torch.equal(made.features[0][made.keep[0]], tensors["tokens"])
    assert torch.equal(made.raster[0][made.keep[0]], tensors["kept_indices_in_output_order"])
    return 0.0
