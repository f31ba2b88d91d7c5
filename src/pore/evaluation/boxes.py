"""Answers that are a box in the image, as grounding asks for them."""

from __future__ import annotations

import re

from pore.data.samples import Box, Sample

OVERLAP = 0.5
"""The overlap from which on a box counts as right, as the RefCOCO benchmarks have it."""

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def box_in(text: str) -> Box | None:
    """The box that a text names.

    Args:
        text: An answer, such as "[0.1, 0.2, 0.5, 0.9]". If all numbers are at most 1 they are
            shares of the width and the height, as LLaVA writes them; otherwise thousandths, as
            Qwen-VL and InternVL do.

    Returns:
        Left, top, right and bottom as shares; None unless there are just four numbers that make a
        box within the image.
    """
    found = [float(number) for number in _NUMBER.findall(text)]
    if len(found) != 4 or max(found) > 1000:
        return None
    unit = 1.0 if max(found) <= 1 else 1000.0
    left, top, right, bottom = (number / unit for number in found)
    return (left, top, right, bottom) if left <= right and top <= bottom else None


def overlap(one: Box, other: Box) -> float:
    """The area of both boxes over the area of either (IoU); 0 for boxes without any area."""

    def area(box: Box) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    both = area(
        (
            max(one[0], other[0]),
            max(one[1], other[1]),
            min(one[2], other[2]),
            min(one[3], other[3]),
        )
    )
    either = area(one) + area(other) - both
    return both / either if either > 0 else 0.0


def expected(sample: Sample) -> str:
    """The right answer as text; a box is written as its four shares."""
    if sample.answer is not None or sample.box is None:
        return str(sample.answer)
    return str(list(sample.box))
