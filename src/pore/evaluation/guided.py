"""SGL in an evaluation: a guide belongs to one batch, so the method is made batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pore.bias.provenance import Provenance
from pore.calibration.calibrating import calibrate_guide
from pore.calibration.sums import Calibration
from pore.cost.shapes import ModelShape
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.engine.stages import Selection, View
from pore.errors import InputError, UnsupportedModelError
from pore.evaluation.batches import Batches, conditions, good_inputs
from pore.families.base import Family
from pore.families.registry import family_of, identity
from pore.methods.guiding import GUIDE, GUIDED, Guide, guide
from pore.methods.sgl import SGL


class Guiding:
    """A model that guides another through any number of batches.

    Args:
        model: The model that guides, not pruned.
        processor: Its processor.
        max_new_tokens: Its longest answer.
        itself: Whether it is the very model that it guides.
    """

    def __init__(
        self, model: Any, processor: Any, *, max_new_tokens: int, itself: bool = False
    ) -> None:
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.itself = itself
        self._guides: WeakKeyDictionary[Batches, dict[int, tuple[list[int], Guide]]] = (
            WeakKeyDictionary()
        )

    @property
    def name(self) -> str:
        """What the model is called in results: "itself", or its own name."""
        return "itself" if self.itself else self.provenance.model or "a model without a name"

    @property
    def provenance(self) -> Provenance:
        """That of its guides."""
        return Provenance(**identity(self.model), normalize=GUIDE, host=GUIDED)

    @property
    def conditions(self) -> dict[str, Any]:
        """What its guides depend on beside the samples, as JSON gives it back."""
        found = conditions(self.model, self.processor)
        return {**found, "max_new_tokens": self.max_new_tokens}

    def usual(self, keep: int | float, shape: ModelShape) -> Guided:
        """SGL guided by this model, as its authors set it up, scaled to the depth of the other.

        Args:
            keep: As in `SGL`.
            shape: Sizes of the model that is pruned.

        Returns:
            The method.
        """
        return Guided(keep, layer=int(0.4 * shape.decoder.layers), guide=self)

    def guide(self, batches: Batches, i: int) -> Guide | None:
        """The guide of a batch, made once.

        Args:
            batches: Batches of the model that is pruned. Samples that this model's processor
                refuses are skipped there too.
            i: Number of the batch.

        Returns:
            The guide; None where no sample of the batch is good.

        Raises:
            PoreError: The model cannot answer, see `pore.guide`; or too many samples are bad.
        """
        made = self._guides.setdefault(batches, {})
        numbers, found = made.get(i, ([], None))
        if found is None or numbers != batches.numbers(i):
            with torch.inference_mode():
                inputs = self._inputs(batches, i)
                if not inputs:
                    return None
                found = guide(self.model, inputs, max_new_tokens=self.max_new_tokens)
            made[i] = batches.numbers(i), found
        return found

    def _inputs(self, batches: Batches, i: int) -> dict[str, Any]:
        """What this model is asked of a batch."""
        if self.itself:
            return batches.encoded(i)
        if not batches.inputs(i):
            return {}
        numbers = batches.numbers(i)
        samples = [batches.samples[number] for number in numbers]
        inputs, bad = good_inputs(self.model, self.processor, samples)
        for place, reason in bad.items():
            batches.skip(numbers[place], f"for {self.name}, which guides: {reason}")
        return inputs

    def calibrate(self, samples: Iterable[Sample], **settings: Any) -> Calibration:
        """What P of the guided method is fitted to, by `pore.calibrate_guide`.

        Args:
            samples: Samples with an image each.
            **settings: Further arguments of `calibrate_guide`.

        Returns:
            The sums over all images.
        """
        longest = self.max_new_tokens
        return calibrate_guide(
            self.model, self.processor, samples, max_new_tokens=longest, **settings
        )


@dataclass(frozen=True)
class Guided(SGL):
    """SGL with a model that guides in the place of a guide, for `evaluate` and what follows it.

    It prunes nothing itself; `of` gives what prunes a batch.

    Attributes:
        guide: The model that guides.
    """

    guide: Guiding  # type: ignore[assignment]

    def of(self, batches: Batches, i: int) -> SGL | None:
        """The method with the guide of a batch.

        Args:
            batches: The batches.
            i: Number of the batch.

        Returns:
            The method; None where no sample of the batch is good.
        """
        made = self.guide.guide(batches, i)
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return None if made is None else SGL(**{**settings, "guide": made})

    @property
    def looks_at(self) -> list[int]:
        """All layers, where the model guides itself; else none of its own."""
        if not self.guide.itself:
            return []
        family = family_of(self.guide.model)
        layers = enumerate(family.layers(self.guide.model))
        return [i for i, layer in layers if not family.recurrent(layer)]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse what `SGL` does, and a guide that cuts images into other tokens."""
        super().check(model, family)
        # Models of unknown sizes are compared when the first batch is asked.
        with suppress(UnsupportedModelError):
            here, there = (
                ModelShape.from_config(one.config).visual_tokens
                for one in (model, self.guide.model)
            )
            if here != there:
                raise InputError(
                    f"The model that guides ({self.guide.name}) cuts an image into {there} visual "
                    f"tokens, this one into {here}; SGL needs one that cuts images into the same "
                    "tokens."
                )

    def _select(self, view: View) -> Selection:
        raise InputError("A guide is of one batch: prune with `of(batches, i)`.")


def stretches(
    pruner: Pruner | None, batches: Batches, numbers: Sequence[int]
) -> Iterator[tuple[Pruner | None, Sequence[int]]]:
    """What prunes which batches: a method all of them, a guided one each with a guide of its own.

    Args:
        pruner: The method, or None for the unpruned model.
        batches: The batches.
        numbers: Which of them.

    Yields:
        Pruners that can be entered, and numbers of batches.
    """
    if isinstance(pruner, Guided):
        for i in numbers:
            one = pruner.of(batches, i)
            if one is not None:
                yield one, [i]
    else:
        yield pruner, numbers
