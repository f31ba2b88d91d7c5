"""The errors that pore raises. Each message says what was wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable


class PoreError(ValueError):
    """Base of every error that pore raises on purpose."""


class UnsupportedModelError(PoreError):
    """pore does not know the model's family, or the method cannot run in it."""


class ModelStateError(PoreError):
    """The model is in a state in which it cannot be pruned, such as already being pruned."""


class BudgetError(PoreError):
    """The number of visual tokens asked for cannot be kept."""


class InputError(PoreError):
    """The inputs of the model do not say what pruning needs to know."""


class ScoreError(PoreError):
    """Scores are unusable, for instance because attention holds NaN or infinity."""


class ProfileError(PoreError):
    """A saved position bias is damaged, of an unknown version, or not a position bias."""


class ProfileMismatchError(ProfileError):
    """A position bias was measured under other conditions than those it is applied to."""


class CalibrationError(PoreError):
    """Calibration cannot start, cannot resume, or saw too many bad samples."""


class StaleCheckpointError(CalibrationError):
    """A checkpoint belongs to another model, other conditions or other samples than the call."""


def check_options(function: str, given: Iterable[str], options: type) -> None:
    """Refuse keywords that a function does not take, as Python does for ordinary arguments.

    Args:
        function: Its name, as users call it.
        given: The names of the keywords.
        options: The `TypedDict` of the keywords that it takes.

    Raises:
        TypeError: It does not take one of them; the message names it, and those that it takes.
    """
    known = options.__annotations__
    for name in given:
        if name not in known:
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}; besides the others it "
                f"takes {', '.join(known)}."
            )
