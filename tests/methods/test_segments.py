"""Where a video is cut into segments."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.golden_files import draw
from pore.methods._segments import runs, segments


@given(st.integers(1, 9), st.floats(-1, 1), st.integers(1, 12), st.integers(0, 99))
def test_cuts(frames: int, threshold: float, least: int, seed: int) -> None:
    """Below the threshold, and the least similar of the others until there are enough."""
    features = draw(seed, frames, 3).double()
    likeness = [
        float(torch.cosine_similarity(features[t], features[t + 1], dim=0))
        for t in range(frames - 1)
    ]
    cuts = {t for t, value in enumerate(likeness) if value < threshold}
    for t in sorted(range(frames - 1), key=lambda t: likeness[t]):
        if len(cuts) + 1 < least:
            cuts.add(t)
    found = segments(features, threshold, least)
    assert [part.stop - 1 for part in found[:-1]] == sorted(cuts)
    assert [t for part in found for t in part] == list(range(frames))


def test_runs() -> None:
    cut = torch.tensor([False, True, True, False])
    assert list(map(list, runs(cut))) == [[0, 1], [2], [3, 4]]
    assert runs(cut[:0]) == [range(1)]
