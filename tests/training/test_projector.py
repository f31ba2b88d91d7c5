"""The projector in closed form finds what can be found, and what it is fitted to is right."""

from __future__ import annotations

from types import SimpleNamespace

import projector
import torch
from canvas import COVERED, canvas

from tower import COLOR_NAMES, NAMES


def made_up(n: int, seed: int) -> projector.Patches:
    """Patches whose targets follow from their features, half of them background at one place."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 6, generator=generator) * 3 + 1
    mixing = torch.randn(6, 24, generator=torch.Generator().manual_seed(9))
    kinds = torch.arange(n) % 2
    features[kinds == 0] = 8.0
    return projector.Patches(features, (features / 3).tanh() @ mixing, kinds)


def test_what_follows_from_the_features_is_found() -> None:
    weights = projector.fit(made_up(4000, 0))
    assert weights["linear_1.weight"].shape == (24, 6)
    assert weights["linear_2.weight"].shape == (24, 24)
    held_out = made_up(1000, 1)
    assert projector.explained(held_out, weights) > 0.8
    shuffled = projector.Patches(held_out.features, held_out.targets.flip(0), held_out.kinds)
    assert projector.explained(shuffled, weights) < 0


def test_targets_are_the_words_for_the_object_that_covers_a_patch() -> None:
    shown = canvas("train", 5, 192)
    width = len(NAMES) + len(COLOR_NAMES) + 1
    one = torch.eye(width)
    words = SimpleNamespace(
        names=one[: len(NAMES)],
        colors=one[len(NAMES) : -1],
        places=one[-1].expand(12, 12, -1),
        background=torch.full((width,), -1.0),
    )
    wanted, kinds = projector.targets(shown, words)
    assert wanted.shape == (576, width)
    for thing in shown.things:
        patch = int(shown.coverage(thing).argmax())
        assert kinds[patch] == 1
        assert wanted[patch, NAMES.index(thing.name)] == 1
        assert wanted[patch, len(NAMES) + COLOR_NAMES.index(thing.color)] == 1
        assert wanted[patch].sum() == 3
    assert (wanted[kinds < 1] == -1).all()
    most = torch.stack([torch.from_numpy(shown.coverage(t)) for t in shown.things]).amax(0)
    assert torch.equal(kinds == 1, most >= COVERED)
    assert (most[kinds == 0] < 255).all()
