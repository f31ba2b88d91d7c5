"""`pore benchmarks`: the benchmarks of Table 1 as tasks of lmms-eval, and who scores them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import typer

from pore._screen import cell
from pore.cli.options import AsJson, takes
from pore.cli.printing import plain_table, say, stdout


@dataclass(frozen=True)
class Options:
    """The options of `pore benchmarks`."""

    as_json: AsJson = False


@takes(Options)
def benchmarks(options: Options) -> None:
    """List the benchmarks of the PoRe paper's Table 1.

    Names their tasks in lmms-eval, and who scores them. Two protocols: lmms-eval's own, and that of
    LLaVA-1.5's scripts, from which published figures come.

    Examples:

        pore benchmarks

        pore benchmarks --json
    """
    from pore.evaluation.harness import TASKS
    from pore.evaluation.harness.benchmarks import BENCHMARKS

    if options.as_json:
        rows = [asdict(one) for one in BENCHMARKS]
        typer.echo(json.dumps({"include_path": str(TASKS), "benchmarks": rows}, indent=2))
        return
    table = plain_table("benchmark", "task", "scored", "note")
    for one in BENCHMARKS:
        scored = {"here": "here", "server": "by a server", "judge": "by a paid judge"}[one.scored]
        table.add_row(cell(one.name, "bold"), one.task, scored, one.note)
    stdout().print(table)
    say(f"lmms-eval finds the llava_ tasks with: --include_path {TASKS}")
