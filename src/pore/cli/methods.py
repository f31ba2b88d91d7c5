"""`pore methods`: the pruning methods that are installed."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

from pore._screen import cell
from pore.cli.options import takes
from pore.cli.printing import plain_table, say, stdout

if TYPE_CHECKING:
    from pore.engine.pruner import Pruner


@dataclass(frozen=True)
class Options:
    """The options of `pore methods`: those that every command has."""


@takes(Options)
def methods(options: Options) -> None:
    """List the pruning methods and their settings."""
    from pore.methods.registry import methods as registered

    del options
    table = plain_table("method", "reweight", "what it does, its paper and its settings")
    for name, kind in registered().items():
        line = (kind.__doc__ or "").strip().splitlines()[0]
        told = cell(f"{line if kind.paper in line else f'{line} {kind.paper}'}\n")
        settings = ", ".join(_setting(field) for field in fields(kind))  # type: ignore[arg-type]
        told.append_text(cell(settings, "dim"))
        table.add_row(cell(name, "bold"), _takes_bias(kind), told)
    stdout().print(table)
    say(
        "reweight: whether the method takes P (--reweight); harmed: it does, and P made it worse "
        "where that was measured",
        style="dim",
    )


def _takes_bias(kind: type[Pruner]) -> str:
    if not kind.reweightable:
        return "-"
    return "yes" if kind.harmed is None else "harmed"


def _setting(field: Any) -> str:
    kind = field.type if isinstance(field.type, str) else field.type.__name__
    if field.default is MISSING:
        return f"{field.name}: {kind}"
    return f"{field.name} = {field.default!r}"
