"""`pore models`: the model families, with the methods that each takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from pore._screen import cell
from pore.cli.options import AsJson, takes
from pore.cli.printing import plain_table, say, stdout

if TYPE_CHECKING:
    from pore.methods.support import Support


@dataclass(frozen=True)
class Options:
    """The options of `pore models`."""

    as_json: AsJson = False


@takes(Options)
def models(options: Options) -> None:
    """List the model families, and the methods that each takes.

    Says also why a family does not take a method. Every method has its authors' settings here;
    other settings may work in more families.

    Examples:

        pore models

        pore models --json
    """
    from pore.cost.named import SHAPES
    from pore.embedded import EMBEDDED, EMBEDDED_VIDEO
    from pore.methods.registry import methods as registered
    from pore.methods.support import support

    families = support()
    if options.as_json:
        typer.echo(json.dumps([one.to_dict() for one in families], indent=2))
        return
    table = plain_table("family", "methods")
    for one in families:
        name = cell(one.family.name, "bold")
        name.append_text(cell("\n" + ", ".join(one.model_types), "not bold dim"))
        table.add_row(name, "\n".join(_taken(one)))
    stdout().print(table)
    others = sorted(registered().keys() - families[0].limits.keys())
    videos = [name for name in others if registered()[name].videos_only]
    say(f"For videos alone, in families that take some: {', '.join(videos)}")
    resizing = [name for name in others if registered()[name].resizes]
    say(f"On pictures, in families that take images of any size: {', '.join(resizing)}")
    rest = [name for name in others if name not in (*videos, *resizing)]
    say(f"Set up with more than a model: {', '.join(rest)}")
    say(
        f"Shipped with the package: --model {EMBEDDED}, and {EMBEDDED_VIDEO} for videos",
        f"Shapes with random weights, for bench and flops: {', '.join(SHAPES)}, llava-WIDTHxLAYERS",
    )


def _taken(one: Support) -> Iterator[str]:
    """The methods that a family takes, and those that it does not take, grouped by reason."""
    everywhere = [name for name, limits in one.limits.items() if not limits]
    yield "all" if len(everywhere) == len(one.limits) else ", ".join(everywhere)
    never: dict[str, list[str]] = {}
    where: dict[str, list[str]] = {}
    for name, limits in one.limits.items():
        for limit in limits:
            if limit.unless is None:
                never.setdefault(limit.reason, []).append(name)
                break  # one reason is enough
            if name in one.takes:
                where.setdefault(limit.unless, []).append(name)
    for condition, names in where.items():
        yield f"where {condition}: {', '.join(names)}"
    for reason, names in never.items():
        yield f"not {', '.join(names)}: {reason}"
