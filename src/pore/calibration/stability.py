"""How many images are enough: what P of fewer images, or of more, keeps of what P of all keeps.

Sums keep no image to draw again, but the mean and its standard error at every position. So the
bootstrap is a parametric one: a mean of m images is the mean that was measured, with a normal error
as large as m images have it, independent at every position, on its logarithm. P is fitted to it
anew, and what it keeps of typical images is compared with what P of all images keeps. How near that
comes to calibrating on m other images was measured on the embedded model (docs/calibrating.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pore.bias.choosing import judge
from pore.bias.fitting import Floats, fit
from pore.calibration.diagnosing import Axis, at_tokens
from pore.calibration.diagnosis import percent
from pore.calibration.typical import Tokens, Typical
from pore.errors import CalibrationError, ProfileError

STABLE = 0.98
"""P is stable if it keeps at least this share of what P of all images keeps, in most draws."""

TIMES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""The numbers of images asked about, as multiples of the number measured."""

_DRAWS, _SEED = 20, 0


_FIRST, _GROWTH = 100, 1.25


class Agreement(NamedTuple):
    """What P of a number of images has in common with P of all.

    Attributes:
        images: The number of images.
        usual: The share of what is kept that they have in common, averaged over all draws.
        least: That share in all draws but the worst of 20.
    """

    images: int
    usual: float
    least: float


@dataclass(frozen=True)
class Stability:
    """How much P depends on which images it was measured on.

    Attributes:
        keep: Number of tokens kept, or their share.
        images: Number of images measured.
        agreement: What P of fewer and of more images has in common with P of all.
        stable: Whether `least` is at least `STABLE` for as many images as were measured.
        enough: About how many images make it so; None if even the largest number asked about does
            not.
    """

    keep: int | float
    images: int
    agreement: tuple[Agreement, ...]

    @property
    def here(self) -> Agreement:
        """The agreement for as many images as were measured."""
        return next(one for one in self.agreement if one.images == self.images)

    @property
    def stable(self) -> bool:
        """Whether P is stable: no more images are needed."""
        return self.here.least >= STABLE

    @property
    def enough(self) -> int | None:
        """About how many images are enough."""
        before: Agreement | None = None
        for one in self.agreement:
            if one.least >= STABLE:
                return one.images if before is None else _between(before, one)
            before = one
        return None

    def document(self, stopped: bool) -> Mapping[str, Any]:
        """What a profile says of it.

        Args:
            stopped: Whether the calibration ended because P was stable.
        """
        return {
            "keep": self.keep,
            "agreement": round(self.here.least, 4),
            "enough": self.enough,
            "stopped": stopped,
        }

    def __str__(self) -> str:
        from pore.plotting.labels import budget_label  # late: it loads rich

        budget, here = budget_label(self.keep), self.here
        known = (
            f"P of {self.images} images keeps about {100 * here.usual:.1f} % of what P of "
            f"endlessly many would keep at {budget}, in 19 of 20 bootstrap draws at least "
            f"{100 * here.least:.1f} %"
        )
        if self.enough is None:
            more = f"more than {self.agreement[-1].images} would be needed for"
        elif self.enough == self.agreement[0].images:
            more = f"{self.enough} or fewer are enough for"
        else:
            more = f"about {self.enough} {'are' if self.stable else 'would be'} enough for"
        return f"{known}; {more} {percent(STABLE)}."


def stability(
    axes: Sequence[Axis],
    tokens: Tokens,
    kind: str,
    keep: int | float,
    images: int,
    times: Sequence[float] = TIMES,
) -> Stability:
    """How much P depends on which images it was measured on.

    Args:
        axes: The attention along every axis.
        tokens: The tokens of a typical image.
        kind: The form of P, or "auto".
        keep: How many tokens are kept, or which share of them.
        images: How many images were measured.
        times: The numbers of images to ask about, as multiples of `images`; 1 is among them.

    Raises:
        PoreError: No such P can be fitted or divided by, or `keep` is not a budget.
    """
    kinds = [_kind(axis, kind) for axis in axes]
    typical = Typical(tokens, keep)
    kept = typical.kept(at_tokens([_curve(*each) for each in zip(axes, kinds, strict=True)], axes))
    counts = sorted({max(round(images * each), 1) for each in times})
    random = np.random.default_rng(_SEED)
    normal = [random.standard_normal((_DRAWS, len(axis.attention))) for axis in axes]
    found = []
    for count in counts:
        shares = sorted(
            _share(axes, kinds, [each[draw] for each in normal], images / count, typical, kept)
            for draw in range(_DRAWS)
        )
        found.append(Agreement(count, float(np.mean(shares)), shares[1]))
    return Stability(keep, images, tuple(found))


def due(seen: int, batch_size: int) -> bool:
    """Whether it is asked after some samples if P is stable, so that calibration ends.

    It is asked when 100 samples are done, and whenever their number has grown by a quarter, each
    time at the end of the batch. So the answer is not one of chance among very many.

    Args:
        seen: Number of samples that are done.
        batch_size: Number of samples in a batch.
    """
    point = _FIRST
    while point <= seen - batch_size:
        point = math.ceil(point * _GROWTH)
    return point <= seen


def _kind(axis: Axis, kind: str) -> str:
    if kind != "auto":
        return kind
    judged = judge(axis.attention, axis.halves, axis.points)
    if judged.best is None:
        raise CalibrationError("No curve can be divided by, so that there is no P to be stable.")
    return judged.best


def _curve(axis: Axis, kind: str, attention: Floats | None = None) -> Floats:
    """The curve of a kind along an axis; a power of x is an exponential over ln x."""
    form, at = ("exponential", "spline") if kind == "power" else (kind, kind)
    measured = axis.attention if attention is None else attention
    return fit(measured, form, axis.points(at)).curve


def _share(
    axes: Sequence[Axis],
    kinds: Sequence[str],
    normal: Sequence[Floats],
    larger: float,
    typical: Typical,
    kept: np.ndarray,
) -> float:
    """The share of what is kept that a drawn P has in common with that of all images.

    Args:
        axes: The attention along every axis.
        kinds: The form along each.
        normal: For each axis (K,) normal numbers.
        larger: How many times larger the variance of the mean is than that of all images.
        typical: Typical images.
        kept: What P of all images keeps of them.
    """
    curves: list[Floats | None] = []
    for axis, kind, drawn in zip(axes, kinds, normal, strict=True):
        attention = axis.attention * np.exp(axis.error * math.sqrt(larger) * drawn)
        try:
            curves.append(_curve(axis, kind, attention))
        except ProfileError:  # P of such a mean could not be had at all
            return 0.0
    return 1 - typical.apart(typical.kept(at_tokens(curves, axes)), kept)


def _between(before: Agreement, after: Agreement) -> int:
    """The number of images at which `least` reaches `STABLE`, to two digits.

    What two do not have in common falls as a power of the number of images between them.
    """
    x = np.log([before.images, after.images])
    y = np.log(np.maximum([1 - before.least, 1 - after.least], 1e-4))
    at = math.exp(np.interp(-math.log(1 - STABLE), -y, x))
    unit: int = 10 ** max(math.floor(math.log10(at)) - 1, 0)
    return math.ceil(at / unit) * unit
