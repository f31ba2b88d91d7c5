"""The report of a run: what was seen and kept of every prompt."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pore._numbers import flops as as_text
from pore.cost.shapes import ModelShape
from pore.engine.prefill import Prefill, SampleReport
from pore.engine.stages import Method
from pore.errors import UnsupportedModelError
from pore.families.registry import shape_of


class Report:
    """What a run kept, of every prefill: print it, iterate over samples, or write it as JSON.

    A prefill that failed is not in it. The report grows by a few kilobytes with every prefill, as
    long as the block lasts; the report of an applied run holds only the latest prefill.

    Args:
        method: The method.
        layers: Decoder layers of the model.
        config: The model's config.
        history: How many prefills are remembered; None means all.

    Attributes:
        notes: Where the run differs from what the method's authors do or the caller asked for.
    """

    def __init__(self, method: Method, layers: int, config: Any, history: int | None) -> None:
        self._method = method
        self._layers = layers
        self._config = config
        self._prefills: deque[Prefill | Sequence[SampleReport]] = deque(maxlen=history)
        self.notes: tuple[str, ...] = ()

    def note(self, text: str) -> None:
        """Add a note, unless it was made before."""
        if text not in self.notes:
            self.notes = (*self.notes, text)

    def add(self, prefill: Prefill) -> None:
        """Add a prefill whose call of the model has succeeded."""
        self._prefills.append(prefill)

    @property
    def samples(self) -> list[SampleReport]:
        """One entry per prompt, in the order the run saw them."""
        found: list[SampleReport] = []
        for i, prefill in enumerate(self._prefills):
            if isinstance(prefill, Prefill):  # read once, to free what is on the device
                self._prefills[i] = prefill = prefill.samples(self._layers, self._shape())
            found += [replace(one, sample=len(found) + one.sample) for one in prefill]
        return found

    def _shape(self) -> ModelShape | None:
        try:
            return shape_of(self._config)
        except UnsupportedModelError:
            return None

    def __len__(self) -> int:
        return sum(len(one.tokens if isinstance(one, Prefill) else one) for one in self._prefills)

    def __iter__(self) -> Iterator[SampleReport]:
        return iter(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {
            "schema": "pore.report",
            "version": 1,
            "method": self._method.name,
            "flops_count": "true",
            "notes": list(self.notes),
            "samples": [sample.to_dict() for sample in self],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        samples = self.samples
        if not samples:
            return f"{self._method.name}: no prefill yet"
        prompts = "one prompt" if len(samples) == 1 else f"{len(samples)} prompts"
        lines = [f"{self._method.name}: {prompts}"]
        lines.append(
            f"{'sample':>6}  {'image':>5}  {'visual tokens':>14}  {'tokens by layer':<21}  "
            f"{'before':>12}  {'after':>12}"
        )
        for sample in samples:
            steps = steps_of(sample.tokens)
            cost = (as_text(sample.unpruned_flops), as_text(sample.flops))
            if not sample.images:
                lines.append(
                    f"{sample.sample:>6}  {'-':>5}  {'none':>14}  {steps:<21}  "
                    f"{cost[0]:>12}  {cost[1]:>12}"
                )
            for number, image in enumerate(sample.images):
                tail = (steps, *cost) if number == 0 else ("", "", "")
                lines.append(
                    f"{sample.sample:>6}  {image.image:>5}  "
                    f"{image.seen:>5} -> {len(image.kept) + image.extra:<5}   "
                    f"{tail[0]:<21}  {tail[1]:>12}  {tail[2]:>12}".rstrip()
                )
        if not any(sample.images for sample in samples):
            lines.append("No prompt had visual tokens, so nothing was dropped.")
        if any(sample.flops_of == "decoder" for sample in samples):
            lines.append("FLOPs are of the decoder alone: those of the vision tower are not known.")
        return "\n".join([*lines, *self.notes])


def steps_of(tokens: Sequence[int]) -> str:
    """Tokens by layer in short: `611 (0-1), 163 (2-31)`."""
    parts, start = [], 0
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or tokens[i] != tokens[start]:
            span = f"{start}" if i - 1 == start else f"{start}-{i - 1}"
            parts.append(f"{tokens[start]} ({span})")
            start = i
    return ", ".join(parts)
