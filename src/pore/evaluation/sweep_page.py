"""The page of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pore._numbers import fixed, interval, p_value, percent, signed
from pore._page import Dot, File, First, dots, filled, html, joined, table
from pore._page import tables as page_tables
from pore._text import Html
from pore.evaluation import parts
from pore.evaluation.asked_under import several_circumstances
from pore.evaluation.cells import Row, Sweep
from pore.evaluation.headlines import BASELINES, listed
from pore.evaluation.outcome import records_of
from pore.evaluation.sweep_rows import blocks, costs, name_of, parts_of, relative, value
from pore.evaluation.sweep_scores import FILE, changes, hosts, scores_of
from pore.evaluation.tables import HEADINGS, columns
from pore.plotting.labels import UNPRUNED, budget_label

_TITLE = "Visual token pruning on benchmarks"

_FILES = (
    File("sweep.json", "every number of this page"),
    File("sweep.csv", "the table"),
    File("sweep.tex", "the table for LaTeX"),
)
_SCORES = File(FILE, "what every score is made of, for pore compare")


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
        "processes": str(hardware.get("processes", 1)),
    }
    return filled(
        "sweep.html",
        _TITLE,
        command=str(made.get("command", "")),
        setup=setup,
        first=_first(sweep).shown(),
        table=_table(sweep),
        changes=_changes(sweep),
        groups=_groups(sweep),
        left_out=parts.left_out([f"{one.method}: {one.reason}" for one in sweep.left_out]),
    )


def _first(sweep: Sweep) -> First:
    """The first screen: the best method at the middle budget, relative to the unpruned model."""
    done = [one for one in sweep.rows if one.relative is not None and one.method != UNPRUNED]
    groups = [[one for one in rows if one in done] for _, rows in blocks(sweep)]
    groups = [rows for rows in groups if rows]
    state = (
        "All cells are done."
        if sweep.done
        else f"Not done, of what the command asks for: {sweep.waiting}; the same command goes on."
    )
    number, ends, about, found = "–", "no row is complete yet", state, [state]
    if groups:
        rows = _ranked(groups[(len(groups) - 1) // 2])
        choosing = [one for one in rows if one.method not in BASELINES] or rows
        best = choosing[0]
        over = f"{len(sweep.benchmarks)} benchmarks" if sweep.benchmarks[1:] else "one benchmark"
        number, ends = relative(best)
        ends = f"{ends}, 95 % interval" if ends else "no interval: see below the table"
        about = (
            f"of the unpruned model's score is left with {name_of(best)}, the best of "
            f"{len(choosing)} at {budget_label(best.keep)}, as the mean over {over}."
        )
        found = [*map(_best, groups), *_pore(groups), state]
    return First(
        heading=_TITLE,
        lead=f"{listed(sweep.benchmarks)}: every number was measured by the command below, in one "
        "run or in several that resumed it.",
        number=number,
        unit="%" if groups else "",
        interval=ends,
        about=about,
        chart=_chart(sweep, done),
        found=[line for line in (*found, several_circumstances(sweep)) if line],
        note="Which differences between any two methods are real, the command pore compare says, "
        "given scores.json twice, with --first and --second.",
        files=[
            *_FILES,
            *([_SCORES] if sweep.done else ()),
            *(File(f"{one}/results.json", f"{one}, by question") for one in _by_question(sweep)),
        ],
    )


def _changes(sweep: Sweep) -> Html:
    """What corrections change, on every benchmark and on their mean."""
    settings = scores_of(sweep.rows) if sweep.done else []
    pairs = hosts(settings)
    if not pairs:
        return Html("<p>No method was asked with a correction and without.</p>")
    seed = sweep.circumstances.get("seed")
    found = changes(pairs, settings[0], seed=seed if isinstance(seed, int) else 0)
    groups: dict[str, list[page_tables.Row]] = {}
    for one in found:
        paired, share = one.paired, one.benchmark is None
        unit = 0.01 if share else 1.0
        ends = "[{}, {}]".format(*(signed(end / unit) for end in paired.ci))
        row = (
            one.second.name,
            "mean, % of unpruned" if share else one.benchmark,
            html("<b>{}</b>" if one.real else "{}", signed(paired.difference / unit)),
            ends,
            f"{paired.gained} / {paired.lost}",
            p_value(paired.p),
            p_value(one.p_holm),
        )
        groups.setdefault(budget_label(one.second.keep), []).append(page_tables.Row(row, share))
    headings = ("with a correction", "benchmark", "change", "95 % interval", "won / lost", "p")
    return table("Changes by corrections", (*headings, "p (Holm)"), groups.items())


def _groups(sweep: Sweep) -> Html:
    """How groups of questions did, of the benchmarks whose questions belong to some."""
    made = []
    for name in _by_question(sweep):
        rows = [one for one in sweep.rows if name in one.cells]
        found = records_of([replace(r.cells[name].outcome, budget=r.keep) for r in rows])
        named = [{**record, "reweight": r.reweight} for record, r in zip(found, rows, strict=True)]
        if any(columns(named, by) for by in HEADINGS):
            made.append(html("<h3>{}</h3>\n{}", name, parts.results_table(named)))
    if not made:
        return Html("<p>The benchmarks do not say what their questions are about.</p>")
    return joined(made)


def _ranked(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda one: -float(one.relative or 0.0))


def _best(rows: list[Row]) -> str:
    """Which methods keep most of the score at a budget, and what is lost."""
    ranked = _ranked(rows)
    some = listed(f"{name_of(one)} {relative(one)[0]} %" for one in ranked[:3])
    said = f"At {budget_label(ranked[0].keep)}, most of the unpruned score is left with {some}"
    if len(ranked) > 3:
        said += f", and least with {name_of(ranked[-1])}, {relative(ranked[-1])[0]} %"
    return f"{said}."


def _pore(groups: list[list[Row]]) -> list[str]:
    """What PoRe adds to its hosts or takes from them."""
    more: list[str] = []
    less: list[str] = []
    for rows in groups:
        hosts = {one.method: one for one in rows if one.reweight is None}
        for one in rows:
            host = hosts.get(one.method)
            if one.reweight == "pore" and host is not None:
                change = 100 * (float(one.relative or 0) - float(host.relative or 0))
                to = "to" if change > 0 else "from"
                text = f"{fixed(abs(change))} {to} {one.method} at {budget_label(one.keep)}"
                (more if change > 0 else less).append(text)
    lines = []
    if more:
        lines.append(f"PoRe adds points: {listed(more)}.")
    if less:
        lines.append(f"PoRe takes points or adds none: {listed(less)}.")
    return lines


def _by_question(sweep: Sweep) -> list[str]:
    """The benchmarks whose folder has the results of every question."""
    cells = {
        name: [r.cells[name] for r in sweep.rows if name in r.cells] for name in sweep.benchmarks
    }
    return [
        name for name, own in cells.items() if sweep.done and own and all(c.scored for c in own)
    ]


def _chart(sweep: Sweep, done: list[Row]) -> Html:
    groups = [
        (
            budget,
            [
                Dot(
                    name_of(one),
                    100 * float(one.relative or 0.0),
                    " ".join(relative(one)).strip(),
                    None
                    if one.relative_ci is None
                    else (100 * one.relative_ci[0], 100 * one.relative_ci[1]),
                    f"{costs(one)[0]} visual tokens, {costs(one)[1]} GFLOPs",
                    one.reweight == "pore",
                )
                for one in rows
                if one in done
            ],
        )
        for budget, rows in blocks(sweep)
    ]
    groups = [group for group in groups if group[1]]
    if not groups:
        return Html("<p>No row is complete: there is nothing to draw yet.</p>")
    caption = (
        "Score in percent of the unpruned model's, averaged over the benchmarks, with 95 % "
        "intervals where they are known. The dashed line is the unpruned model."
    )
    return dots(groups, caption, line=100.0)


def _table(sweep: Sweep) -> Html:
    by_part = parts_of(sweep)
    measured = {
        name: next((o.cells[name].metric for o in sweep.rows if name in o.cells), "")
        for name in sweep.benchmarks
    }
    named = [html("{}<br><small>{}</small>", name, measured[name]) for name in sweep.benchmarks]
    relatives = ("relative %", *(f"{part} %" for part in by_part))
    headings = ("method", "tokens", "GFLOPs", *named, *relatives)

    def row(one: Row) -> page_tables.Row:
        found = [one.cells.get(name) for name in sweep.benchmarks]
        cells = [(value(cell), interval(cell.ci if cell else None, 1)) for cell in found]
        by = one.relative_by or {}
        return page_tables.Row(
            (
                name_of(one),
                *costs(one),
                *(html("{}<br><small>{}</small>", *cell) for cell in cells),
                html("<b>{}</b><br><small>{}</small>", *relative(one)),
                *(percent(by[part]) if part in by else "–" for part in by_part),
            ),
            one.reweight == "pore",
        )

    rows = ((budget, map(row, rows)) for budget, rows in blocks(sweep))
    return table("Scores by method and budget", headings, rows)
