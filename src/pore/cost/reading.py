"""Reads sizes from a config, with an error that names a size that is missing or wrong."""

from __future__ import annotations

from typing import Any

from pore.errors import UnsupportedModelError


def known_type(config: object, name: str, known: tuple[str, ...]) -> str:
    """The `model_type` of a config.

    Args:
        config: The config of a part of a model.
        name: What to call the part in an error.
        known: The types whose sizes can be read.

    Raises:
        UnsupportedModelError: The type is none of them.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in known:
        raise UnsupportedModelError(
            f"the sizes of this {name} cannot be read: its config is a "
            f"{type(config).__name__} with model_type {model_type!r}; "
            f"known here: {', '.join(known)}"
        )
    return str(model_type)


def part(config: object, name: str) -> Any:
    """The entry of a model's config with this name, such as `text_config`.

    Raises:
        UnsupportedModelError: There is none.
    """
    found = getattr(config, name, None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(config).__name__} has no {name}; pass the config of the whole model"
        )
    return found


def size(config: object, name: str, default: int | None = None) -> int:
    """A positive whole number from a config; `default` stands for a value of None.

    Raises:
        UnsupportedModelError: It is anything else.
    """
    value = getattr(config, name, None)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(
            f"{type(config).__name__}.{name} must be a whole number of at least 1, is {value!r}"
        )
    return value


def side(config: Any, name: str) -> int:
    """The side of a square, which a config may give as (height, width).

    Raises:
        UnsupportedModelError: It is not a square, or not a positive whole number.
    """
    value = getattr(config, name, None)
    if isinstance(value, list | tuple) and len(set(value)) == 1 and isinstance(value[0], int):
        return value[0]
    return size(config, name)
