"""`pore check`: prove that pruning is exact on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import typer

from pore._screen import cell
from pore.cli.options import AsJson, Making, takes
from pore.cli.printing import plain_table, stdout


@dataclass(frozen=True)
class Options(Making):
    """The options of `pore check`."""

    model: Annotated[
        str, typer.Argument(help="Hub id, folder, or 'embedded': the model shipped here.")
    ] = "embedded"
    as_json: AsJson = False


@takes(Options)
def check(options: Options) -> None:
    """Prove on this machine that pruning a model is exact.

    Builds a tiny random twin from the model's config alone, and checks on it: keeping every token
    changes nothing, pruning equals masking, a batch equals its samples one by one, cached decoding
    equals a full forward, and the model is left as it was. Takes seconds; exits with 1 if a check
    fails.

    Examples:

        pore check

        pore check Qwen/Qwen2.5-VL-7B-Instruct --dtype bfloat16 --attn eager
    """
    from pore.checking.proofs import check as prove
    from pore.checking.twin import load_twin

    result = prove(load_twin(options.model, **options.how))
    if options.as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        table = plain_table("", "weights", "what must hold", "found")
        for row in result.rows:
            mark = cell("holds", "green") if row.holds else cell("FAILS", "red")
            table.add_row(mark, row.dtype, cell(row.name), cell(row.finding))
        stdout().print(table)
        stdout().print(result.summary)
    if not result.passed:
        raise typer.Exit(1)
