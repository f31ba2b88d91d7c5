"""A LLaVA projector without gradient steps: a random first layer, a second one by least squares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from canvas import COVERED, Canvas, canvas
from lexicon import Lexicon
from model import pixels
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionModel

from pore.embedded.things import SIDE
from tower import COLOR_NAMES, NAMES

PATCHES = 400 * 144
"""Patches that the projector is fitted to: 400 pictures of 144, 225 of 256, 100 of 576."""

FIRST, HELD_OUT = 3_000_000, 3_500_000
"""Numbers of the first training scenes that it is fitted to, and of those that it is tested on."""

SPREAD, RIDGE = 0.5, 1e-3
"""Standard deviation of the first layer for features of variance 1, and the ridge as a share of the
mean square of its outputs. Chosen on 50 held-out training scenes of 144 patches."""

_FEW = 255
"""Coverage of a patch, in units of 1/255 pixel, below which it shows background."""
_BATCH = 20
_OBJECT, _BACKGROUND, _NEITHER = 1, 0, -1


@dataclass(frozen=True)
class Patches:
    """What patches look like, and what they should be turned into.

    Attributes:
        features: ``(P, 128)`` of the tower.
        targets: ``(P, D)`` sums of the decoder's embeddings of the words for what they show.
        kinds: ``(P,)``: 1 an object, 0 background, -1 the rim of an object, which is left out.
    """

    features: Tensor
    targets: Tensor
    kinds: Tensor


def visual_features(tower: CLIPVisionModel, images: np.ndarray) -> Tensor:
    """Patch features as LLaVA reads them, of hidden state -2, ``(B, N, 128)``."""
    with torch.inference_mode():
        found = [
            tower(pixels(images[i : i + _BATCH]), output_hidden_states=True).hidden_states[-2]
            for i in range(0, len(images), _BATCH)
        ]
    return torch.cat(found)[:, 1:].clone()


def targets(shown: Canvas, words: Lexicon) -> tuple[Tensor, Tensor]:
    """The words for every patch of a picture, summed, ``(N, D)``, and the kinds, ``(N,)``."""
    coverage = np.stack([shown.coverage(t) for t in shown.things])
    most = torch.from_numpy(coverage.max(0))
    told = torch.stack(
        [
            words.names[NAMES.index(t.name)]
            + words.colors[COLOR_NAMES.index(t.color)]
            + words.places[min(t.y // 8, SIDE // 8 - 1), min(t.x // 8, SIDE // 8 - 1)]
            for t in shown.scaled
        ]
    )
    wanted = told[torch.from_numpy(coverage.argmax(0))]
    kinds = torch.where(most >= COVERED, _OBJECT, torch.where(most < _FEW, _BACKGROUND, _NEITHER))
    return torch.where((kinds == _OBJECT)[:, None], wanted, words.background), kinds


def gather(tower: CLIPVisionModel, words: Lexicon, first: int, n: int, side: int) -> Patches:
    """The patches of `n` training pictures from number `first` on."""
    shown = [canvas("train", first + i, side) for i in range(n)]
    wanted, kinds = zip(*(targets(one, words) for one in shown), strict=True)
    features = visual_features(tower, np.stack([one.image for one in shown]))
    return Patches(features.flatten(0, 1), torch.cat(wanted), torch.cat(kinds))


def fit(patches: Patches, seed: int = 0) -> dict[str, Tensor]:
    """The projector's weights under their names, in float32.

    The first layer is drawn at random and sees features of mean 0 and variance 1; the second is the
    ridge regression of the targets on what the first gives, objects and background weighing alike.

    Args:
        patches: What to fit to.
        seed: Of the first layer.

    Returns:
        ``linear_1`` from the tower's width to the decoder's, ``linear_2`` from that to itself.
    """
    features, wanted = patches.features.double(), patches.targets.double()
    generator = torch.Generator().manual_seed(seed)
    inside, width = features.shape[1], wanted.shape[1]
    drawn = torch.randn(width, inside, generator=generator, dtype=torch.float64)
    first = drawn * SPREAD / inside**0.5 / features.std(0)
    shift = torch.rand(width, generator=generator, dtype=torch.float64) * 2 - 1
    bias = shift - first @ features.mean(0)
    outputs = _with_one(functional.gelu(features @ first.T + bias))
    weight = sum(
        (patches.kinds == kind).double() / (patches.kinds == kind).sum().clamp_min(1)
        for kind in (_OBJECT, _BACKGROUND)
    )
    assert isinstance(weight, Tensor)
    weighed = outputs * weight[:, None]
    square = weighed.T @ outputs
    ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    second = torch.linalg.solve(square + ridge, weighed.T @ wanted).T
    found = {
        "linear_1.weight": first,
        "linear_1.bias": bias,
        "linear_2.weight": second[:, :-1],
        "linear_2.bias": second[:, -1],
    }
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def explained(patches: Patches, weights: dict[str, Tensor]) -> float:
    """R²: the share of the variance of the objects' targets that a projector explains."""
    shown = patches.kinds == _OBJECT
    inside = patches.features[shown] @ weights["linear_1.weight"].T + weights["linear_1.bias"]
    given = functional.gelu(inside) @ weights["linear_2.weight"].T + weights["linear_2.bias"]
    wanted = patches.targets[shown]
    error = (given - wanted).square().sum()
    return 1 - float(error / (wanted - wanted.mean(0)).square().sum())


def _with_one(outputs: Tensor) -> Tensor:
    return torch.cat([outputs, torch.ones_like(outputs[:, :1])], 1)
