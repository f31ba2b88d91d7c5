"""Under which circumstances the cells of a sweep were asked: several runs may share a table."""

from __future__ import annotations

import json
from typing import Any

from pore.evaluation.cells import Sweep

_PARTS = ("versions", "commit", "hardware")


def circumstances_of_cells(sweep: Sweep) -> list[dict[str, Any]]:
    """The circumstances of all cells, each of them once.

    Args:
        sweep: What was found so far.

    Returns:
        `versions`, `commit` and `hardware`, each None where a file does not say, and `cells`:
        `benchmark`, `method`, `reweight` and `keep` of those that were asked so.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in sweep.rows:
        for name, cell in row.cells.items():
            made = {part: cell.outcome.circumstances.get(part) for part in _PARTS}
            own = found.setdefault(json.dumps(made, sort_keys=True), {**made, "cells": []})
            place = {"method": row.method, "reweight": row.reweight, "keep": row.keep}
            own["cells"].append({"benchmark": name, **place})
    return list(found.values())


def several_circumstances(sweep: Sweep) -> str:
    """A sentence on cells that were asked under different circumstances; empty if all are alike.

    Args:
        sweep: What was found so far.
    """
    found = circumstances_of_cells(sweep)
    if len(found) < 2:
        return ""
    flat = [_flat(one) for one in found]
    names = list(dict.fromkeys(name for one in flat for name in one))
    differ = [name for name in names if len({one.get(name) for one in flat}) > 1]
    parts = []
    for one, own in zip(found, flat, strict=True):
        told = ", ".join(f"{name} {own[name]}" for name in differ if name in own)
        parts.append(f"{len(one['cells'])} with {told or 'what their files do not say'}")
    return (
        f"The cells were not all asked under the same circumstances: {'; '.join(parts)}. Which are "
        "which, sweep.json says."
    )


def _flat(made: dict[str, Any]) -> dict[str, str]:
    """Everything that circumstances say, by name."""
    commit, plus, changes = str(made["commit"] or "").partition("+")
    found = {"commit": f"{commit[:12]}{plus}{changes}"} if commit else {}
    for part in ("versions", "hardware"):
        found |= {name: str(value) for name, value in (made[part] or {}).items()}
    return found
