"""G-Prune: visual tokens that gather information in a walk over a graph of similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pore.engine.stages import Selection, Stage, View
from pore.errors import BudgetError, ScoreError
from pore.methods.scorer import BudgetPruner
from pore.tensors.gathering import cosine, pack, take
from pore.tensors.selection import proportional_shares, top_k

_CLOSED = -5000.0
"""Logit of a missing link: its weight underflows to 0, unless the row has no link at all."""


@dataclass(frozen=True)
class GPrune(BudgetPruner):
    """Keep the visual tokens that receive most in a walk over a graph (arXiv 2501.02268).

    Projected embeddings are linked if their cosine reaches `similarity`. Every token starts with
    the length of its embedding; in each of `iterations` steps it passes what it has on to those it
    is linked with, itself included, by a softmax over cosine / `temperature`. The score of a token
    is what it has in the end, divided by the number of its links. It acts before the decoder, and
    kept tokens keep their original positions.

    For an image in tiles, the whole image and the grid of the other tiles are two graphs, each with
    its share of `keep`; newline tokens stay. The authors' code only covers such images: an image in
    one piece is treated like their whole image, which is our choice. Links are counted in float32;
    in half precision the authors' code loses the weakest.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float), divided between the two
            graphs by their sizes.
        similarity: Least cosine of a link.
        temperature: Divides the cosine in the softmax.
        iterations: Steps of the walk.
        faithful: Round a fraction down in each graph, as the authors' code does, rather than meet
            the budget of the image.
    """

    keep: int | float = 0.5
    similarity: float = 0.5
    temperature: float = 0.03
    iterations: int = 5
    faithful: bool = False

    name: ClassVar[str] = "G-Prune"
    paper: ClassVar[str] = "arXiv 2501.02268"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.similarity <= 1.0:
            raise ScoreError(
                f"similarity={self.similarity!r}: the smallest cosine of a link must be a number "
                "above 0, up to 1."
            )
        if not self.temperature > 0.0:
            raise ScoreError(f"temperature={self.temperature!r} must be above 0.")
        if self.iterations < 1:
            raise ScoreError(f"iterations={self.iterations!r}: the walk needs at least 1 step.")

    def stages(self) -> Sequence[Stage]:
        """One stage, on the embeddings; positions stay."""
        return [Stage(0, self._select, positions="original")]

    def _select(self, view: View) -> Selection:
        layout = view.layout
        tile, _ = layout.shows()
        graphs = [layout.valid & (tile == 0), layout.valid & (tile > 0)]
        rooms = list(zip(*(graph.sum(1).tolist() for graph in graphs), strict=True))
        shares = self._shares(view, rooms)
        keep = torch.zeros_like(layout.valid)
        for number, graph in enumerate(graphs):
            width = max(room[number] for room in rooms)
            if width == 0:
                continue
            slots, valid = pack(graph, width=width)
            features = take(view.features, slots)
            links = transition(features, valid, self.similarity, self.temperature)
            scores = arrivals(features, links, valid, self.iterations)
            kept = top_k(scores, [share[number] for share in shares], valid)
            keep |= torch.zeros_like(keep).scatter(1, slots, kept)
        return Selection(keep)

    def _shares(self, view: View, rooms: Sequence[tuple[int, ...]]) -> list[list[int]]:
        """Tokens to keep in the two graphs of every image."""
        if not self.faithful or isinstance(self.keep, int):
            pairs = zip(view.budget(self.keep), rooms, strict=True)
            return [proportional_shares(total, room, room) for total, room in pairs]
        shares = [[int(self.keep * room) for room in pair] for pair in rooms]
        if not all(map(sum, shares)):
            raise BudgetError(
                f"keep={self.keep} of an image rounds down to no token; ask for more, or "
                "faithful=False."
            )
        return shares


def transition(features: Tensor, valid: Tensor, similarity: float, temperature: float) -> Tensor:
    """The weights with which every token passes on what it has, in one step.

    Args:
        features: (I, t, D) embeddings.
        valid: (I, t) bool, False where an image has fewer tokens.
        similarity: Least cosine of a link.
        temperature: Divides the cosine in the softmax.

    Returns:
        (I, t, t) rows that sum to one, at least float32; 0 where there is no link. An embedding of
        length 0 passes the same amount to all.
    """
    alike = cosine(features, features)
    logits = (alike / temperature).masked_fill(alike < similarity, _CLOSED)
    return logits.masked_fill(~valid[:, None], -torch.inf).softmax(-1)


def arrivals(features: Tensor, links: Tensor, valid: Tensor, iterations: int) -> Tensor:
    """What every token has at the end of the walk, for each of its links.

    Args:
        features: (I, t, D) embeddings; a token starts with the length of its embedding.
        links: (I, t, t) from `transition`.
        valid: (I, t) bool, False where an image has fewer tokens.
        iterations: Steps of the walk.

    Returns:
        (I, t) scores; arbitrary where not `valid`.
    """
    mass = features.to(links.dtype).norm(dim=-1).masked_fill(~valid, 0.0)[:, None]
    for _ in range(iterations):
        mass = torch.matmul(mass, links)
    scores: Tensor = mass[:, 0] / degrees(links)
    return scores


def degrees(links: Tensor) -> Tensor:
    """(I, t) the number of links of every token, itself included, from weights (I, t, t)."""
    return (links > 0).sum(-1)
