"""The splits of the scenes, and their random generators."""

from __future__ import annotations

from typing import Literal

import numpy as np

Split = Literal["train", "calibration", "test", "fresh"]

SPLITS: tuple[Split, ...] = ("train", "calibration", "test", "fresh")
"""The first 2,100 questions of "test" were asked often while the library grew. "fresh" has other
seeds, of which no question was asked before the comparison of corrections; it shares its
handwriting with "test"."""


def generator(split: Split, index: int, purpose: int) -> np.random.Generator:
    """The random generator of a scene, independent of all other scenes.

    Args:
        split: The scene's split.
        index: Its number within the split.
        purpose: What is drawn: 0 the objects, 1 the background, 2 the questions, 3 places on a
            larger picture (`training/canvas.py`), 4 the size of one among mixed sizes; of a video,
            5 the ways of its objects, 6 the objects, 7 the question.
    """
    return np.random.default_rng([SPLITS.index(split), index, purpose])
