"""DivPrune: the most diverse visual tokens, without text and without attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pore.engine.stages import Limit, Selection, Stage, View
from pore.errors import BudgetError, InputError
from pore.families.base import Family
from pore.layout import Layout
from pore.methods.scorer import BudgetPruner
from pore.tensors.gathering import cosine, take
from pore.tensors.selection import budget


@dataclass(frozen=True)
class DivPrune(BudgetPruner):
    """Keep the visual tokens that are farthest apart (arXiv 2503.02175).

    Greedy max-min selection by cosine distance of the projected embeddings, before the decoder. The
    first pick is the token farthest from its nearest neighbour, each next one the token farthest
    from those picked. No token is picked twice, and newline tokens of images in tiles stay.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        faithful: Pick as the authors' code does: if all that remain are duplicates of picked
            tokens, a token is picked again, and the decoder gets it as many times; newline tokens,
            which are all alike, can be picked like visual tokens, and count.
    """

    faithful: bool = False

    name: ClassVar[str] = "DivPrune"
    paper: ClassVar[str] = "arXiv 2503.02175"

    def stages(self) -> Sequence[Stage]:
        """One stage, on the embeddings."""
        return [Stage(0, self._select, merges=self.faithful)]

    def limits(self, family: Family) -> list[Limit]:
        """A token cannot be given twice if positions are places in the image."""
        found = super().limits(family)
        if self.faithful and family.mrope:
            found.append(
                Limit(
                    "faithful=True can give a token twice, but a visual token's position is its "
                    "place in the image; use faithful=False."
                )
            )
        return found

    def _select(self, view: View) -> Selection:
        if self.faithful:
            return self._select_as_the_authors(view)
        valid = view.layout.valid
        counts = torch.tensor(view.budget(self.keep), device=valid.device)
        distance = cosine_distance(view.features)
        return Selection(farthest(distance, int(counts.max()), valid)[1] < counts[:, None])

    def _select_as_the_authors(self, view: View) -> Selection:
        layout = view.layout
        columns, raster, valid = _with_newlines(layout)
        features = view.hidden_states[layout.rows[:, None], columns]
        counts = [budget(self.keep, candidates) for candidates in valid.sum(1).tolist()]
        ends = torch.tensor(counts, device=valid.device)[:, None]
        distance = cosine_distance(features)
        order, rank = farthest(distance, max(counts), valid, faithful=True)
        picked = rank < ends
        if columns is layout.columns and picked.sum(1).tolist() == counts:
            return Selection(picked)
        slots = layout.valid.shape[1]
        for image, count, room in zip(layout.images, counts, layout.counts, strict=True):
            if count > room:
                raise BudgetError(
                    f"Image {image.index} of sample {image.row} has {room} visual tokens, which "
                    f"{count} cannot replace; use faithful=False."
                )
        steps = torch.arange(slots, device=valid.device)
        order = order.masked_fill(steps[: order.shape[1]] >= ends, valid.shape[1]).sort(1).values
        order = nn.functional.pad(order, (0, slots - order.shape[1])).clamp(max=valid.shape[1] - 1)
        return Selection(
            keep=steps < ends,
            features=take(features, order),
            raster=raster.gather(1, order),
            structure=[False] * len(layout.images),
        )


def _with_newlines(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Visual and newline tokens of every image: columns, raster and valid, (I, n) each."""
    if not any(image.structure for image in layout.images):
        return layout.columns, layout.raster, layout.valid
    rows = []
    for image, count in zip(layout.images, layout.counts, strict=True):
        if count != len(image.columns):
            raise InputError(
                "faithful=True picks among newline tokens too, but a method before it has dropped "
                "some tokens; use faithful=False in a chain."
            )
        places = range(count) if image.places is None else image.places
        visual = list(zip(image.columns, places, strict=True))
        rows.append(sorted(visual + [(column, -1) for column in image.structure]))
    widest = max(map(len, rows))
    filled = torch.tensor([row + [(0, 0)] * (widest - len(row)) for row in rows])
    columns, raster = filled.to(layout.columns.device).unbind(-1)
    lengths = torch.tensor([len(row) for row in rows], device=columns.device)
    return columns, raster, torch.arange(widest, device=columns.device) < lengths[:, None]


def cosine_distance(features: Tensor) -> Tensor:
    """One minus the cosine between all pairs of tokens.

    Args:
        features: (I, t, D) embeddings.

    Returns:
        (I, t, t) distances, at least float32; 1 from an embedding of zeros.
    """
    return 1 - cosine(features, features)


def farthest(
    distance: Tensor, count: int, valid: Tensor, faithful: bool = False
) -> tuple[Tensor, Tensor]:
    """Greedy max-min selection.

    Args:
        distance: (I, t, t) distances.
        count: Tokens to pick from every image.
        valid: (I, t) bool, the tokens to pick from; once an image has no more, its picks are
            arbitrary.
        faithful: Let picked tokens be picked again: they are only avoided for their distance to
            themselves, about 0.

    Returns:
        order (I, count), the tokens in the order in which they are picked, and rank (I, t), the
        first place of every token in that order; `count` if it is not picked.
    """
    images = torch.arange(distance.shape[0], device=distance.device)
    both = valid[:, :, None] & valid[:, None, :]
    if faithful:  # the nearest is the token itself, or a duplicate
        two = min(2, distance.shape[1])
        reach = distance.masked_fill(~both, torch.inf)
        nearest = reach.topk(two, dim=1, largest=False).values[:, -1]
    else:
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
        nearest = reach if step == 0 else torch.minimum(nearest, reach)
        gap = nearest.masked_fill(~(valid if faithful else left), -torch.inf)
    return torch.stack(order, 1), rank
