"""The conditions of a measurement; measurements can be merged only if these are the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONDITIONS = (
    *("model", "revision", "weights", "config", "host", "layer", "normalize"),
    *("processor", "template"),
)
"""The fields of a provenance that say how it was measured, not when or on what data."""

_LATER = ("weights", "config")  # which older files do not know


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What differs between the conditions of two measurements, in words.

    What one side does not know, such as a condition missing in older files, is not compared.

    Args:
        here: Conditions by name.
        there: Conditions of the other measurement.
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
    """What both sides know of conditions that do not differ.

    Args:
        here: Conditions by name.
        there: Conditions of the other measurement.

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
