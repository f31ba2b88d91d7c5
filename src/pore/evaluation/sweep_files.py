"""The table of a sweep as files: JSON, CSV, LaTeX and a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pore._files import write_atomic
from pore._numbers import fixed, interval, number, percent, tokens
from pore._page import filled, html, items, row
from pore._saved.forms import Form
from pore._saved.seals import sealed_text
from pore._text import Html, for_csv, for_latex
from pore.errors import InputError
from pore.evaluation.cells import Cell, Row, Sweep
from pore.plotting.labels import UNPRUNED, budget_label

_SWEEP = Form(
    "pore.sweep",
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
    }
    return (
        write_atomic(out / "sweep.json", sealed_text(_SWEEP.document(entries))),
        write_atomic(out / "sweep.csv", to_csv(sweep)),
        write_atomic(out / "sweep.tex", to_latex(sweep)),
        write_atomic(out / "sweep.html", to_html(sweep)),
    )


def name_of(one: Row) -> str:
    """A row's method in words, such as "FastV + PoRe"."""
    if one.reweight is None:
        return one.method
    shown = {"pore": "PoRe", "rope": "RoPE prior"}.get(one.reweight, one.reweight)
    return f"{one.method} + {shown}"


def blocks(sweep: Sweep) -> Iterator[tuple[str, list[Row]]]:
    """The rows by budget, with the name of the budget."""
    found: dict[str, list[Row]] = {}
    for one in sweep.rows:
        unpruned = one.method == UNPRUNED
        name = "all visual tokens" if unpruned else budget_label(one.keep)
        found.setdefault(name, []).append(one)
    yield from found.items()


def value(cell: Cell | None) -> str:
    """What a benchmark measures, with one decimal; "-" where a cell is not done."""
    return "-" if cell is None else fixed(cell.value)


def relative(one: Row) -> tuple[str, str]:
    """The mean relative to the unpruned model in percent, and its interval."""
    if one.relative is None:
        return "-", ""
    return percent(one.relative), interval(one.relative_ci)


def parts_of(sweep: Sweep) -> list[str]:
    """What benchmarks ask for, where they differ in that."""
    return list(dict.fromkeys(part for one in sweep.rows for part in one.relative_by or {}))


def costs(one: Row) -> tuple[str, str]:
    """Visual tokens that reach the last layer, and GFLOPs."""
    return "-" if one.tokens is None else tokens(one.tokens), number(one.flops, 1e9)


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


def to_latex(sweep: Sweep) -> str:
    """The table as LaTeX, for the package booktabs."""
    names = [for_latex(name) for name in sweep.benchmarks]
    lines = [
        "% Needs \\usepackage{booktabs}. Relative: mean over the benchmarks of the score divided",
        "% by that of the unpruned model. GFLOPs of the prefill, a multiply-add counted as two.",
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
            cells = [value(one.cells.get(name)) for name in sweep.benchmarks]
            share = relative(one)[0]
            share = share if share == "-" else f"{share}\\,\\%"
            lines.append(" & ".join([for_latex(name_of(one)), *costs(one), *cells, share]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def to_html(sweep: Sweep) -> Html:
    """The table as a page, with what was left out and how everything was measured."""
    made = sweep.circumstances
    hardware: Mapping[str, Any] = made.get("hardware", {})
    setup = {
        "machine": ", ".join(str(hardware[n]) for n in ("gpu", "cpu") if n in hardware),
        "versions": ", ".join(f"{k} {v}" for k, v in made.get("versions", {}).items()),
        "commit": str(made.get("commit") or "not in a git checkout"),
        "seed": str(made.get("seed")),
        "date": str(made.get("date")),
    }
    return filled(
        "sweep.html",
        "Visual token pruning on benchmarks",
        command=str(made.get("command", "")),
        setup=setup,
        state="All cells are done."
        if sweep.done
        else f"Not done, of what the command asks for: {sweep.waiting}; the same command goes on.",
        table=_table(sweep),
        left_out=html("<ul>{}</ul>", items(f"{one.method}: {one.reason}" for one in sweep.left_out))
        if sweep.left_out
        else Html("<p>Nothing.</p>"),
    )


def _table(sweep: Sweep) -> Html:
    parts = parts_of(sweep)
    measured = {
        name: next((o.cells[name].metric for o in sweep.rows if name in o.cells), "")
        for name in sweep.benchmarks
    }
    named = [html("{}<br><small>{}</small>", name, measured[name]) for name in sweep.benchmarks]
    relatives = ("relative %", *(f"{part} %" for part in parts))
    headings: Sequence[object] = ("method", "tokens", "GFLOPs", *named, *relatives)
    lines = [f"<thead>{row(headings, 'th')}</thead>"]
    for budget, rows in blocks(sweep):
        opening = f"<tbody><tr class='budget'><td colspan='{len(headings)}'>"
        lines.append(html(opening + "{}</td></tr>", budget))
        for one in rows:
            found = [one.cells.get(name) for name in sweep.benchmarks]
            cells = [(value(cell), interval(cell.ci if cell else None, 1)) for cell in found]
            by = one.relative_by or {}
            lines.append(
                row(
                    (
                        name_of(one),
                        *costs(one),
                        *(html("{}<br><small>{}</small>", *cell) for cell in cells),
                        html("<b>{}</b><br><small>{}</small>", *relative(one)),
                        *(percent(by[part]) if part in by else "-" for part in parts),
                    ),
                    own=one.reweight == "pore",
                )
            )
        lines.append("</tbody>")
    return Html("<table class='results'>" + "\n".join(lines) + "</table>")
