"""`pore methods`: the pruning methods that are installed."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from pore._text import cell
from pore.cli.printing import plain_table, stdout

if TYPE_CHECKING:
    from pore.engine.pruner import Pruner


def methods() -> None:
    """List the pruning methods that are installed, with their settings."""
    from pore.methods.registry import methods as registered

    table = plain_table("method", "reweight", "settings", "what it does", "paper")
    for name, kind in registered().items():
        table.add_row(
            cell(name, "bold"),
            _takes_bias(kind),
            "\n".join(_setting(field) for field in fields(kind)),  # type: ignore[arg-type]
            (kind.__doc__ or "").strip().split("\n", 1)[0],
            kind.paper,
        )
    stdout().print(table)


def _takes_bias(kind: type[Pruner]) -> str:
    if not kind.reweightable:
        return "-"
    return "yes" if kind.harmed is None else "yes, but it was harmed"


def _setting(field: Any) -> str:
    kind = field.type if isinstance(field.type, str) else field.type.__name__
    if field.default is MISSING:
        return f"{field.name}: {kind}"
    return f"{field.name} = {field.default!r}"
