"""Where a position bias comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, cast

from pore._saved.forms import brief
from pore._saved.parsing import MAX_DEPTH, parse_json
from pore.errors import ProfileError


@dataclass(frozen=True)
class Provenance:
    """Where a position bias comes from. A field that is None is unknown and never checked.

    Attributes:
        model: Hub id or path of the model measured.
        revision: Its revision on the hub.
        layer: The pruned layer K, 0-based; the attention is that of layer K − 1.
        normalize: A word for what was averaged: "prompt" or "visual" for the attention of the last
            text token after a softmax over either; another word for a host that `measures`
            something else.
        processor: The image processor's settings, such as `{"do_pad": False}`.
        template: The prompt template.
        samples: How many images were averaged.
        date: When it was measured, as an ISO 8601 date.
        host: The pruning method whose scores were averaged.
        source: The data set, or the paper and table.
        weights: The fingerprint of the model's weights (`pore.identity.weights_of`).
        config: The settings in its config that decide what it computes (`pore.identity.config_of`).
        stability: How much P depends on which images were averaged: at the budget `keep` the share
            of what is kept on which P of so many images agrees with P of endlessly many
            (`agreement`), about how many images are `enough`, and whether calibration `stopped`
            because of it.

    Raises:
        ProfileError: A field has the wrong type, or `processor`, `config` or `stability` cannot be
            written as JSON.
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
    stability: Mapping[str, Any] | None = field(default=None, hash=False)

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> Provenance:
        """The provenance in JSON of any origin; ProfileError if it holds none."""
        known = {each.name for each in fields(cls)}
        if not entries.keys() <= known:
            wrong = sorted(entries.keys() - known)
            raise ProfileError(f"unknown fields of the provenance: {brief(wrong)}.")
        return cls(**entries)

    def document(self) -> dict[str, Any]:
        """The entries that a file holds; what older versions do not know is left out if unknown."""
        entries = asdict(self)
        if self.stability is None:
            del entries["stability"]
        return entries

    def then(self, step: str) -> Provenance:
        """The provenance of what was made of this in a further step, which `source` names."""
        return replace(self, source=step if self.source is None else f"{self.source}; {step}")

    def __post_init__(self) -> None:
        texts = ("model", "revision", "normalize", "template", "date", "host", "source", "weights")
        for name in texts:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and _is_text(value)):
                raise ProfileError(f"provenance.{name} must be text, not {brief(value)}.")
        for name in ("layer", "samples"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ProfileError(f"provenance.{name} must be a whole number, not {brief(value)}.")
        for name in ("processor", "config", "stability"):
            if (settings := getattr(self, name)) is not None:
                object.__setattr__(self, name, plain(settings))


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON; ProfileError if JSON cannot hold them."""
    try:
        # Half of the depth, so that the document around it can still be read.
        plain = parse_json(json.dumps(dict(settings), allow_nan=False), depth=MAX_DEPTH // 2)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProfileError(
            f"Processor settings must be a mapping of what JSON can hold: {error}."
        ) from error
    return cast("dict[str, Any]", plain)


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it; it cannot hold half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
