"""The table of a sweep as files: JSON, CSV, LaTeX and a page."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pore._files import write_atomic
from pore._numbers import interval
from pore._saved.forms import Form
from pore._saved.seals import sealed_text
from pore._text import for_csv, for_latex
from pore.errors import InputError
from pore.evaluation.asked_under import circumstances_of_cells
from pore.evaluation.cells import Sweep
from pore.evaluation.files import SWEEP
from pore.evaluation.sweep_page import to_html
from pore.evaluation.sweep_rows import blocks, costs, name_of, parts_of, relative, value

_SWEEP = Form(
    SWEEP,
    "sweep",
    InputError,
    {"circumstances": dict, "benchmarks": list, "rows": list, "left_out": list},
)


def write_sweep(sweep: Sweep, out: Path) -> tuple[Path, ...]:
    """Write `sweep.json`, `sweep.csv`, `sweep.tex` and `sweep.html`, each whole or not at all.

    Args:
        sweep: What was found so far.
        out: The folder.

    Returns:
        The paths.

    Raises:
        OSError: They cannot be written.
    """
    entries = {
        "circumstances": dict(sweep.circumstances),
        "benchmarks": list(sweep.benchmarks),
        "rows": [one.record() for one in sweep.rows],
        "left_out": [asdict(one) for one in sweep.left_out],
        "circumstances_of_cells": circumstances_of_cells(sweep),
    }
    return (
        write_atomic(out / "sweep.json", sealed_text(_SWEEP.document(entries))),
        write_atomic(out / "sweep.csv", to_csv(sweep)),
        write_atomic(out / "sweep.tex", to_latex(sweep)),
        write_atomic(out / "sweep.html", to_html(sweep)),
    )


def to_csv(sweep: Sweep) -> str:
    """The table as CSV: a row for every setting, three columns for every benchmark."""
    ends = [f"{name}{end}" for name in sweep.benchmarks for end in ("", ".low", ".high")]
    parts = parts_of(sweep)
    headings = ["method", "reweight", "keep", "tokens_after", "mean_tokens", "flops", *ends]
    headings += ["relative", "relative.low", "relative.high", *(f"relative.{one}" for one in parts)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(for_csv, headings))
    for one in sweep.rows:
        cells: list[Any] = [one.method, one.reweight, one.keep]
        cells += [one.tokens, one.mean_tokens, one.flops]
        for name in sweep.benchmarks:
            cell = one.cells.get(name)
            cells += [None] * 3 if cell is None else [cell.value, *(cell.ci or (None, None))]
        cells += [one.relative, *(one.relative_ci or (None, None))]
        cells += [(one.relative_by or {}).get(part) for part in parts]
        writer.writerow(map(for_csv, cells))
    return buffer.getvalue()


def _ci(shown: str, ends: str) -> str:
    """A number with its interval in small print."""
    return f"{shown} {{\\scriptsize {ends}}}" if ends else shown


def to_latex(sweep: Sweep) -> str:
    """The table as LaTeX, for the package booktabs."""
    names = [for_latex(name) for name in sweep.benchmarks]
    lines = [
        "% Needs \\usepackage{booktabs}. Relative: mean over the benchmarks of the score divided",
        "% by that of the unpruned model. GFLOPs of the prefill, a multiply-add counted as two.",
        "% In brackets are 95 % intervals.",
        f"\\begin{{tabular}}{{lrr{'r' * len(names)}r}}",
        "\\toprule",
        " & ".join(["Method", "Tokens", "GFLOPs", *names, "Relative"]) + r" \\",
    ]
    for budget, rows in blocks(sweep):
        lines += [
            "\\midrule",
            f"\\multicolumn{{{len(names) + 4}}}{{l}}{{{for_latex(budget)}}} \\\\",
        ]
        for one in rows:
            found = [one.cells.get(name) for name in sweep.benchmarks]
            cells = [_ci(value(cell), interval(cell.ci if cell else None, 1)) for cell in found]
            share, ends = relative(one)
            share = share if share == "-" else _ci(f"{share}\\,\\%", ends)
            lines.append(" & ".join([for_latex(name_of(one)), *costs(one), *cells, share]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])
