"""Whether a position bias was measured under the present conditions."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pore._saved.forms import brief
from pore.bias.provenance import Provenance
from pore.errors import ProfileMismatchError
from pore.identity import same_weights

NAMES = ("model", "revision")
"""What a model is called. A model of another name may have other weights and another config."""

CONTENT = ("weights", "config")
"""What a model is, by its content."""

CHECKED = (*NAMES, *CONTENT, "layer", "normalize", "processor", "template")
"""The fields of a provenance that are compared."""

OTHER_LENGTH = "For another number of positions, ask for bias.resample(n)."


def differences(
    origin: Provenance, here: Mapping[str, Any], allowed: Collection[str]
) -> dict[str, list[str]]:
    """What differs between the conditions of a measurement and the present ones, in words.

    Args:
        origin: The conditions of the measurement.
        here: The present conditions, by the names of `CHECKED`. A value may be a function that
            returns it; the function is called only if the value is compared.
        allowed: Names that are not compared.

    Returns:
        By name, all that differs.
    """
    found: dict[str, list[str]] = {}
    for name in CHECKED:
        if name in allowed or (name in CONTENT and not {*allowed, *found}.isdisjoint(NAMES)):
            continue
        if differs := _difference(name, getattr(origin, name), here[name]):
            found[name] = differs
    return found


def refuse(positions: str | None, others: Mapping[str, list[str]]) -> None:
    """Refuse a bias if anything differs, and say what to do.

    Args:
        positions: How the number of positions differs, or None.
        others: What `differences` returns.

    Raises:
        ProfileMismatchError: Anything differs.
    """
    if positions is None and not others:
        return
    ways = [] if positions is None else [OTHER_LENGTH]
    if others:
        ways.append(
            "If you know that it holds here nevertheless, say so with bias.allowing("
            + ", ".join(map(repr, others))
            + ")."
        )
    listed = [each for differs in others.values() for each in differs]
    raise ProfileMismatchError(
        "The position bias was measured under other conditions: "
        + "; ".join(listed if positions is None else [positions, *listed])
        + ". Calibrate under the present conditions (pore calibrate). "
        + " ".join(ways)
    )


def _difference(name: str, profile: Any, here: Any) -> list[str]:
    """What differs in one condition, in words; nothing if either side is unknown."""
    if profile is None:
        return []
    here = here() if callable(here) else here
    if here is None:
        return []
    if isinstance(profile, Mapping):
        return [
            f"{name}.{key}: the profile says {brief(profile[key])}, here it is {brief(here[key])}"
            for key in sorted(profile.keys() & here.keys())
            if profile[key] != here[key]
        ]
    alike = _ALIKE.get(name)
    if profile == here or (alike is not None and alike(profile, here)):
        return []
    return [f"{name}: the profile says {brief(profile)}, here it is {brief(here)}"]


def _same_model(one: str, other: str) -> bool:
    owner, name = _model_name(one)
    other_owner, other_name = _model_name(other)
    return name == other_name and (owner == other_owner or not owner or not other_owner)


# When two values of a field count as the same although they are not equal.
_ALIKE: dict[str, Callable[[Any, Any], bool]] = {"model": _same_model, "weights": same_weights}


def _model_name(model: str) -> tuple[str, str]:
    """Owner and name of a model, spelled the same for a checkpoint and its conversion.

    "liuhaotian/llava-v1.5-7b" and "llava-hf/llava-1.5-7b-hf" have the same weights. A path has no
    owner, unless it lies in the cache of the hub.
    """
    path = model.replace("\\", "/").rstrip("/").lower()
    cached = re.search(r"(?:^|/)models--([^/]+?)--([^/]+)(?:/|$)", path)
    if cached:
        owner, name = cached.groups()
    else:
        parts = path.split("/")
        name = parts[-1]
        owner = parts[0] if len(parts) == 2 and parts[0] not in ("", ".", "..", "~") else ""
    if owner == "liuhaotian":
        owner = "llava-hf"
    return owner, re.sub(r"-v(?=\d)", "-", name.removesuffix("-hf"))
