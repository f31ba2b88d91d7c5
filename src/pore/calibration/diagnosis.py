"""Whether a position bias will help, judged from the sums to which it is fitted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pore.bias.choosing import CHOICES, listed
from pore.bias.judging import FAR

THIRDS = ("first", "middle", "last")
"""The thirds of an image, in reading order."""

LITTLE = 0.02
"""P matters only if it changes at least this share of the kept tokens."""

UNSURE = 0.05
"""More images are asked for if they would change more than this share of the kept tokens."""

BETTER = 0.8
"""The error of P must not exceed this share of the error without any bias."""

CHANCE = 0.7
"""If chance alone makes more than this share of the error without bias, it hides P's benefit."""

Verdict = Literal["divide", "little bias", "more images", "do not divide"]


@dataclass(frozen=True)
class AxisDiagnosis:
    """How the attention along one coordinate can be described.

    Errors are typical factors, as logarithms (`pore.bias.judging.log_error`): 0.1 means about 10 %.

    Attributes:
        name: The coordinate: "position" in the image, or an axis of an `AnySizeBias`.
        kind: The form of P, or None if no form can be divided by.
        span: How many times more attention the twelfth of the image with the most gets than the
            twelfth with the least.
        fitted: The same for P; None without P.
        errors: For every form that can be fitted, its error on the half of the images that it was
            not fitted to; "flat" is no bias at all, "empirical" the mean attention itself.
        refused: For every form that cannot be fitted or divided by, the reason.
        noise: The error that a perfect curve would have, because the other half's mean varies.
    """

    name: str
    kind: str | None
    span: float
    fitted: float | None
    errors: Mapping[str, float]
    refused: Mapping[str, str]
    noise: float


@dataclass(frozen=True)
class Diagnosis:
    """What a calibration says about P before anything is pruned with it.

    `str` gives it in sentences. Which tokens would be kept is found on images that are drawn from
    the mean and spread of the attention at every position, because sums keep no single image; see
    `pore.calibration.typical`.

    Attributes:
        axes: How the attention can be described: over the position in the image; for images of any
            size over the coordinate asked for, with "place" over rows and over columns.
        images: Number of images measured.
        keep: Number of tokens kept, or their share.
        standard_error: The standard error of Ā at every position, relative to Ā. For images of any
            size at every bin; it is then one number, from the difference of the two halves.
        within: At how many of these P is nearer to Ā than 1.96 standard errors; None without P.
        before: Shares of the kept tokens that lie in the first, middle and last third of the image,
            in reading order (with "distance" from the farthest to the nearest), without P.
        after: The same with P; None without P.
        changed: The share of the kept tokens that P changes; None without P.
        unsure: The share of the kept tokens in which P of one half of the images and P of the other
            differ; None if either cannot be fitted. P of all images differs from P of infinitely
            many by about half of it.
        verdict: "divide", "little bias" (P changes hardly anything), "more images" (what P
            corrects cannot be told from chance) or "do not divide".
    """

    axes: tuple[AxisDiagnosis, ...]
    images: int
    keep: int | float
    standard_error: tuple[float, ...]
    within: int | None
    before: tuple[float, float, float]
    after: tuple[float, float, float] | None
    changed: float | None
    unsure: float | None

    @property
    def error(self) -> float | None:
        """The held-out error of P, over all axes; None without P."""
        return self._error_of([axis.kind for axis in self.axes])

    @property
    def flat(self) -> float:
        """The held-out error of no bias at all, over all axes."""
        found = self._error_of(["flat"] * len(self.axes))
        assert found is not None
        return found

    @property
    def noise(self) -> float:
        """The held-out error that a perfect P would have, over all axes."""
        return math.hypot(*(axis.noise for axis in self.axes))

    @property
    def steep(self) -> AxisDiagnosis | None:
        """An axis along which P spans far more than the attention, if there is one."""
        for axis in self.axes:
            if axis.fitted is not None and axis.fitted > FAR * axis.span:
                return axis
        return None

    @property
    def verdict(self) -> Verdict:
        """Whether to divide by P, from the numbers above in this order."""
        if any(axis.kind is None or axis.kind in axis.refused for axis in self.axes):
            return "do not divide"
        if self.steep:
            return "do not divide"
        if self.changed is None or self.error is None:
            return "do not divide"
        if self.unsure is None or self.unsure / 2 > UNSURE:
            return "more images"
        if self.changed < LITTLE:
            return "little bias"
        if self.error > BETTER * self.flat:
            return "more images" if self.noise > CHANCE * self.flat else "do not divide"
        return "divide"

    @property
    def advice(self) -> str:
        """Whether to divide by P, and why, in sentences that follow only from the numbers."""
        return _advice(self)

    def __str__(self) -> str:
        return "\n".join([self.advice, *_numbers(self)])

    def _error_of(self, kinds: Sequence[str | None]) -> float | None:
        errors = [axis.errors.get(kind or "") for axis, kind in zip(self.axes, kinds, strict=True)]
        known = [error for error in errors if error is not None]
        return math.hypot(*known) if len(known) == len(errors) else None


def _advice(found: Diagnosis) -> str:
    if found.verdict == "divide":
        return f"Divide by P. {_described(found)} {_moved(found)}{_better(found)}"
    if found.verdict == "little bias":
        assert found.changed is not None
        return (
            "Dividing by P matters little: there is hardly any bias to divide out. At "
            f"{_budget(found)} P changes about {percent(found.changed)} of what is kept."
        )
    if found.verdict == "more images":
        return f"Calibrate on more images before you divide by P. {_unsure(found)}"
    return f"Do not divide by P. {_harm(found)}"


def _numbers(found: Diagnosis) -> list[str]:
    lines = []
    for axis in found.axes:
        errors = ", ".join(f"{name_of(kind)} {off(error)}" for kind, error in axis.errors.items())
        lines.append(
            f"Error on images not fitted to{_over(axis)}: {errors}; chance alone makes "
            f"{off(axis.noise)}."
        )
        fitted = "" if axis.fitted is None else f", the {axis.kind} curve {fold(axis.fitted)}"
        lines.append(f"The attention{_over(axis)} spans {fold(axis.span)}{fitted}.")
    return [*lines, sureness(found)]


def sureness(found: Diagnosis) -> str:
    """How certain the mean attention and P are, in a sentence."""
    error, known = float(np.median(found.standard_error)), len(found.standard_error)
    parts = [f"The mean of {found.images} images has a standard error of {off(error)}"]
    if found.within is not None:
        parts.append(f"P is within 1.96 of these at {found.within} of {known} positions")
    if found.unsure is not None:
        parts.append(
            f"more images would change about {percent(found.unsure / 2)} of what is kept at "
            f"{_budget(found)}"
        )
    return f"{'; '.join(parts)}."


def name_of(kind: str) -> str:
    """A form of P in words."""
    return "flat (no bias)" if kind == "flat" else kind


def off(error: float) -> str:
    """An error in words: "9 %", or "3.1-fold" if it is large."""
    return percent(math.expm1(error)) if error < math.log(2) else fold(math.exp(error))


def fold(times: float) -> str:
    """A factor in words: "3.1-fold", "5,199-fold"."""
    return f"{times:,.0f}-fold" if times >= 100 else f"{times:.3g}-fold"


def percent(share: float) -> str:
    """A share in words: "31 %", small ones with a decimal."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def _described(found: Diagnosis) -> str:
    assert found.error is not None
    return (
        f"P ({_kinds(found)}) is off by {off(found.error)} on images that it was not fitted to, "
        f"where chance alone makes {off(found.noise)}; no bias at all is off by {off(found.flat)}."
    )


def _moved(found: Diagnosis) -> str:
    assert found.changed is not None
    assert found.after is not None
    text = f"At {_budget(found)} it changes about {percent(found.changed)} of what is kept"
    change = [after - before for before, after in zip(found.before, found.after, strict=True)]
    most, least = (f(range(len(change)), key=change.__getitem__) for f in (max, min))
    if change[most] < 0.005:
        return f"{text}."
    moves = (
        f"the {THIRDS[i]} third of the image has {percent(found.after[i])} of it instead of "
        f"{percent(found.before[i])}"
        for i in (most, least)
    )
    return f"{text}: {', '.join(moves)}."


def _better(found: Diagnosis) -> str:
    """Which other form describes the attention far better, if one does."""
    axis = found.axes[0]
    able = [kind for kind in CHOICES if kind in axis.errors and kind not in axis.refused]
    best = min(able, key=axis.errors.__getitem__, default=None)
    if len(found.axes) > 1 or best is None or best == axis.kind:
        return ""
    if axis.errors[best] > BETTER * axis.errors.get(axis.kind or "", math.inf):
        return ""
    return f" The {best} curve is off by {off(axis.errors[best])} only: fit that."


def _unsure(found: Diagnosis) -> str:
    if found.unsure is None:
        return (
            f"P ({_kinds(found)}) cannot be fitted to each half of the {found.images} images, so "
            "that its error cannot be told."
        )
    if found.unsure / 2 > UNSURE:
        return (
            f"P of one half of the {found.images} images and P of the other do not agree on "
            f"{percent(found.unsure)} of what is kept at {_budget(found)}; more images "
            "would change about half of that."
        )
    return f"Whether it is any better than no bias cannot be told from chance. {_described(found)}"


def _harm(found: Diagnosis) -> str:
    for axis in found.axes:
        if axis.kind is None:
            return f"No curve{_over(axis)} can be divided by. {listed(axis.refused)}{_itself(axis)}"
        if axis.kind in axis.refused:
            why = axis.refused[axis.kind].rstrip(".")
            return f"The {axis.kind} curve{_over(axis)}: {why}.{_better(found)}"
    if found.steep:
        return f"{_steep(found.steep)} {_described(found)}{_better(found)}"
    return f"It is hardly better than no bias at all, or worse. {_described(found)}{_better(found)}"


def _itself(axis: AxisDiagnosis) -> str:
    """A sentence on the mean attention itself, if it is better than no bias."""
    error = axis.errors.get("empirical", math.inf)
    if error > BETTER * axis.errors["flat"]:
        return ""
    return (
        f' The mean attention itself, kind="empirical", is off by {off(error)}; it takes what is '
        "special about the calibration images for bias."
    )


def _steep(axis: AxisDiagnosis) -> str:
    assert axis.fitted is not None
    return (
        f"The {axis.kind} curve{_over(axis)} spans {fold(axis.fitted)} between the parts of the "
        f"image, and the attention {fold(axis.span)}: the ranking would prefer a part of the image "
        "for no reason."
    )


def _kinds(found: Diagnosis) -> str:
    return ", ".join(f"{axis.kind}{_over(axis)}" for axis in found.axes)


def _over(axis: AxisDiagnosis) -> str:
    return "" if axis.name == "position" else f" over the {axis.name}"


def _budget(found: Diagnosis) -> str:
    from pore.plotting.labels import budget_label  # late: it loads rich, which few programs need

    return budget_label(found.keep)
