"""HoliTom: windows, clusters of what stands still, and the merge inside the decoder."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pore
from helpers.golden_files import draw
from pore.methods._merging_videos import Frames
from pore.methods.holitom import best_windows, clustered, halved


def saved(still: torch.Tensor, windows: list[range]) -> int:
    """How many tokens repeat what stood at their place at the start of a window."""
    inside = (still[w.start : w.stop - 1].all(0).sum() * (len(w) - 1) for w in windows)
    return sum(map(int, inside))


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_windows_save_as_much_as_can_be(frames: int, size: int, longest: int, seed: int) -> None:
    still = draw(seed, frames - 1, size) > -0.5
    found = best_windows(still, longest)
    assert [t for window in found for t in window] == list(range(frames))
    assert all(len(window) <= longest for window in found)
    best = 0
    for cuts in product([False, True], repeat=frames - 1):
        ends = [t + 1 for t, cut in enumerate(cuts) if cut] + [frames]
        some = [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        if max(map(len, some)) <= longest:
            best = max(best, saved(still, some))
    assert saved(still, found) == best


def test_of_equal_windows_the_shorter_counts() -> None:
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert best_windows(nothing, 9) == [range(t, t + 1) for t in range(4)]


@pytest.mark.parametrize("beta", [0.6, None])
def test_clusters(beta: float | None) -> None:
    """Two clumps of three, of which the middle ones are the centres."""
    means = torch.tensor([[[0.0], [1.0], [2.5], [50.0], [51.0], [52.5], [7.0]]])
    still = torch.tensor([[True] * 6 + [False]])
    centres, merged = clustered(means, still, [2], 7, beta)
    first, second = centres[0].nonzero()[:, 0].tolist()
    for centre, clump in ((first, [0, 1, 2]), (second, [3, 4, 5])):
        assert centre in clump
        others = torch.stack([means[0, i] for i in clump if i != centre])
        own = means[0, centre]
        plain = torch.cat([own[None], others]).mean(0)
        expected = plain if beta is None else beta * own + (1 - beta) * others.mean(0)
        torch.testing.assert_close(merged[0, centre], expected)


@given(st.integers(1, 12), st.integers(0, 99), st.data())
def test_halving_one_after_the_other(n: int, seed: int, data: st.DataObject) -> None:
    states = draw(seed, n, 3).double()
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any)))
    expected, stay = states.clone(), kept.nonzero()[:, 0]
    for i in range(n):
        if not kept[i]:
            likeness = torch.cosine_similarity(states[i], states[stay], dim=-1)
            to = int(stay[likeness.argmax()])
            expected[to] = (expected[to] + states[i]) / 2
    torch.testing.assert_close(halved(states, kept), expected)


def test_what_stands_still_becomes_its_mean() -> None:
    """Two places stand still in all of four frames, and the budget is what is then left."""
    still, moving = draw(0, 1, 2, 16), draw(1, 4, 3, 16)
    video = torch.cat([still + draw(2, 4, 2, 16) / 50, moving], 1)
    made = pore.HoliTom(2 + 4 * 3).merge(Frames(video, torch.ones(4, 5)))
    assert made.index.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 14, 17, 18, 19]
    torch.testing.assert_close(made.tokens[:2], video[:, :2].mean(0))
    # With three more to keep, those with the most attention stay as they are, out of the mean.
    attention = torch.ones(4, 5)
    attention[1, 0] = attention[2, 0] = attention[3, 1] = 2.0
    made = pore.HoliTom(2 + 4 * 3 + 3).merge(Frames(video, attention))
    assert {5, 10, 16} <= set(made.index.tolist())
    torch.testing.assert_close(made.tokens[0], video[[0, 3], 0].mean(0))
    torch.testing.assert_close(made.tokens[made.index == 16][0], video[3, 1])
