"""The page of a comparison of corrections."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pore._files import write_atomic
from pore._numbers import interval, p_value, percent, points
from pore._page import Dot, First, dots, filled, html, joined, table
from pore._page.tables import Row
from pore._text import Html, capitalised
from pore.evaluation import parts
from pore.evaluation.comparing import Compared, Comparison
from pore.evaluation.differences import Difference
from pore.evaluation.findings import footnotes, skips
from pore.evaluation.headlines import listed
from pore.evaluation.results import About
from pore.evaluation.statistics import CLEAR, holm
from pore.evaluation.wording import scoring
from pore.plotting.labels import budget_label, marks

_BESIDE = {
    "predictions.jsonl": "every answer",
    "differences.json": "every comparison, by third of the image too",
    "left_out.json": "what could not be run",
    "corrections.png": "the differences as a figure",
}

_STRONG = 0.15
"""The difference from which on colours do not get stronger."""


def write_corrections(result: Comparison, about: About, folder: Path) -> Path:
    """Write `report.html` of a comparison of corrections, whole or not at all.

    Args:
        result: The comparison.
        about: The circumstances of the run.
        folder: Where the results are, and the page goes.

    Returns:
        The path written.

    Raises:
        OSError: It cannot be written.
    """
    records = [one.record() for one in result.compared]
    title = f"Corrections of position bias on {about.model}"
    scored = scoring(records[0]["metric"])
    text = filled(
        "corrections.html",
        title,
        command=about.command,
        setup=about.setup,
        first=_first(result, title, about, folder).shown(),
        calibration=about.calibration,
        test=about.test,
        rule=scored.rule,
        interval=scored.interval,
        by_test=scored.test,
        n=result.questions,
        grids=joined(_grids(result)),
        table=_table(result),
        times=parts.about_times(records),
        footnotes=parts.listed(footnotes(records, result.taught)),
        thirds=_thirds(result),
        left_out=parts.left_out([f"{one.method}: {one.reason}" for one in result.left_out]),
    )
    return write_atomic(folder / "report.html", text)


def _by_correction(result: Comparison) -> dict[str, list[Difference]]:
    """The differences over all questions, by correction, that with the best median first."""
    found: dict[str, list[Difference]] = {}
    for one in result.compared:
        if one.differences:
            found.setdefault(one.setting.correction, []).append(one.differences[0])
    return dict(sorted(found.items(), key=lambda each: -_median(each[1])))


def _median(differences: Sequence[Difference]) -> float:
    return statistics.median(d.paired.difference for d in differences)


def _quartiles(differences: Sequence[Difference]) -> tuple[float, float]:
    found = sorted(d.paired.difference for d in differences)
    if len(found) < 2:
        return found[0], found[0]
    low, _, high = statistics.quantiles(found, n=4, method="inclusive")
    return low, high


def _first(result: Comparison, title: str, about: About, folder: Path) -> First:
    """The first screen: the correction that does most for the usual host."""
    by = _by_correction(result)
    records = [one.record() for one in result.compared]
    lead = (
        f"Every correction on every host that ranks by attention, on the same {result.questions} "
        "questions. Every number was measured by the run that wrote this page."
    )
    files = parts.beside(folder, _BESIDE)
    if not by:
        nothing = "No host was asked with a correction."
        return First(title, lead, "–", "", nothing, nothing, Html(""), [nothing], files=files)
    best, differences = next(iter(by.items()))
    low, high = _quartiles(differences)
    test = scoring(records[0]["metric"]).test
    return First(
        heading=title,
        lead=lead,
        number=points(_median(differences)),
        unit="points",
        interval=f"[{points(low)}, {points(high)}], half of the hosts and budgets",
        about=f"in the median of {len(differences)} hosts and budgets, with “{best}”, the best of "
        f"{len(by)} corrections. The best of so many is partly lucky.",
        chart=_chart(by),
        found=[*_found(result, by), *skips(records)],
        note=f"Clear means p < {CLEAR:g} in {test} on the same questions.",
        files=files,
    )


def _found(result: Comparison, by: Mapping[str, Sequence[Difference]]) -> list[str]:
    """What was found, in sentences."""
    every = [d for differences in by.values() for d in differences]
    better = [d for d in every if d.paired.clear and d.paired.difference > 0]
    worse = [d for d in every if d.paired.clear and d.paired.difference < 0]
    sure = sum(p < CLEAR for p in holm([d.paired.p for d in every]))
    harmless = [
        name
        for name, differences in by.items()
        if not any(d.paired.clear and d.paired.difference < 0 for d in differences)
    ]
    last = list(by)[-1]
    lines = [
        f"Of {len(every)} comparisons of a host with a correction and without, {len(better)} are "
        f"clearly better with it and {len(worse)} clearly worse; corrected for their number, "
        f"{sure} stay clear.",
        f"“{last}” does worst: {points(_median(by[last]))} points in the median.",
    ]
    if harmless:
        named = listed(f"“{name}”" for name in harmless)
        lines.append(f"No host at any budget was clearly worse with {named}.")
    else:
        lines.append("Every correction made some host clearly worse at some budget.")
    return lines


def _chart(by: Mapping[str, Sequence[Difference]]) -> Html:
    rows: list[Dot] = []
    for name, differences in by.items():
        low, high = _quartiles(differences)
        clear = [d.paired.difference for d in differences if d.paired.clear]
        up, down = sum(one > 0 for one in clear), sum(one < 0 for one in clear)
        rows.append(
            Dot(
                name,
                100 * _median(differences),
                f"{points(_median(differences))} [{points(low)}, {points(high)}]",
                (100 * low, 100 * high),
                f"clearly better {up} times, clearly worse {down} times, of {len(differences)}",
                own=not rows,
            )
        )
    caption = (
        "Points more than the host alone: the median over hosts and budgets, and where half of "
        "them lie. The dashed line is no difference."
    )
    return dots([("", rows)], caption, line=0.0)


def _grids(result: Comparison) -> list[Html]:
    """For every budget a table of differences, a row for every correction, coloured."""
    keeps = dict.fromkeys(one.setting.keep for one in result.compared if one.differences)
    made = []
    for keep in keeps:
        here = [one for one in result.compared if one.differences and one.setting.keep == keep]
        hosts = {one.outcome.method: marks(one.record(), result.taught) for one in here}
        cells = {(one.setting.correction, one.outcome.method): one for one in here}
        rows = [
            Row((name, *(_heat(cells.get((name, host))) for host in hosts)))
            for name in dict.fromkeys(one.setting.correction for one in here)
        ]
        headings = ("correction", *(f"{host}{mark}" for host, mark in hosts.items()))
        shown = table(f"Differences at {budget_label(keep)}", headings, [("", rows)], kind="heat")
        made.append(html("<h3>{}</h3>{}", capitalised(budget_label(keep)), shown))
    return made


def _heat(one: Compared | None) -> Html:
    """A difference in a colour; bold where it is clear."""
    if one is None:
        return Html("–")
    paired = one.differences[0].paired
    strength = round(100 * min(abs(paired.difference) / _STRONG, 1.0))
    kind = "more" if paired.difference > 0 else "less"
    text = html("<b>{}</b>" if paired.clear else "{}", points(paired.difference))
    return html("<span class='{}' style='--heat:{}%'>{}</span>", kind, strength, text)


def _table(result: Comparison) -> Html:
    """A row for every setting: how many are right, and how that differs from the host alone."""
    corrected = iter(holm([o.differences[0].paired.p for o in result.compared if o.differences]))
    known = parts.known_costs([one.record() for one in result.compared])
    groups: dict[str, list[Row]] = {}
    for one in result.compared:
        record = one.record()
        cells: list[object] = ["", "", "", ""]
        if one.differences:
            paired = one.differences[0].paired
            shown = html("<b>{}</b>" if paired.clear else "{}", points(paired.difference))
            cells = [shown, one.differences[0].interval, p_value(paired.p)]
            cells.append(p_value(next(corrected)))
        right = html(
            "<b>{}</b> <small>{}</small>", percent(record["accuracy"]), interval(record["ci"])
        )
        keep = one.setting.keep
        budget = "all visual tokens" if keep is None else budget_label(keep)
        row = (
            record["method"] + marks(record, result.taught),
            record["reweight"] or "–",
            right,
            *cells,
            *(cost(record) for cost in known.values()),
        )
        groups.setdefault(budget, []).append(Row(row))
    headings = ("host", "correction", "accuracy %", "difference", "95 % interval", "p", "p (Holm)")
    heads = (*headings, *known)
    return table("Results by host and correction", heads, groups.items(), kind="corrections")


def _thirds(result: Comparison) -> Html:
    """How every correction differs from the host alone, by third of the image asked about."""
    named = dict.fromkeys(d.third for one in result.compared for d in one.differences)
    thirds = [third for third in named if third is not None]
    if not thirds:
        return Html("<p>The questions do not say which third of the image they are about.</p>")
    groups: dict[str, list[Row]] = {}
    for one in result.compared:
        by = {d.third: f"{points(d.paired.difference)} {d.interval}" for d in one.differences}
        if by:
            cells = (one.outcome.method, one.setting.correction, *(by.get(t, "–") for t in thirds))
            groups.setdefault(budget_label(one.setting.keep), []).append(Row(cells))
    headings = ("host", "correction", *map(parts.third, thirds))
    return table("Differences by third of the image", headings, groups.items(), kind="corrections")
