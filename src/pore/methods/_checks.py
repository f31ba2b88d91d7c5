"""Refuses settings that make no sense, in the same words for every method."""

from __future__ import annotations

from typing import Any, get_args

from pore.errors import BudgetError, ScoreError


def is_whole(value: Any) -> bool:
    """Whether a setting is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(least: int, **settings: Any) -> None:
    """Refuse settings that are not whole numbers of at least `least`.

    Raises:
        BudgetError: Names the setting.
    """
    for name, value in settings.items():
        if not is_whole(value) or value < least:
            raise BudgetError(f"{name} must be a whole number of at least {least}, not {value!r}.")


def check_share(**settings: float) -> None:
    """Refuse settings that are not shares of the kept tokens.

    Raises:
        BudgetError: Names the setting.
    """
    for name, value in settings.items():
        if not 0.0 <= value <= 1.0:
            raise BudgetError(f"{name}={value!r} is not a share of the kept tokens; choose 0 to 1.")


def check_choice(kind: Any, **settings: str) -> None:
    """Refuse settings that are not one of the words of a `Literal`.

    Raises:
        ScoreError: Names the setting and the words.
    """
    for name, value in settings.items():
        if value not in get_args(kind):
            words = " or ".join(map(repr, get_args(kind)))
            raise ScoreError(f"{name} must be {words}, not {value!r}.")
