"""Check that records can be drawn; a file may hold anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from pore.errors import InputError


def check_drawable(
    records: Sequence[Mapping[str, Any]],
    *,
    names: Sequence[str] = (),
    shares: Sequence[str] = (),
    costs: Sequence[str] = (),
) -> None:
    """Refuse records that cannot be drawn.

    Args:
        records: The records.
        names: Further fields that are text or None.
        shares: Fields that are a share, or a difference of shares.
        costs: Fields that are a number of at least 0, or None.

    Raises:
        InputError: Names the record, field and value.
    """

    def share(value: object) -> bool:
        return _is_number(value) and abs(value) <= 1

    def cost(value: object) -> bool:
        return value is None or (_is_number(value) and value >= 0)

    for number, record in enumerate(records, 1):
        ends = record["ci"]
        fine = {
            "method": isinstance(record["method"], str),
            "keep": isinstance(record["keep"], str | None) or _is_number(record["keep"]),
            "ci": isinstance(ends, (list, tuple)) and len(ends) == 2 and all(map(share, ends)),
            "looks_at": isinstance(record.get("looks_at", []), list)
            and all(isinstance(layer, int) for layer in record.get("looks_at", [])),
            **{name: isinstance(record.get(name), str | None) for name in names},
            **{name: share(record[name]) for name in shares},
            **{n: cost(record[n]) for n in costs},
        }
        if wrong := [name for name, right in fine.items() if not right]:
            shown = repr(record.get(wrong[0]))[:80]
            raise InputError(f"Result {number} cannot be drawn: its {wrong[0]!r} is {shown}.")


def _is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number of a size that axes can have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100
