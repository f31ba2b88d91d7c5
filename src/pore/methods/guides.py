"""What a small model attended to in a batch of prompts, as a guide for a large one (SGL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor, nn

from pore.bias.provenance import Provenance
from pore.errors import InputError
from pore.layout import Image, Layout

GUIDED, GUIDE = "SGL", "guide"
"""The method that uses a guide, and the word for what a guide measures (`Provenance.normalize`)."""


@dataclass(frozen=True, eq=False)
class Guide:
    """A small model's answers to a batch of prompts, and the attention behind them.

    Attributes:
        images: The I images of the batch, by sample.
        importance: (I, t) attention that each visual token got, summed over layers, heads, the
            prompt from the last visual token on, and the answer; 0 where not `valid`. This curve,
            averaged over images, is what a position bias for SGL is fitted to.
        valid: (I, t) bool, False where a smaller image is filled up.
        sequences: (B, n) the answers' token ids.
        answered: (B, n) bool, False after the end of a shorter answer.
        confidence: (B,) geometric mean of the probabilities of the answer's tokens.
        provenance: The conditions of the measurement, for `PositionBias.fit`.
    """

    images: tuple[Image, ...] = field(repr=False)
    importance: Tensor = field(repr=False)
    valid: Tensor = field(repr=False)
    sequences: Tensor = field(repr=False)
    answered: Tensor = field(repr=False)
    confidence: Tensor
    provenance: Provenance

    @property
    def looks_at(self) -> list[int]:
        """Layers of the guided model whose attention the guide was made from: none."""
        return []

    def check(self, model: nn.Module) -> None:
        """Refuse nothing: when a batch comes, `match` checks whether it is the guide's."""

    def __len__(self) -> int:
        """Samples of the batch."""
        return len(self.sequences)

    def select(self, samples: Sequence[int]) -> Guide:
        """The guide of some of the samples, for a large model that gets only those.

        Args:
            samples: Their numbers in the batch, in the order of the smaller batch.

        Returns:
            The guide.

        Raises:
            InputError: There is no such sample.
        """
        if not all(0 <= sample < len(self) for sample in samples):
            raise InputError(f"The guide has samples 0 to {len(self) - 1}, not {list(samples)}.")
        chosen = [
            (i, replace(image, row=row))
            for row, sample in enumerate(samples)
            for i, image in enumerate(self.images)
            if image.row == sample
        ]
        numbers, rows = [i for i, _ in chosen], list(samples)
        widest = self.valid[numbers].any(0)
        return Guide(
            images=tuple(image for _, image in chosen),
            importance=self.importance[numbers][:, widest],
            valid=self.valid[numbers][:, widest],
            sequences=self.sequences[rows],
            answered=self.answered[rows],
            confidence=self.confidence[rows],
            provenance=self.provenance,
        )

    def match(self, layout: Layout) -> list[int]:
        """Find every image of another model's batch among the guide's images.

        The batches must hold the same prompts in the same order; samples may be repeated for beams
        or for several answers.

        Args:
            layout: The layout of the batch.

        Returns:
            The number of each image among the guide's images.

        Raises:
            InputError: The batches have other images, or images have other numbers of tokens.
        """
        samples = len(layout.tokens)
        copies = max(samples // len(self), 1)
        numbers = {(image.row, image.index): i for i, image in enumerate(self.images)}
        found = [numbers.get((image.row // copies, image.index)) for image in layout.images]
        which = [number for number in found if number is not None]
        if (
            samples != copies * len(self)
            or len(which) != len(found)
            or len(found) != copies * len(numbers)
        ):
            raise InputError(
                f"The guide has seen {_places(self.images, len(self))}, but here are "
                f"{_places(layout.images, samples)}; make the guide from the same batch of "
                "prompts, or choose the samples of this batch with guide.select(samples)."
            )
        for image, number in zip(layout.images, which, strict=True):
            seen, here = len(self.images[number].columns), len(image.columns)
            if seen != here:
                raise InputError(
                    f"Image {image.index} of sample {image.row} has {here} visual tokens, but had "
                    f"{seen} in the guiding model; it can guide only models that cut images "
                    "into the same tokens."
                )
        return which


class Guides(Protocol):
    """Makes a guide for every batch; a method for many batches has this in place of a guide.

    Before a batch is pruned, its guide replaces this object, as in `evaluate`.
    """

    @property
    def provenance(self) -> Provenance:
        """The provenance of its guides."""

    @property
    def looks_at(self) -> list[int]:
        """Layers of the guided model whose attention its guides were made from."""

    def check(self, model: nn.Module) -> None:
        """Refuse a model that it cannot guide."""


def _places(images: Sequence[Image], samples: int) -> str:
    rows = [image.row for image in images]
    return f"{samples} sample(s) with {[rows.count(row) for row in range(samples)]} images"
