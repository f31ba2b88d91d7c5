"""The conditions of a measurement, which those that belong together have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONDITIONS = (
    *("model", "revision", "weights", "config", "host", "layer", "normalize"),
    *("processor", "template"),
)


"""The fields of a provenance that say how was measured, and not when or of what data."""


_LATER = ("weights", "config")  # which older files do not know


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What differs between the conditions of two measurements, in words.

    What one of them does not know, a condition of older files or a setting in one, is passed over.

    Args:
        here: Conditions by name.
        there: Those of the other.
    """
    found = []
    for name, a in here.items():
        b = there.get(name)
        if name not in there or (name in _LATER and (a is None or b is None)):
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys = [key for key in sorted(a.keys() & b.keys()) if a[key] != b[key]]
            a, b = ({key: settings[key] for key in keys} for settings in (a, b))
        if a != b:
            found.append(f"{name} is {a!r} here and {b!r} there")
    return found


def common(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """Of conditions that do not differ, what both sides know.

    Args:
        here: Conditions by name.
        there: Those of the other.

    Returns:
        The processor, the weights and the config.
    """
    found: dict[str, Any] = {}
    for name in ("processor", *_LATER):
        a, b = here[name], there[name]
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found[name] = {key: value for key, value in a.items() if key in b}
        else:
            found[name] = a if b is not None else None
    return found
