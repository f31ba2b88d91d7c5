"""SGL in an evaluation: every batch is pruned with its own guide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pore.bias.provenance import Provenance
from pore.calibration.calibrating import calibrate_guide
from pore.calibration.sums import Calibration
from pore.data.prompts import Prompt, prompt_inputs
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.errors import InputError, UnsupportedModelError
from pore.evaluation.batches import Batches, conditions, good_inputs
from pore.families.registry import family_of, shape_of
from pore.identity import identity
from pore.methods.guides import GUIDE, GUIDED, Guide
from pore.methods.guiding import guide
from pore.methods.sgl import SGL


class Guiding:
    """A model that guides another through any number of batches.

    Args:
        model: The model that guides, not pruned.
        processor: Its processor.
        max_new_tokens: Its longest answer.
        itself: Whether the model guides itself.
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
        """The provenance of its guides."""
        return Provenance(**identity(self.model), normalize=GUIDE, host=GUIDED)

    @property
    def conditions(self) -> dict[str, Any]:
        """What its guides depend on other than the samples, as read from JSON."""
        own = conditions(self.model, self.processor)
        return {**own, "max_new_tokens": self.max_new_tokens}

    @property
    def looks_at(self) -> list[int]:
        """All layers with attention if the model guides itself; otherwise none."""
        if not self.itself:
            return []
        family = family_of(self.model)
        return [i for i, one in enumerate(family.layers(self.model)) if not family.recurrent(one)]

    def check(self, model: nn.Module) -> None:
        """Refuse a model that cuts images into a different number of tokens."""
        # Models of unknown sizes are compared when the first batch is asked.
        with suppress(UnsupportedModelError):
            here, there = (shape_of(one.config).visual_tokens for one in (model, self.model))
            if here != there:
                raise InputError(
                    f"The model that guides ({self.name}) cuts an image into {there} visual "
                    f"tokens, this one into {here}; SGL needs one that cuts images into the same "
                    "tokens."
                )

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
        numbers, of_batch = made.get(i, ([], None))
        if of_batch is None or numbers != batches.numbers(i):
            with torch.inference_mode():
                inputs = self._inputs(batches, i)
                if not inputs:
                    return None
                of_batch = guide(self.model, inputs, max_new_tokens=self.max_new_tokens)
            made[i] = batches.numbers(i), of_batch
        return of_batch

    def _inputs(self, batches: Batches, i: int) -> dict[str, Any]:
        """The inputs that this model gets for a batch."""
        if self.itself:
            return batches.inputs(i)
        if not batches.inputs(i):
            return {}
        numbers = batches.numbers(i)
        samples = [batches.samples[number] for number in numbers]
        inputs, bad = good_inputs(self.model, self.processor, samples)
        for place, reason in bad.items():
            batches.skip(numbers[place], f"for {self.name}, which guides: {reason}")
        return inputs

    def calibrate(self, samples: Iterable[Sample], **settings: Any) -> Calibration:
        """Measure what P of the guided method is fitted to, with `pore.calibrate_guide`.

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


def guiding_of(pruner: Pruner | None) -> Guiding | None:
    """The model that guides a method, batch by batch, if one does."""
    guiding = pruner.guide if isinstance(pruner, SGL) else None
    return guiding if isinstance(guiding, Guiding) else None


def with_guide(
    pruner: Pruner | None, prompts: Sequence[Prompt], inputs: Mapping[str, Any], longest: int
) -> Pruner | None:
    """A method as it is for some prompts: one that another model guides, with its guide for them.

    Args:
        pruner: The method, or None for the unpruned model.
        prompts: The prompts.
        inputs: What the processor of the pruned model made of them.
        longest: The longest answer of the model that guides, in tokens.

    Returns:
        The method; the same one where no other model guides it.

    Raises:
        PoreError: The model that guides cannot answer, see `pore.guide`.
    """
    guiding = guiding_of(pruner)
    if pruner is None or guiding is None:
        return pruner
    small = guiding.model
    if not guiding.itself:
        inputs = prompt_inputs(guiding.processor, prompts, small.device, small.dtype)
    made = guide(small, inputs, max_new_tokens=longest)
    return replace(pruner, guide=made)  # type: ignore[type-var]


def stretches(
    pruner: Pruner | None, batches: Batches, numbers: Sequence[int]
) -> Iterator[tuple[Pruner | None, Sequence[int]]]:
    """Split batches into runs: pruners to enter, each with the batches that it prunes.

    Most methods prune all batches in one `with` block. A guided method needs a guide for every
    batch, and so a `with` block for every batch.

    Args:
        pruner: The method, or None for the unpruned model.
        batches: The batches.
        numbers: Which of them.

    Yields:
        Pruners that can be entered, and numbers of batches.
    """
    guiding = guiding_of(pruner)
    if guiding is None:
        yield pruner, numbers
        return
    for i in numbers:
        made = guiding.guide(batches, i)
        if made is not None:
            yield replace(pruner, guide=made), [i]  # type: ignore[type-var]
