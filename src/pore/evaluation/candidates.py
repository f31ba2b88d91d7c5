"""The corrections that are compared with each other, made for a host from what was measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pore.bias.coordinates import Over
from pore.bias.position_bias import PositionBias
from pore.calibration.fits import FitKind, Mean
from pore.calibration.sums import Calibration
from pore.corrections.null_token import NullTokenPrior
from pore.corrections.subtracted import Subtracted
from pore.corrections.without_rope import WithoutRoPE
from pore.engine.corrections import Correction
from pore.engine.pruner import Pruner
from pore.errors import ProfileError
from pore.evaluation.hosts import fitted
from pore.evaluation.reweighting import reweighted

NONE = "none"
"""The name of the host without a correction."""

HALF = 0.5
"""The strength of a weaker P, and the share that is subtracted; fixed before anything was asked."""


@dataclass(frozen=True)
class Measurement:
    """What corrections of a host are made from.

    Attributes:
        stages: What was measured for every stage, on calibration samples.
        rope: Makes the data-free prior of the model, or says why it has none.
    """

    stages: tuple[Calibration, ...]
    rope: Callable[[], Correction]

    def fitted(self, kind: FitKind, mean: Mean = "arithmetic") -> list[PositionBias]:
        """P of every stage: in this form, or the next that fits."""
        with warnings.catch_warnings():
            # That a curve spans too much is warned of; what comes of it is measured here.
            warnings.simplefilter("ignore", UserWarning)
            return [fitted(stage, kind, mean) for stage in self.stages]

    def weaker(self, kind: FitKind) -> list[PositionBias]:
        """The same, of half the strength."""
        return [bias.with_strength(HALF) for bias in self.fitted(kind)]

    def any_size(self, over: Over) -> list[Correction]:
        """A spline over something else than the number of the token."""
        return [stage.fit_any_size("spline", over) for stage in self.stages]

    def by_head(self, mean: Mean = "arithmetic") -> list[Correction]:
        """A spline for every head of every stage; where one does not fit a head, their means."""
        found: list[Correction] = []
        for stage in self.stages:
            try:
                found.append(stage.fit_heads("spline", mean))
            except ProfileError:
                found.append(stage.fit_heads("empirical", mean))
        return found


Make = Callable[[Measurement], Sequence[Correction]]


CANDIDATES: Mapping[str, Make] = {
    "exponential": lambda made: made.fitted("exponential"),
    "exponential+offset": lambda made: made.fitted("exponential+offset"),
    "spline": lambda made: made.fitted("spline"),
    "auto": lambda made: made.fitted("auto"),
    "empirical": lambda made: made.fitted("empirical"),
    "geometric, auto": lambda made: made.fitted("auto", "geometric"),
    "geometric, exponential": lambda made: made.fitted("exponential", "geometric"),
    "geometric, spline": lambda made: made.fitted("spline", "geometric"),
    "geometric, empirical": lambda made: made.fitted("empirical", "geometric"),
    "geometric, per head": lambda made: made.by_head("geometric"),
    "exponential, half strength": lambda made: made.weaker("exponential"),
    "spline, half strength": lambda made: made.weaker("spline"),
    "rows × columns": lambda made: made.any_size("place"),
    "distance": lambda made: made.any_size("distance"),
    "distance, power": lambda made: [stage.fit_any_size("power") for stage in made.stages],
    "per head": lambda made: made.by_head(),
    "subtracted": lambda made: [Subtracted(bias, HALF) for bias in made.fitted("spline")],
    "RoPE prior": lambda made: [made.rope()],
    "without RoPE": lambda _: [WithoutRoPE()],
    "null token, log ratio": lambda _: [NullTokenPrior()],
    "null token, ratio": lambda _: [NullTokenPrior("ratio")],
}
"""How every correction is made. Without a word of its own, P is a spline over the tokens."""


def with_correction(host: Pruner, name: str, made: Measurement) -> Pruner:
    """A host with a correction.

    Args:
        host: The host, without one.
        name: A name of `CANDIDATES`, or `NONE`.
        made: What was measured for it.

    Returns:
        The host with it. For `NONE` the host itself; one that cannot do without a correction
        divides by 1.

    Raises:
        PoreError: The correction cannot be made for this host.
    """
    if name != NONE:
        return reweighted(host, CANDIDATES[name](made))
    if not host.always_reweighted:
        return host
    return reweighted(host, [bias.with_strength(0.0) for bias in made.fitted("empirical")])


def set_up(kind: type[Pruner], keep: int | float, shape: Any, **guide: Any) -> Pruner | None:
    """A host at a budget as its authors set it up, without a correction; None where it cannot be.

    Args:
        kind: The method.
        keep: Visual tokens left at the end.
        shape: The model's sizes.
        **guide: `guide`, for one that another model guides.
    """
    found = kind.usual(keep, shape, **guide)
    if found is None and kind.always_reweighted:
        return kind(keep=keep)  # type: ignore[call-arg]
    return found
