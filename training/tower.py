"""Supervision of the tower: what covers each patch, and what is in the image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from model import pixels
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionModel

from pore.embedded.drawing import draw, opacity
from pore.embedded.splits import Split
from pore.embedded.things import COLORS, DIGITS, LETTERS, SHAPES, SIDE, Thing, things_of

PATCH, GRID = 8, 12
NAMES = (*SHAPES, *DIGITS, *LETTERS)
COLOR_NAMES = tuple(COLORS)
IGNORED = -100
FEW, SOME = 255, 8 * 255
"""Coverage of a patch, in units of 1/255 pixel: background below FEW, an object from SOME on."""


@dataclass
class Labels:
    """Labels of a batch.

    Attributes:
        patches: ``(B, 144, 4)``: name, colour, row and column of the covering object. Name and
            colour 0 are the background; row and column are ignored there.
        presence: ``(B, names + colours)``: what the image shows, 0 or 1.
    """

    patches: Tensor
    presence: Tensor


def patch_labels(things: tuple[Thing, ...]) -> np.ndarray:
    """``(144, 4)`` labels of the patches of one scene."""
    half = 8
    labels = np.full((GRID * GRID, 4), IGNORED)
    labels[:, :2] = 0
    for thing in things:
        cover = np.zeros((SIDE, SIDE), np.int32)
        cover[thing.y - half : thing.y + half, thing.x - half : thing.x + half] = opacity(thing)
        total = cover.reshape(GRID, PATCH, GRID, PATCH).sum((1, 3)).reshape(-1)
        row, column = (min(c // PATCH, GRID - 1) for c in (thing.y, thing.x))
        name, color = 1 + NAMES.index(thing.name), 1 + COLOR_NAMES.index(thing.color)
        labels[(total >= FEW) & (total < SOME) & (labels[:, 0] <= 0)] = IGNORED
        labels[total >= SOME] = (name, color, row, column)
    return labels


def tower_batch(split: Split, first: int, size: int) -> tuple[np.ndarray, Labels]:
    """``(size, 96, 96, 3)`` images from index ``first`` on, with their labels."""
    images, patches, presence = [], [], np.zeros((size, len(NAMES) + len(COLOR_NAMES)), np.float32)
    for i in range(size):
        things = things_of(split, first + i)
        images.append(draw(split, first + i, things))
        patches.append(patch_labels(things))
        for t in things:
            presence[i, NAMES.index(t.name)] = 1
            presence[i, len(NAMES) + COLOR_NAMES.index(t.color)] = 1
    labels = Labels(torch.from_numpy(np.stack(patches)), torch.from_numpy(presence))
    return np.stack(images), labels


class TowerHeads(nn.Module):
    """Linear heads on the features that LLaVA will read, and on the pooled output."""

    def __init__(self, width: int) -> None:
        """Make the heads.

        Args:
            width: Width of the tower.
        """
        super().__init__()
        self.sizes = (len(NAMES) + 1, len(COLOR_NAMES) + 1, GRID, GRID)
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, sum(self.sizes))
        self.image = nn.Linear(width, len(NAMES) + len(COLOR_NAMES))

    def forward(self, tower: CLIPVisionModel, images: np.ndarray) -> tuple[list[Tensor], Tensor]:
        """Logits per patch, ``(B, 144, size)`` for each of four labels, and per image."""
        out = tower(pixels(images), output_hidden_states=True)
        per_patch = self.patch(self.norm(out.hidden_states[-2][:, 1:]))
        return list(per_patch.split(self.sizes, -1)), self.image(out.pooler_output)

    def loss(self, tower: CLIPVisionModel, images: np.ndarray, labels: Labels) -> Tensor:
        """Sum of the cross-entropies; half of the weight of names lies on covered patches."""
        per_patch, image = self(tower, images)
        total = functional.binary_cross_entropy_with_logits(image.float(), labels.presence)
        covered = labels.patches[..., 0] > 0
        for i, logits in enumerate(per_patch):
            target = labels.patches[..., i]
            chosen = logits[covered].float()
            total = total + functional.cross_entropy(chosen, target[covered])
            if i < 2:
                flat = logits.flatten(0, 1).float()
                total = total + functional.cross_entropy(flat, target.flatten())
        return total

    @torch.no_grad()
    def accuracy(self, tower: CLIPVisionModel) -> dict[str, object]:
        """Accuracy of the linear probe on calibration scenes, on covered patches."""
        images, labels = tower_batch("calibration", 0, 200)
        per_patch, image = self(tower, images)
        best = torch.stack([logits.argmax(-1) for logits in per_patch], -1)
        hit = best == labels.patches
        name = labels.patches[..., 0]
        categories = {
            "shape": (name >= 1) & (name <= 7),
            "digit": (name >= 8) & (name <= 17),
            "letter": name >= 18,
        }
        covered = name > 0
        found = {category: hit[..., 0][here] for category, here in categories.items()}
        found["background"] = hit[..., 0][name == 0]
        found["color"] = hit[..., 1][covered]
        found["row"], found["column"] = hit[..., 2][covered], hit[..., 3][covered]
        found["presence"] = (image > 0) == (labels.presence > 0)
        return {"probe": {k: round(v.float().mean().item(), 4) for k, v in found.items()}}
