"""FlashVID: which tokens are chosen, trees through time, and what differs from the authors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pore
from helpers.golden_files import draw
from pore.methods._merging_videos import Frames
from pore.methods.flashvid import diverse, most_similar_before, tree_means


@settings(max_examples=20)
@given(st.sampled_from(["div", "attn_div"]), st.integers(1, 7), st.integers(0, 99))
def test_chosen_one_after_the_other(selecting: Any, count: int, seed: int) -> None:
    video = Frames(draw(seed, 2, 7, 4).double(), draw(seed + 1, 2, 7).double().softmax(-1))
    found = diverse(video, [count, max(count - 1, 0)], selecting)
    for frame, number in enumerate([count, max(count - 1, 0)]):
        x, weight = video.tokens[frame], video.attention[frame]
        weight = torch.ones_like(weight) if selecting == "div" else weight
        far = (1 - torch.cosine_similarity(x[:, None], x[None], dim=-1)) * weight
        chosen: list[int] = []
        for _ in range(number):
            reach = {
                j: min(float(far[i, j]) for i in (chosen or range(7)) if i != j)
                for j in range(7)
                if j not in chosen
            }
            chosen.append(max(reach, key=lambda j: reach[j]))
        assert found[frame].tolist() == sorted(chosen)


def test_tokens_unlike_their_segment_are_chosen_twice_by_the_authors_alone() -> None:
    """Where weights are negative, a token that is chosen already wins, with a distance of 0."""
    video = Frames(draw(0, 3, 20, 6), torch.ones(3, 20))
    faithful = diverse(video, [18] * 3, "attn_div_v2", faithful=True)
    assert any(len(set(one.tolist())) < 18 for one in faithful)
    assert all(len(set(one.tolist())) == 18 for one in diverse(video, [18] * 3, "attn_div_v2"))


@settings(max_examples=30)
@given(st.integers(2, 5), st.integers(1, 5), st.integers(0, 99))
def test_means_of_trees(frames: int, size: int, seed: int) -> None:
    tokens, merges = draw(seed, frames, size, 3).double(), draw(seed + 1, frames, size) > 0
    merges[0] = False
    parent = draw(seed + 2, frames, size).abs().mul(9).long() % size
    below: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for t in range(1, frames):
        for p in range(size):
            if merges[t, p]:
                below.setdefault((t - 1, int(parent[t, p])), []).append((t, p))

    def tree(root: tuple[int, int]) -> list[tuple[int, int]]:
        return [root, *(place for child in below.get(root, []) for place in tree(child))]

    means = tree_means(tokens, merges, parent)
    authors = tree_means(tokens, merges, parent, faithful=True)
    for t in range(frames):
        for p in range(size):
            every = torch.stack([tokens[place] for place in tree((t, p))])
            torch.testing.assert_close(means[t, p], every.mean(0))
            children = len(below.get((t, p), []))
            torch.testing.assert_close(authors[t, p], every.sum(0) / (1 + children))


def test_the_most_similar_of_the_frame_before() -> None:
    tokens = torch.eye(3).repeat(2, 1, 1)
    free = torch.ones(2, 3, dtype=torch.bool)
    free[0, 2] = False
    best, place = most_similar_before(tokens, free)
    assert best[0].tolist() == [-1.0] * 3
    assert place[1, :2].tolist() == [0, 1]
    assert best[1].tolist() == [1.0, 1.0, 0.0]


def test_still_places_become_one_token_each() -> None:
    """A still video: what is not chosen is one tree for every place, at the first frame."""
    still = draw(0, 1, 6, 32).repeat(5, 1, 1)
    method = pore.FlashVID(5 * 2 + 4, alpha=0.6, selecting="attn", segments=1)
    attention = torch.tensor([0.3, 0.3, 0.1, 0.1, 0.1, 0.1]).expand(5, 6)
    made = method.merge(Frames(still, attention))
    assert len(made.index) == 14
    torch.testing.assert_close(made.tokens, still.flatten(0, 1)[made.index])


@pytest.mark.parametrize("faithful", [True, False])
def test_a_segment_of_one_frame(faithful: bool) -> None:
    """The authors cluster chosen tokens a second time."""
    video = Frames(draw(0, 1, 12, 4), draw(1, 1, 12).softmax(-1))
    made = pore.FlashVID(8, alpha=0.5, faithful=faithful).merge(video)
    assert len(made.index) == 8
    assert (len(set(made.index.tolist())) < 8) == faithful
