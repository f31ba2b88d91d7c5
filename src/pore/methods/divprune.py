"""DivPrune: the most diverse visual tokens, without text and without attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pore.pruner import Pruner, Selection, Stage, View
from pore.selection import check_keep


@dataclass(frozen=True)
class DivPrune(Pruner):
    """Keep the visual tokens that are farthest apart (arXiv 2503.02175).

    Greedy max-min selection by cosine distance of the projected embeddings, before the decoder. The
    first pick is the token farthest from its nearest neighbour, each next one the token farthest
    from those picked. Picked tokens are not picked again: the authors' code can repeat one when all
    that remain are duplicates of picked ones, which is the only difference.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
    """

    keep: int | float

    name: ClassVar[str] = "DivPrune"
    source: ClassVar[str] = "arXiv 2503.02175"

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def stages(self) -> Sequence[Stage]:
        """One stage, on the embeddings."""
        return [Stage(0, self._select)]

    def _select(self, view: View) -> Selection:
        valid = view.layout.valid
        counts = torch.tensor(view.budget(self.keep), device=valid.device)
        distance = cosine_distance(view.features)
        return Selection(farthest(distance, int(counts.max()), valid)[1] < counts[:, None])


def cosine_distance(features: Tensor) -> Tensor:
    """One minus the cosine between all pairs of tokens.

    Args:
        features: (I, t, D) embeddings.

    Returns:
        (I, t, t) distances, at least float32.
    """
    unit = features.to(torch.promote_types(features.dtype, torch.float32))
    unit = unit / unit.norm(dim=-1, keepdim=True)
    return 1 - torch.matmul(unit, unit.transpose(1, 2))


def farthest(distance: Tensor, count: int, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy max-min selection.

    Args:
        distance: (I, t, t) distances.
        count: Tokens to pick from every image.
        valid: (I, t) bool, False where a smaller image is filled up.

    Returns:
        order (I, count), the tokens in the order they are picked, and rank (I, t), the place of
        every token in that order, `count` where it is not picked.
    """
    images = torch.arange(distance.shape[0], device=distance.device)
    both = valid[:, :, None] & valid[:, None, :]
    itself = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    nearest = distance.masked_fill(~both | itself, torch.inf).amin(1)
    if distance.shape[1] == 1:
        nearest = torch.zeros_like(nearest)
    gap = nearest.masked_fill(~valid, -torch.inf)
    left, order = valid.clone(), []
    rank = torch.full(valid.shape, count, device=valid.device)
    for step in range(count):
        pick = gap.argmax(1)
        order.append(pick)
        rank[images, pick] = torch.where(left[images, pick], step, rank[images, pick])
        left[images, pick] = False
        reach = distance[images, pick]
        gap = reach if step == 0 else torch.minimum(nearest, reach)
        nearest = gap
        gap = gap.masked_fill(~left, -torch.inf)
    return torch.stack(order, 1), rank
