"""The workload of a benchmark: what every run does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from pore.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every run does.

    Attributes:
        batch_size: Prompts that run together.
        text_before: Text tokens before the image, and tags between its tiles or rows.
        visual: Visual tokens.
        text_after: Text tokens after the image, at least 1.
        new_tokens: Tokens generated for each prompt, the first included; 0 if none is.
        repeats: Timed runs of every setting.
        warmup: Runs of every setting before those, not counted.
        seed: Seed of token ids and pixels.

    Raises:
        InputError: A number is out of range.
    """

    batch_size: int = 1
    text_before: int = 35
    visual: int
    text_after: int = 20
    new_tokens: int = 16
    repeats: int = 10
    warmup: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            check_number(name, getattr(self, name), least)

    @property
    def prompt(self) -> int:
        """Tokens of one prompt."""
        return self.text_before + self.visual + self.text_after


_LEAST = {
    "batch_size": 1,
    "text_before": 0,
    "text_after": 1,
    "new_tokens": 0,
    "repeats": 1,
    "warmup": 0,
}


def check_number(name: str, value: object, least: int) -> None:
    """Refuse a value that is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}.")


class Asked(TypedDict, total=False):
    """The part of a workload that `measure_calibration` takes; see `Workload`."""

    batch_size: int
    text_before: int
    text_after: int
    repeats: int
    warmup: int
    seed: int


class AskedWithAnswer(Asked, total=False):
    """The part of a workload that `measure` takes."""

    new_tokens: int


class Runs(TypedDict, total=False):
    """The part of a workload that `measure` takes for given inputs."""

    new_tokens: int
    repeats: int
    warmup: int
