"""The splits of the scenes, and where their chance comes from."""

from __future__ import annotations

from typing import Literal

import numpy as np

Split = Literal["train", "calibration", "test"]

SPLITS: tuple[Split, ...] = ("train", "calibration", "test")


def generator(split: Split, index: int, purpose: int) -> np.random.Generator:
    """The source of chance of a scene, apart from that of any other.

    Args:
        split: The scene's split.
        index: Its number within the split.
        purpose: What is drawn: 0 the objects, 1 the background, 2 the questions.
    """
    return np.random.default_rng([SPLITS.index(split), index, purpose])
