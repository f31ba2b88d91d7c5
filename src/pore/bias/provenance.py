"""Where a position bias comes from, and whether it fits a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from pore._saved.parsing import MAX_DEPTH, parse_json
from pore.errors import ProfileError
from pore.identity import same_weights

_NAMES = ("model", "revision")


_CONTENT = ("weights", "config")


_CHECKED = (*_NAMES, *_CONTENT, "layer", "normalize", "processor", "template")


@dataclass(frozen=True)
class Provenance:
    """Where a position bias comes from. A field that is None is unknown and never checked.

    Attributes:
        model: Hub id or path of the model measured.
        revision: Its revision on the hub.
        layer: The pruned layer K, 0-based; the attention is that of layer K − 1.
        normalize: A word for what was averaged: "prompt" or "visual" for the attention of the last
            text token with a softmax over either, another for a host that reads otherwise.
        processor: The image processor's settings, such as `{"do_pad": False}`.
        template: The prompt template.
        samples: How many images were averaged.
        date: When, as an ISO 8601 date.
        host: The pruning method whose scores were averaged.
        source: The data set, or the paper and table.
        weights: The fingerprint of the model's weights (`pore.identity.weights_of`).
        config: The settings in its config that decide what it computes (`config_of` there).

    Raises:
        ProfileError: A field has the wrong type, or `processor` or `config` cannot be written as
            JSON.
    """

    model: str | None = None
    revision: str | None = None
    layer: int | None = None
    normalize: str | None = None
    processor: Mapping[str, Any] | None = field(default=None, hash=False)
    template: str | None = None
    samples: int | None = None
    date: str | None = None
    host: str | None = None
    source: str | None = None
    weights: str | None = None
    config: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        texts = ("model", "revision", "normalize", "template", "date", "host", "source", "weights")
        for name in texts:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and _is_text(value)):
                raise ProfileError(f"provenance.{name} must be text, not {_brief(value)}.")
        for name in ("layer", "samples"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ProfileError(
                    f"provenance.{name} must be a whole number, not {_brief(value)}."
                )
        for name in ("processor", "config"):
            if (settings := getattr(self, name)) is not None:
                object.__setattr__(self, name, _plain(settings))


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON would give them back, or ProfileError."""
    try:
        # So deep that it can still be read within what holds it.
        plain = parse_json(json.dumps(dict(settings), allow_nan=False), depth=MAX_DEPTH // 2)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProfileError(
            f"Processor settings must be a mapping of what JSON can hold: {error}."
        ) from error
    return cast("dict[str, Any]", plain)


def _difference(name: str, profile: Any, here: Any) -> list[str]:
    """What differs in one field, in words; nothing where either side is unknown.

    `here` may be a function that gives it, which is called where the profile's is known.
    """
    if profile is None:
        return []
    here = here() if callable(here) else here
    if here is None:
        return []
    if isinstance(profile, Mapping):
        return [
            f"{name}.{key}: the profile says {_brief(profile[key])}, here it is {_brief(here[key])}"
            for key in sorted(profile.keys() & here.keys())
            if profile[key] != here[key]
        ]
    alike = _ALIKE.get(name)
    if profile == here or (alike is not None and alike(profile, here)):
        return []
    return [f"{name}: the profile says {_brief(profile)}, here it is {_brief(here)}"]


def _same_model(one: str, other: str) -> bool:
    owner, name = _model_name(one)
    other_owner, other_name = _model_name(other)
    return name == other_name and (owner == other_owner or not owner or not other_owner)


# What counts as the same in a field, where that is more than what is equal.
_ALIKE: dict[str, Callable[[Any, Any], bool]] = {"model": _same_model, "weights": same_weights}


def _model_name(model: str) -> tuple[str, str]:
    """Owner and name of a model, in one spelling for a checkpoint and its conversion.

    "liuhaotian/llava-v1.5-7b" and "llava-hf/llava-1.5-7b-hf" are the same weights. A path gives
    no owner, unless it lies in the cache of the hub.
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


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it, which half of a surrogate pair it cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _brief(value: object) -> str:
    """A value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
